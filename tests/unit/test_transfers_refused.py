"""What nobody asked for is refused at the port, and what is not what it is named is not kept."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pytest
from egress_samples import reference
from site_samples import member_credentials
from transfer_samples import (
    MIB,
    NAME,
    OTHER_STUDY,
    SITE_DELIVER,
    SITE_FETCH,
    STUDY,
    Hospital,
    Moved,
    Port,
    announced,
    deliver,
    fetched,
    raw,
    run,
)

from consilium_client import received as site_side
from consilium_client.received import model_file, wait_for_model
from consilium_common.errors import ConsiliumError
from consilium_common.identity.authority import Authority
from consilium_common.identity.certificates import Role
from consilium_common.wire.methods import CHUNK_BYTES

LARGE = os.urandom(5 * MIB + 123)
SMALL = os.urandom(70_000)


@pytest.fixture
def port(tmp_path: Path) -> Port:
    return Port(tmp_path)


@pytest.fixture
def authority(port: Port) -> Authority:
    return port.found()


@pytest.fixture
def hospital(port: Port, authority: Authority, tmp_path: Path) -> Hospital:
    return Hospital(port, tmp_path, authority)


def stranger(port: Port, authority: Authority) -> Any:
    """Return the credentials of another site, which has approved the other study."""
    credentials = member_credentials(authority, Role.SITE, "south")
    port.add("south", credentials.certificate, OTHER_STUDY)
    return credentials


def test_what_was_not_asked_for_is_refused_by_name_and_disturbs_nobody(
    port: Port, hospital: Hospital, authority: Authority
) -> None:
    model = port.offer(SMALL)
    update, path = hospital.store(LARGE)
    south = stranger(port, authority)
    north = hospital.credentials
    evil = reference(b"x" * 1000)
    ask = {"study": STUDY, "sha256": model.sha256, "offset": 0}
    too_large = {"study": STUDY, "sha256": "a" * 64, "bytes": update.bytes + 1}
    refused: list[tuple[str, Any, str, Any, str]] = [
        ("a model from a place before it", north, SITE_FETCH, {**ask, "offset": -1}, "no-model"),
        ("a model from far behind it", north, SITE_FETCH, {**ask, "offset": 2**70}, "no-model"),
        ("a model from no number", north, SITE_FETCH, {**ask, "offset": "0"}, "no-model"),
        ("a model from a truth", north, SITE_FETCH, {**ask, "offset": True}, "no-model"),
        ("a file that is not offered", north, SITE_FETCH, {**ask, "sha256": "a" * 64}, "no-model"),
        ("a path", north, SITE_FETCH, {**ask, "sha256": "../in/x"}, "no-model"),
        ("a long path", north, SITE_FETCH, {**ask, "sha256": "../" + "a" * 61}, "no-model"),
        ("no name", north, SITE_FETCH, {**ask, "sha256": ["a" * 64]}, "no-model"),
        ("what was delivered", north, SITE_FETCH, {**ask, "sha256": evil.sha256}, "no-model"),
        ("another's study", south, SITE_FETCH, ask, "not-approved"),
        ("no study", north, SITE_FETCH, {**ask, "study": "../x"}, "not-approved"),
        ("no study at all", north, SITE_FETCH, {"offset": 0}, "not-approved"),
        ("no request", north, SITE_FETCH, b"\xff", "garbage"),
        ("a list", north, SITE_FETCH, b"[]", "garbage"),
        ("another's study", south, SITE_DELIVER, announced(update), "not-approved"),
        ("an unasked one", south, SITE_DELIVER, announced(update, OTHER_STUDY), "not-expected"),
        ("too large a one", north, SITE_DELIVER, too_large, "not-expected"),
        ("a path", north, SITE_DELIVER, {**too_large, "sha256": "../../x"}, "bad-message"),
        ("no length", north, SITE_DELIVER, {**too_large, "bytes": -1}, "bad-message"),
        ("half a byte", north, SITE_DELIVER, {**too_large, "bytes": 0.5}, "bad-message"),
        ("no request", north, SITE_DELIVER, b"{", "garbage"),
        ("nothing", north, SITE_DELIVER, b"", "garbage"),
    ]
    slow = asyncio.Event()

    async def wait(moved: Moved, _: Any) -> None:
        if moved.bytes >= 2 * MIB:
            await slow.wait()

    async def scenario() -> None:
        async with port.open(), hospital.connected() as (transfers, connection):
            connection.meanwhile = wait
            honest = asyncio.create_task(deliver(transfers, update, path))
            for what, who, method, said, code in refused:
                answers, found = await raw(port, who, method, said)
                assert found.endswith(f".{code}"), (what, found)
                assert answers == [], what
            slow.set()
            assert await honest
            assert len(connection.of(SITE_DELIVER)) == 1

    run(scenario)
    assert port.files.delivered(NAME, update).read_bytes() == LARGE
    assert not (port.home.study_folder(OTHER_STUDY) / "in").exists()


@pytest.mark.parametrize(
    ("pieces", "code"),
    [
        ([SMALL[:-1] + bytes([SMALL[-1] ^ 1])], "run.bad-update"),  # of another content
        ([SMALL, b"x"], ""),  # what comes after the end is not read
        ([SMALL + b"x"], "run.bad-update"),
        ([SMALL[:9], SMALL[9:] + b"x"], "run.bad-update"),
        ([SMALL[:-1]], "network.garbage"),
        ([bytes(CHUNK_BYTES + 1)], "network.too-large"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_leaves_nothing_behind(
    port: Port, hospital: Hospital, pieces: list[bytes], code: str
) -> None:
    update, path = hospital.store(SMALL)

    async def scenario() -> None:
        async with port.open(), hospital.connected() as (transfers, _):
            first = announced(update)
            heard, found = await raw(port, hospital.credentials, SITE_DELIVER, first, *pieces)
            assert found == code
            assert port.came() == (
                {update.sha256}
                if code == ""
                # An honest half is gone on with.
                else {f"{update.sha256}.part"}
                if code in ("network.garbage", "network.too-large")
                else set()
            )
            assert len(heard) == (2 if code == "" else 1)
            assert await deliver(transfers, update, path)

    run(scenario)
    assert port.files.delivered(NAME, update).read_bytes() == SMALL


def test_a_site_delivers_into_its_own_folder_alone_and_reads_no_other_s(
    port: Port, hospital: Hospital, authority: Authority
) -> None:
    update, path = hospital.store(SMALL)
    south = member_credentials(authority, Role.SITE, "south")
    port.add("south", south.certificate, STUDY)
    port.files.expect("south", 0, len(SMALL))

    async def scenario() -> None:
        async with port.open(), hospital.connected() as (transfers, _):
            assert await deliver(transfers, update, path)
            asked = {"study": STUDY, "sha256": update.sha256, "offset": 0}
            assert await raw(port, south, SITE_FETCH, asked) == ([], "run.no-model")
            # Knowing its name is not having it: it must send the content itself.
            heard, code = await raw(port, south, SITE_DELIVER, announced(update), b"x" * 10)
            assert (heard, code) == ([b'{"held":0}'], "network.garbage")

    run(scenario)
    assert port.came() == {update.sha256}
    assert port.came("south") == {f"{update.sha256}.part"}
    with pytest.raises(ConsiliumError):
        port.files.delivered("south", update)


# --- the process that waits ---------------------------------------------------------------------


def test_why_a_model_cannot_be_had_reaches_the_task_that_waits_for_it(
    port: Port, hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = reference(SMALL)

    async def scenario() -> None:
        async with port.open(), hospital.connected() as (transfers, _):
            await fetched(transfers, gone)

    run(scenario)
    with pytest.raises(ConsiliumError) as caught:
        wait_for_model(hospital.home, STUDY, gone, 5)
    assert caught.value.code == "run.no-model"
    other = reference(LARGE)
    with pytest.raises(ConsiliumError) as caught:
        wait_for_model(hospital.home, STUDY, other, 0.05)
    assert caught.value.code == "run.no-model"
    # A study that was stopped is not waited for.
    monkeypatch.setattr(site_side, "_ENDED_SECONDS", 0.05)
    hospital.home.running.write_text("[]")
    began = time.monotonic()
    with pytest.raises(ConsiliumError):
        wait_for_model(hospital.home, STUDY, other, 30)
    assert time.monotonic() - began < 5


def test_a_model_of_another_content_than_was_named_is_not_kept(
    port: Port, hospital: Hospital
) -> None:
    model = port.offer(SMALL)
    (port.home.study_folder(STUDY) / "out" / model.sha256).write_bytes(SMALL[::-1])

    async def scenario() -> None:
        async with port.open(), hospital.connected() as (transfers, _):
            await fetched(transfers, model)

    run(scenario)
    with pytest.raises(ConsiliumError) as caught:
        wait_for_model(hospital.home, STUDY, model, 5)
    assert caught.value.code == "run.bad-message"
    folder = model_file(hospital.home, STUDY, model).parent
    assert [path.suffix for path in folder.iterdir()] == [".refused"]
