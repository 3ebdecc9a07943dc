"""What one caller may use of the aggregator: calls, rates, bytes. Over its limit it hurts itself.

A limit is judged for the name in a certificate that TLS has verified, before anything of the call
is read or looked up. Defaults leave a site with 100 million parameters on a fast line untouched.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from consilium_common.errors import ConsiliumError
from consilium_common.wire.methods import CHUNK_BYTES, MAX_MESSAGE_BYTES

_MIB: Final = 1024 * 1024
#: Calls that carry a piece of starting weights or measure the line; all others are small.
_LARGE_CALLS: Final = frozenset({"Propose", "Probe"})
#: Calls whose answers may be as large.
_LARGE_ANSWERS: Final = frozenset({"GetFab", "Records", "Log", "Studies"})
#: What a stream may have in memory: a piece being taken, and one on its way.
_STREAM_BYTES: Final = 2 * CHUNK_BYTES
#: A caller over its rate is answered this late, so that asking faster does not pay.
_PENALTY_SECONDS: Final = 1.0
#: So many answers are held late for one caller; further ones come at once.
_PENALISED: Final = 64
#: Names whose use is kept; certificates are few, so this is never reached by honest ones.
_KEPT: Final = 4096

_Count = Annotated[int, Field(ge=1)]
_Seconds = Annotated[float, Field(gt=0)]


class Limits(BaseModel):
    """``limits`` in ``server.json``; what is not named there has its default."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    calls: _Count = 64  #: calls of one caller under way at a time
    requests_per_second: _Seconds = 100.0  #: of one caller, on average
    requests_burst: _Count = 1000  #: at once, after a quiet while
    upload_bytes_per_second: Annotated[float, Field(ge=_MIB)] = 256.0 * _MIB  #: of one caller
    upload_burst_bytes: Annotated[int, Field(ge=MAX_MESSAGE_BYTES)] = 1024 * _MIB
    caller_bytes_in_flight: Annotated[int, Field(ge=2 * MAX_MESSAGE_BYTES)] = 64 * _MIB
    bytes_in_flight: Annotated[int, Field(ge=2 * MAX_MESSAGE_BYTES)] = 1024 * _MIB  #: of all
    transfers: _Count = 64  #: models on their way at a time, of all; others wait for their turn
    small_message_bytes: Annotated[int, Field(ge=4096)] = 256 * 1024  #: heartbeats and the like
    reply_bytes: Annotated[int, Field(ge=64 * 1024)] = 2 * _MIB  #: to one message; updates apart
    enrolments_per_minute: _Seconds = 20.0  #: of one invitation
    body_seconds: _Seconds = 120.0  #: until a call's body, or the next piece of a stream, has come
    handshake_seconds: _Seconds = 10.0  #: until TLS stands
    idle_seconds: Annotated[float, Field(ge=10.0)] = 120.0  #: a connection without calls
    streams: Annotated[int, Field(ge=8, le=1000)] = 128  #: calls on one connection
    header_bytes: Annotated[int, Field(ge=2048, le=64 * 1024)] = 8192

    @classmethod
    def read(cls, config: Path) -> Limits:
        """Read ``limits`` of ``server.json``.

        Raises
        ------
        ConsiliumError
            ``usage.limits`` for an unknown limit or a value that makes no sense.
        """
        content = json.loads(config.read_text(encoding="utf-8")).get("limits", {})
        try:
            return cls.model_validate_json(json.dumps(content))
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, ("limits", *first["loc"])))
            raise ConsiliumError(
                "usage.limits",
                f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}.",
                where=str(config),
                hint=f"Known limits: {', '.join(cls.model_fields)}.",
            ) from error

    def largest(self, call: str) -> int:
        """Return how many bytes a call's body may have; ``call`` without its service."""
        return MAX_MESSAGE_BYTES if call in _LARGE_CALLS else self.small_message_bytes

    def for_grpc(self) -> list[tuple[str, int]]:
        """Return what gRPC itself holds its callers to, before a call of ours begins."""
        return [
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_concurrent_streams", self.streams),
            ("grpc.max_metadata_size", self.header_bytes),
            ("grpc.absolute_max_metadata_size", 2 * self.header_bytes),
            ("grpc.server_handshake_timeout_ms", round(1000 * self.handshake_seconds)),
            ("grpc.max_connection_idle_ms", round(1000 * self.idle_seconds)),
            # A vanished site is noticed, and firewalls see traffic from this side, too.
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.keepalive_permit_without_calls", 1),
            # Sites ping every 20 s. On a busy machine several pings may be read at once, and a
            # site that asked for calm would lose its calls for nothing: so a few are forgiven.
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
            ("grpc.http2.max_ping_strikes", 20),
            # gRPC would measure the line, and let much of a stream wait in memory on a fast one.
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", 2 * CHUNK_BYTES),
        ]


class Bucket:
    """A rate with a burst: what is taken too fast becomes a debt that time repays.

    Parameters
    ----------
    rate : float
        Units per second.
    burst : float
        Units that may be taken at once after a quiet while.
    """

    def __init__(self, rate: float, burst: float, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._left = burst
        self._at = clock()

    def debt_seconds(self) -> float:
        """Return in how many seconds something may be taken; 0 when now."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        return max(0.0, -self._left / self._rate)

    def take(self, amount: float) -> None:
        """Take ``amount``, into debt if need be."""
        self.debt_seconds()
        self._left -= amount


@dataclass
class _Use:
    """What one caller uses now."""

    requests: Bucket
    upload: Bucket
    calls: int = 0
    in_flight: int = 0
    penalised: int = 0


class Meter:
    """Counts what every caller uses and refuses what is over :class:`Limits`."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self._clock = clock
        self._use: dict[str, _Use] = {}
        self._in_flight = 0
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def call(self, who: str, *, enrolling: bool = False) -> AsyncIterator[Call]:
        """Hold a call's place, and all that it has reserved, until it ends.

        Raises
        ------
        ConsiliumError
            ``network.too-many-calls``, ``network.too-fast``.
        """
        use = self._use_of(who, enrolling)
        if use.calls >= self.limits.calls:
            await self._refuse(use, "network.too-many-calls", "Too many calls are under way.")
        if use.requests.debt_seconds():
            await self._refuse(use, "network.too-fast", "Calls come too fast.")
        use.requests.take(1)
        use.calls += 1
        call = Call(self, use)
        try:
            yield call
        finally:
            use.calls -= 1
            call.release()

    async def _refuse(self, use: _Use, code: str, message: str) -> None:
        if use.penalised < _PENALISED:
            use.penalised += 1
            try:
                await asyncio.sleep(_PENALTY_SECONDS)
            finally:
                use.penalised -= 1
        raise ConsiliumError(code, message, hint="Wait a little and try again.")

    def _use_of(self, who: str, enrolling: bool) -> _Use:
        use = self._use.get(who)
        if use is None:
            if len(self._use) >= _KEPT:
                self._use = {name: old for name, old in self._use.items() if old.calls}
            limits = self.limits
            per_second, burst = (
                (limits.enrolments_per_minute / 60, limits.enrolments_per_minute)
                if enrolling
                else (limits.requests_per_second, limits.requests_burst)
            )
            use = self._use[who] = _Use(
                Bucket(per_second, burst, self._clock),
                Bucket(limits.upload_bytes_per_second, limits.upload_burst_bytes, self._clock),
            )
        return use

    async def reserve(self, use: _Use, size: int) -> None:
        """Count ``size`` bytes as in memory; waits while others, or the caller's own, fill it.

        Raises
        ------
        ConsiliumError
            ``network.too-many-bytes`` when the caller's own share stayed full, ``network.busy``.
        """

        def own_excess() -> bool:
            return use.in_flight + size > self.limits.caller_bytes_in_flight

        try:
            async with asyncio.timeout(self.limits.body_seconds):
                # A site that makes a dozen calls at once does no wrong: what is not read yet stays
                # with it, and its calls are counted.
                while own_excess() or self._in_flight + size > self.limits.bytes_in_flight:
                    self._freed.clear()
                    await self._freed.wait()
        except TimeoutError:
            code, message = (
                ("network.too-many-bytes", "Too many bytes of this caller are under way.")
                if own_excess()
                else ("network.busy", "The aggregator is busy.")
            )
            raise ConsiliumError(code, message, hint="Try again in a while.") from None
        self.change(use, size)

    def change(self, use: _Use, size: int) -> None:
        """Count more bytes as in memory without waiting, or with a negative ``size`` fewer."""
        use.in_flight += size
        self._in_flight += size
        if size < 0:
            self._freed.set()


class Call:
    """One call's place and its reserved bytes."""

    def __init__(self, meter: Meter, use: _Use) -> None:
        self._meter = meter
        self._use = use
        self._reserved = 0

    async def expect_body(self) -> None:
        """Reserve room for the largest body there is, after earlier bytes have been paid off.

        What is not read yet stays with the caller: HTTP/2 lets only a window of it through.
        """
        await self.wait_for_debt()
        await self._meter.reserve(self._use, MAX_MESSAGE_BYTES)
        self._reserved = MAX_MESSAGE_BYTES

    async def expect_stream(self) -> None:
        """Reserve room for a stream's pieces for as long as it lasts."""
        await self._meter.reserve(self._use, _STREAM_BYTES)
        self._reserved = _STREAM_BYTES

    async def wait_for_debt(self) -> None:
        """Wait until the caller's earlier bytes have been paid off."""
        debt = self._use.upload.debt_seconds()
        if debt:
            await asyncio.sleep(debt)

    def took_piece(self, size: int) -> None:
        """Note one message of a stream.

        Raises
        ------
        ConsiliumError
            ``network.too-large``.
        """
        self._use.upload.take(size)
        if size > CHUNK_BYTES:
            raise ConsiliumError("network.too-large", "A piece of the stream is too large.")

    def took_body(self, size: int, call: str) -> None:
        """Note the body's true size; a call with a large answer keeps room for that.

        Raises
        ------
        ConsiliumError
            ``network.too-large`` for this kind of call.
        """
        self._use.upload.take(size)
        if size > self._meter.limits.largest(call):
            raise ConsiliumError("network.too-large", f"The body of {call} is too large.")
        if call not in _LARGE_ANSWERS:
            self._hold(size)

    def holds(self, size: int) -> None:
        """Note an answer of ``size`` bytes, which is in memory until it is taken."""
        self._hold(size)

    def release(self) -> None:
        """Give everything back."""
        self._hold(0)

    def _hold(self, size: int) -> None:
        change, self._reserved = size - self._reserved, size
        if change:
            self._meter.change(self._use, change)


class Allowances:
    """How many bytes each site may send to Flower in answer to its messages: figures and names.

    Looked at over its last few messages, so that the reply to one may come while the next is there
    already. Updates go another way and have limits of their own.
    """

    _WINDOW: Final = 4

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._sent: dict[str, deque[int]] = {}

    def message(self, node: str) -> None:
        """Note that a message went to the site."""
        self._of(node).append(0)

    def charge(self, node: str, size: int) -> None:
        """Count ``size`` bytes sent, or refuse them.

        Raises
        ------
        ConsiliumError
            ``network.too-much``.
        """
        sent = self._of(node)
        if sum(sent) + size > self._limits.reply_bytes * len(sent):
            raise ConsiliumError(
                "network.too-much",
                "The site sends far more than a reply has.",
                hint="If a study truly needs it, the aggregator operator raises"
                " limits.reply_bytes in server.json.",
            )
        sent[-1] += size

    def _of(self, node: str) -> deque[int]:
        return self._sent.setdefault(node, deque([0], maxlen=self._WINDOW))
