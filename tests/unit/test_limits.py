"""One caller's use of the aggregator ends at its limits, and touches no other caller's."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium_common.errors import ConsiliumError
from consilium_common.wire.methods import CHUNK_BYTES, MAX_MESSAGE_BYTES
from consilium_server import limits as limits_module
from consilium_server.limits import Allowances, Bucket, Limits, Meter

MIB = 1024 * 1024


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _no_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_module, "_PENALTY_SECONDS", 0.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 5), st.integers(1, 50)), max_size=60))
def test_nobody_takes_more_than_rate_and_burst_permit(takes: list[tuple[float, int]]) -> None:
    clock = Clock()
    bucket = Bucket(10.0, 100.0, clock)
    taken = 0
    for pause, amount in takes:
        clock.now += pause
        if not bucket.debt_seconds():
            bucket.take(amount)
            taken += amount
        # The last take may run into debt by at most its own size.
        assert taken <= 100 + 10 * clock.now + 50 + 1e-6


def test_a_debt_is_repaid_by_time_alone() -> None:
    clock = Clock()
    bucket = Bucket(10.0, 20.0, clock)
    bucket.take(50)
    assert bucket.debt_seconds() == pytest.approx(3.0)
    clock.now = 3.0
    assert bucket.debt_seconds() == 0.0


async def _code(meter: Meter, who: str) -> str:
    try:
        async with meter.call(who):
            return ""
    except ConsiliumError as error:
        return error.code


def test_a_caller_with_too_many_calls_is_refused_and_others_are_not() -> None:
    async def scenario() -> None:
        meter = Meter(Limits(calls=3))
        async with meter.call("a"), meter.call("a"), meter.call("a"):
            assert await _code(meter, "a") == "network.too-many-calls"
            assert await _code(meter, "b") == ""
        assert await _code(meter, "a") == ""

    asyncio.run(scenario())


def test_a_caller_that_asks_too_fast_is_refused_until_time_has_passed() -> None:
    async def scenario() -> None:
        clock = Clock()
        meter = Meter(Limits(requests_per_second=2.0, requests_burst=5), clock)
        codes = [await _code(meter, "a") for _ in range(8)]
        assert codes[:5] == [""] * 5
        assert set(codes[6:]) == {"network.too-fast"}
        assert await _code(meter, "b") == ""
        clock.now = 2.0
        assert await _code(meter, "a") == ""

    asyncio.run(scenario())


def test_an_invitation_may_be_tried_a_few_times_a_minute_only() -> None:
    async def scenario() -> None:
        meter = Meter(Limits(enrolments_per_minute=3.0), Clock())
        codes = []
        for _ in range(6):
            try:
                async with meter.call("invitation a", enrolling=True):
                    codes.append("")
            except ConsiliumError as error:
                codes.append(error.code)
        assert codes.count("network.too-fast") >= 2
        assert codes[:3] == ["", "", ""]

    asyncio.run(scenario())


def test_unread_bodies_of_one_caller_fill_its_own_share_alone() -> None:
    async def scenario() -> None:
        limits = Limits(caller_bytes_in_flight=2 * MAX_MESSAGE_BYTES, body_seconds=0.02)
        meter = Meter(limits)
        async with meter.call("a") as first, meter.call("a") as second, meter.call("a") as third:
            await first.expect_body()
            await second.expect_body()
            with pytest.raises(ConsiliumError) as caught:
                await third.expect_body()
            assert caught.value.code == "network.too-many-bytes"
            async with meter.call("b") as other:
                await other.expect_body()
            waiting = asyncio.create_task(third.expect_body())  # a dozen calls at once are no fault
            await asyncio.sleep(0)
            assert not waiting.done()
            first.took_body(100, "SendNodeHeartbeat")
            second.took_body(100, "SendNodeHeartbeat")
            await asyncio.wait_for(waiting, 1)
        async with meter.call("a") as last, meter.call("a") as one_more:
            await last.expect_body()
            await one_more.expect_body()  # all was given back

    asyncio.run(scenario())


def test_when_all_room_is_taken_the_next_caller_waits_for_it() -> None:
    async def scenario() -> None:
        meter = Meter(Limits(bytes_in_flight=2 * MAX_MESSAGE_BYTES))
        async with meter.call("a") as a, meter.call("b") as b, meter.call("c") as c:
            await a.expect_body()
            await b.expect_body()
            waiting = asyncio.create_task(c.expect_body())
            await asyncio.sleep(0.01)
            assert not waiting.done()
            a.release()
            await asyncio.wait_for(waiting, 1)

    asyncio.run(scenario())


def test_room_that_never_comes_is_a_refusal_and_a_given_up_wait_leaves_no_trace() -> None:
    async def scenario() -> None:
        meter = Meter(Limits(bytes_in_flight=2 * MAX_MESSAGE_BYTES, body_seconds=0.02))
        async with meter.call("a") as a, meter.call("b") as b, meter.call("c") as c:
            await a.expect_body()
            await b.expect_body()
            with pytest.raises(ConsiliumError) as caught:
                await c.expect_body()
            assert caught.value.code == "network.busy"
            waiting = asyncio.create_task(c.expect_body())
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        async with meter.call("c") as c, meter.call("d") as d:
            await c.expect_body()
            await d.expect_body()

    asyncio.run(scenario())


def test_a_fleet_call_as_large_as_a_piece_of_starting_weights_is_refused() -> None:
    async def scenario() -> None:
        meter = Meter(Limits())
        async with meter.call("a") as call:
            await call.expect_body()
            call.took_body(5 * MIB, "Propose")
            for name in ("SendNodeHeartbeat", "PushObject", "PushMessages"):
                call.release()
                await call.expect_body()
                with pytest.raises(ConsiliumError) as caught:
                    call.took_body(5 * MIB, name)
                assert caught.value.code == "network.too-large"

    asyncio.run(scenario())


def test_a_stream_s_piece_has_a_size_and_the_stream_room_for_two_for_as_long_as_it_lasts() -> None:
    async def scenario() -> None:
        limits = Limits(caller_bytes_in_flight=2 * MAX_MESSAGE_BYTES, body_seconds=0.02)
        meter = Meter(limits)
        async with AsyncExitStack() as stack:
            for _ in range(2 * MAX_MESSAGE_BYTES // (2 * CHUNK_BYTES)):
                call = await stack.enter_async_context(meter.call("a"))
                await call.expect_stream()
                call.took_piece(CHUNK_BYTES)  # noted as sent, and still in its room
            one_more = await stack.enter_async_context(meter.call("a"))
            with pytest.raises(ConsiliumError) as caught:
                await one_more.expect_stream()
            assert caught.value.code == "network.too-many-bytes"
            with pytest.raises(ConsiliumError) as caught:
                call.took_piece(CHUNK_BYTES + 1)
            assert caught.value.code == "network.too-large"
            async with meter.call("b") as other:
                await other.expect_stream()
        async with meter.call("a") as again:
            await again.expect_body()  # all was given back

    asyncio.run(scenario())


def test_pieces_come_no_faster_than_the_site_may_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()

    async def sleep(seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr(asyncio, "sleep", sleep)

    async def scenario() -> None:
        limits = Limits(upload_bytes_per_second=4.0 * MIB, upload_burst_bytes=8 * MIB)
        meter = Meter(limits, clock)
        async with meter.call("a") as one, meter.call("a") as two, meter.call("b") as other:
            for _ in range(20 * MIB // CHUNK_BYTES):
                for call in (one, two):  # two streams share what one site has
                    await call.wait_for_debt()
                    call.took_piece(CHUNK_BYTES)
            before = clock.now
            for _ in range(8 * MIB // CHUNK_BYTES):
                await other.wait_for_debt()
                other.took_piece(CHUNK_BYTES)
            assert clock.now == before

    asyncio.run(scenario())
    # 40 MiB: 8 at once, the last piece may be owed, and the rest at 4 a second.
    assert clock.now == pytest.approx((32 - CHUNK_BYTES / MIB) / 4)


def test_the_defaults_let_a_hundred_million_parameters_through_on_a_fast_line() -> None:
    """400 MB down and up at 10 Gbit/s, two studies at a time, with a few small calls between."""

    async def scenario() -> None:
        clock = Clock()
        meter, allowances = Meter(Limits(), clock), Allowances(Limits())
        for _ in range(3):
            allowances.message("7")
            async with meter.call("a") as one, meter.call("a") as two:
                await one.expect_stream()
                await two.expect_stream()
                for _ in range(400_000_000 // CHUNK_BYTES):
                    clock.now += CHUNK_BYTES / 1.25e9
                    for call in (one, two):
                        assert not call._use.upload.debt_seconds()
                        call.took_piece(CHUNK_BYTES)
                async with meter.call("a") as reply:
                    await reply.expect_body()
                    reply.took_body(2000, "PushMessages")
                    allowances.charge("7", 2000)
            clock.now += 5.0  # training

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_a_site_sends_flower_no_more_than_replies_have() -> None:
    allowances = Allowances(Limits(reply_bytes=64 * 1024))
    allowances.message("7")
    sent = 0
    with pytest.raises(ConsiliumError) as caught:
        while True:
            allowances.charge("7", 1000)
            sent += 1000
    assert caught.value.code == "network.too-much"
    # The reply to it, and one to a message from before.
    assert sent == 2 * 64 * 1024 // 1000 * 1000
    allowances.charge("8", 1000)  # another site's is its own
    allowances.message("7")
    allowances.charge("7", 64 * 1024)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300_000), st.integers(1, 30), st.integers(0, 3))
def test_an_honest_site_is_never_over_its_allowance(size: int, rounds: int, tries: int) -> None:
    """Rounds of training and evaluation, each reply tried again a few times in full."""
    allowances = Allowances(Limits())
    for _ in range(rounds):
        for _ in ("train", "evaluate"):
            allowances.message("7")
            for _ in range(1 + tries):
                allowances.charge("7", size)


def write(folder: Path, limits: object) -> Path:
    path = folder / "server.json"
    path.write_text(json.dumps({"consortium": "c", "address": "a:1", "limits": limits}))
    return path


def test_limits_are_read_from_the_configuration(tmp_path: Path) -> None:
    assert Limits.read(write(tmp_path, {"calls": 7})).calls == 7
    assert Limits.read(write(tmp_path, {})) == Limits()


@pytest.mark.parametrize(
    "wrong",
    [
        {"cals": 7},
        {"calls": 0},
        {"calls": "many"},
        {"requests_per_second": -1.0},
        {"caller_bytes_in_flight": 100},
        {"idle_seconds": 0.1},
        ["calls"],
    ],
)
def test_a_wrong_limit_is_one_clear_error(tmp_path: Path, wrong: object) -> None:
    with pytest.raises(ConsiliumError) as caught:
        Limits.read(write(tmp_path, wrong))
    assert caught.value.code == "usage.limits"
    assert "limits" in caught.value.message
    assert "requests_per_second" in caught.value.hint
