"""What the privacy officer can hold in the hand after a private study over real processes."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import Federation, Running, add_hospitals, consilium, small_study, wait_for

from consilium_common.demo.hospitals import NAMES as HOSPITALS
from consilium_common.models.registry import initial_weights, tensor_specs, trained_specs
from consilium_common.models.weights import pack, unpack
from consilium_common.study import Study

#: Two hospitals are enough: what is shown here is shown for each by itself.
NAMES = HOSPITALS[:2]

#: Adaptive clipping, first and last layer of a public start, noised evaluations, averaging.
EVERYTHING: dict[str, dict[str, Any]] = {
    "model": {"trainable": "first+last"},
    "training": {
        "optimiser": {"name": "adamw-bc", "learning_rate": 0.01},
        "augmentation": {"flip": 0.5, "copies": 2},
    },
    "privacy": {
        "mode": "patient",
        "sampling_rate": 0.5,
        "clip_norm": 1.0,
        "clipping": {"kind": "adaptive", "count_noise": 10.0},
        "noise_multiplier": 4.0,
        "delta": 0.001,
    },
    "federation": {"averaging": 0.5},
    "evaluation": {"release": "private", "epsilon": 1.0},
}


def with_start(
    folder: Path, study: dict[str, Any], *, bias: float = 0.01
) -> tuple[dict[str, Any], Path]:
    """Return the study with a public start that leans to the liver, and the file of its weights."""
    plain = {**study["model"], "trainable": "all"}
    weights = initial_weights(Study.model_validate({**study, "model": plain}))
    (last,) = [name for name, tensor in weights.items() if tensor.shape == (2,)]
    weights[last] = np.array([-bias, bias], dtype=np.float32)
    blob = pack(weights)
    path = folder / f"{study['name']}.safetensors"
    path.write_bytes(blob)
    start = {"sha256": hashlib.sha256(blob).hexdigest(), "data": "made-up shapes, public"}
    return {**study, "model": {**study["model"], "start": start}}, path


def propose_with_start(federation: Federation, study: dict[str, Any], start: Path) -> str:
    """Propose a study with its starting weights and return its digest."""
    import yaml

    path = federation.folder / f"{study['name']}.yaml"
    path.write_text(yaml.safe_dump(study))
    digest: str = federation.study("propose", path, "--start", start).data["digest"]
    return digest


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A consortium of its own: what is spent and broken here is nobody else's."""
    with Federation(tmp_path_factory.mktemp("officer")) as running:
        add_hospitals(running, NAMES)
        yield running


@pytest.fixture(scope="module")
def finished(federation: Federation) -> tuple[Study, dict[str, Any]]:
    """A study with every lever, run to its end."""
    for name in NAMES:
        federation.sites[name].set_policy(private_metrics_epsilon=2.0)
    study, start = with_start(federation.folder, small_study("officer", **EVERYTHING))
    digest = propose_with_start(federation, study, start)
    federation.approve(digest, *NAMES)
    federation.study("run", digest).data  # noqa: B018
    return Study.model_validate(study), federation.study("watch", digest).data


def test_only_trained_tensors_leave_and_the_rest_stays_as_it_was_in_public(
    federation: Federation, finished: tuple[Study, dict[str, Any]]
) -> None:
    study, shown = finished
    assert shown["state"] == "finished"
    trained = {spec.name for spec in trained_specs(study)}
    everything = {spec.name for spec in tensor_specs(study)}
    assert trained < everything
    (model,) = federation.home.glob(f"studies/{study.digest[:16]}/model.safetensors")
    after = unpack(model.read_bytes())
    before = unpack((federation.folder / "officer.safetensors").read_bytes())
    assert set(after) == everything
    for name in everything:
        changed = bool((after[name] != before[name]).any())
        assert changed == (name in trained), name
    for site in NAMES:
        for stored in federation.sites[site].home.glob(
            f"releases/{study.digest[:16]}-*.safetensors"
        ):
            assert set(unpack(stored.read_bytes())) == trained


def test_the_starting_model_is_evaluated_first_and_figures_carry_their_error(
    finished: tuple[Study, dict[str, Any]],
) -> None:
    study, shown = finished
    evaluations = shown["evaluations"]
    assert [row["rounds_done"] for row in evaluations] == list(study.evaluations) == [0, 2]
    for row in evaluations:
        assert row["standard_error"] > 0
        assert row["sites"] == sorted(NAMES)
        assert "dice" not in json.dumps(row).lower()


def test_training_and_evaluation_are_charged_to_different_patients(
    federation: Federation, finished: tuple[Study, dict[str, Any]], tmp_path: Path
) -> None:
    study, _ = finished
    for name in NAMES:
        site = federation.sites[name]
        site("evidence", tmp_path / name).data  # noqa: B018
        cohorts: dict[str, set[str]] = {}
        charged: dict[str, list[tuple[int, set[str]]]] = {"training": [], "evaluation": []}
        for line in (tmp_path / name / "ledger.jsonl").read_text().splitlines():
            value = json.loads(line)
            if "witness" in value:
                continue
            body, kind = value["content"]["body"], value["content"]["kind"]
            if kind == "cohort":
                cohorts[body["cohort"]] = set(body["patients"])
            elif kind == "charge" and body["study"] == study.digest:
                charged[body["purpose"]].append((body["round"], cohorts[body["cohort"]]))
        assert [number for number, _ in charged["training"]] == [0, 1]
        assert [number for number, _ in charged["evaluation"]] == [0, 2]
        for _, trained in charged["training"]:
            for _, evaluated in charged["evaluation"]:
                assert not trained & evaluated


def test_the_head_of_every_ledger_is_witnessed_and_the_evidence_verifies(
    federation: Federation, finished: tuple[Study, dict[str, Any]], tmp_path: Path
) -> None:
    study, _ = finished
    for name in NAMES:
        evidence = tmp_path / name

        def witnessed(name: str = name, evidence: Path = evidence) -> dict[str, Any] | None:
            shutil.rmtree(evidence, ignore_errors=True)
            federation.sites[name]("evidence", evidence).data  # noqa: B018
            (report,) = consilium("audit", "verify", evidence).data["ledgers"]
            return report if report["witnessed"]["last"] == report["entries"] - 1 else None

        report: dict[str, Any] = wait_for(witnessed, "a witnessed head", timeout=20)
        assert report["verified"]
        records = tmp_path / f"{name}.records.json"
        federation.server("records", name, records).data  # noqa: B018
        assert consilium("audit", "compare", evidence, records).data["differences"] == []
        page = tmp_path / f"{name}.html"
        consilium("audit", "report", evidence, "--records", records, "--out", page).data  # noqa: B018
        text = page.read_text()
        assert study.digest in text
        assert "made-up shapes, public" in text
        for foreign in ("http://", "https://", "<script"):
            assert foreign not in text.replace("http://www.w3.org/", "")


def test_a_good_enough_start_ends_the_study_before_any_budget_is_spent_on_training(
    federation: Federation, finished: tuple[Study, dict[str, Any]]
) -> None:
    del finished  # its hospitals: they release noised figures
    for name in NAMES:
        federation.sites[name].set_policy(
            private_metrics_epsilon=60.0, budget={"epsilon": 90.0, "delta": 0.001}
        )
    study = small_study("enough", **EVERYTHING)
    # Everything called liver scores about 0.12 and the noise here is 0.02: chance decides nothing.
    study["evaluation"] |= {"sufficient": 0.001, "epsilon": 50.0}
    # This start calls everything liver: a poor model, and yet better than the study asks for.
    study, start = with_start(federation.folder, study, bias=10.0)
    digest = propose_with_start(federation, study, start)
    federation.approve(digest, *NAMES)
    federation.study("run", digest).data  # noqa: B018
    shown = federation.study("watch", digest).data
    assert shown["state"] == "finished"
    assert shown["rounds"] == []
    assert "starting model" in shown["reason"]
    assert [row["rounds_done"] for row in shown["evaluations"]] == [0]
    for name in NAMES:
        spend = federation.sites[name]("budget").data["spend"]
        (spent,) = [s for s in spend["studies"] if s["study"] == digest]
        assert (spent["rounds"], spent["evaluations"]) == (0, 1)


def test_a_ledger_that_was_rolled_back_is_found_and_trains_no_more(
    federation: Federation, finished: tuple[Study, dict[str, Any]]
) -> None:
    del finished
    site = federation.sites[NAMES[1]]
    ledger = site.home / "ledger.db"
    site.stop()
    before = federation.folder / "earlier.db"
    _copy(ledger, before)
    site.start()
    digest = federation.propose(_private("later"))
    federation.approve(digest, *NAMES)
    federation.study("run", digest).data  # noqa: B018
    federation.study("watch", digest).data  # noqa: B018

    def all_witnessed() -> bool:
        sites = federation.server("sites").data["sites"]
        (row,) = [row for row in sites if row["name"] == site.name]
        return bool(row["witnessed"] == len(_entries(ledger)) - 1)

    wait_for(all_witnessed, "the last head's witness", timeout=20)
    site.stop()
    later = federation.folder / "later.db"
    _copy(ledger, later)
    _put_back(before, ledger)
    site.launch()
    running = site.running
    assert isinstance(running, Running)
    running.wait_until_says("privacy.witness-conflict", timeout=30)
    digest = federation.propose(_private("refused-by-witness"))
    answer = site("approve", digest, "--yes")
    assert answer.code == "privacy.ledger-rolled-back"
    site.stop()
    # As the error says: with the newest copy back in place the site works again.
    _put_back(later, ledger)
    (site.home / "ledger.conflict").unlink()
    site.start()
    site("approve", digest, "--yes").data  # noqa: B018


def _private(name: str) -> dict[str, Any]:
    return small_study(name, privacy=EVERYTHING["privacy"], evaluation={"release": "none"})


def _copy(ledger: Path, to: Path) -> None:
    """Copy a ledger as a backup does: with what still stands in its write-ahead log."""
    with sqlite3.connect(ledger) as source, sqlite3.connect(to) as target:
        source.backup(target)
    source.close()
    target.close()


def _put_back(copy: Path, ledger: Path) -> None:
    for side in ("-wal", "-shm"):
        ledger.with_name(ledger.name + side).unlink(missing_ok=True)
    shutil.copyfile(copy, ledger)


def _entries(ledger: Path) -> list[bytes]:
    with sqlite3.connect(f"file:{ledger}?mode=ro", uri=True) as db:
        return [row[0] for row in db.execute("SELECT line FROM entry ORDER BY sequence")]
