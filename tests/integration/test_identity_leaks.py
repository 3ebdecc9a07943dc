"""Nothing that names a patient reaches a log, a message, a report for others, or the wire.

Made-up names and numbers are planted in every text tag of DICOM files, in NIfTI headers, in the
case lists and in file names. Then everything is run that reads them, failures too, up to a private
study over real processes; and all that was written or sent is searched.
"""

from __future__ import annotations

import csv
import io
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from data_fixtures import write_list, write_seg, write_slices
from deid_samples import GIVEN, NAME, SURNAME, holds, identity_everywhere
from federation import PRIVATE, Federation, Site, environment, small_study
from warm_commands import run_warm

from consilium_client.data.ingest.dicom_file import quietly

#: Stands in names of folders and files only. Messages at the site may name files.
PATH_WORD = "Grubelnixe"
#: Every patient's number begins so.
NUMBER = "KH73Q"
BIRTH = "19570312"
IDENTITY = (SURNAME, GIVEN, NUMBER, BIRTH)
PATIENTS = 5

#: What may hold patients' numbers, and why: the case list is where a site says who its patients
#: are; it is the site user's alone (0700).
MAY_IDENTIFY = ("data/cases.csv",)
#: What may name files, and why: the lists of files and of what is wrong with them, for the person
#: at the site who has to mend it; none of it is sent or handed on.
MAY_NAME_FILES = (
    *MAY_IDENTIFY,
    "data/site.yaml",
    "data/cache/",
    "data/deidentified/",
    "reports/",
)


def volume(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return values in HU and a mask, (16, 16, 16)."""
    values = np.random.default_rng(number).normal(0, 60, (16, 16, 16))
    mask = np.zeros(values.shape, np.int16)
    mask[4:10, 5:11, 3 + number : 9 + number] = 1
    return values + 80 * mask, mask


def write_dicom(folder: Path) -> Path:
    """Write one study per patient: CT and SEG, the identity in every text tag."""
    for number in range(PATIENTS):
        values, mask = volume(number)
        place = folder / f"{PATH_WORD}{number}"
        slices = write_slices(place / "ct", values, patient=f"{NUMBER}-{number}")
        write_seg(place / "seg.dcm", slices, mask, "liver")
        with quietly():
            for path in (*slices, place / "seg.dcm"):
                dataset = pydicom.dcmread(path)
                geometry = {word: dataset.get(word) for word in ("RescaleType", "SegmentLabel")}
                identity_everywhere(dataset)
                # What the values mean is not text for people.
                for word, value in geometry.items():
                    if value is not None:
                        setattr(dataset, word, value)
                dataset.PatientID = f"{NUMBER}-{number}"
                dataset.PatientBirthDate = BIRTH
                dataset.save_as(path)
    return folder


def write_nifti(folder: Path) -> Path:
    """Write pairs and their list: the identity in header strings, extensions and patient_id."""
    rows = []
    for number in range(PATIENTS):
        for kind, values in zip(("ct", "mask"), volume(number + 3), strict=True):
            image = nibabel.Nifti1Image(values.astype(np.int16), np.eye(4))
            image.header["descrip"] = f"{GIVEN} {SURNAME}".encode()
            image.header["db_name"] = SURNAME.encode()
            image.header["aux_file"] = f"{NUMBER}-{number}".encode()
            text = f"{NAME} {BIRTH}".encode()
            image.header.extensions.append(nibabel.nifti1.Nifti1Extension(6, text))
            folder.mkdir(parents=True, exist_ok=True)
            nibabel.save(image, folder / f"{kind}_{PATH_WORD}{number}.nii.gz")
        name = f"{PATH_WORD}{number}.nii.gz"
        rows.append((f"case{number}", f"{NUMBER}-{number}", f"ct_{name}", f"mask_{name}"))
    write_list(folder, rows)
    return folder


class Ear:
    """Runs commands and keeps all they say: in turn as people and as programs call them."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, bytes]] = []

    def __call__(self, *arguments: object, good: bool = True) -> None:
        """Run a command that must succeed, or must not."""
        mode = ("--json",) if len(self.heard) % 2 else ()
        done = run_warm([*mode, *map(str, arguments)], environment(), 120)
        name = " ".join(map(str, arguments[:3]))
        self.heard.append((name, done.stdout + done.stderr))
        said = (done.stdout + done.stderr).decode()
        # 10 is said when there are warnings alone.
        assert "Traceback" not in said and "internal." not in said, said
        assert (done.returncode in (0, 10)) == good, f"{name}: {done.returncode}\n{said}"


def import_planted(ear: Ear, site: Site, folder: Path) -> None:
    """Import after failing in the ways operators fail."""
    broken = next(iter(sorted(folder.rglob("*.dcm"))), None) or next(folder.glob("ct_*.gz"))
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) * 2 // 3])
    wanted = ("site", "data", "import", folder, "--label", "liver=1", "--input", "ct")
    ear(*wanted, "--home", site.home, good=False)
    broken.write_bytes(whole)
    ear(*wanted, "--home", site.home)


def all_train_but_one(cases: Path) -> None:
    """Fix the split: drawn by a site's own key, few patients may leave nobody to train on."""
    with cases.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for number, row in enumerate(rows):
        row["split"] = "train" if number else "test"
    with cases.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def look_around(ear: Ear, site: Site, folder: Path) -> None:
    """Run every command of a site that reads its data; the second site what differs by format."""
    home = ("--home", site.home)
    ear("site", "data", "check", *home)
    out = site.home.parent / f"clean-{site.name}"
    ear("site", "data", "deidentify", folder, out, *home)
    if site.name != "north":
        return
    moved = ("--retain-longitudinal", "--keep", "descriptors")
    ear("site", "data", "deidentify", folder, f"{out}-moved", *moved, *home)
    ear("site", "doctor", *home)
    ear("site", "data", "list", *home)
    ear("site", "data", "stats", *home)
    with (site.home / "data" / "cases.csv").open(newline="") as stream:
        case = next(csv.DictReader(stream))["case_id"]
    ear("site", "data", "show", case, *home)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Federation, Ear]]:
    """Everything run once."""
    originals = tmp_path_factory.mktemp("originals")
    ear = Ear()
    with Federation(tmp_path_factory.mktemp("leaks")) as federation:
        folders = {
            "north": write_dicom(originals / "dicom"),
            "south": write_nifti(originals / "nifti"),
        }

        def fill(name: str) -> None:
            site, folder = federation.join(name), folders[name]
            import_planted(ear, site, folder)
            all_train_but_one(site.home / "data" / "cases.csv")
            look_around(ear, site, folder)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(fill, folders))
        for site in federation.sites.values():
            site.launch()
        for site in federation.sites.values():
            site.wait_until_ready()
        train_privately(federation, ear)
        # A file that breaks after the import is the site's to hear of; nothing runs.
        (folders["south"] / f"ct_{PATH_WORD}1.nii.gz").write_bytes(b"broken")
        digest = federation.propose(small_study("fails", **PRIVATE))
        south = federation.sites["south"]
        ear("site", "approve", digest, "--yes", "--home", south.home, good=False)
        ear("study", "show", digest, "--home", federation.home)
        hand_out(federation, ear)
        for site in federation.sites.values():
            site.stop()
        federation.stop()
        yield federation, ear


def train_privately(federation: Federation, ear: Ear) -> None:
    """Run a private study to its end."""
    digest = federation.propose(small_study("private", **PRIVATE))
    for site in federation.sites.values():
        ear("site", "approve", digest, "--yes", "--home", site.home)
    federation.study("run", digest).data  # noqa: B018
    assert federation.study("watch", digest).data["state"] == "finished"
    home = ("--home", federation.sites["north"].home)
    ear("site", "budget", *home)
    ear("site", "egress", *home)
    ear("site", "results", digest, *home)


def hand_out(federation: Federation, ear: Ear) -> None:
    """Write what is meant for others: evidence, the aggregator's records, the officer's report."""
    for name, site in federation.sites.items():
        site("evidence", federation.folder / f"evidence-{name}").data  # noqa: B018
        federation.server("records", name, federation.folder / f"records-{name}.json").data  # noqa: B018
    report = federation.folder / "report.html"
    evidence = federation.folder / "evidence-north"
    ear("audit", "report", evidence, "--out", report, "--json-out", report.with_suffix(".json"))


def contents(path: Path) -> Iterator[bytes]:
    """Yield a file's bytes, and what is packed inside it."""
    content = path.read_bytes()
    yield content
    if content[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            for name in packed.namelist():
                yield packed.read(name)
    elif content[:2] == b"\x1f\x8b":
        yield zlib.decompress(content, 47)


def search(files: list[Path], *words: str) -> list[str]:
    """Return the files that hold one of the words, or have one in their name."""
    found = []
    for path in files:
        held = {word for part in contents(path) for word in holds(part, *words)}
        held |= set(holds(str(path).encode(), *words))
        if held:
            found.append(f"{path}: {sorted(held)}")
    return found


def files_of(federation: Federation, *, but: tuple[str, ...]) -> list[Path]:
    """Return all files the platform has written, without those the sites may keep to themselves."""
    own = tuple(
        f"{site.home.relative_to(federation.folder)}/{part}"
        for site in federation.sites.values()
        for part in but
    )
    return [
        path
        for path in sorted(federation.folder.rglob("*"))
        if path.is_file()
        and not path.relative_to(federation.folder).as_posix().startswith(own or ("\0",))
    ]


def test_the_search_finds_what_is_there(run: tuple[Federation, Ear]) -> None:
    federation, ear = run
    everything = files_of(federation, but=())
    lists = [path for path in everything if path.name == "cases.csv"]
    assert len(lists) == 2 and len(search(lists, NUMBER)) == 2
    assert len(search(lists, PATH_WORD)) == 2
    assert any(PATH_WORD.encode() in said for _, said in ear.heard)
    for part in ("aggregator/", "evidence-north/", "evidence-south/", "clean-north/"):
        assert any(p.relative_to(federation.folder).as_posix().startswith(part) for p in everything)
    for site in federation.sites.values():
        assert any(p.is_relative_to(site.home / "releases") for p in everything)


def test_no_command_says_who_a_patient_is(run: tuple[Federation, Ear]) -> None:
    _, ear = run
    assert [(name, held) for name, said in ear.heard if (held := holds(said, *IDENTITY))] == []


def test_nothing_written_says_who_a_patient_is(run: tuple[Federation, Ear]) -> None:
    federation, _ = run
    assert search(files_of(federation, but=MAY_IDENTIFY), *IDENTITY) == []


def test_nothing_that_leaves_a_site_names_a_file(run: tuple[Federation, Ear]) -> None:
    federation, ear = run
    assert search(files_of(federation, but=MAY_NAME_FILES), PATH_WORD) == []
    others = [said for name, said in ear.heard if name.startswith(("study", "audit", "server"))]
    assert others and not any(holds(said, PATH_WORD) for said in others)
