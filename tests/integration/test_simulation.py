"""A study on Flower's simulation engine ends in the model that it has over the network."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from federation import CONSILIUM, PRIVATE, Answer, Federation, consilium, environment, small_study

from consilium_common.demo.hospitals import NAMES

pytest.importorskip("ray", reason="the extra `simulation` is not installed")


def simulate(study: dict[str, Any], sites: Path, folder: Path, *, together: int = 1) -> Answer:
    """Simulate a study with the command itself: Ray must not find a forked process's gRPC."""
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(study))
    arguments = ["study", "simulate", file, "--sites", sites, "--out", folder / "out"]
    arguments += ["--together", together]
    done = subprocess.run(
        [CONSILIUM, "--json", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=280.0,
        env=environment(),
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.stdout.count("\n") == 1, f"not one envelope: {done.stdout}\n{done.stderr}"
    return Answer(done.returncode, json.loads(done.stdout), done.stderr)


@pytest.fixture
def homes(federation: Federation, tmp_path: Path) -> Path:
    """A folder with the homes of the three hospitals: other tests add sites of their own."""
    folder = tmp_path / "homes"
    folder.mkdir()
    for name in NAMES:
        (folder / name).symlink_to(federation.sites[name].home, target_is_directory=True)
    return folder


def test_a_simulated_study_ends_in_the_networks_model_bit_for_bit(
    federation: Federation, homes: Path, tmp_path: Path
) -> None:
    # What rounds at random and keeps what it lost: whatever differs anywhere would show.
    compression = {"encoding": "int8", "level": 1}
    # All sites in all rounds: on a machine with much to do one may be thought away for a while.
    study = small_study("simulated", federation={"compression": compression, "quorum": len(NAMES)})
    found = federation.run_to_end(study)
    assert found["state"] == "finished"
    assert all(row["sites"] == sorted(NAMES) for row in found["rounds"])
    model = federation.home / "studies" / found["digest"][:16] / "model.safetensors"
    simulated = simulate(study, homes, tmp_path, together=2).data
    assert simulated["digest"] == found["digest"]
    assert simulated["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert Path(simulated["model"]).read_bytes() == model.read_bytes()
    for row, simulated_row in zip(found["rounds"], simulated["rounds"], strict=True):
        assert simulated_row["sites"] == row["sites"] == sorted(NAMES)
        assert simulated_row["loss"] == row["loss"]
    assert simulated["evaluation"]["figures"] == found["evaluation"]["figures"]
    assert set(found["evaluation"]["figures"]) == set(NAMES)


def test_a_simulation_spends_nothing_of_the_sites_whose_data_it_uses(
    federation: Federation, homes: Path, tmp_path: Path
) -> None:
    folders = {name: federation.sites[name].home for name in NAMES}
    before = {name: federation.sites[name]("budget").data["spend"] for name in NAMES}
    decided = {name: federation.sites[name]("studies").data for name in NAMES}
    study = small_study("spent-nowhere", **PRIVATE, federation={"rounds": 1})
    done = simulate(study, homes, tmp_path).data
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
