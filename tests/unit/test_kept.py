"""What a study keeps at its site goes with its round, survives restarts, and never leaves."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from round_samples import NAME, RoundsAtSite, deciding_site, keyed_cohort, tiny_study
from strategy_samples import start_of

from consilium_client import store as stores
from consilium_client.declared import declared
from consilium_client.home import SiteHome
from consilium_client.store import StudyStore
from consilium_client.store_tables import make_tables, transaction
from consilium_common.errors import ConsiliumError
from consilium_common.ledger.store import Ledger
from consilium_common.models.compression import check_encoded
from consilium_common.models.exchange import CONTROL, kept_specs, sent_specs
from consilium_common.models.weights import pack, unpack
from consilium_common.study import Study

EXACT = "permit_non_private: true\nrelease_exact_metrics: true\n"


def study_of(strategy: Any, *, private: bool) -> Study:
    value = tiny_study(private=private, release="private" if private else "exact").to_canonical()
    value["federation"]["strategy"] = strategy
    return Study.model_validate(value)


def at_site(folder: Path, study: Study) -> RoundsAtSite:
    site = deciding_site(folder / "site", study)
    if study.privacy.mode == "none":
        site.home.policy.write_text(site.home.policy.read_text() + EXACT)
    rounds = RoundsAtSite(site, study, keyed_cohort())
    rounds.weights = pack(start_of(study))
    return rounds


def afresh(rounds: RoundsAtSite) -> RoundsAtSite:
    """Return what a worker that was started again holds."""
    again = RoundsAtSite(rounds.site, rounds.study, rounds.cohort)
    again.weights = rounds.weights
    return again


def kept_by(rounds: RoundsAtSite) -> dict[str, np.ndarray]:
    content = StudyStore(rounds.site.home).kept(rounds.study.digest)
    assert content is not None
    return unpack(content)


def report_of(rounds: RoundsAtSite, rounds_done: int) -> dict[str, Any]:
    folder = rounds.site.home.reports / rounds.study.digest[:16]
    found: dict[str, Any] = json.loads((folder / f"round-{rounds_done:05d}.json").read_text())
    return found


@pytest.mark.parametrize(
    ("strategy", "private"),
    [("scaffold", False), ("scaffold", True), ("fedbn", False), ("fedrep", False), ("ditto", True)],
)
def test_it_lies_apart_from_what_leaves_and_goes_on_after_a_restart(
    tmp_path: Path, strategy: str, private: bool
) -> None:
    rounds = at_site(tmp_path, study_of(strategy, private=private))
    first = rounds.train(0)
    names = {spec.name for spec in kept_specs(rounds.study)}
    kept = kept_by(rounds)
    assert kept.keys() == names
    assert unpack(first.blob).keys() == {spec.name for spec in sent_specs(rounds.study)}
    home = rounds.site.home
    (file,) = home.kept.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert home.kept.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in home.releases.iterdir()} == {first.file.name}
    # Asked again it is the stored update, and nothing moves.
    again = afresh(rounds)
    assert again.train(0).sha256 == first.sha256
    assert pack(kept_by(rounds)) == pack(kept)
    second = again.train(1)
    assert second.sha256 != first.sha256
    assert pack(kept_by(rounds)) != pack(kept)
    assert len(list(home.kept.iterdir())) == 1


@pytest.mark.parametrize("strategy", ["fedbn", "fedrep"])
def test_what_the_link_lets_out_has_no_place_for_personal_layers(
    tmp_path: Path, strategy: str
) -> None:
    rounds = at_site(tmp_path, study_of(strategy, private=False))
    update = rounds.train(0)
    allowed = declared(rounds.study).tensors
    check_encoded(rounds.study, allowed, update.file)
    more = tmp_path / "more.safetensors"
    more.write_bytes(pack({**unpack(update.blob), **kept_by(rounds)}))
    with pytest.raises(ConsiliumError, match=r"run\.bad-update"):
        check_encoded(rounds.study, allowed, more)


def test_a_round_that_died_before_it_was_stored_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of({"name": "ditto", "pull": 0.5}, private=False)
    whole = at_site(tmp_path / "whole", study)
    expected = [whole.train(0).sha256, whole.train(1).sha256]
    rounds = at_site(tmp_path / "dying", study)
    assert rounds.train(0).sha256 == expected[0]
    before = kept_by(rounds)

    def dies(name: str) -> None:
        if name == "training.file-written":  # the last point before the row stands
            raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(stores, "fault_point", dies)
        with pytest.raises(KeyboardInterrupt):
            rounds.train(1)
    assert len(list(rounds.site.home.kept.iterdir())) == 2  # written, and it does not stand
    assert pack(kept_by(rounds)) == pack(before)
    again = afresh(rounds)
    assert again.train(1).sha256 == expected[1]
    assert pack(kept_by(rounds)) == pack(kept_by(whole))
    assert len(list(rounds.site.home.kept.iterdir())) == 1


def test_a_lost_or_altered_file_stops_the_round_and_a_new_approval_begins_anew(
    tmp_path: Path,
) -> None:
    rounds = at_site(tmp_path, study_of("fedbn", private=False))
    rounds.train(0)
    (file,) = rounds.site.home.kept.iterdir()
    for damage in (lambda: file.write_bytes(file.read_bytes()[:-1] + b"x"), file.unlink):
        damage()
        with pytest.raises(ConsiliumError, match=r"state\.kept-lost") as caught:
            rounds.train(1)
        assert caught.value.hint
    store = StudyStore(rounds.site.home)
    store.decide(rounds.study, "declined", 0, "withdrawn")
    assert store.kept(rounds.study.digest) is None
    store.decide(rounds.study, "approved", 5, "")
    assert store.kept(rounds.study.digest) is None
    assert afresh(rounds).train(1).bytes > 0


def test_a_private_round_that_has_lost_what_it_begins_with_charges_nobody(tmp_path: Path) -> None:
    rounds = at_site(tmp_path, study_of("ditto", private=True))
    first = rounds.train(0)
    (file,) = rounds.site.home.kept.iterdir()
    file.unlink()
    assert rounds.train(0).sha256 == first.sha256  # what is stored is sent all the same
    with pytest.raises(ConsiliumError, match=r"state\.kept-lost"):
        rounds.train(1)
    with Ledger.open(rounds.site.home.ledger, site=NAME) as ledger:
        assert len(ledger.state.charges) == 1


def test_a_round_that_is_caught_up_later_is_the_one_that_counts(tmp_path: Path) -> None:
    study = study_of("ditto", private=False)
    store = StudyStore(at_site(tmp_path, study).site.home)
    store.keep_update(study.digest, 1, b"later", {}, kept=b"one")
    store.keep_update(study.digest, 0, b"earlier", {}, kept=b"two")
    assert store.kept(study.digest) == b"two"
    store.keep_update(study.digest, 2, b"last", {})
    assert store.kept(study.digest) == b"two"


def test_a_store_of_the_release_before_has_kept_nothing(tmp_path: Path) -> None:
    home = SiteHome.create(tmp_path / "site")
    StudyStore(home)
    with sqlite3.connect(home.studies) as connection:
        connection.execute("ALTER TABLE updates DROP COLUMN kept")
        connection.execute(
            "INSERT INTO updates (digest, purpose, round, sha256, bytes, figures, stored_at)"
            " VALUES ('d', 'training', 0, 'x', 1, '{}', '')"
        )
    with transaction(home.studies) as connection:
        make_tables(connection)
    assert StudyStore(home).kept("d") is None


# --- evaluation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fedbn", "fedrep", "ditto"])
def test_a_personal_model_is_the_one_that_is_evaluated_and_the_report_says_so(
    tmp_path: Path, strategy: str
) -> None:
    rounds = at_site(tmp_path, study_of(strategy, private=False))
    before = rounds.evaluate(0)
    assert report_of(rounds, 0)["model"] == "global"  # nothing was trained here yet
    rounds.train(0)
    rounds.train(1)
    after = rounds.evaluate(2)
    assert report_of(rounds, 2)["model"] == "personal"
    personal = rounds.session.personal(unpack(rounds.weights), kept_by(rounds))
    assert personal is not None
    figures = rounds.session.evaluate(personal, "test").to_dict()
    assert after["dice.organ.total"] == figures["dice"]["organ"]["total"]
    assert after != before
    folder = rounds.site.home.reports / rounds.study.digest[:16]
    assert (folder / "personal.safetensors").read_bytes() == pack(personal)
    assert (folder / "model.safetensors").read_bytes() == rounds.weights


def test_in_a_private_study_only_the_global_models_score_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A personal model has seen the training patients without noise; the noise of a score is made
    # for the test patients.
    rounds = at_site(tmp_path, study_of("ditto", private=True))
    rounds.train(0)
    scored: list[list[float]] = []
    monkeypatch.setattr(
        "consilium_client.score_query.ScoreQuery.release",
        lambda _, scores: scored.append(list(scores)) or 0.0,
    )
    assert rounds.evaluate(2) == {"sum": 0.0}
    report = report_of(rounds, 2)
    assert report["model"] == "personal"
    of_global = [row["values"]["organ"] for row in report["global"]["rows"]]
    of_personal = [row["values"]["organ"] for row in report["rows"]]
    assert scored == [of_global]
    assert of_global != of_personal


def test_scaffold_has_no_personal_model_and_its_report_holds_the_network_alone(
    tmp_path: Path,
) -> None:
    rounds = at_site(tmp_path, study_of("scaffold", private=False))
    rounds.train(0)
    rounds.evaluate(2)
    assert report_of(rounds, 2)["model"] == "global"
    folder = rounds.site.home.reports / rounds.study.digest[:16]
    model = unpack((folder / "model.safetensors").read_bytes())
    assert not any(name.startswith(CONTROL) for name in model)
    assert not (folder / "personal.safetensors").exists()
