"""What is refused before a study is simulated, and what stands in for the wire while it is."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from round_samples import tiny_study

from consilium_client import simulated
from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.files import private_folder
from consilium_common.study import Study
from consilium_common.wire.messages import Instructions, Reference, to_server, to_site
from consilium_server.arrivals import ArrivalLists
from consilium_server.home import ServerHome
from consilium_server.simulating import Wire, _register, simulate
from consilium_server.study_files import StudyFiles


def code_of(call: Any, *arguments: Any, **named: Any) -> str:
    with pytest.raises(ConsiliumError) as caught:
        call(*arguments, **named)
    return caught.value.code


def site_at(folder: Path) -> Path:
    """Make what `site data import` makes, as far as a site is known by it."""
    private_folder(folder / "data")
    (folder / "data" / "site.yaml").touch()
    return folder


def test_sites_are_found_by_their_data_and_named_as_they_joined(tmp_path: Path) -> None:
    site_at(tmp_path / "site-north")
    site_at(tmp_path / "b")
    (tmp_path / "b" / "site.json").write_text(
        '{"name": "south", "consortium": "c", "address": "a:1"}'
    )
    (tmp_path / "images").mkdir()
    (tmp_path / "notes.txt").touch()
    assert simulated.sites_in(tmp_path) == {
        "north": tmp_path / "site-north",
        "south": tmp_path / "b",
    }
    site_at(tmp_path / "north")
    assert code_of(simulated.sites_in, tmp_path) == "data.same-site"
    assert code_of(simulated.sites_in, tmp_path / "images") == "data.no-sites"
    assert code_of(simulated.sites_in, tmp_path / "missing") == "data.no-sites"


def test_what_cannot_be_simulated_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, sites, out = tiny_study(), tmp_path / "sites", tmp_path / "out"
    real, here = importlib.util.find_spec, []

    def find(name: str) -> Any:
        return (object() if here else None) if name == "ray" else real(name)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    assert code_of(simulate, study, sites, out) == "usage.extra"
    assert not out.exists()
    here.append(True)
    site_at(sites / "alone")
    # What it sets for the processes that it starts is no business of other tests.
    with patch.dict(os.environ):
        assert code_of(simulate, study, sites, out) == "run.too-few-sites"
        assert code_of(simulate, study, sites, sites) == "state.not-empty"


class Engine:
    """Flower's grid with sites behind it that answer with what they are told to."""

    def __init__(self) -> None:
        self.answers: dict[int, Any] = {}
        self._waiting: dict[str, Any] = {}

    def get_node_ids(self) -> list[int]:
        return [22, 11]

    def push_messages(self, messages: list[Any]) -> list[str]:
        from flwr.app import Error, Message

        pushed = []
        for message in messages:
            identity = f"m{len(self._waiting)}"
            message.metadata.__dict__["_message_id"] = identity
            answer = self.answers[message.metadata.dst_node_id]
            if isinstance(answer, str):
                reply = Message(Error(code=1, reason=answer), reply_to=message)
            else:
                reply = Message(content=answer, reply_to=message)
            self._waiting[identity] = reply
            pushed.append(identity)
        return pushed

    def pull_messages(self, identities: Any) -> list[Any]:
        return [self._waiting.pop(one) for one in list(identities) if one in self._waiting]


@pytest.fixture(autouse=True)
def _run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message names the run that it is of, which Flower sets for a process."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def wired(tmp_path: Path) -> tuple[Wire, Engine, ServerHome, Study]:
    """A wire between a registry and the engine's two nodes."""
    study = tiny_study()
    home = ServerHome.create(tmp_path / "aggregator")
    sizes = {"cohort_size": 5, "evaluation_size": 0}
    registry = _register(home, study, {"east": sizes, "west": sizes})
    homes = {name: tmp_path / name for name in ("east", "west")}
    wire, engine = Wire(home, registry, study, homes, tmp_path), Engine()
    wire.connect(engine)  # type: ignore[arg-type]
    assert registry.site("east").node_id == "11"
    assert not registry.site("east").online
    assert wire.get_node_ids() == [11, 22]
    assert registry.site("east").online and registry.site("west").online
    return wire, engine, home, study


def messages(study: Study, kind: str) -> list[Any]:
    """Return a message to each node."""
    from flwr.app import Message

    content = to_site(Instructions(study.digest, 0, 5))
    return [Message(content=content, dst_node_id=node, message_type=kind) for node in (11, 22)]


def test_a_message_is_on_its_way_until_its_reply_and_its_file_are_here(
    wired: tuple[Wire, Engine, ServerHome, Study], tmp_path: Path
) -> None:
    wire, engine, home, study = wired
    files = StudyFiles(home.study_folder(study.digest))
    for node, site in ((11, "east"), (22, "west")):
        written = tmp_path / "written"
        written.write_bytes(site.encode() * 1000)
        update = Reference.of(written)
        written.rename(tmp_path / "updates" / update.sha256)
        engine.answers[node] = to_server(update, None)
        files.expect(site, 0, 10_000)
    pushed = wire.push_messages(messages(study, "train"))
    assert not list((tmp_path / "updates").iterdir())
    for site, node in (("east", 11), ("west", 22)):
        (arrived,) = (home.study_folder(study.digest) / "in" / site).glob("?" * 64)
        assert arrived.read_bytes() == site.encode() * 1000
        assert len(ArrivalLists(home.arrived).since(str(node), 0)) == 1
    assert len(list(wire.pull_messages(pushed))) == 2
    assert list(wire.pull_messages(pushed)) == []


def test_an_update_larger_than_was_expected_never_takes_its_place(
    wired: tuple[Wire, Engine, ServerHome, Study], tmp_path: Path
) -> None:
    wire, engine, home, study = wired
    written = tmp_path / "written"
    written.write_bytes(bytes(100))
    engine.answers = dict.fromkeys((11, 22), to_server(Reference.of(written), None))
    StudyFiles(home.study_folder(study.digest)).expect("east", 0, 99)
    assert code_of(wire.push_messages, messages(study, "train")) == "run.site-failed"


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (canonical_json({"code": "data.missing", "message": "No image."}).decode(), "data.missing"),
        ("words of Flower's own", "run.site-failed"),
        ("[1]", "run.site-failed"),
    ],
)
def test_what_a_site_fails_with_ends_the_simulation_and_names_it(
    wired: tuple[Wire, Engine, ServerHome, Study], reason: str, code: str
) -> None:
    wire, engine, _, study = wired
    engine.answers = {11: to_server(None, {}), 22: reason}
    with pytest.raises(ConsiliumError, match="west: ") as caught:
        wire.push_messages(messages(study, "evaluate"))
    assert caught.value.code == code


def test_when_the_engine_ends_nobody_waits_for_it(
    wired: tuple[Wire, Engine, ServerHome, Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    wire, engine, _, study = wired
    engine.answers = dict.fromkeys((11, 22), to_server(None, {}))
    monkeypatch.setattr(engine, "pull_messages", lambda identities: [])
    wire.close()
    assert code_of(wire.push_messages, messages(study, "evaluate")) == "run.simulation"
