"""A fault point does nothing unless it is named, and then ends the process at the asked passing."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from consilium_client.faults import COUNT_VARIABLE, FAULT_VARIABLE, fault_point
from consilium_common.errors import ConsiliumError


def passes(points: list[str]) -> int | None:
    """Return how many of the points a child passes; None when it passes all."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        for point in points:
            fault_point(point)
            os.write(write, b".")
        os._exit(0)
    os.close(write)
    _, status = os.waitpid(child, 0)
    with os.fdopen(read, "rb") as stream:
        passed = len(stream.read())
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return passed
    return None


def test_nothing_happens_where_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "another", "another:1"):
        monkeypatch.setenv(FAULT_VARIABLE, value)
        assert passes(["one", "two"]) is None
    monkeypatch.delenv(FAULT_VARIABLE)
    assert passes(["one", "two"]) is None


def test_a_named_point_kills_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAULT_VARIABLE, "two")
    assert passes(["one", "two", "three"]) == 1


def test_passings_are_counted_over_restarts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(COUNT_VARIABLE, str(tmp_path / "count"))
    monkeypatch.setenv(FAULT_VARIABLE, "one:3,two:2")
    round_of_work = ["one", "two", "one"]
    assert passes(round_of_work) is None  # one twice, two once
    assert passes(round_of_work) == 0  # one for the third time
    assert passes(round_of_work) == 1  # two for the second
    assert passes(round_of_work) is None  # each asked passing kills once


def test_a_passing_by_number_needs_a_file_to_count_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAULT_VARIABLE, "one:2")
    monkeypatch.delenv(COUNT_VARIABLE, raising=False)
    with pytest.raises(ConsiliumError) as caught:
        fault_point("one")
    assert caught.value.code == "usage.fault"
