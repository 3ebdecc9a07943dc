"""A ServerApp does a study's rounds only as the run that the registry names, and alone."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from state_samples import add_study, put

from consilium_common.errors import ConsiliumError
from consilium_common.processes import only_one
from consilium_server import app as app_module
from consilium_server.home import HOME_VARIABLE, ServerConfig, ServerHome
from consilium_server.lifecycle import SIMULATION
from consilium_server.registry import Registry
from consilium_server.tables import StudyRow


class House:
    """A running study, and rounds that do what a test says."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home = ServerHome.create(folder)
        self.home.save_config(ServerConfig("tests", "127.0.0.1:1"))
        self.registry = Registry(self.home.database)
        self.digest = add_study(self.registry, "liver", "north", "south")
        put(self.registry, self.digest, "running")
        self.rounds = 0
        self.error: Exception | None = None
        house = self

        class Rounds:
            def __init__(self, *_: object) -> None: ...

            def run(self) -> None:
                house.rounds += 1
                if house.error is not None:
                    raise house.error

        monkeypatch.setenv(HOME_VARIABLE, str(folder))
        monkeypatch.setattr(app_module, "StudyRun", Rounds)

    def named(self, run: str | None) -> None:
        with self.registry.transaction() as session:
            session.get_one(StudyRow, self.digest).flower_run = run

    def run(self, run_id: int) -> None:
        context: Any = SimpleNamespace(run_config={"study": self.digest}, run_id=run_id)
        app_module.app(grid=None, context=context)

    @property
    def row(self) -> StudyRow:
        return self.registry.study(self.digest)


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    return House(tmp_path, monkeypatch)


def test_the_run_that_is_named_does_the_rounds_and_another_does_none(house: House) -> None:
    house.named("17")
    house.run(16)
    assert house.rounds == 0
    house.run(17)
    assert house.rounds == 1
    house.named(SIMULATION)
    house.run(4711)
    assert house.rounds == 2
    put(house.registry, house.digest, "stopped")
    house.run(17)
    assert house.rounds == 2


def test_a_run_waits_a_moment_until_it_is_named(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer = threading.Timer(0.2, house.named, ["17"])
    timer.start()
    house.run(17)
    timer.join()
    assert house.rounds == 1
    monkeypatch.setattr(app_module, "_NAMED_SECONDS", 0.1)
    house.named(None)
    house.run(18)
    assert house.rounds == 1


def test_what_ends_the_rounds_is_written_down(house: House) -> None:
    house.named("17")
    house.error = ConsiliumError("run.diverged", "The mean is not finite.")
    with pytest.raises(ConsiliumError):
        house.run(17)
    assert (house.row.state, "not finite" in house.row.reason) == ("failed", True)


def test_two_processes_never_do_a_study_s_rounds_at_once(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.named("17")
    monkeypatch.setattr(app_module, "_ALONE_SECONDS", 0.1)
    lock = house.home.study_folder(house.digest) / "lock"
    with only_one(lock, "", hint=""), pytest.raises(ConsiliumError, match="Another process"):
        house.run(17)
    assert house.rounds == 0
    # It is a matter of a moment: the run is begun again.
    assert (house.row.state, house.row.flower_run) == ("running", None)
