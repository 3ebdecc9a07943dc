"""A private fusion study over real processes: counted, trained, stored, audited, as declared."""

from __future__ import annotations

import csv
import shutil
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_fixtures import write_list, write_nifti, write_slices
from federation import PRIVATE, Federation, Site, consilium, small_study
from pydicom.uid import generate_uid

from consilium_common.ledger.state import Charge
from consilium_common.ledger.store import Ledger
from consilium_common.privacy.accounting import epsilon_of, parameters
from consilium_common.study import Study
from consilium_common.study.statistics import tables
from consilium_server.home import ServerHome

NORTH, SOUTH = "north", "south"
PATIENTS = 6
#: In cases.csv, by patient: any number of the classes, also none.
LABELS = ("oedema", "-", "oedema|effusion", "effusion", "-", "oedema")
#: Years; where one is missing the network is told that it is not known.
AGES = (41, None, 67, 58, 72, 35)
SEXES = ("F", "M", "M", "F", "M", "F")

_PRIVATE = small_study("fusion", **PRIVATE)
STUDY: dict[str, Any] = {
    **_PRIVATE,
    "task": {
        "kind": "classification",
        "dimensions": 3,
        "inputs": ["t1", "t2"],
        "classes": ["oedema", "effusion"],
        "multi_label": True,
        "covariates": [
            {"kind": "number", "name": "age", "centre": 60, "scale": 15},
            {"kind": "category", "name": "sex", "values": ["f", "m"]},
        ],
    },
    "preprocessing": {"size": [16, 16, 16], "intensity": {"kind": "zscore"}},
    "model": {
        "network": "resnet10",
        "arguments": {
            "block_inplanes": [8, 8, 8, 8],
            "conv1_t_size": 3,
            "conv1_t_stride": 1,
            "no_max_pool": True,
        },
    },
    "training": {"loss": "bce", "steps_per_round": 2},
    "statistics": {"epsilon": 1.0, "of": ["classes", "intensity", "spacing", "size"]},
}


def volumes(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return one patient's two registered channels."""
    rng = np.random.default_rng(number)
    t1 = rng.normal(100, 20, (12, 11, 6))
    return t1, t1 / 2 + rng.normal(0, 5, t1.shape)


def write_dicom(folder: Path) -> tuple[str, ...]:
    """Write examinations of two series, and their classes; return the options of the import."""
    for number in range(PATIENTS):
        examination = {"StudyInstanceUID": generate_uid(), "FrameOfReferenceUID": generate_uid()}
        age = AGES[number]
        for name, values in zip(("t1", "t2"), volumes(number), strict=True):
            write_slices(
                folder / str(number) / name,
                values,
                patient=f"N-{number}",
                changes={
                    **examination,
                    "Modality": "MR",
                    "RescaleType": "US",
                    "SeriesDescription": f"{name} registered",
                    "PatientSex": SEXES[number],
                    "PatientAge": "" if age is None else f"{age:03d}Y",
                    "PatientName": f"Doe^{number}",
                },
            )
    rows = [f"N-{number},{label}" for number, label in enumerate(LABELS)]
    (folder / "labels.csv").write_text("\n".join(["patient_id,label", *rows]) + "\n")
    wanted = ("--channel", "t1=t1*", "--channel", "t2=t2*")
    return (*wanted, "--covariate", "age=PatientAge", "--covariate", "sex=PatientSex")


def write_table(folder: Path) -> tuple[str, ...]:
    """Write NIfTI images and their table; return the options of the import."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(PATIENTS):
        for name, values in zip(("t1", "t2"), volumes(number + 50), strict=True):
            write_nifti(folder / f"{number}-{name}.nii.gz", values)
        age = "" if AGES[number] is None else str(AGES[number])
        images = (f"{number}-t1.nii.gz", f"{number}-t2.nii.gz")
        rows.append((f"case{number}", f"S-{number}", *images, LABELS[number], age, SEXES[number]))
    write_list(folder, rows, "case_id,patient_id,image,image_t2,label,years,covariate_sex")
    return ("--input", "t1", "--input", "t2", "--covariate", "age=years")


def last_two_are_tested(cases: Path) -> None:
    """Fix the split: drawn by a site's own key, few patients may leave nobody to test on."""
    with cases.open(newline="") as stream:
        rows = sorted(csv.DictReader(stream), key=lambda row: row["patient_id"])
    for number, row in enumerate(rows):
        row["split"] = "train" if number < PATIENTS - 2 else "test"
    with cases.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """An aggregator and two sites, running: one keeps DICOM, one NIfTI files and a table."""
    originals = tmp_path_factory.mktemp("originals")

    with Federation(tmp_path_factory.mktemp("fusion")) as running:

        def add(name: str) -> Site:
            folder = originals / name
            options = write_dicom(folder) if name == NORTH else write_table(folder)
            site = running.join(name)
            site("data", "import", folder, *options).data  # noqa: B018
            last_two_are_tested(site.home / "data" / "cases.csv")
            return site

        with ThreadPoolExecutor(2) as pool:
            sites = list(pool.map(add, (NORTH, SOUTH)))
        for site in sites:
            site.launch()
        for site in sites:
            site.wait_until_ready()
        yield running


@pytest.fixture(scope="module")
def sites(small: Federation) -> dict[str, Site]:
    """The two, by name."""
    return {name: small.sites[name] for name in (NORTH, SOUTH)}


@pytest.fixture(scope="module")
def fused(small: Federation, sites: dict[str, Site]) -> dict[str, Any]:
    """The study, approved by the two, run to its end."""
    digest = small.propose(STUDY)
    small.approve(digest, *sites)
    small.study("run", digest).data  # noqa: B018
    found: dict[str, Any] = small.study("watch", digest).data
    return found


def test_dicom_and_tables_become_the_same_cases_with_channels_classes_and_covariates(
    sites: dict[str, Site],
) -> None:
    known: dict[str, list[tuple[str, ...]]] = {}
    for name, site in sites.items():
        with (site.home / "data" / "cases.csv").open(newline="") as stream:
            rows = sorted(csv.DictReader(stream), key=lambda row: row["patient_id"])
        assert all(row["image"] and row["image_t2"] for row in rows)
        columns = ("label", "covariate_age", "covariate_sex")
        known[name] = [tuple(row[column] for column in columns) for row in rows]
    ages = ["" if age is None else str(age) for age in AGES]
    assert known[NORTH] == known[SOUTH] == list(zip(LABELS, ages, SEXES, strict=True))


def test_the_check_says_that_every_case_fits_the_study(
    small: Federation, sites: dict[str, Site], fused: dict[str, Any]
) -> None:
    for site in sites.values():
        found = site("data", "check", "--study", small.folder / "fusion.yaml").data
        assert found["cases"] == PATIENTS
        # So few cases, and names in DICOM headers, are warned of; nothing else is amiss.
        codes = {one["code"] for one in found["warnings"]}
        assert codes <= {"data.tiny-cohort", "deid.tags"}


def test_a_private_fusion_study_trains_on_two_channels_and_covariates_to_its_end(
    sites: dict[str, Site], fused: dict[str, Any]
) -> None:
    assert fused["state"] == "finished"
    assert [(row["sites"], row["dropped"]) for row in fused["rounds"]] == [([NORTH, SOUTH], {})] * 2
    for site in sites.values():
        results = site("results", "fusion").data
        assert results["rounds_done"] == 2
        assert results["cases"] == 2
        assert set(results["auc"]) == set(STUDY["task"]["classes"])
        # Each of two cases is decided for each of two classes.
        assert results["decisions"] == 4


def test_its_statistics_arrive_with_noise_on_every_number(
    small: Federation, fused: dict[str, Any]
) -> None:
    found = small.study("stats", fused["digest"]).data
    assert found["public"]["cohorts"] == {NORTH: 4, SOUTH: 4}
    assert found["asked"] == STUDY["statistics"]
    statistics = found["statistics"]
    assert statistics == fused["statistics"]
    assert (statistics["sites"], statistics["dropped"]) == ([NORTH, SOUTH], {})
    wanted = tables(Study.model_validate(STUDY))
    shown = {one["name"]: one for one in statistics["tables"]}
    assert list(shown) == [table.name for table in wanted]
    for table in wanted:
        assert [row["bin"] for row in shown[table.name]["bins"]] == list(table.bins)
    # What four training patients of each site have; the sites declare all of them.
    for name, expected in {
        "classes": {"oedema": 0.5, "effusion": 0.5},  # one patient has both, one has neither
        "spacing.smallest": {"0.5 to 1 mm": 0.5, "1 to 2 mm": 0.5},
        "spacing.largest": {"2 to 4 mm": 0.5, "1 to 2 mm": 0.5},
        "size": {"below 4,096": 1.0},
    }.items():
        for row in shown[name]["bins"]:
            off = row["share"] - expected.get(row["bin"], 0)
            assert 0 < abs(off) < 6 * shown[name]["standard_error"]
    intensity = shown["intensity"]
    spread = intensity["standard_error"] * len(intensity["bins"]) ** 0.5
    assert abs(sum(row["share"] for row in intensity["bins"]) - 1) < 6 * spread


def test_both_sites_charge_the_statistics_first_and_what_is_left_is_what_was_charged(
    sites: dict[str, Site], fused: dict[str, Any]
) -> None:
    plan = parameters(Study.model_validate(STUDY))
    assert plan is not None
    expected = epsilon_of(plan.events_of(2), plan.delta)
    assert fused["epsilon"] == pytest.approx({NORTH: expected, SOUTH: expected}, abs=0.001)
    for site in sites.values():
        with Ledger.open(site.home / "ledger.db") as ledger:
            charges = list(ledger.state.charges.values())
            # The same four patients, whatever they are charged for.
            (cohort,) = {one.cohort for one in charges}
            assert len(ledger.state.cohorts[cohort]) == 4
        assert charges[0].event == plan.statistics_event
        assert charges[0].clip_norm == plan.statistics_sensitivity
        assert [(one.purpose, one.round_index, one.state) for one in charges] == [
            ("statistics", 0, "released"),
            ("training", 0, "released"),
            ("training", 1, "released"),
        ]
        left = site("egress", fused["digest"]).data["updates"]
        assert sorted(row["sha256"] for row in left) == sorted(one.update for one in charges)


def test_an_audit_of_the_fusion_study_finds_it_as_declared(
    small: Federation,
    sites: dict[str, Site],
    fused: dict[str, Any],
    tmp_path: Path,
) -> None:
    evidence, records = tmp_path / "evidence", tmp_path / "records.json"
    sites[NORTH]("evidence", evidence).data  # noqa: B018
    small.server("records", NORTH, records).data  # noqa: B018
    page = tmp_path / "report.html"
    report = consilium("audit", "report", evidence, "--records", records, "--out", page).data
    (found,) = report["studies"]
    assert found["study"] == fused["digest"]
    assert (found["rounds"], found["statistics"], found["released"]) == (2, 1, 3)
    assert found["as_declared"] is True
    assert [one for one in report["reconciliation"]["differences"] if one["serious"]] == []


def test_asked_again_sites_answer_from_the_store_without_a_charge(
    small: Federation, sites: dict[str, Site], fused: dict[str, Any]
) -> None:
    digest = fused["digest"]
    charged = {name: charges_of(site) for name, site in sites.items()}
    _forget(small, digest)
    small.study("run", digest).data  # noqa: B018
    again = small.study("watch", digest).data
    assert again["statistics"] == fused["statistics"]
    assert again["alarms"] == []  # no site sent other numbers than before
    assert {name: charges_of(site) for name, site in sites.items()} == charged


def charges_of(site: Site) -> list[Charge]:
    """Return all charges, from the site's ledger as it lies there."""
    with Ledger.open(site.home / "ledger.db") as ledger:
        return list(ledger.state.charges.values())


def _forget(small: Federation, digest: str) -> None:
    """Let the aggregator lose all that a study's run has left there, as after a bad restore."""
    home = ServerHome.existing(small.home)
    shutil.rmtree(home.study_folder(digest) / "checkpoints")
    with closing(sqlite3.connect(home.database, timeout=20)) as database, database:
        for table in ("statistics", "evaluations", "rounds"):
            database.execute(f"DELETE FROM {table} WHERE digest = ?", (digest,))
        database.execute("UPDATE studies SET state = 'stopped' WHERE digest = ?", (digest,))
