"""The greeting that site and aggregator exchange all the time: releases, clocks, what runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime

from consilium_common import __version__
from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.wire.methods import PROTOCOL, check_protocol


@dataclass(frozen=True)
class Greeting:
    """What the aggregator answered.

    Attributes
    ----------
    version : str
        Its release, for people.
    running : list of str
        Digests of the studies that run.
    time : datetime or None
        Its clock.
    trust : str
        SHA-256 of the bundle of authorities it wants members to trust.
    renew : bool
        Whether it wants this site to renew its certificate now.
    """

    version: str
    running: list[str]
    time: datetime | None = None
    trust: str = ""
    renew: bool = False


def greeting(session: str, trust: str) -> bytes:
    """Return the request of a greeting.

    Parameters
    ----------
    session : str
        Changes when the site starts anew.
    trust : str
        SHA-256 of the bundle of authorities that this site trusts.
    """
    said = {"version": __version__, "protocol": PROTOCOL, "session": session, "trust": trust}
    return canonical_json(said)


def read_greeting(content: bytes) -> Greeting:
    """Read the aggregator's answer.

    Raises
    ------
    ConsiliumError
        ``network.version`` when the two releases do not fit, ``network.bad-answer``.
    """
    try:
        answer = json.loads(content)
        check_protocol(answer.get("protocol"), release=answer.get("version"), who="the aggregator")
        running = answer["running"]
        if not isinstance(running, list) or not all(isinstance(one, str) for one in running):
            raise TypeError
        return Greeting(
            version=str(answer["version"])[:40],
            running=running,
            time=datetime.fromisoformat(answer["time"]),
            trust=str(answer["trust"]),
            renew=answer["renew"] is True,
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConsiliumError(
            "network.bad-answer",
            "The aggregator's answer to the greeting has another form than expected.",
            hint="Site and aggregator may run versions that do not fit; update the older one.",
        ) from error
