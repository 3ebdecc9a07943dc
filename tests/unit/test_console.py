"""stdout carries one result, stderr the rest; an error is one message and its exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from consilium_common.console import MODE, UNREAD, command, note, print_error, result
from consilium_common.errors import EXIT_STATUS, ConsiliumError

_CONSILIUM = "from consilium_common.cli import main; main()"
ERROR = ConsiliumError("data.truncated", "The file [is] broken.", where="a[1].nii", hint="Copy it.")


@pytest.fixture(autouse=True)
def _mode() -> Iterator[None]:
    before = vars(MODE).copy()
    MODE.json = MODE.debug = False
    yield
    vars(MODE).update(before)


def run(function: Any) -> int:
    """Run a command and return its exit status."""
    try:
        command(function)()
    except typer.Exit as end:
        return end.exit_code
    return 0


def test_a_result_is_for_people_or_one_envelope(capsys: pytest.CaptureFixture[str]) -> None:
    result({"n": 1}, "one [thing]")
    assert capsys.readouterr().out == "one [thing]\n"
    result({"n": 1}, "SHA-256 8A:AB:58")
    assert capsys.readouterr().out == "SHA-256 8A:AB:58\n"
    MODE.json = True
    result({"n": "ε"}, "one thing")
    out = capsys.readouterr().out
    assert json.loads(out) == {"status": "ok", "data": {"n": "ε"}}
    assert out.count("\n") == 1


def test_a_note_never_reaches_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    MODE.json = True
    note("working [on] it")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "working [on] it" in captured.err


@pytest.mark.parametrize("category", list(EXIT_STATUS))
def test_every_category_of_error_has_its_exit_status(
    category: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise ConsiliumError(f"{category}.name", "m")

    MODE.json = True
    assert run(fail) == EXIT_STATUS[category]
    envelope = json.loads(capsys.readouterr().out)
    assert envelope["status"] == "error"
    assert set(envelope["error"]) == {"code", "message", "where", "hint"}


def test_exit_statuses_tell_categories_apart() -> None:
    assert len(set(EXIT_STATUS.values())) == len(EXIT_STATUS)
    assert not set(EXIT_STATUS.values()) & {0, 130}
    with pytest.raises(ValueError, match="unknown error category"):
        ConsiliumError("nonsense.name", "m")


def test_an_error_for_people_says_what_where_and_what_to_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_error(ERROR)
    captured = capsys.readouterr()
    assert captured.out == ""
    for part in (ERROR.code, ERROR.message, ERROR.where, ERROR.hint):
        assert part in captured.err  # brackets are text, never markup
    assert "Traceback" not in captured.err


def test_what_was_not_foreseen_shows_its_kind_and_never_its_words(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise RuntimeError("patient Doe^John")

    assert run(fail) == 1
    captured = capsys.readouterr()
    assert "RuntimeError" in captured.err
    assert "Doe" not in captured.err + captured.out
    assert "Traceback" not in captured.err

    MODE.debug = True
    assert run(fail) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interruption_is_an_error_with_the_shells_status(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    MODE.json = True
    assert run(fail) == 130
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "run.interrupted"


def test_a_commands_own_exit_passes() -> None:
    def leave() -> None:
        raise typer.Exit(3)

    assert run(leave) == 3
    assert run(lambda: None) == 0


@pytest.mark.parametrize(
    ("arguments", "both"),
    [
        ("study examples", False),
        ("study examples", True),
        ("--json study examples", False),
        ("study --help", False),
    ],
)
def test_a_command_whose_reader_has_gone_ends_without_a_word(arguments: str, both: bool) -> None:
    reads, writes = os.pipe()
    os.close(reads)  # as `head` does once it has its lines
    try:
        ended = subprocess.run(
            [sys.executable, "-c", _CONSILIUM, *arguments.split()],
            stdout=writes,
            stderr=writes if both else subprocess.PIPE,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writes)
    assert ended.returncode == UNREAD
    assert not ended.stderr


def test_a_pipe_that_breaks_elsewhere_is_an_error_like_any_other(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise BrokenPipeError

    assert run(fail) == 1
    assert "BrokenPipeError" in capsys.readouterr().err
