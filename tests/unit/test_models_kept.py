"""What commands keep of a network is found out once, and never believed where it is damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from study_samples import TEXT, study_of

from consilium_common.errors import ConsiliumError
from consilium_common.models import kept as keeping
from consilium_common.models.kept import CACHE_VARIABLE, keep_networks
from consilium_common.study import cost as costs
from consilium_common.study.cost import cost
from consilium_common.study.schema import Study

STUDY = study_of("unet", {"channels": [4, 8]})
Looked = list[Study]


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> Looked:
    """The studies whose networks are built, as they are."""
    found: Looked = []
    real: Callable[[Study], Any] = costs._of_network
    monkeypatch.setattr(costs, "_of_network", lambda study: found.append(study) or real(study))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in which this process keeps networks."""
    keep_networks(tmp_path / "cache")
    return tmp_path / "cache"


def changed(**parts: Any) -> Study:
    """Return the study with some of its parts replaced."""
    value = STUDY.model_dump(mode="json", by_alias=True)
    for name, part in parts.items():
        value[name] = {**value[name], **part} if isinstance(part, dict) else part
    return Study.model_validate(value)


def test_what_a_network_does_not_depend_on_asks_for_no_second_look(
    folder: Path, looked: Looked
) -> None:
    first = cost(STUDY)
    for other in (
        STUDY,
        changed(name="other", title="Another"),
        changed(federation={"rounds": 7, "quorum": 3}),
        changed(training={"seed": 5, "steps_per_round": 9}),
    ):
        assert cost(other) == first
    assert looked == [STUDY]
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "parts",
    [
        {"model": {"arguments": {"channels": [4, 16]}}},
        {"model": {"trainable": "first+last"}},
        {"task": {"classes": ["a", "b"]}},
        {"preprocessing": {"size": [64, 64]}},
    ],
)
def test_what_it_may_depend_on_is_looked_at_again(
    folder: Path, looked: Looked, parts: dict[str, Any]
) -> None:
    cost(STUDY)
    other = changed(**parts)
    found = cost(other)
    assert looked == [STUDY, other]
    keep_networks(folder / "elsewhere")
    assert cost(other) == found


def test_another_release_of_the_code_looks_again(
    folder: Path, looked: Looked, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost(STUDY)
    monkeypatch.setattr(keeping, "_LIBRARIES", ("numpy",))
    cost(STUDY)
    assert looked == [STUDY, STUDY]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b'{"parameters": 1}', b'{"parameters": "many"}']
)
def test_a_damaged_file_is_made_anew(folder: Path, looked: Looked, content: bytes) -> None:
    found = cost(STUDY)
    (path,) = folder.iterdir()
    sound = path.read_bytes()
    path.write_bytes(content)
    assert cost(STUDY) == found
    assert len(looked) == 2
    assert path.read_bytes() == sound


def test_an_error_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(study: Study) -> None:
        raise ConsiliumError("study.network", "no")

    with monkeypatch.context() as patch:
        patch.setattr(costs, "_of_network", fail)
        with pytest.raises(ConsiliumError):
            cost(STUDY)
    assert not folder.exists()
    assert cost(STUDY).parameters > 0


def test_a_process_that_was_not_told_to_keeps_and_believes_nothing(
    folder: Path, looked: Looked, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = cost(STUDY)
    (path,) = folder.iterdir()
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "parameters": 1}))
    assert cost(STUDY).parameters == 1
    monkeypatch.setattr(keeping._Keeping, "folder", None)
    assert cost(STUDY) == found
    assert len(looked) == 2


def test_a_folder_that_cannot_be_used_costs_time_alone(tmp_path: Path, looked: Looked) -> None:
    (tmp_path / "file").write_text("")
    keep_networks(tmp_path / "file" / "below")
    assert cost(STUDY) == cost(STUDY)
    assert len(looked) == 2


def test_only_the_last_networks_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "_MOST", 3)
    names: list[set[str]] = []
    for classes in range(2, 7):
        cost(study_of("unet", {"channels": [4, 8]}, classes=classes))
        names.append({path.name for path in folder.iterdir()})
        for path in folder.iterdir():  # file times may be coarse
            os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - 10**9))
    assert [len(found) for found in names] == [1, 2, 3, 3, 3]
    assert not names[0] & names[4]


def test_a_command_that_asks_a_second_time_loads_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(TEXT)
    program = (
        "import atexit, sys\n"
        "from consilium_common.cli import main\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        f"sys.argv = ['consilium', 'study', 'check', {str(path)!r}]\n"
        "main()"
    )
    loaded, said = [], set()
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, CACHE_VARIABLE: str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            check=True,
        )
        loaded.append(done.stderr.split()[-1])
        said.add(done.stdout)
    assert loaded == ["True", "False"]
    assert len(said) == 1
