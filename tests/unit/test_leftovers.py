"""What an ended study kept at its site goes; the site's own model and what was released stay."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from strategy_samples import strategy_study
from typer.testing import CliRunner

from consilium_client import deciding, leftovers
from consilium_client.cli import app
from consilium_client.encoding import LOST
from consilium_client.home import SiteHome
from consilium_client.identity import SiteIdentity
from consilium_client.leftovers import forget, own_model, tidy
from consilium_client.proposals import Proposal
from consilium_client.store import Decision, StoredUpdate, StudyStore
from consilium_common.errors import ConsiliumError
from consilium_common.models.exchange import CONTROL
from consilium_common.models.weights import pack, unpack
from consilium_common.study import Study

OWN = {"head.weight": np.arange(3, dtype=np.float32)}
REST = {CONTROL + "head.weight": np.ones(3, np.float32), LOST + "body": np.ones(2, np.float32)}
BLOB = b"the update"


@pytest.fixture
def home(tmp_path: Path) -> SiteHome:
    return SiteHome.create(tmp_path / "site")


def trained(home: SiteHome, strategy: str, name: str = "tiny") -> tuple[Decision, StoredUpdate]:
    """Return an approved study of which one round was trained and one model was sent."""
    plain = strategy_study(strategy).to_canonical()
    study = Study.model_validate({**plain, "name": name})
    store = StudyStore(home)
    decision = store.decide(study, "approved", 5, "")
    kept = pack({**(OWN if strategy in ("ditto", "fedbn", "fedrep") else {}), **REST})
    update = store.keep_update(study.digest, 0, BLOB, {}, kept=kept)
    folder = home.models / study.digest[:16]
    folder.mkdir()
    (folder / "model").write_bytes(b"a model")
    return decision, update


def left(home: SiteHome) -> set[str]:
    """Return what of studies lies in the folders of models and of kept files."""
    return {path.name for folder in (home.models, home.kept) for path in folder.iterdir()}


def end(home: SiteHome, decision: Decision, how: str) -> None:
    if how == "withdrawn":
        decision = StudyStore(home).decide(decision.study, "declined", 0, "closed")
    forget(home, decision, finished=how == "finished")


@pytest.mark.parametrize("how", ["finished", "withdrawn"])
@pytest.mark.parametrize("strategy", ["scaffold", "fedavg", "ditto", "fedbn", "fedrep"])
def test_only_the_site_s_own_model_stays_and_what_was_released(
    home: SiteHome, strategy: str, how: str
) -> None:
    decision, update = trained(home, strategy)
    digest = decision.study.digest
    end(home, decision, how)
    own = own_model(home, digest)
    if strategy in ("scaffold", "fedavg"):
        assert (own, left(home)) == (None, set())
    else:
        assert own == home.kept / f"{digest[:16]}-personal.safetensors"
        assert left(home) == {own.name}
        assert own.stat().st_mode & 0o777 == 0o600
        found = unpack(own.read_bytes())
        assert found.keys() == OWN.keys()
        assert np.array_equal(found["head.weight"], OWN["head.weight"])
    assert update.file.read_bytes() == BLOB
    store = StudyStore(home)
    assert store.kept(digest) is None
    if how == "finished":  # asked again it is the stored one, and nothing is charged anew
        assert store.update(digest, 0) == update
    else:
        with pytest.raises(ConsiliumError, match=r"study\.withheld"):
            store.update(digest, 0)
    forget(home, store.approved(digest) if how == "finished" else decision, finished=True)
    assert own_model(home, digest) == own


def test_a_model_that_the_results_hold_already_is_not_kept_twice(home: SiteHome) -> None:
    decision, _ = trained(home, "ditto")
    result = home.reports / decision.study.digest[:16] / "personal.safetensors"
    result.parent.mkdir()
    result.write_bytes(b"the whole model")
    end(home, decision, "finished")
    assert left(home) == set()
    assert own_model(home, decision.study.digest) == result


def test_a_study_that_may_go_on_or_was_approved_anew_loses_nothing(home: SiteHome) -> None:
    decision, _ = trained(home, "ditto")
    before = left(home)
    forget(home, decision)
    store = StudyStore(home)
    declined = store.decide(decision.study, "declined", 0, "")
    store.decide(decision.study, "approved", 5, "")
    forget(home, declined)
    forget(home, decision, finished=True)  # of an approval that was replaced
    assert left(home) == before
    assert len(before) == 2


def test_a_new_approval_begins_anew_beside_the_model_of_the_one_before(home: SiteHome) -> None:
    decision, _ = trained(home, "fedrep")
    end(home, decision, "withdrawn")
    digest = decision.study.digest
    store = StudyStore(home)
    store.decide(decision.study, "approved", 5, "")
    assert store.kept(digest) is None
    kept = pack({"head.weight": np.zeros(3, np.float32)})
    store.keep_update(digest, 1, BLOB, {}, kept=kept)
    assert store.kept(digest) == kept
    assert left(home) == {f"{digest[:16]}-personal.safetensors", f"{digest[:16]}-00001.safetensors"}


def test_an_altered_model_of_its_own_is_not_taken_for_it_and_nothing_is_removed(
    home: SiteHome,
) -> None:
    for strategy in ("ditto", "scaffold"):
        decision, _ = trained(home, strategy, strategy)
        (file,) = home.kept.iterdir()
        file.write_bytes(file.read_bytes()[:-1] + b"x")
        before = left(home)
        if strategy == "ditto":
            with pytest.raises(ConsiliumError, match=r"state\.kept-lost"):
                end(home, decision, "finished")
            assert left(home) == before
            file.unlink()  # there is nothing to save
        end(home, decision, "finished")
        assert left(home) == set()


def test_files_that_a_crash_left_go_at_the_next_look(
    home: SiteHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    decision, _ = trained(home, "ditto")

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(leftovers, "drop_rounds", dies)
        with pytest.raises(KeyboardInterrupt):
            end(home, decision, "finished")
    own = own_model(home, decision.study.digest)
    assert own is not None
    content = own.read_bytes()
    assert len(left(home)) == 3
    end(home, decision, "finished")
    assert left(home) == {own.name}
    assert own.read_bytes() == content


# --- the running site ----------------------------------------------------------------------------


class Identity:
    """Stands where the site's identity does; counts calls, and answers with states."""

    def __init__(self, states: dict[str, Decision], monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        known = [Proposal(d.study, "op", "now", state, None) for state, d in states.items()]
        monkeypatch.setattr(leftovers, "proposals_over", lambda *_: known)

    def caller(self) -> Any:
        self.calls += 1
        return self

    def close(self) -> None:
        """Nothing is open."""


def look(home: SiteHome, identity: Any) -> None:
    asyncio.run(tidy(home, identity))


def test_a_running_site_forgets_the_finished_and_keeps_what_may_go_on(
    home: SiteHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = {
        state: trained(home, "scaffold", state)[0]
        for state in ("finished", "running", "paused", "stopped", "failed")
    }
    digests = {state: decision.study.digest for state, decision in states.items()}
    home.running.write_text(json.dumps([digests["running"]]))
    identity = Identity(states, monkeypatch)
    look(home, identity)
    assert identity.calls == 1
    names = {digest[:16] for state, digest in digests.items() if state != "finished"}
    assert left(home) == names | {f"{name}-00000.safetensors" for name in names}


def test_what_was_withdrawn_from_goes_without_a_connection_also_while_others_go_on(
    home: SiteHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    decision, _ = trained(home, "scaffold")
    home.running.write_text(json.dumps([decision.study.digest]))
    identity = Identity({}, monkeypatch)
    look(home, identity)
    assert len(left(home)) == 2
    StudyStore(home).decide(decision.study, "declined", 0, "")
    look(home, identity)
    assert left(home) == set()
    look(home, identity)
    assert identity.calls == 0


def test_what_cannot_be_removed_is_said_once_and_looked_at_again(
    home: SiteHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    decision, _ = trained(home, "ditto")
    StudyStore(home).decide(decision.study, "declined", 0, "")
    (file,) = home.kept.iterdir()
    sound = file.read_bytes()
    file.write_bytes(b"damaged")
    monkeypatch.setattr(leftovers, "LOOK_SECONDS", 0.001)
    identity, said = Identity({}, monkeypatch), []

    async def until_removed() -> None:
        looking = asyncio.create_task(leftovers.tidy_for_ever(home, identity, said.append))  # type: ignore[arg-type]
        async with asyncio.timeout(20):
            while not said:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)
            file.write_bytes(sound)  # out of the backup
            while own_model(home, decision.study.digest) is None:
                await asyncio.sleep(0.001)
        looking.cancel()

    asyncio.run(until_removed())
    assert len(said) == 1
    assert "state.kept-lost" in said[0]


def test_who_withdraws_is_told_where_the_site_s_own_model_stays(
    home: SiteHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    decision, _ = trained(home, "ditto")
    monkeypatch.setattr(SiteIdentity, "load", lambda _: None)
    monkeypatch.setattr(deciding, "tell", lambda *_: None)
    arguments = ["withdraw", "tiny", "--why", "closed", "--home", str(home.path)]
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 0, answer.output
    (own,) = home.kept.iterdir()
    assert own == own_model(home, decision.study.digest)
    assert own.name in answer.stdout.replace("\n", "")
