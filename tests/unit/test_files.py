"""A file is replaced whole or not at all, and durably where it must outlive a crash."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from consilium_common.errors import ConsiliumError
from consilium_common.files import private_folder, write_atomic


@pytest.mark.parametrize("durable", [True, False])
def test_the_disk_is_waited_for_only_where_it_matters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    waited: list[int] = []
    monkeypatch.setattr(os, "fsync", waited.append)
    path = tmp_path / "file"
    path.write_text("before")
    write_atomic(path, b"after", durable=durable)
    assert path.read_bytes() == b"after"
    assert path.stat().st_mode & 0o777 == 0o600
    # The file before it takes its name, and the folder after.
    assert len(waited) == (2 if durable else 0)


@pytest.mark.parametrize("durable", [True, False])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ConsiliumError) as caught:
        write_atomic(path, b"after", durable=durable)
    assert caught.value.code == "state.disk"
    assert "No space left" in caught.value.message
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "before"


def test_a_private_folder_s_new_parents_are_private_too_and_old_ones_stay(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o755)
    before = os.umask(0o022)
    try:
        private_folder(shared / "a" / "b")
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (shared, shared / "a", shared / "a" / "b")]
    assert modes == [0o755, 0o700, 0o700]
