"""Which models stay at a site: those that a task may wait for, whatever other studies do."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from egress_samples import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium_client import received
from consilium_client.home import SiteHome
from consilium_client.received import Received, model_file, note_refusal
from consilium_common.errors import ConsiliumError
from consilium_common.wire.messages import Reference

ONE, OTHER = "1" * 64, "2" * 64
MODELS = [reference(bytes([number])) for number in range(6)]


@pytest.fixture
def home(tmp_path: Path) -> SiteHome:
    return SiteHome(tmp_path)


def come(models: Received, study: str, model: Reference) -> Path:
    """Ask for a model and let it come, by a clock that is wrong by a day more each time."""
    path = models.ask(study, model)
    path.write_bytes(b"the model")
    when = time.time() - 86400 * len(list(path.parent.iterdir()))
    os.utime(path, (when, when))
    return path


@given(asked=st.lists(st.tuples(st.sampled_from([ONE, OTHER]), st.sampled_from(MODELS))))
@settings(max_examples=25, deadline=None)
def test_of_each_study_the_three_models_asked_for_last_stay(
    tmp_path_factory: pytest.TempPathFactory, asked: list[tuple[str, Reference]]
) -> None:
    home = SiteHome(tmp_path_factory.mktemp("site"))
    models = Received(home)
    last: dict[str, list[str]] = {ONE: [], OTHER: []}
    for study, model in asked:
        come(models, study, model)
        names = [one for one in last[study] if one != model.sha256]
        last[study] = [*names, model.sha256][-3:]
    for study, names in last.items():
        folder = model_file(home, study, MODELS[0]).parent
        assert {path.name for path in folder.iterdir()} == set(names)


def test_what_has_come_in_part_stays_with_its_model_and_a_refusal_until_it_is_asked_again(
    home: SiteHome,
) -> None:
    models = Received(home)
    path = models.ask(ONE, MODELS[0])
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(b"a half")
    note_refusal(path, ConsiliumError("run.no-model", "It is not on offer."))
    for model in MODELS[1:3]:
        models.ask(ONE, model)
    assert {one.suffix for one in path.parent.iterdir()} == {".part", ".refused"}
    models.ask(ONE, MODELS[0])
    assert list(path.parent.iterdir()) == [part]
    for model in MODELS[3:]:
        models.ask(ONE, model)
    assert list(path.parent.iterdir()) == []


def test_a_link_that_begins_anew_keeps_what_the_one_before_it_left(home: SiteHome) -> None:
    before = Received(home)
    for model in MODELS[:2]:
        before.ask(ONE, model).write_bytes(b"the model")
    path = Received(home).ask(ONE, MODELS[2])
    assert {one.name for one in path.parent.iterdir()} == {one.sha256 for one in MODELS[:2]}


def test_models_of_a_study_that_does_not_run_go_once_nobody_can_wait_for_them(
    home: SiteHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = Received(home)
    paths = [come(models, study, MODELS[0]) for study in (ONE, OTHER)]
    models.tidy([])
    # A study that has just begun is not said to run yet.
    assert all(path.exists() for path in paths)
    moment = time.monotonic() + received._UNUSED_SECONDS + 1
    monkeypatch.setattr("consilium_client.received.time.monotonic", lambda: moment)
    models.tidy([ONE])
    assert paths[0].exists()
    assert not paths[1].parent.exists()
    assert come(models, OTHER, MODELS[1]).exists()  # it runs again
