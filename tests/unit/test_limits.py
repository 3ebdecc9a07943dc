"""One caller's use of the aggregator ends at its limits, and touches no other caller's."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium_common.errors import ConsiliumError
from consilium_common.wire.methods import MAX_MESSAGE_BYTES
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
        meter = Meter(Limits(caller_bytes_in_flight=2 * MAX_MESSAGE_BYTES))
        async with meter.call("a") as first, meter.call("a") as second, meter.call("a") as third:
            await first.expect_body()
            await second.expect_body()
            with pytest.raises(ConsiliumError) as caught:
                await third.expect_body()
            assert caught.value.code == "network.too-many-bytes"
            async with meter.call("b") as other:
                await other.expect_body()
            first.took_body(100, "SendNodeHeartbeat")
            second.took_body(100, "SendNodeHeartbeat")
            await third.expect_body()
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


def test_a_heartbeat_as_large_as_a_model_s_chunk_is_refused() -> None:
    async def scenario() -> None:
        meter = Meter(Limits())
        async with meter.call("a") as call:
            await call.expect_body()
            call.took_body(5 * MIB, "PushObject")
            call.release()
            await call.expect_body()
            with pytest.raises(ConsiliumError) as caught:
                call.took_body(5 * MIB, "SendNodeHeartbeat")
            assert caught.value.code == "network.too-large"

    asyncio.run(scenario())


def test_the_defaults_let_a_hundred_million_parameters_through_on_a_fast_line() -> None:
    """400 MB down and up at 10 Gbit/s, two chunks at a time, with a hello every second."""

    async def scenario() -> None:
        clock = Clock()
        meter, allowances = Meter(Limits(), clock), Allowances(Limits())
        chunk, chunks = 5_000_000, 80
        for _ in range(3):
            allowances.message("7")
            for number in range(chunks):
                clock.now += chunk / 1.25e9
                async with meter.call("a") as call:
                    await call.expect_body()
                    call.took_body(200, "PullObject")
                    call.holds(chunk)
                    allowances.sent("7", str(number), chunk)
            for _ in range(chunks):
                clock.now += chunk / 1.25e9
                async with meter.call("a") as one, meter.call("a") as two:
                    await one.expect_body()
                    await two.expect_body()
                    one.took_body(chunk, "PushObject")
                    allowances.charge("7", chunk)
            clock.now += 5.0  # training

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_a_site_uploads_in_proportion_to_the_model_that_it_was_given() -> None:
    allowances = Allowances(Limits(upload_factor=2.0, upload_floor_bytes=MIB))
    allowances.message("7")
    for _ in range(100):
        allowances.sent("7", "same object", 10 * MIB)  # asking again earns nothing
    sent = 0
    with pytest.raises(ConsiliumError) as caught:
        while True:
            allowances.charge("7", MIB)
            sent += 1
    assert caught.value.code == "network.too-much"
    assert 20 <= sent <= 22
    allowances.charge("8", MIB)  # another site's is its own
    allowances.refund("7", MIB)
    allowances.charge("7", MIB)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), st.integers(1, 30), st.integers(0, 3))
def test_an_honest_site_is_never_over_its_allowance(size: int, rounds: int, tries: int) -> None:
    """Rounds of training and evaluation, each object tried again up to once in full."""
    allowances = Allowances(Limits())
    for number in range(rounds):
        allowances.message("7")
        allowances.sent("7", f"m{number}", size * MIB)
        for _ in range(1 + min(tries, 1)):
            allowances.charge("7", size * MIB)
        allowances.message("7")  # an evaluation: the new model again, and a few figures back
        allowances.sent("7", f"e{number}", size * MIB)
        allowances.charge("7", 1000)


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
