"""A checkpoint is there whole or not at all, and model and round never disagree."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from consilium_common.errors import ConsiliumError
from consilium_server.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

WEIGHTS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array(np.pi, dtype=np.float32),
}


@pytest.mark.parametrize("rounds", [0, 1, 17, 9_999, 10_000])
def test_it_reads_back_exactly(tmp_path: Path, rounds: int) -> None:
    save_checkpoint(tmp_path, Checkpoint(rounds, WEIGHTS))
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.rounds_done == rounds
    assert set(found.weights) == set(WEIGHTS)
    for name, tensor in WEIGHTS.items():
        np.testing.assert_array_equal(found.weights[name], tensor)
        assert found.weights[name].shape == tensor.shape


def test_before_the_first_round_there_is_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None


def test_a_crash_while_writing_leaves_the_round_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, Checkpoint(1, WEIGHTS))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConsiliumError) as caught:
        save_checkpoint(tmp_path, Checkpoint(2, {k: v + 1 for k, v in WEIGHTS.items()}))
    assert caught.value.code == "state.disk"
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.rounds_done == 1
    np.testing.assert_array_equal(found.weights["a"], WEIGHTS["a"])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_a_damaged_checkpoint_is_an_error_and_not_a_new_beginning(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Checkpoint(1, WEIGHTS))
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ConsiliumError) as caught:
        load_checkpoint(tmp_path)
    assert str(path) in caught.value.where
    assert caught.value.code.startswith("state.")


def test_it_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Checkpoint(1, WEIGHTS))
    assert (tmp_path / "checkpoint.safetensors").stat().st_mode & 0o077 == 0


def test_the_running_average_rides_along_and_is_what_is_kept(tmp_path: Path) -> None:
    average = {"a": WEIGHTS["a"] + 7}
    save_checkpoint(tmp_path, Checkpoint(3, WEIGHTS, average))
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert (set(found.weights), set(found.average)) == ({"a", "b"}, {"a"})
    # Training goes on from the model; what is evaluated and kept is the average, where there is
    # one, and the frozen rest.
    np.testing.assert_array_equal(found.weights["a"], WEIGHTS["a"])
    np.testing.assert_array_equal(found.result["a"], average["a"])
    np.testing.assert_array_equal(found.result["b"], WEIGHTS["b"])
