"""What the link refused to let out lately, as the doctor sees it."""

from __future__ import annotations

import json

from consilium_client.home import SiteHome
from consilium_common.diagnosis.steps import Found
from consilium_common.errors import printable

_LOOK = (
    "The site's log has each of them, and `consilium site egress` what did leave. The link refuses "
    "what no approved study permits: find out what asked for it, and tell your privacy officer."
)


def check_refused(home: SiteHome) -> Found:
    """Read ``run/refused.json``: how many since the site started, and the last one."""
    path = home.path / "run" / "refused.json"
    try:
        said = json.loads(path.read_bytes())
        count, when = int(said["count"]), printable(str(said["time"]))[:40]
        call, code, what = (printable(str(said[name]))[:300] for name in ("call", "code", "what"))
    except FileNotFoundError:
        return Found("the link has refused nothing since the site started", facts={"refused": 0})
    except (OSError, ValueError, KeyError, TypeError):
        return Found.warning(
            "the link refused something; how often and why cannot be read", _LOOK, refused=None
        )
    return Found.warning(
        f"the link refused {count} since the site started; the last one, {call} at "
        f"{when[:19].replace('T', ' ')} UTC: {what}",
        _LOOK,
        refused=count,
        call=call,
        code=code,
        what=what,
        time=when,
    )
