"""The greeting that site and aggregator exchange all the time: releases, clocks, what runs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime

from consilium_client.home import SiteHome
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
    benched : dict of str to str
        Studies that do not ask this site for now, each with the reason.
    """

    version: str
    running: list[str]
    time: datetime | None = None
    trust: str = ""
    renew: bool = False
    benched: dict[str, str] = field(default_factory=dict)


def studies_at_once(home: SiteHome) -> int | None:
    """Return in how many studies the policy lets this site take part at a time; None: in any."""
    from consilium_client.budget.policy import load_policy

    try:
        return load_policy(home).studies_at_once
    except ConsiliumError:
        return None  # whoever starts work says what is wrong with it


def greeting(session: str, trust: str, at_once: int | None = None) -> bytes:
    """Return the request of a greeting.

    Parameters
    ----------
    session : str
        Changes when the site starts anew.
    trust : str
        SHA-256 of the bundle of authorities that this site trusts.
    at_once : int or None
        In how many studies it takes part at a time (default: in any).
    """
    said = {"version": __version__, "protocol": PROTOCOL, "session": session, "trust": trust}
    return canonical_json(said if at_once is None else {**said, "studies_at_once": at_once})


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
            time=datetime.fromisoformat(answer["time"]).astimezone(UTC),
            trust=str(answer["trust"]),
            renew=answer["renew"] is True,
            benched={_said(one): _said(why) for one, why in answer.get("benched", {}).items()},
        )
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise ConsiliumError(
            "network.bad-answer",
            "The aggregator's answer to the greeting has another form than expected.",
            hint="Site and aggregator may run versions that do not fit; update the older one.",
        ) from error


def _said(words: object) -> str:
    """Return words of the aggregator for the site operator's terminal: short, in one line."""
    return "".join(one for one in str(words) if one.isprintable())[:400]
