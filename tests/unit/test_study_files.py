"""A study's files under way: what is offered, what is expected, and what came of it."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
from egress_samples import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium_client.sealed import Sealed
from consilium_common.errors import ConsiliumError
from consilium_common.wire.messages import Reference
from consilium_common.wire.methods import CHUNK_BYTES
from consilium_server import study_files
from consilium_server.study_files import Arriving, StudyFiles

BLOB = os.urandom(3000)


@pytest.fixture
def files(tmp_path: Path) -> StudyFiles:
    return StudyFiles(tmp_path)


def refused(action: Any, code: str) -> None:
    with pytest.raises(ConsiliumError) as caught:
        action()
    assert caught.value.code == code, caught.value


def taken(files: StudyFiles, site: str, blob: bytes = BLOB, upto: int | None = None) -> Arriving:
    """Let a file arrive, or the first bytes of it."""
    arriving = files.arriving(site, reference(blob))
    arriving.open()
    arriving.write(blob[arriving.held : upto])
    if upto is None:
        arriving.finish()
    arriving.close()
    return arriving


# --- offered ------------------------------------------------------------------------------------


def test_a_model_is_offered_without_a_copy_and_the_last_three_stay(
    files: StudyFiles, tmp_path: Path
) -> None:
    names = []
    for number in range(5):
        path = tmp_path / f"model-{number}"
        path.write_bytes(b"model %d" % number)
        offered = files.offer(path)
        assert offered == reference(b"model %d" % number)
        assert files.offer(path) == offered  # asked once more
        found = files.offered(offered.sha256)
        assert found is not None and found.samefile(path)
        names.append(offered.sha256)
    assert [files.offered(name) is not None for name in names] == [False, False, True, True, True]
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(names[2:])
    assert (tmp_path / "out").stat().st_mode & 0o077 == 0


def test_a_model_whose_digest_is_known_is_offered_without_reading_it(
    files: StudyFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    path.write_bytes(BLOB)
    known = reference(BLOB).sha256

    def read(_: Path) -> Reference:
        raise AssertionError("all of the model was read")

    monkeypatch.setattr(Reference, "of", read)
    assert files.offer(path, known) == reference(BLOB)
    found = files.offered(known)
    assert found is not None and found.samefile(path)


def test_a_model_is_offered_as_it_is_though_a_crash_left_another_file_of_its_name(
    files: StudyFiles, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    path.write_bytes(BLOB)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / reference(BLOB).sha256).write_bytes(b"half")
    found = files.offered(files.offer(path).sha256)
    assert found is not None and found.read_bytes() == BLOB


def test_a_disk_that_takes_no_file_is_one_clear_error(
    files: StudyFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    path.write_bytes(BLOB)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(study_files.os, "link", full)
    refused(lambda: files.offer(path), "state.disk")


# --- expected -----------------------------------------------------------------------------------


def test_a_site_delivers_what_it_was_asked_for_in_this_round_alone(files: StudyFiles) -> None:
    assert files.most("north") == 0
    files.expect("north", 3, 5000)
    assert files.most("north") == 5000
    assert files.most("south") == 0
    refused(lambda: files.delivered("north", reference(BLOB)), "run.bad-update")
    taken(files, "north")
    assert files.delivered("north", reference(BLOB)).read_bytes() == BLOB
    # Of this very round: asked again, as after a crash, it need not be sent again.
    files.expect("north", 3, 5000)
    assert files.delivered("north", reference(BLOB)).read_bytes() == BLOB
    # Of the next it is no update, though its content were the same.
    files.expect("north", 4, 5000)
    refused(lambda: files.delivered("north", reference(BLOB)), "run.bad-update")
    files.forget("north")
    assert files.most("north") == 0


def test_when_a_round_is_over_nothing_stays_but_of_whom_is_named(
    files: StudyFiles, tmp_path: Path
) -> None:
    files.forget_all()
    for site in ("east", "north", "south"):
        files.expect(site, 0, 5000)
        taken(files, site)
    files.forget_all(but=["north"])
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["north"]
    assert files.delivered("north", reference(BLOB)).read_bytes() == BLOB


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"most": "5"}', b'{"most": true}', b"\xff"]
)
def test_a_damaged_note_of_what_is_expected_expects_nothing(
    files: StudyFiles, tmp_path: Path, content: bytes
) -> None:
    files.expect("north", 0, 5000)
    (tmp_path / "in" / "north" / "expected.json").write_bytes(content)
    assert files.most("north") == 0


def test_a_file_of_another_length_than_named_has_not_come(files: StudyFiles) -> None:
    files.expect("north", 0, 5000)
    taken(files, "north")
    longer = Reference(reference(BLOB).sha256, len(BLOB) + 1)
    refused(lambda: files.delivered("north", longer), "run.bad-update")


def test_after_a_crash_of_the_machine_only_files_stay_that_are_what_their_name_says(
    files: StudyFiles, tmp_path: Path
) -> None:
    files.verify()
    for site in ("north", "south"):
        files.expect(site, 0, 5000)
        taken(files, site)
    (tmp_path / "in" / "south" / reference(BLOB).sha256).write_bytes(bytes(len(BLOB)))
    files.verify()
    assert files.arrived("north", reference(BLOB)) is not None
    assert files.arrived("south", reference(BLOB)) is None
    assert files.most("south") == 5000  # it is asked for it again


# --- arriving -----------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3000), max_size=5))
def test_a_file_is_whole_however_often_its_line_breaks(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int]
) -> None:
    files = StudyFiles(tmp_path_factory.mktemp("study"))
    files.expect("north", 0, 5000)
    for cut in sorted(cuts):
        assert taken(files, "north", upto=cut).held == cut
        assert files.arrived("north", reference(BLOB)) is None
    taken(files, "north")
    assert files.delivered("north", reference(BLOB)).read_bytes() == BLOB


def test_what_is_not_what_its_name_says_or_too_long_is_thrown_away(
    files: StudyFiles, tmp_path: Path
) -> None:
    files.expect("north", 0, 5000)
    arriving = files.arriving("north", reference(BLOB))
    arriving.open()
    arriving.write(BLOB[::-1])
    refused(arriving.finish, "run.bad-update")
    arriving = files.arriving("north", reference(BLOB))
    arriving.open()
    assert arriving.held == 0
    arriving.write(BLOB)
    refused(lambda: arriving.write(b"x"), "run.bad-update")
    # A part that was altered on the disk, or grew there.
    for part in (bytes(len(BLOB)), BLOB + b"x"):
        (tmp_path / "in" / "north" / f"{reference(BLOB).sha256}.part").write_bytes(part)
        arriving = files.arriving("north", reference(BLOB))
        arriving.open()
        refused(arriving.finish, "run.bad-update")
    assert [path.name for path in (tmp_path / "in" / "north").iterdir()] == ["expected.json"]


def test_a_site_has_one_file_at_a_time_and_cannot_fill_the_disk(
    files: StudyFiles, tmp_path: Path
) -> None:
    files.expect("north", 0, 5000)
    for number in range(20):
        blob = b"%d" % number + BLOB
        if number % 2:
            taken(files, "north", blob)
        else:
            taken(files, "north", blob, upto=1000)
        assert len(list((tmp_path / "in" / "north").iterdir())) == 2


def test_a_line_that_was_given_up_writes_no_more_and_its_piece_is_whole_or_not_there(
    files: StudyFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.expect("north", 0, 5000)
    begun, goes_on = threading.Event(), threading.Event()

    class Slow(study_files.FileIO):
        def write(self, content: Any) -> int:
            begun.set()
            assert goes_on.wait(10)
            return super().write(content)

    monkeypatch.setattr(study_files, "FileIO", Slow)
    old = files.arriving("north", reference(BLOB))
    old.open()
    monkeypatch.undo()
    writing = threading.Thread(target=old.write, args=(BLOB[:1000],))
    writing.start()
    assert begun.wait(10)
    closing = threading.Thread(target=old.close)
    closing.start()
    goes_on.set()
    writing.join(10)
    closing.join(10)
    refused(lambda: old.write(b"more"), "network.replaced")
    new = files.arriving("north", reference(BLOB))
    new.open()
    assert new.held == 1000
    new.write(BLOB[1000:])
    new.finish()
    assert files.delivered("north", reference(BLOB)).read_bytes() == BLOB


def test_a_line_that_is_given_up_before_it_was_opened_takes_nothing(files: StudyFiles) -> None:
    files.expect("north", 0, 5000)
    arriving = files.arriving("north", reference(BLOB))
    arriving.close()
    refused(arriving.open, "network.replaced")
    refused(lambda: arriving.write(BLOB), "network.replaced")


def test_a_disk_that_is_full_is_said_and_what_came_stays(
    files: StudyFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.expect("north", 0, 5000)
    taken(files, "north", upto=1200)

    class Full(study_files.FileIO):
        def write(self, _: Any) -> int:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(study_files, "FileIO", Full)
        refused(lambda: taken(files, "north"), "state.disk")
    assert taken(files, "north", upto=1200).held == 1200
    taken(files, "north")
    assert files.delivered("north", reference(BLOB)).read_bytes() == BLOB


# --- what leaves a site -------------------------------------------------------------------------


def test_a_sealed_update_is_read_from_any_place_to_the_end_of_its_piece(tmp_path: Path) -> None:
    content = os.urandom(2 * CHUNK_BYTES + 77)
    path = tmp_path / "update"
    path.write_bytes(content)
    sealed = Sealed(path, reference(content))
    for offset in (0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 5):
        end = (offset // CHUNK_BYTES + 1) * CHUNK_BYTES
        assert sealed.piece(offset) == content[offset:end]
    assert sealed.piece(3 * CHUNK_BYTES) == b""


def test_of_an_update_that_was_altered_no_altered_piece_leaves(tmp_path: Path) -> None:
    content = os.urandom(2 * CHUNK_BYTES + 77)
    path = tmp_path / "update"
    path.write_bytes(content)
    refused(lambda: Sealed(path, reference(content[::-1])), "privacy.update-lost")
    sealed = Sealed(path, reference(content))
    with path.open("r+b") as stream:
        stream.seek(CHUNK_BYTES + 9)
        stream.write(bytes([content[CHUNK_BYTES + 9] ^ 1]))
    assert sealed.piece(0) == content[:CHUNK_BYTES]
    for offset in (CHUNK_BYTES, CHUNK_BYTES + 500):
        refused(lambda at=offset: sealed.piece(at), "privacy.update-lost")
    path.write_bytes(content[: CHUNK_BYTES + 5])
    refused(lambda: sealed.piece(2 * CHUNK_BYTES), "privacy.update-lost")
    path.unlink()
    refused(lambda: sealed.piece(0), "privacy.update-lost")
    refused(lambda: Sealed(path, reference(content)), "privacy.update-lost")
