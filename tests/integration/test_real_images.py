"""The shipped studies on real images, through real processes over mutual TLS."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from federation import Federation, consilium
from real_studies import (
    hippocampus_sites,
    mednist_sites,
    pooled_dice,
    run_example,
)

pytestmark = [pytest.mark.long, pytest.mark.data]


@pytest.fixture(scope="module")
def hippocampus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with hippocampus_sites(tmp_path_factory.mktemp("hippocampus")) as federation:
        yield federation


@pytest.mark.timeout(900)
def test_a_federated_3d_study_reaches_dice_082_in_eight_minutes(hippocampus: Federation) -> None:
    finished = run_example(hippocampus, "hippocampus", timeout=800)
    dice = pooled_dice(finished.results)
    assert dice["mean"] >= 0.82, dice
    # Without privacy and with the sites' leave the aggregator sees the same figures.
    assert finished.study["evaluation"]["mean_dice"] == pytest.approx(dice["mean"])
    assert finished.study["evaluation"]["cases"] == 30
    assert finished.seconds <= 8 * 60


@pytest.mark.timeout(600)
def test_a_private_study_spends_what_an_independent_computation_says(
    hippocampus: Federation, tmp_path: Path
) -> None:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    finished = run_example(hippocampus, "hippocampus-private", timeout=500, rounds=4)
    assert finished.study["evaluation"] == {}, "a private study releases no figure"
    for site in hippocampus.sites.values():
        exported = tmp_path / f"{site.name}.jsonl"
        key = site.home / "identity" / "ledger-public.pem"
        consilium("audit", "export", site.home / "ledger.db", exported).data  # noqa: B018
        audited = consilium("audit", "verify", exported, "--key", key).data["ledgers"][0]
        accountant = PLDAccountant()
        for line in exported.read_text().splitlines():
            entry = json.loads(line).get("content")  # a witness record has none
            if entry is not None and entry["kind"] == "charge":
                event = entry["body"]["event"]
                step = PoissonSampledDpEvent(
                    event["sampling_rate"], GaussianDpEvent(event["noise_multiplier"])
                )
                accountant.compose(step, event["steps"])
        epsilon = accountant.get_epsilon(1e-3)
        assert audited["verified"]
        assert audited["worst_patient"]["epsilon"]["pld"] == pytest.approx(epsilon, abs=0.01)
        assert epsilon <= 8.0
        assert finished.study["epsilon"][site.name] == pytest.approx(epsilon, abs=0.01)


@pytest.mark.timeout(600)
@pytest.mark.xdist_group("mednist")  # hospitals of its own: it need not wait for the others
def test_a_federated_classification_reaches_accuracy_095(tmp_path: Path) -> None:
    with mednist_sites(tmp_path / "mednist") as federation:
        finished = run_example(federation, "mednist", timeout=500)
    correct = sum(r["correct"] for r in finished.results.values())
    decisions = sum(r["decisions"] for r in finished.results.values())
    assert decisions == 300
    assert correct / decisions >= 0.95
    assert finished.study["evaluation"]["accuracy"] == pytest.approx(correct / decisions)
