"""Studies run to their end over real processes and the one port, and cost what they say."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import PRIVATE, Federation, consilium, small_study

from consilium_common.demo.hospitals import NAMES


def test_dicom_nifti_and_csv_sites_train_one_study_to_its_end(federation: Federation) -> None:
    found = federation.run_to_end(small_study("plain", federation={"rounds": 3}))
    assert found["state"] == "finished"
    assert [row["number"] for row in found["rounds"]] == [0, 1, 2]
    for row in found["rounds"]:
        assert row["sites"] == sorted(NAMES)
        assert row["dropped"] == {}
        assert row["loss"] > 0
    evaluation = found["rounds"][-1]["metrics"]["evaluation"]
    assert set(evaluation) == set(NAMES)
    for site in federation.sites.values():
        if site.name in NAMES:
            results = site("results", "plain").data
            assert results["rounds_done"] == 3
            assert set(results["dice"]) == {"liver"}


@pytest.fixture(scope="module")
def private(federation: Federation) -> dict[str, Any]:
    """A private study that has run to its end."""
    return federation.run_to_end(small_study("private", **PRIVATE))


def test_a_private_study_costs_what_an_independent_computation_says(
    federation: Federation, private: dict[str, Any], tmp_path: Path
) -> None:
    assert private["state"] == "finished"

    def check(name: str) -> None:
        home = federation.sites[name].home
        export = tmp_path / f"{name}.jsonl"
        consilium("audit", "export", home / "ledger.db", export).data  # noqa: B018
        key = home / "identity" / "ledger-public.pem"
        (report,) = consilium("audit", "verify", export, "--key", key).data["ledgers"]
        (cost,) = [s for s in report["studies"] if s["study"] == private["digest"]]
        assert (cost["rounds"], cost["released"]) == (2, 2)

        expected = _epsilon_of_recorded_events(export, private["digest"])
        assert 0.1 < expected < 10
        assert cost["epsilon"]["epsilon"]["pld"] == pytest.approx(expected, abs=0.005)
        budget = federation.sites[name]("budget").data
        (spent,) = [s for s in budget["spend"]["studies"] if s["study"] == private["digest"]]
        assert spent["study_epsilon"] == pytest.approx(expected, abs=0.005)
        assert budget["remaining"] == pytest.approx(10 - budget["spend"]["epsilon"]["most"])
        assert private["epsilon"][name] == pytest.approx(expected, abs=0.005)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(check, NAMES))


def _epsilon_of_recorded_events(export: Path, digest: str) -> float:
    """Compose what the ledger's lines say was done, with nothing of consilium's."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant()
    delta = 1.0
    for line in export.read_text().splitlines():
        entry = json.loads(line).get("content")  # a witness record has none
        if entry is None or entry["kind"] != "charge" or entry["body"]["study"] != digest:
            continue
        event = entry["body"]["event"]
        step = PoissonSampledDpEvent(
            event["sampling_rate"], GaussianDpEvent(event["noise_multiplier"])
        )
        accountant.compose(SelfComposedDpEvent(step, event["steps"]))
        delta = min(delta, entry["body"]["delta"])
    return float(accountant.get_epsilon(delta))


def test_nothing_of_a_private_study_that_depends_on_data_reaches_the_aggregator(
    private: dict[str, Any],
) -> None:
    for row in private["rounds"]:
        assert row["loss"] is None
        assert row["metrics"] == {}
    assert private["evaluation"] == {}


def test_a_charged_ledger_does_not_verify_once_a_line_is_changed(
    federation: Federation, private: dict[str, Any], tmp_path: Path
) -> None:
    home = federation.sites[NAMES[0]].home
    export = tmp_path / "changed.jsonl"
    consilium("audit", "export", home / "ledger.db", export).data  # noqa: B018
    text = export.read_text()
    assert '"noise_multiplier":4.0' in text
    export.write_text(text.replace('"noise_multiplier":4.0', '"noise_multiplier":5.0', 1))
    key = home / "identity" / "ledger-public.pem"
    assert consilium("audit", "verify", export, "--key", key).code == "privacy.ledger-broken"


def test_an_update_with_nan_is_left_out_and_the_round_goes_on(federation: Federation) -> None:
    from consilium_client.home import SiteHome
    from consilium_client.store import StudyStore
    from consilium_common.models.registry import initial_weights
    from consilium_common.models.weights import pack
    from consilium_common.study import Study

    study = small_study("poisoned")
    digest = federation.propose(study)
    federation.approve(digest)
    # This hospital's disk gives NaN back for the first round: a stored update is sent as it is.
    weights = initial_weights(Study.model_validate(study))
    broken = next(name for name, tensor in weights.items() if tensor.ndim > 1)
    weights[broken] = np.full_like(weights[broken], np.nan)
    victim = NAMES[2]
    store = StudyStore(SiteHome.existing(federation.sites[victim].home))
    store.keep_update(digest, 0, pack(weights), {})

    federation.study("run", digest).data  # noqa: B018
    found = federation.study("watch", digest).data
    first, second = found["rounds"]
    assert first["sites"] == sorted(set(NAMES) - {victim})
    assert set(first["dropped"]) == {victim}
    # Its own link does not let it out; what the aggregator does with one is test_aggregation's.
    assert "privacy.egress" in first["dropped"][victim]
    assert second["sites"] == sorted(NAMES)
    assert np.isfinite(second["loss"])


def test_a_round_without_a_quorum_waits_and_says_why_and_goes_on_when_it_can(
    federation: Federation,
) -> None:
    from consilium_client.home import SiteHome
    from consilium_client.store import StudyStore

    digest = federation.propose(small_study("refused", federation={"rounds": 1, "quorum": 3}))
    federation.approve(digest)
    # The aggregator has the approval; the hospital's own record decides, and says no.
    home = SiteHome.existing(federation.sites[NAMES[1]].home)
    store = StudyStore(home)
    approval = store.approved(digest)
    declined = store.decide(approval.study, "declined", 0, "changed our mind")
    store.note_told(declined)  # or the running site would tell it now
    federation.study("run", digest).data  # noqa: B018
    shown = federation.wait_until(
        digest,
        lambda row: NAMES[1] in row["standing"]["waits_for"],
        "the study to say why it waits",
    )
    assert shown["standing"]["waits_for"].startswith("waiting for 1 more site; ")
    assert "study.not-approved" in shown["standing"]["waits_for"]
    assert (shown["state"], shown["rounds"]) == ("running", [])
    # The hospital thinks again; what the others have sent is still there.
    federation.approve(digest, NAMES[1])
    assert federation.study("watch", digest).data["rounds"][0]["sites"] == sorted(NAMES)
