"""Three hospitals with synthetic abdominal CT: one keeps DICOM, one the MSD layout, one a CSV."""

from __future__ import annotations

import csv
import io
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from consilium_common.errors import ConsiliumError

if TYPE_CHECKING:
    import numpy as np

    from consilium_common.demo.anatomy import Anatomy
    from consilium_common.demo.scanner import Scan, Scanner

Format = Literal["dicom", "msd", "csv", "folders"]
#: Called with scans done and scans in all.
Progress = Callable[[int, int], None]

NAMES: Final = ("northfield", "riverside", "st-anna")
FORMATS: Final[tuple[Format, ...]] = ("dicom", "msd", "csv")
_SMALLEST: Final = 16


@dataclass(frozen=True)
class Hospital:
    """One hospital's folder of images.

    Parameters
    ----------
    name : str
        Name of the site, fit for `consilium server invite`.
    folder : Path
        What `consilium site data import` is given.
    format : Format
        ``dicom``, ``msd``, ``csv`` or ``folders`` (a folder of 2D images per class).
    patients : int
        How many patients it holds: the cohort size that a site would declare.
    labels : tuple of str
        Class names by the masks' values, for formats that carry none (CSV); else empty.
    """

    name: str
    folder: Path
    format: Format
    patients: int
    labels: tuple[str, ...] = ()


def scanners() -> tuple[Scanner, Scanner, Scanner]:
    """Return the three hospitals' scanners, in the order of :data:`NAMES`."""
    from consilium_common.demo.scanner import Scanner

    return (
        Scanner("Demo Imaging", "North 64", (1.0, 1.0, 1.0), "LPS", 1.0, 0.01, 10, 2.2, 0.5),
        Scanner("Demo Imaging", "River 16", (0.94, 0.94, 1.16), "RAS", 1.02, 0.03, 16, 3.2, 1.0),
        Scanner("Tomo Demo", "Anna S", (1.08, 1.08, 0.9), "LAS", 0.99, 0.015, 22, 1.8, 1.0),
    )


def write_hospitals(
    folder: Path,
    *,
    patients: Sequence[int] = (16, 12, 12),
    size: int = 48,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Hospital]:
    """Write three hospitals' images below ``folder``; equal arguments write equal bytes.

    Parameters
    ----------
    folder : Path
        Gets one new folder per hospital; made where it is missing.
    patients : sequence of three integers
        Patients per hospital, at least 1 each. At the third hospital every fifth patient, and
        at least one, has two scans.
    size : int
        Voxels from left to right at the basic voxel size, at least 16. 48 is 6.5 mm.
    seed : int
        Decides every patient and every voxel.

    Raises
    ------
    ConsiliumError
        ``usage.demo`` for arguments out of range; ``state.not-empty`` where a hospital's folder
        is there already; ``state.disk`` when the disk is full or not writable.
    """
    if len(patients) != len(NAMES) or min(patients) < 1 or size < _SMALLEST or seed < 0:
        raise ConsiliumError(
            "usage.demo",
            f"The demo needs three hospitals of at least one patient, a size of at least "
            f"{_SMALLEST} and a seed of at least 0.",
            where=f"patients {tuple(patients)}, size {size}, seed {seed}",
            hint="Three times ten patients, size 48 and seed 0 are good values.",
        )
    import numpy as np

    from consilium_common.demo.anatomy import CLASSES

    total = sum(patients) + _second_scans(patients[2])
    counter = itertools.count(1)

    def done() -> None:
        scans = next(counter)
        if progress is not None:
            progress(scans, total)

    writers = (_write_dicom, _write_msd, _write_csv)
    hospitals = []
    for index, (name, scanner) in enumerate(zip(NAMES, scanners(), strict=True)):
        target = folder / name
        with new_folder(target) as draft:
            rng = np.random.default_rng([seed, index])
            writers[index](draft, _Order(scanner, patients[index], size, rng, done))
        labels = CLASSES if FORMATS[index] == "csv" else ()
        hospitals.append(Hospital(name, target, FORMATS[index], patients[index], labels))
    return hospitals


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a draft folder that becomes ``target`` when all went well, and vanishes when not."""
    if target.exists():
        raise ConsiliumError(
            "state.not-empty",
            "The folder for a hospital's images is there already.",
            where=str(target),
            hint="Remove it, or choose another folder.",
        )
    draft = target.with_name(f".{target.name}.draft")
    try:
        # A draft that is there was left by a run that was killed.
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        yield draft
        draft.replace(target)
    except OSError as error:
        raise ConsiliumError(
            "state.disk",
            f"Cannot write a hospital's images: {error.strerror or error}.",
            where=error.filename if isinstance(error.filename, str) else str(target),
            hint="Free space on the disk, or choose a folder that you may write.",
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@dataclass(frozen=True)
class _Order:
    """What one hospital's writer is asked for."""

    scanner: Scanner
    patients: int
    size: int
    rng: np.random.Generator
    #: Called after every scan.
    done: Callable[[], None]

    def scan(self, anatomy: Anatomy) -> Scan:
        from consilium_common.demo.scanner import acquire

        return acquire(anatomy, self.scanner, self.rng, size=self.size)


def _second_scans(patients: int) -> int:
    """How many patients of the third hospital come twice."""
    return (patients + 4) // 5


def _write_dicom(folder: Path, order: _Order) -> None:
    from consilium_common.demo.anatomy import draw_anatomy
    from consilium_common.demo.dicom_writer import Identity, write_segmentation, write_series

    run = f"{order.rng.integers(2**63):016x}"  # studies of different seeds have different UIDs
    for number in range(1, order.patients + 1):
        scan = order.scan(draw_anatomy(order.rng))
        identity = Identity("Northfield Hospital (demo)", f"NF-{number:04d}", run)
        patient = folder / f"patient-{number:04d}"
        series = write_series(scan, order.scanner, identity, patient / "ct")
        write_segmentation(scan, series, identity, patient / "liver-seg.dcm")
        order.done()


def _write_msd(folder: Path, order: _Order) -> None:
    from consilium_common.demo.anatomy import CLASSES, draw_anatomy

    training = []
    for number in range(1, order.patients + 1):
        scan = order.scan(draw_anatomy(order.rng))
        name = f"liver_{number:03d}.nii.gz"
        write_nifti(scan, folder / "imagesTr" / name, folder / "labelsTr" / name)
        training.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
        order.done()
    (folder / "imagesTs").mkdir()
    description = {
        "name": "Liver",
        "description": "Synthetic abdominal CT with liver and tumour (demo)",
        "reference": "Consilium demo",
        "licence": "CC0-1.0",
        "release": "1.0",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {str(value): name for value, name in enumerate(CLASSES)},
        "numTraining": order.patients,
        "numTest": 0,
        "training": training,
        "test": [],
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=1) + "\n")


def _write_csv(folder: Path, order: _Order) -> None:
    from consilium_common.demo.anatomy import draw_anatomy

    rows = []
    for number in range(1, order.patients + 1):
        anatomy = draw_anatomy(order.rng)
        for visit in range(2 if number <= _second_scans(order.patients) else 1):
            # At the second visit the lesions have grown or shrunk under treatment.
            seen = anatomy if visit == 0 else anatomy.grown(float(order.rng.uniform(0.75, 1.25)))
            scan = order.scan(seen)
            case = f"SA{number:03d}{'ab'[visit]}"
            image, label = f"scans/{case}.nii.gz", f"masks/{case}.nii.gz"
            write_nifti(scan, folder / image, folder / label)
            rows.append([case, f"SA-{number:04d}", image, label])
            order.done()
    table = csv_text(["case_id", "patient_id", "image", "label"], rows)
    (folder / "cases.csv").write_text(table, encoding="utf-8")


def write_nifti(scan: Scan, image: Path, label: Path) -> None:
    """Write a scan and its label as NIfTI-1 files, millimetres, scanner coordinates (RAS)."""
    import nibabel
    import numpy as np

    for path, array in (
        (image, np.round(scan.hounsfield / scan.step).astype(np.int16)),
        (label, scan.label),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = nibabel.Nifti1Image(array, scan.affine_ras)
        file.header.set_xyzt_units("mm")
        file.set_sform(scan.affine_ras, code="scanner")
        file.set_qform(scan.affine_ras, code="scanner")
        if path == image:
            file.header.set_slope_inter(scan.step, 0)
        nibabel.save(file, path)


def csv_text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as CSV with line feeds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
