"""A checkpoint is there whole or not at all, and a damaged one is said aloud, never passed over."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.models.weights import pack, unpack
from consilium_server.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

WEIGHTS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array(np.pi, dtype=np.float32),
}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Return an empty study folder."""
    folder = tmp_path / "study"
    folder.mkdir()
    return folder


def after(folder: Path, rounds: int, **more: Any) -> Checkpoint:
    """Return what a round left, in files beside the study's folder."""
    model = folder.parent / "next-model"
    write_atomic(model, pack({name: t + rounds for name, t in WEIGHTS.items()}))
    return Checkpoint(rounds, model, **more)


def weights(path: Path) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in unpack(path.read_bytes()).items()}


def places(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("rounds", [0, 1, 17, 9_999, 10_000])
def test_it_reads_back_exactly(study: Path, rounds: int) -> None:
    saved = save_checkpoint(study, after(study, rounds))
    assert load_checkpoint(study) == saved
    assert saved.rounds_done == rounds
    assert saved.model.is_relative_to(study)
    assert weights(saved.model) == {n: (t + rounds).tolist() for n, t in WEIGHTS.items()}
    assert (saved.state, saved.average, saved.result) == (None, None, saved.model)


def test_it_knows_the_digest_of_its_own_files_and_of_no_other(study: Path) -> None:
    made = after(study, 1)
    assert made.sha256_of(made.model) is None  # not read yet
    saved = save_checkpoint(study, made)
    assert saved.sha256_of(saved.model) == hashlib.sha256(saved.model.read_bytes()).hexdigest()
    assert saved.sha256_of(made.model) is None


def test_before_the_first_round_there_is_none(study: Path) -> None:
    assert load_checkpoint(study) is None


def test_state_average_draw_and_history_ride_along(study: Path) -> None:
    for name in ("state", "average"):
        (study.parent / name).write_bytes(pack({name: np.ones(3, np.float32)}))
    drawing = np.random.default_rng(7)
    drawing.permutation(100)
    saved = save_checkpoint(
        study,
        after(
            study,
            3,
            state=study.parent / "state",
            average=study.parent / "average",
            random=drawing.bit_generator.state,
            history="f" * 64,
        ),
    )
    found = load_checkpoint(study)
    assert found == saved
    assert found.state is not None
    assert found.average is not None
    assert weights(found.state) == {"state": [1.0, 1.0, 1.0]}
    assert found.result == found.average
    assert found.history == "f" * 64
    assert set(found.digests) == {"model", "state", "average"}
    # The sites of the rounds to come are those that would have been drawn.
    again = np.random.default_rng()
    again.bit_generator.state = dict(found.random)
    assert drawing.permutation(100).tolist() == again.permutation(100).tolist()


def test_the_last_two_are_kept_and_what_a_crash_left_goes(study: Path) -> None:
    for rounds in range(4):
        if rounds == 2:
            (study / "checkpoints" / ".aside-round-000002").mkdir()
            (study / "checkpoints" / ".aside-gone-round-000000").mkdir()
        save_checkpoint(study, after(study, rounds))
    assert places(study) == ["round-000002", "round-000003"]
    # The same round once more, after a crash between it and the next.
    save_checkpoint(study, after(study, 3, history="again"))
    found = load_checkpoint(study)
    assert found is not None
    assert (found.rounds_done, found.history) == (3, "again")
    assert places(study) == ["round-000002", "round-000003"]


def test_going_on_from_a_checkpoint_keeps_its_own_files(study: Path) -> None:
    # A study's model may be the very file of the checkpoint before it.
    saved = save_checkpoint(study, after(study, 0))
    for rounds in range(1, 4):
        saved = save_checkpoint(study, Checkpoint(rounds, saved.model))
    assert weights(saved.model) == {n: t.tolist() for n, t in WEIGHTS.items()}


def test_a_disk_without_links_gets_a_copy(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    saved = save_checkpoint(study, after(study, 1))
    (study.parent / "next-model").write_bytes(b"something else")
    assert load_checkpoint(study) == saved


@pytest.mark.parametrize("call", ["fsync", "rename", "link"])
def test_a_crash_or_a_full_disk_leaves_the_round_before(
    study: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    before = save_checkpoint(study, after(study, 1))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(ConsiliumError) as caught:
            save_checkpoint(study, after(study, 2))
    assert caught.value.code == "state.disk"
    assert places(study) == ["round-000001"]
    assert load_checkpoint(study) == before


class Killed(BaseException):
    """The process ends here and cleans up nothing."""


@pytest.mark.parametrize("again", [False, True], ids=["next round", "same round"])
def test_killed_before_any_call_to_the_disk_one_of_the_two_is_whole(
    study: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    new, moments, ended = (7 if again else 8), 0, False
    while not ended:
        left = moments = moments + 1
        shutil.rmtree(study)
        study.mkdir()
        save_checkpoint(study, after(study, 6))
        save_checkpoint(study, after(study, 7, history="old"))
        with monkeypatch.context() as patched:

            def counted(name: str, owner: Any = os, patched: Any = patched) -> None:
                real = getattr(owner, name)

                def call(*given: Any, **named: Any) -> Any:
                    nonlocal left
                    left -= 1
                    if left == 0:
                        raise Killed
                    return real(*given, **named)

                patched.setattr(owner, name, call)

            for name in ("link", "fsync", "rename", "mkdir", "rmdir", "unlink"):
                counted(name)
            with suppress(Killed):
                save_checkpoint(study, after(study, new, history="new"))
                ended = True
        found = load_checkpoint(study)
        assert found is not None
        if again and found.rounds_done == 6:
            # Between the old one's going and the new one's coming: the round is repeated.
            assert not ended
        else:
            assert (found.rounds_done, found.history) in {(7, "old"), (new, "new")}
            assert found.history == "new" or not ended
        # Whatever was left behind, the study goes on.
        save_checkpoint(study, after(study, 8))
        assert len(places(study)) == 2
    assert moments > 8


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
def test_a_damaged_checkpoint_is_an_error_that_names_the_whole_one_before_it(
    study: Path, name: str, how: str
) -> None:
    save_checkpoint(study, after(study, 4))
    last = save_checkpoint(study, after(study, 5, history="0123456789")).model.parent
    content = (last / name).read_bytes()
    (last / name).unlink()
    if how == "cut":
        (last / name).write_bytes(content[:-3])
    elif how == "changed":
        middle = len(content) // 2
        (last / name).write_bytes(content[:middle] + b"7" + content[middle + 1 :])
    with pytest.raises(ConsiliumError) as caught:
        load_checkpoint(study)
    assert caught.value.code == "state.checkpoint"
    assert caught.value.where == str(last)
    assert "round-000004" in caught.value.hint
    # What the hint says works.
    last.rename(last.with_name("round-000005.damaged"))
    found = load_checkpoint(study)
    assert found is not None
    assert found.rounds_done == 4


def test_where_none_is_whole_only_the_backup_helps(study: Path) -> None:
    for rounds in (1, 2):
        (save_checkpoint(study, after(study, rounds)).model).unlink()
    with pytest.raises(ConsiliumError) as caught:
        load_checkpoint(study)
    assert caught.value.code == "state.checkpoint"
    assert "backup" in caught.value.hint
    assert "round-000001" not in caught.value.hint


def test_it_is_readable_by_its_owner_alone(study: Path) -> None:
    saved = save_checkpoint(study, after(study, 1))
    for path in (saved.model.parent.parent, saved.model.parent, *saved.model.parent.iterdir()):
        assert path.stat().st_mode & 0o077 == 0, path


# --- the single file of older releases -----------------------------------------------------------


def old_file(folder: Path, rounds: int, *, averaged: bool) -> Path:
    tensors = {**WEIGHTS, "consilium.rounds_done": np.array([rounds], dtype=np.float32)}
    if averaged:
        tensors["consilium.average.a"] = WEIGHTS["a"] + 7
    path = folder / "checkpoint.safetensors"
    path.write_bytes(pack(tensors))
    return path


@pytest.mark.parametrize("averaged", [False, True])
def test_a_checkpoint_of_an_older_release_is_read(study: Path, averaged: bool) -> None:
    old_file(study, 17, averaged=averaged)
    found = load_checkpoint(study)
    assert found is not None
    assert found.rounds_done == 17
    assert weights(found.model) == {n: t.tolist() for n, t in WEIGHTS.items()}
    if averaged:
        result = {"a": (WEIGHTS["a"] + 7).tolist(), "b": WEIGHTS["b"].tolist()}
        assert weights(found.result) == result
    else:
        assert found.average is None
    # From then on it is one of ours.
    assert load_checkpoint(study) == found
    assert sorted(p.name for p in study.iterdir()) == ["checkpoint.safetensors", "checkpoints"]


def test_a_damaged_old_checkpoint_is_an_error_and_not_a_new_beginning(study: Path) -> None:
    path = old_file(study, 3, averaged=False)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ConsiliumError) as caught:
        load_checkpoint(study)
    assert caught.value.code == "state.checkpoint"
    assert str(path) in caught.value.where
