"""One member talks to the aggregator: is it admitted, do releases and clocks fit, how fast?"""

from __future__ import annotations

import base64
import hashlib
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cached_property
from statistics import median
from typing import Any, Final

from consilium_common import __version__
from consilium_common.diagnosis.steps import Found
from consilium_common.errors import ConsiliumError
from consilium_common.report.wording import data_size, duration, moment
from consilium_common.wire.channel import Caller
from consilium_common.wire.methods import MEMBER_PROBE, check_protocol

#: Bytes sent each way to measure; enough to be past TCP's slow start on most ways.
_PAYLOAD: Final = 3 * 1024 * 1024
_CALLS: Final = 5
_TRANSFER_SECONDS: Final = 120.0
#: Certificates begin ten minutes in the past (authority.CLOCK_SLACK): beyond that renewals fail.
_CLOCK_FAILS: Final = 600.0
_CLOCK_WARNS: Final = 60.0
#: Below this, in bytes per second, a round waits minutes for a model of 100 MB.
_SLOW: Final = 1e6
#: Beyond this, in seconds, every small call is felt.
_FAR: Final = 0.5
_MODEL: Final = 100_000_000


class Exchange:
    """The doctor's calls; the first is made once, however many steps look at its answer.

    Parameters
    ----------
    open_caller : callable
        Opens the member's own connection.
    """

    def __init__(self, open_caller: Callable[[], Caller]) -> None:
        self._open = open_caller
        self._skew = 0.0

    @cached_property
    def _caller(self) -> Caller:
        return self._open()

    @cached_property
    def _first(self) -> dict[str, Any]:
        sent = datetime.now(UTC)
        answer = self._call("")
        half = (datetime.now(UTC) - sent) / 2
        try:
            theirs = datetime.fromisoformat(answer["time"]).astimezone(UTC)
        except (KeyError, TypeError, ValueError):
            theirs = sent + half  # an aggregator that does not say its time shows no skew
        self._skew = (sent + half - theirs).total_seconds()
        return answer

    def close(self) -> None:
        """Close the connection, if one was opened."""
        if "_caller" in self.__dict__:
            self._caller.close()

    def admitted(self) -> Found:
        """Call the aggregator with the certificate; it looks whether it is revoked or replaced.

        Raises
        ------
        ConsiliumError
            ``identity.*`` when it refuses; ``network.*``.
        """
        _ = self._first
        return Found("the aggregator accepts it: neither revoked nor replaced")

    def fits(self) -> Found:
        """Compare releases and protocols.

        Raises
        ------
        ConsiliumError
            ``network.version``.
        """
        release = str(self._first.get("version", ""))[:40]
        check_protocol(self._first.get("protocol"), release=release, who="the aggregator")
        if release == __version__:
            return Found(f"both run release {release}", facts={"release": release})
        return Found.warning(
            f"the aggregator runs release {release}, this side {__version__}",
            "Calls fit; training needs the same release on both sides. Agree with the aggregator "
            "operator who updates.",
            release=release,
        )

    def skew(self) -> Found:
        """Compare the clocks, half the round trip taken off.

        Raises
        ------
        ConsiliumError
            ``network.clock`` beyond ten minutes.
        """
        _ = self._first
        apart, facts = abs(self._skew), {"seconds_ahead": round(self._skew, 3)}
        which = "ahead of" if self._skew > 0 else "behind"
        said = f"{duration(apart)} {which} the aggregator's"
        todo = "Let both machines set their clocks by NTP."
        if apart > _CLOCK_FAILS:
            raise ConsiliumError(
                "network.clock",
                f"This machine's clock is {said}: it says {moment(datetime.now(UTC))}.",
                hint=f"{todo} Renewed certificates are refused by a clock that is this far behind.",
            )
        if apart > _CLOCK_WARNS:
            return Found.warning(said, todo, **facts)
        return Found(said, facts=facts)

    def speed(self) -> Found:
        """Measure round trip (median of a few small calls) and throughput both ways.

        Raises
        ------
        ConsiliumError
            ``network.*`` when a transfer breaks off; ``network.changed`` when what arrives is not
            what was sent.
        """
        trip = median(self._timed("")[1] for _ in range(_CALLS))
        content = base64.b64encode(os.urandom(_PAYLOAD * 3 // 4)).decode()
        up = self._rate(*self._timed(content), trip, hashlib.sha256(content.encode()).hexdigest())
        answer, seconds = self._timed("", want=_PAYLOAD)
        came = str(answer.get("content", ""))
        down = len(came) / max(seconds - trip, 1e-3) if came else None
        rates = [rate for rate in (up, down) if rate is not None]
        said = f"round trip {1000 * trip:.0f} ms, up {data_size(int(up))}/s"
        if down is not None:
            said += f", down {data_size(int(down))}/s"
        there = sum(_MODEL / rate for rate in rates)
        said += f"; a model of {data_size(_MODEL)} takes {duration(there)} there and back"
        facts = {"round_trip_seconds": round(trip, 4), "up": round(up), "down": round(down or 0)}
        if min(rates) < _SLOW or trip > _FAR:
            return Found.warning(
                said,
                "Rounds will wait for this line: have your network department look whether this "
                "machine's traffic is throttled, and tell the operator when deadlines are set.",
                **facts,
            )
        return Found(said, facts=facts)

    def _rate(self, answer: dict[str, Any], seconds: float, trip: float, sent: str) -> float:
        if answer.get("sha256") != sent:
            raise ConsiliumError(
                "network.changed",
                "What arrived at the aggregator is not what was sent.",
                hint="Tell the aggregator operator; do not train over this connection.",
            )
        return _PAYLOAD / max(seconds - trip, 1e-3)

    def _timed(self, content: str, *, want: int = 0) -> tuple[dict[str, Any], float]:
        started = time.perf_counter()
        answer = self._call(content, want=want)
        return answer, time.perf_counter() - started

    def _call(self, content: str, *, want: int = 0) -> dict[str, Any]:
        request: dict[str, Any] = {"content": content}
        if want:
            request["want"] = want
        answer = self._caller.call(MEMBER_PROBE, request, timeout=_TRANSFER_SECONDS)
        return answer if isinstance(answer, dict) else {}
