"""Every wrong input ends with one clear error: its code, what, where, what to do. Nothing is lost.

The same through Python is tested in ``tests/unit``; here it is what a person gets at the command.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import yaml
from federation import PRIVATE, Answer, Federation, consilium, small_study

from consilium_common.demo.hospitals import NAMES
from consilium_common.processes import free_port


def assert_clear(answer: Answer, code: str, status: int) -> None:
    """Assert the code, the exit status, and that a person is told what to do."""
    assert (answer.code, answer.status) == (code, status), answer.envelope
    assert answer.error["message"]
    assert answer.error["hint"]
    assert set(answer.error) == {"code", "message", "where", "hint"}


# --- studies -----------------------------------------------------------------------------------


def test_an_unknown_study_key_is_refused_with_its_line_and_the_nearest_name(
    tmp_path: Path,
) -> None:
    study = small_study("misspelt")
    study["training"]["steps_per_rund"] = 5
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    line = next(
        number
        for number, text in enumerate(path.read_text().splitlines(), start=1)
        if "steps_per_rund" in text
    )
    answer = consilium("study", "check", path)
    assert answer.status == 3
    assert answer.code.startswith("study.")
    assert f"{path}:{line}" in answer.error["where"]
    assert "steps_per_round" in answer.error["hint"] + answer.error["message"]


@pytest.fixture(scope="module")
def proposed(federation: Federation) -> str:
    """A study that is proposed and nothing more."""
    return federation.propose(small_study("unapproved"))


def test_a_study_that_is_not_approved_does_not_start(federation: Federation, proposed: str) -> None:
    digest = proposed
    assert_clear(federation.study("run", digest), "study.not-approved", 3)
    federation.approve(digest, NAMES[0])
    assert_clear(federation.study("run", digest), "study.not-approved", 3)  # one of two
    federation.sites[NAMES[0]]("decline", digest, "--why", "no staff this week").data  # noqa: B018
    found = federation.show(digest)
    assert found["state"] == "proposed"
    assert [(row["decision"], row["why"]) for row in found["approvals"]] == [
        ("declined", "no staff this week")
    ]


def test_a_study_waits_in_the_queue_while_no_site_is_online(federation: Federation) -> None:
    away = federation.join("away")
    away("data", "import", federation.folder / "images" / NAMES[1]).data  # noqa: B018
    digest = federation.propose(small_study("alone", federation={"quorum": 1}))
    federation.approve(digest, "away")
    queued = federation.study("run", digest).data
    assert queued["state"] == "queued"
    assert queued["waits_for"] == "0 of the 1 sites it needs are online"
    assert federation.study("stop", digest).data["state"] == "stopped"


def test_a_class_that_a_site_lacks_is_named_at_that_site(federation: Federation) -> None:
    digest = federation.propose(small_study("spleen", task={"classes": ["background", "spleen"]}))
    answer = federation.sites[NAMES[0]]("approve", digest, "--yes")
    assert_clear(answer, "data.class-missing", 4)
    assert "spleen" in answer.error["message"]
    assert federation.show(digest)["approvals"] == []


def test_a_study_that_would_overrun_the_budget_is_refused_before_it_starts(
    federation: Federation,
) -> None:
    greedy = {**PRIVATE["privacy"], "noise_multiplier": 0.3}
    digest = federation.propose(
        small_study(
            "greedy",
            training={"steps_per_round": 5},
            federation={"rounds": 5},
            privacy=greedy,
            evaluation=PRIVATE["evaluation"],
        )
    )
    site = federation.sites[NAMES[0]]
    ledger = (site.home / "ledger.db").read_bytes() if (site.home / "ledger.db").exists() else b""
    assert_clear(site("approve", digest, "--yes"), "privacy.budget", 6)
    review = site("review", digest).data
    assert review["price"]["allowed"] is False
    assert federation.show(digest)["approvals"] == []
    if ledger:
        assert (site.home / "ledger.db").read_bytes() == ledger  # nothing was charged


def test_a_study_without_privacy_is_refused_where_policy_does_not_permit_it(
    federation: Federation, proposed: str
) -> None:
    site = federation.sites[NAMES[2]]
    try:
        site.set_policy(permit_non_private=False)
        assert_clear(site("approve", proposed, "--yes"), "privacy.non-private-refused", 6)
    finally:
        site.set_policy()


@pytest.mark.parametrize("command", ["show", "run", "watch", "stop"])
def test_an_unknown_study_is_an_error_of_every_command(
    federation: Federation, command: str
) -> None:
    assert_clear(federation.study(command, "nowhere"), "study.unknown", 3)


# --- the site's data ---------------------------------------------------------------------------


@pytest.fixture
def nifti(tmp_path: Path) -> Path:
    """A folder in the MSD layout with three good cases."""
    folder = tmp_path / "images"
    rng = np.random.default_rng(7)
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    pairs = []
    for number in range(3):
        label = np.zeros((16, 16, 16), np.uint8)
        label[4:10, 5:11, 6:12] = 1
        image = (rng.normal(0, 10, label.shape) + 100 * label).astype(np.float32)
        name = f"blob_{number}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), folder / "imagesTr" / name)
        nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), folder / "labelsTr" / name)
        pairs.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    write_description(folder, pairs)
    return folder


def write_description(folder: Path, pairs: list[dict[str, str]]) -> None:
    description: dict[str, Any] = {
        "name": "Blobs",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "blob"},
        "numTraining": len(pairs),
        "training": pairs,
        "test": [],
    }
    (folder / "dataset.json").write_text(json.dumps(description))


def dicom(federation: Federation, tmp_path: Path, patients: int = 2) -> Path:
    """Return a copy of some patients of the hospital that keeps DICOM."""
    folder = tmp_path / "archive"
    source = federation.folder / "images" / NAMES[0]
    for patient in sorted(source.iterdir())[:patients]:
        shutil.copytree(patient, folder / patient.name)
    return folder


def refused_import(home: Path, folder: Path, code: str) -> Answer:
    """Import, assert the refusal, and that what stood before still stands."""
    before = tree_hash(home / "data")
    answer = consilium("site", "data", "import", folder, "--home", home, "--site", "clinic")
    assert_clear(answer, code, 4)
    assert tree_hash(home / "data") == before
    return answer


def tree_hash(folder: Path) -> dict[str, str]:
    """Return the digest of the manifest's files; empty where there is none."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*"))
        if path.name in ("site.yaml", "cases.csv")
    }


def test_an_image_without_a_label_is_refused(nifti: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    consilium("site", "data", "import", nifti, "--home", home, "--site", "clinic").data  # noqa: B018
    pairs = json.loads((nifti / "dataset.json").read_text())["training"]
    del pairs[1]["label"]
    write_description(nifti, pairs)
    answer = refused_import(home, nifti, "data.no-label")
    assert "blob_1" in answer.error["where"] + answer.error["message"]


def test_a_mask_of_another_geometry_is_refused(nifti: Path, tmp_path: Path) -> None:
    path = nifti / "labelsTr" / "blob_2.nii.gz"
    label = np.asarray(nibabel.load(path).dataobj)
    shifted = np.eye(4)
    shifted[:3, 3] = 5.0
    nibabel.save(nibabel.Nifti1Image(label, shifted), path)
    refused_import(tmp_path / "home", nifti, "data.geometry")
    nibabel.save(nibabel.Nifti1Image(label[:-1], np.eye(4)), path)
    refused_import(tmp_path / "home", nifti, "data.geometry")


def test_a_truncated_image_is_refused_and_the_file_named(nifti: Path, tmp_path: Path) -> None:
    path = nifti / "imagesTr" / "blob_0.nii.gz"
    path.write_bytes(path.read_bytes()[:-200])
    answer = refused_import(tmp_path / "home", nifti, "data.truncated")
    assert str(path) in answer.error["where"]


def test_a_truncated_dicom_file_is_refused(federation: Federation, tmp_path: Path) -> None:
    folder = dicom(federation, tmp_path)
    broken = sorted(folder.glob("*/ct/*.dcm"))[3]
    broken.write_bytes(broken.read_bytes()[:-300])
    answer = refused_import(tmp_path / "home", folder, "data.truncated")
    assert str(broken) in answer.error["where"]


def test_two_patients_in_one_series_folder_are_refused(
    federation: Federation, tmp_path: Path
) -> None:
    folder = dicom(federation, tmp_path)
    first, second = sorted(folder.iterdir())
    for number, path in enumerate(sorted((second / "ct").iterdir())):
        path.rename(first / "ct" / f"more-{number}.dcm")
    shutil.rmtree(second)
    answer = refused_import(tmp_path / "home", folder, "data.two-patients")
    # What is printed may be copied into a letter: the identities are not in it.
    for path in first.glob("ct/*.dcm"):
        identity = str(pydicom.dcmread(path, stop_before_pixels=True).PatientID)
        assert identity not in json.dumps(answer.envelope) + answer.stderr


def test_a_missing_slice_is_refused(federation: Federation, tmp_path: Path) -> None:
    folder = dicom(federation, tmp_path, patients=1)
    slices = sorted(
        folder.glob("*/ct/*.dcm"),
        key=lambda path: float(pydicom.dcmread(path).ImagePositionPatient[2]),
    )
    slices[len(slices) // 2].unlink()
    answer = consilium(
        "site", "data", "import", folder, "--home", tmp_path / "home", "--site", "clinic"
    )
    assert answer.status == 4
    assert answer.code.startswith("data.")


# --- commands ----------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        home = tmp_path / "aggregator"
        consilium("server", "init", "--address", address, "--home", home).data  # noqa: B018
        answer = consilium("server", "start", "--home", home, "--host", "127.0.0.1")
        assert_clear(answer, "state.port-in-use", 8)
        assert answer.error["where"] == address


def test_an_aggregator_that_does_not_answer_is_named(tmp_path: Path) -> None:
    home, address = tmp_path / "aggregator", f"127.0.0.1:{free_port()}"
    consilium("server", "init", "--address", address, "--home", home).data  # noqa: B018
    answer = consilium("study", "list", "--home", home)
    assert_clear(answer, "network.refused", 7)
    assert answer.error["where"] == address


def test_a_second_authority_or_a_second_start_in_one_folder_is_refused(
    federation: Federation,
) -> None:
    key = (federation.home / "identity" / "authority-key.pem").read_bytes()
    assert_clear(federation.server("init", "--address", federation.address), "state.exists", 8)
    assert (federation.home / "identity" / "authority-key.pem").read_bytes() == key
    assert_clear(federation.sites[NAMES[0]]("start"), "state.running", 8)


def test_a_name_that_cannot_stand_in_a_certificate_is_refused(
    federation: Federation, tmp_path: Path
) -> None:
    out = tmp_path / "file"
    for name in ("North Clinic", "../etc"):
        assert_clear(federation.server("invite", name, "--out", out), "identity.bad-name", 5)
    assert_clear(federation.server("invite", "operator", "--out", out), "identity.name-taken", 5)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "status"),
    [
        (("sites",), "usage.arguments", 2),
        (("server", "sites", "--home", "nowhere"), "state.no-server", 8),
        (("site", "budget", "--home", "nowhere"), "state.no-site", 8),
        (("study", "check", "nowhere.yaml"), "study.", 3),
        (("server", "init", "--address", "nonsense", "--home", "{}"), "usage.address", 2),
        (("audit", "verify", "nowhere.db", "--key", "nowhere.pem"), "identity.no-key", 5),
    ],
)
def test_wrong_arguments_end_with_one_envelope_and_the_documented_status(
    tmp_path: Path, arguments: tuple[str, ...], code: str, status: int
) -> None:
    answer = consilium(*(part.format(tmp_path / "new") for part in arguments))
    assert answer.status == status, answer.envelope
    assert answer.code.startswith(code)
