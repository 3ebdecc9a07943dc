"""A study on Flower's simulation engine ends in the model that it has over the network.

Over the network the aggregator is killed in the midst of it: that changes no bit either.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from federation import PRIVATE, Federation, consilium, simulate, small_study

from consilium_common.demo.hospitals import NAMES

pytest.importorskip("ray", reason="the extra `simulation` is not installed")


@pytest.mark.timeout(600)
def test_a_simulated_study_ends_in_the_networks_model_bit_for_bit(
    federation: Federation, tmp_path: Path
) -> None:
    # What rounds at random and keeps what it lost, and state at both ends from round to round:
    # whatever differs anywhere would show.
    federated = {
        "strategy": {"name": "scaffold"},
        "compression": {"encoding": "int8", "level": 1},
        # All sites in all rounds: on a machine with much to do one may be thought away for a while.
        "quorum": len(NAMES),
        "rounds": 5,
    }
    study = small_study("simulated", federation=federated)
    digest = federation.propose(study)
    federation.approve(digest)
    federation.study("run", digest).data  # noqa: B018
    federation.wait_until(digest, lambda data: bool(data["rounds"]), "a round", pause=0.1)
    federation.kill()
    federation.start()
    found = federation.wait_until(
        digest, lambda data: data["state"] in ("finished", "failed"), "its end"
    )
    history = federation.study("log", digest).data["history"]
    assert any("was started anew" in event["why"] for event in history), history
    assert found["state"] == "finished"
    assert all(row["sites"] == sorted(NAMES) for row in found["rounds"])
    model = federation.model(found["digest"])
    simulated = federation.simulate(study, tmp_path, together=2).data
    assert simulated["digest"] == found["digest"]
    assert simulated["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert Path(simulated["model"]).read_bytes() == model.read_bytes()
    for row, simulated_row in zip(found["rounds"], simulated["rounds"], strict=True):
        assert simulated_row["sites"] == row["sites"] == sorted(NAMES)
        assert simulated_row["loss"] == row["loss"]
    assert simulated["evaluation"]["figures"] == found["evaluation"]["figures"]
    assert set(found["evaluation"]["figures"]) == set(NAMES)


def test_a_simulation_spends_nothing_of_the_sites_whose_data_it_uses(
    federation: Federation, tmp_path: Path
) -> None:
    folders = {name: federation.sites[name].home for name in NAMES}
    before = {name: federation.sites[name]("budget").data["spend"] for name in NAMES}
    decided = {name: federation.sites[name]("studies").data for name in NAMES}
    study = small_study("spent-nowhere", **PRIVATE, federation={"rounds": 1})
    done = federation.simulate(study, tmp_path).data
    assert done["state"] == "finished"
    assert all(done["epsilon"][name] > 0.1 for name in NAMES)
    for name in NAMES:
        assert federation.sites[name]("budget").data["spend"] == before[name]
        assert federation.sites[name]("studies").data == decided[name]
        own = tmp_path / "out" / "sites" / name
        assert (own / "ledger.db").is_file()
        assert (own / "data").resolve() == (folders[name] / "data").resolve()
        spent = consilium("site", "budget", "--home", own).data["spend"]["studies"]
        assert [row["study"] for row in spent] == [done["digest"]]


def test_what_a_site_fails_with_ends_the_simulation_and_is_said_in_full(
    federation: Federation, tmp_path: Path
) -> None:
    sites = tmp_path / "sites"
    for name in NAMES[:2]:
        shutil.copytree(federation.sites[name].home / "data", sites / name / "data", symlinks=True)
        shutil.copytree(federation.sites[name].home / "identity", sites / name / "identity")
    poor = NAMES[1]
    cases = sites / poor / "data" / "cases.csv"
    cases.write_text(cases.read_text().replace(",test", ",train"))
    study = small_study("nobody-to-test-on", **PRIVATE)
    study["evaluation"] = {"release": "private", "epsilon": 0.5}
    answer = simulate(study, sites, tmp_path)
    assert answer.code == "privacy.no-test-patients"
    assert answer.error["message"].startswith(f"{poor}: ")
    assert "site.yaml" in answer.error["hint"]
