"""Index, ingest and cached epoch against MONAI's LoadImage + PersistentDataset in the same run.

Run ``python tests/benchmarks/ingest.py`` (a few minutes on two cores); it prints one JSON object.
``--quick`` measures small numbers once. Everything is generated; every figure comes from a process
of its own and is wall time without imports, as a person waits for it.

``index``: headers of 5 000 DICOM instances, grouped by series.
``check``: `consilium site data check` of 260 pairs the size of a hippocampus, from cold: as a
process, its start included, with an empty cache of ours (the system's own cache of files is warm).
``ingest``: ours is what a site does, import (checks, digests, cache on disk, durable) and
preparing for a study; MONAI's is the first epoch of a PersistentDataset over LoadImage,
EnsureChannelFirst, Orientation, Spacing, NormalizeIntensity and FgBgToIndices, without workers or
with a process per core, whichever is faster.
``epoch``: one patch from each case, half of them around a labelled voxel. Ours draws from the
memory-mapped cache, MONAI's loads each case from the PersistentDataset and crops with
RandCropByPosNegLabel from the indices it has cached. Neither augments.

Where no interpolation is asked for, both sides' prepared images are compared, and must agree.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

TARGET = {"index_seconds": 30.0, "check_seconds": 3.0, "ingest": 1.0, "epoch": 10.0}
PATCH = [64, 64, 32]
EPOCHS = 5
#: The public hippocampus has 260 labelled images of about this size.
PAIRS, SMALL = 260, (36, 50, 36)


@dataclass(frozen=True)
class Task:
    """One cohort to bring in."""

    dicom: bool
    #: Millimetres that the study resamples to; the images have 1 × 1 × 2.
    spacing: tuple[float, float, float]

    @property
    def interpolates(self) -> bool:
        """Whether voxels change."""
        return self.spacing != (1.0, 1.0, 2.0)


TASKS = {
    "nifti": Task(False, (1.0, 1.0, 2.0)),
    "nifti, resampled": Task(False, (0.9, 0.9, 1.5)),
    "dicom": Task(True, (1.0, 1.0, 2.0)),
}


# --- what is brought in ------------------------------------------------------------------------


def write_cohort(folder: Path, cases: int, shape: tuple[int, int, int], *, dicom: bool) -> None:
    """Write images (NIfTI or DICOM series), NIfTI labels and their list."""
    import nibabel
    from scipy.ndimage import gaussian_filter

    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    index = np.indices(shape)
    rows = ["case_id,patient_id,image,label"]
    for number in range(cases):
        generator = np.random.default_rng(number)
        anatomy = gaussian_filter(generator.normal(0, 1, shape), 3) * 2000
        values = np.rint(anatomy + generator.normal(0, 12, shape)).astype(np.int16)
        centre = np.array(shape) * generator.uniform(0.4, 0.6, 3)
        away = sum((axis - c) ** 2 for axis, c in zip(index, centre, strict=True))
        label = (away < (min(shape) / 4) ** 2).astype(np.uint8)
        place = f"case{number:03d}"
        (folder / place).mkdir(parents=True)
        nibabel.save(nibabel.Nifti1Image(label, affine), folder / place / "label.nii.gz")
        image = f"{place}/series" if dicom else f"{place}/image.nii.gz"
        if dicom:
            write_series(folder / image, values, patient=place)
        else:
            nibabel.save(nibabel.Nifti1Image(values, affine), folder / image)
        rows.append(f"{place},{place},{image},{place}/label.nii.gz")
    (folder / "cases.csv").write_text("\n".join(rows) + "\n")


def write_series(folder: Path, values: np.ndarray, *, patient: str) -> None:
    """Write a CT series whose affine in RAS+ is that of the NIfTI images."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    folder.mkdir(parents=True)
    series, study, frame = generate_uid(), generate_uid(), generate_uid()
    for number in range(values.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        slice_ = Dataset()
        slice_.file_meta = meta
        slice_.SOPClassUID = CTImageStorage
        slice_.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
        slice_.SeriesInstanceUID, slice_.StudyInstanceUID = series, study
        slice_.FrameOfReferenceUID = frame
        slice_.PatientID, slice_.Modality = patient, "CT"
        slice_.InstanceNumber = number + 1
        slice_.Rows, slice_.Columns = values.shape[1], values.shape[0]
        slice_.PixelSpacing, slice_.SliceThickness = [1.0, 1.0], 2.0
        # RAS+ axes: to the right and to the front are minus x and minus y in DICOM.
        slice_.ImageOrientationPatient = [-1.0, 0.0, 0.0, 0.0, -1.0, 0.0]
        slice_.ImagePositionPatient = [0.0, 0.0, 2.0 * number]
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
        slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit = 16, 16, 15
        slice_.PixelRepresentation = 1
        slice_.RescaleSlope, slice_.RescaleIntercept = 1.0, 0.0
        slice_.PixelData = values[:, :, number].T.astype(np.int16).tobytes()
        slice_.save_as(folder / f"{number:04d}.dcm", enforce_file_format=True)


def study_of(task: Task) -> Any:
    """Return the study that both sides prepare for."""
    from consilium_common.study import Study

    return Study.model_validate(
        {
            "schema": "consilium/study/v1",
            "name": "ingest",
            "task": {
                "kind": "segmentation",
                "dimensions": 3,
                "inputs": ["image"],
                "classes": ["background", "organ"],
            },
            "preprocessing": {"spacing": list(task.spacing)},
            "model": {"network": "unet"},
            "training": {
                "loss": "dice_ce",
                "patch": PATCH,
                "foreground_share": 0.5,
            },
            "privacy": {"mode": "none"},
        }
    )


# --- ours --------------------------------------------------------------------------------------


def index(folder: Path) -> dict[str, Any]:
    """Index all DICOM files below the folder."""
    from consilium_client.data.ingest.dicom_headers import files_below, index_files

    start = time.perf_counter()
    headers, findings = index_files(files_below(folder))
    seconds = time.perf_counter() - start
    series = len({header.series for header in headers})
    return {
        "instances": len(headers),
        "series": series,
        "findings": len(findings),
        "seconds": seconds,
    }


def ours(folder: Path, task: Task) -> dict[str, Any]:
    """Import, prepare, and draw patches from the memory-mapped cache."""
    from consilium_client.data.cohort import open_cohort
    from consilium_client.data.importing import ImportOptions, import_folder
    from consilium_client.data.split import SPLITS
    from consilium_client.home import SiteHome
    from consilium_client.training.patches import PatchSource

    for library in ("nibabel.orientations", "pydicom", "scipy.ndimage", "PIL.Image"):
        importlib.import_module(library)  # as on the other side, they are there before the start
    study = study_of(task)
    with tempfile.TemporaryDirectory() as place:
        home = SiteHome.create(Path(place) / "site")
        options = ImportOptions(labels={"background": 0, "organ": 1}, site="benchmark")
        start = time.perf_counter()
        import_folder(home, folder, options)
        imported = time.perf_counter() - start
        cohort = open_cohort(home, study)
        seconds = time.perf_counter() - start
        patients = [patient for split in SPLITS for patient in cohort.patients(split)]
        patches = PatchSource(study, patients, memory_limit=0)
        generator = np.random.default_rng(0)
        epochs = timed(lambda: [patches.batch([case], generator) for case in patches.cases])
        first = min((case for patient in patients for case in patient.cases), key=_name)
        np.save(folder / "ours.npy", first.image())
        return {"seconds": seconds, "import_seconds": imported, "epoch_seconds": epochs}


def _name(case: Any) -> str:
    return str(case.case_id)


# --- MONAI -------------------------------------------------------------------------------------


def monai(folder: Path, task: Task, workers: int) -> dict[str, Any]:
    """Fill a PersistentDataset by a first epoch, then draw patches from it."""
    import torch
    from monai.data import PersistentDataset
    from monai.transforms import (
        Compose,
        EnsureChannelFirstd,
        FgBgToIndicesd,
        LoadImaged,
        NormalizeIntensityd,
        Orientationd,
        RandCropByPosNegLabeld,
        Spacingd,
    )
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    both = ["image", "label"]
    rows = (folder / "cases.csv").read_text().split()[1:]
    files = [
        {"image": str(folder / image), "label": str(folder / label)}
        for _, _, image, label in (row.split(",") for row in rows)
    ]
    steps = [
        LoadImaged(keys=both),
        EnsureChannelFirstd(keys=both),
        Orientationd(keys=both, axcodes="RAS", labels=None),
        Spacingd(keys=both, pixdim=task.spacing, mode=("bilinear", "nearest")),
        NormalizeIntensityd(keys="image"),
        FgBgToIndicesd(keys="label"),
    ]
    crop = RandCropByPosNegLabeld(
        keys=both,
        label_key="label",
        spatial_size=PATCH,
        num_samples=1,
        fg_indices_key="label_fg_indices",
        bg_indices_key="label_bg_indices",
        allow_smaller=True,
    )
    with tempfile.TemporaryDirectory() as place:
        filling = PersistentDataset(files, Compose(steps), cache_dir=place)
        start = time.perf_counter()
        # Nothing is sent back from workers: filling the cache is all that is wanted.
        for _ in DataLoader(filling, batch_size=None, num_workers=workers, collate_fn=lambda _: 0):
            pass
        seconds = time.perf_counter() - start
        drawing = PersistentDataset(files, Compose([*steps, crop]), cache_dir=place)
        epochs = timed(lambda: [drawing[number] for number in range(len(files))])
        np.save(folder / "monai.npy", np.asarray(filling[0]["image"]))
        return {"seconds": seconds, "epoch_seconds": epochs}


def timed(work: Callable[[], Any]) -> float:
    """Return the least seconds of some epochs, after a first one."""
    work()
    found = []
    for _ in range(EPOCHS):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


# --- comparison --------------------------------------------------------------------------------


def in_fresh_process(*what: str) -> dict[str, Any]:
    """Measure in a process of its own."""
    found = subprocess.run(
        [sys.executable, __file__, "--one", *what],
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if found.returncode:
        raise SystemExit(found.stderr)
    figures: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return figures


def compare(name: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Measure both sides on one cohort; the least of the repeats counts."""
    task = TASKS[name]
    mine = [in_fresh_process("ours", name, str(folder)) for _ in range(repeats)]
    workers = sorted({0, os.cpu_count() or 1})
    theirs = [
        {**in_fresh_process("monai", name, str(folder), str(number)), "workers": number}
        for _ in range(repeats)
        for number in workers
    ]
    ingest = min(one["seconds"] for one in mine), min(one["seconds"] for one in theirs)
    epoch = min(one["epoch_seconds"] for one in mine), min(one["epoch_seconds"] for one in theirs)
    ratios = {"ingest": ingest[1] / ingest[0], "epoch": epoch[1] / epoch[0]}
    result = {
        "ours": {
            "ingest_seconds": round(ingest[0], 2),
            "of_which_import": round(min(one["import_seconds"] for one in mine), 2),
            "epoch_seconds": round(epoch[0], 4),
        },
        "monai": {
            "ingest_seconds": round(ingest[1], 2),
            "workers": min(theirs, key=lambda one: float(one["seconds"]))["workers"],
            "epoch_seconds": round(epoch[1], 4),
        },
        "times_as_fast": {key: round(ratio, 2) for key, ratio in ratios.items()},
        "target_met": {key: ratio >= TARGET[key] for key, ratio in ratios.items()},
    }
    if not task.interpolates:
        a, b = np.load(folder / "ours.npy"), np.load(folder / "monai.npy")
        if a.shape != b.shape:
            raise SystemExit(f"prepared images have shapes {a.shape} and {b.shape}")
        apart = float(np.abs(a - b).max())
        if apart > 1e-3:
            raise SystemExit(f"prepared images differ by {apart}")
        result["largest_difference"] = float(f"{apart:.1e}")
    return result


def measure_index(instances: int, repeats: int) -> dict[str, Any]:
    """Generate so many small instances, fifty a series, and index them."""
    with tempfile.TemporaryDirectory() as place:
        for number in range(instances // 50):
            values = np.full((32, 32, 50), number, dtype=np.int16)
            write_series(Path(place) / f"{number % 7}" / f"{number}", values, patient=f"P{number}")
        found = [in_fresh_process("index", place) for _ in range(repeats)]
    best = min(found, key=lambda one: float(one["seconds"]))
    if best["instances"] != instances or best["findings"]:
        raise SystemExit(f"the index is not complete: {best}")
    return {**best, "seconds": round(best["seconds"], 2)}


def measure_check(pairs: int, repeats: int) -> dict[str, Any]:
    """Import so many small pairs, empty the cache, and check them as a person does."""
    with tempfile.TemporaryDirectory() as place:
        images, home = Path(place) / "images", str(Path(place) / "site")
        write_cohort(images, pairs, SMALL, dicom=False)
        labels = ("--label", "background=0", "--label", "organ=1")
        consilium("import", str(images), "--home", home, "--site", "benchmark", *labels)
        found = []
        for _ in range(repeats):
            consilium("purge", "--home", home)
            start, before = time.perf_counter(), os.times()
            checked = consilium("check", "--home", home)
            after = os.times()
            busy = after.children_user + after.children_system
            busy -= before.children_user + before.children_system
            found.append((round(time.perf_counter() - start, 2), round(busy, 2)))
            if checked["cases"] != pairs or checked["read"] != pairs:
                raise SystemExit(f"not all were read and checked: {checked}")
    seconds, busy = min(found)
    return {"pairs": pairs, "shape": SMALL, "seconds": seconds, "cpu_seconds": busy}


def consilium(*arguments: str) -> dict[str, Any]:
    """Run a command of `site data` as a process and return its data."""
    command = [Path(sys.executable).with_name("consilium"), "--json", "site", "data", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode not in (0, 10):  # 10: warnings only
        raise SystemExit(done.stdout + done.stderr)
    data: dict[str, Any] = json.loads(done.stdout)["data"]
    return data


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small numbers, once")
    parser.add_argument("--repeats", type=int, default=2, help="repeats of each (default 2)")
    parser.add_argument("--case", choices=list(TASKS), action="append", help="only this cohort")
    parser.add_argument("--only-check", action="store_true", help="`site data check` alone")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        what, *rest = options.one
        if what == "index":
            print(json.dumps(index(Path(rest[0]))))
        elif what == "ours":
            print(json.dumps(ours(Path(rest[1]), TASKS[rest[0]])))
        else:
            print(json.dumps(monai(Path(rest[1]), TASKS[rest[0]], int(rest[2]))))
        return
    load = os.getloadavg()
    if options.only_check:
        checked = measure_check(PAIRS, options.repeats)
        print(json.dumps({"benchmark": "check", **checked, "load_average": load}, indent=2))
        return
    repeats = 1 if options.quick else options.repeats
    cases, shape = (4, (72, 72, 36)) if options.quick else (24, (160, 160, 64))
    found: dict[str, Any] = {}
    for name in ["nifti"] if options.quick else options.case or list(TASKS):
        with tempfile.TemporaryDirectory() as place:
            write_cohort(Path(place), cases, shape, dicom=TASKS[name].dicom)
            found[name] = compare(name, Path(place), repeats)
    indexed = measure_index(200 if options.quick else 5000, repeats)
    indexed["target_met"] = indexed["seconds"] <= TARGET["index_seconds"]
    checked = measure_check(20 if options.quick else PAIRS, repeats)
    checked["target_met"] = checked["seconds"] <= TARGET["check_seconds"]
    print(
        json.dumps(
            {
                "benchmark": "ingest",
                "target": TARGET,
                "cases": cases,
                "shape": shape,
                "patch": PATCH,
                "index": indexed,
                "check": checked,
                "cohorts": found,
                "load_average": {"before": load, "after": os.getloadavg()},
                "machine": {
                    "cpus": os.cpu_count(),
                    "platform": platform.platform(),
                    "python": platform.python_version(),
                    **{p: version(p) for p in ("consilium", "torch", "monai", "pydicom")},
                },
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
