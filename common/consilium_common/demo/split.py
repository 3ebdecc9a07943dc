"""Split a folder of one's own over the demo's sites, by patient, into unequal parts.

Whole patients go to one site. Which one follows from the patient's name alone and the others in
the folder, so the same folder is always split the same way. Files are hard-linked where the disk
allows it and copied otherwise; the original folder is only read.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from consilium_common.demo.hospitals import NAMES, Format, Hospital, csv_text, new_folder
from consilium_common.errors import ConsiliumError

T = TypeVar("T")

#: Shares of the patients per site for the demo's three.
THREE: Final = (0.5, 0.3, 0.2)
PICTURES: Final = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})
_COLUMNS: Final = ("case_id", "patient_id", "image", "label")
_MOST: Final = 26


@dataclass
class _Part:
    """What one site will get: files by their place in its folder, and one list of them."""

    name: str
    format: Format
    patients: int
    files: dict[Path, Path] = field(default_factory=dict)
    list_name: str = ""
    list_text: str = ""


def split_dataset(folder: Path, out: Path, sites: int = 3) -> list[Hospital]:
    """Split ``folder`` over ``sites`` sites below ``out``; nothing is written unless all is well.

    Parameters
    ----------
    folder : Path
        One of three layouts, found in this order: ``dataset.json`` of the Medical Segmentation
        Decathlon (one patient per image), a CSV file with the columns ``case_id, patient_id,
        image, label`` and paths relative to it (or that file itself), or a folder of 2D images
        per class (one patient per image, every class split on its own, so that each site has all
        classes).
    out : Path
        Gets one new folder per site.
    sites : int
        How many sites, 1 to 26. Three take .5, .3 and .2 of the patients; other numbers take
        shares in proportion n, n-1, …, 1.

    Raises
    ------
    ConsiliumError
        ``data.layout`` (no known layout), ``data.malformed``, ``data.missing-file``,
        ``data.too-few-patients``, ``usage.demo``, ``state.not-empty``, ``state.disk``.
    """
    if not 1 <= sites <= _MOST:
        raise ConsiliumError("usage.demo", f"The demo has 1 to {_MOST} sites, not {sites}.")
    names = list(NAMES) if sites == len(NAMES) else [f"site-{n + 1}" for n in range(sites)]
    layout, source = _layout(folder)
    if layout == "msd":
        parts = _plan_msd(source, names)
    elif layout == "csv":
        parts = _plan_csv(source, names)
    else:
        parts = _plan_classes(source, names)
    for part in parts:
        if (out / part.name).exists():
            raise ConsiliumError(
                "state.not-empty",
                "The folder for a site's images is there already.",
                where=str(out / part.name),
                hint="Remove it, or choose another folder.",
            )
    return [_write(part, out / part.name) for part in parts]


def shares(sites: int) -> tuple[float, ...]:
    """Return each site's share of the patients; unequal, largest first, sum 1."""
    if sites == len(THREE):
        return THREE
    total = sites * (sites + 1) / 2
    return tuple((sites - index) / total for index in range(sites))


def _layout(folder: Path) -> tuple[Format, Path]:
    """Return the layout and the file or folder that lists the cases."""
    if folder.is_file() and folder.suffix.lower() == ".csv":
        return "csv", folder
    if not folder.is_dir():
        raise ConsiliumError(
            "data.layout",
            "The folder of images does not exist.",
            where=str(folder),
            hint="Give the folder that holds dataset.json, a CSV file or one folder per class.",
        )
    if (folder / "dataset.json").is_file():
        return "msd", folder / "dataset.json"
    if (folder / "cases.csv").is_file():
        return "csv", folder / "cases.csv"
    tables = sorted(folder.glob("*.csv"))
    if len(tables) > 1:
        raise ConsiliumError(
            "data.layout",
            f"The folder holds {len(tables)} CSV files; which one lists the cases is unclear.",
            where=str(folder),
            hint=f"Name it cases.csv; its columns are {', '.join(_COLUMNS)}.",
        )
    if tables:
        return "csv", tables[0]
    if len(_class_folders(folder)) >= 2:
        return "folders", folder
    raise ConsiliumError(
        "data.layout",
        "No known layout: neither a dataset.json, nor a CSV file, nor folders of images by class.",
        where=str(folder),
        hint=f"The simplest is a cases.csv with the columns {', '.join(_COLUMNS)}.",
    )


def _partition(items: Sequence[T], names: Sequence[str], parts: int, where: Path) -> list[list[T]]:
    """Split ``items`` by the order of their names' hashes; every part gets at least one."""
    if len(items) < parts:
        raise ConsiliumError(
            "data.too-few-patients",
            f"{len(items)} patients cannot be split over {parts} sites.",
            where=str(where),
            hint="Give data of more patients, or fewer sites.",
        )
    hashes = [hashlib.sha256(name.encode()).digest() for name in names]
    order = sorted(range(len(items)), key=lambda index: (hashes[index], index))
    ends: list[int] = []
    total = 0.0
    for index, share in enumerate(shares(parts)):
        total += share
        lowest = (ends[-1] if ends else 0) + 1
        highest = len(items) - (parts - 1 - index)
        ends.append(min(max(round(total * len(items)), lowest), highest))
    return [
        # Back in the folder's own order: easier for a person to find a case in.
        [items[index] for index in sorted(order[start:end])]
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]


def _plan_msd(source: Path, names: list[str]) -> list[_Part]:
    try:
        description: dict[str, Any] = json.loads(source.read_bytes())
        cases = [(str(case["image"]), str(case["label"])) for case in description["training"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConsiliumError(
            "data.malformed",
            "dataset.json does not list training cases as pairs of image and label.",
            where=str(source),
            hint='Each entry of "training" needs the paths "image" and "label".',
        ) from error
    images = [Path(image).name for image, _ in cases]
    parts = []
    for name, chosen in zip(names, _partition(cases, images, len(names), source), strict=True):
        part = _Part(name, "msd", len(chosen), list_name="dataset.json")
        training = [
            {"image": f"./{_take(part, image, source)}", "label": f"./{_take(part, label, source)}"}
            for image, label in chosen
        ]
        # Cases without labels serve no study here.
        own = {**description, "training": training, "numTraining": len(training)}
        part.list_text = json.dumps({**own, "test": [], "numTest": 0}, indent=1) + "\n"
        parts.append(part)
    return parts


def _plan_csv(source: Path, names: list[str]) -> list[_Part]:
    header, rows = _table(source)
    patients = list(dict.fromkeys(row["patient_id"].strip() for row in rows))
    images = [column for column in header if column == "image" or column.startswith("image_")]
    parts = []
    for name, group in zip(names, _partition(patients, patients, len(names), source), strict=True):
        part = _Part(name, "csv", len(group), list_name="cases.csv")
        chosen = [dict(row) for row in rows if row["patient_id"].strip() in set(group)]
        for row in chosen:
            for column in images:
                row[column] = _take(part, row[column], source)
            if _is_file(row["label"], source):
                row["label"] = _take(part, row["label"], source)
        part.list_text = csv_text(header, [[row[column] for column in header] for row in chosen])
        parts.append(part)
    return parts


def _plan_classes(folder: Path, names: list[str]) -> list[_Part]:
    parts = [_Part(name, "folders", 0) for name in names]
    for one in _class_folders(folder):
        pictures = _pictures(one)
        keys = [f"{one.name}/{picture.name}" for picture in pictures]
        for part, chosen in zip(parts, _partition(pictures, keys, len(names), one), strict=True):
            part.files |= {picture.relative_to(folder): picture for picture in chosen}
            part.patients += len(chosen)
    return parts


def _table(source: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        reader = csv.DictReader(io.StringIO(source.read_bytes().decode("utf-8-sig")), strict=True)
        header = [str(column) for column in reader.fieldnames or []]
        rows: list[dict[str, str]] = list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise ConsiliumError(
            "data.malformed",
            "The CSV file cannot be read.",
            where=str(source),
            hint="Save it as UTF-8 text with commas.",
        ) from error
    missing = [column for column in _COLUMNS if column not in header]
    if missing:
        raise ConsiliumError(
            "data.malformed",
            f"The CSV file lacks the columns: {', '.join(missing)}.",
            where=str(source),
            hint=f"The first line is {','.join(_COLUMNS)}.",
        )
    for number, row in enumerate(rows, start=2):
        # DictReader puts surplus values under None, and None where values are missing.
        if None in row or None in row.values() or not row["patient_id"].strip():
            raise ConsiliumError(
                "data.malformed",
                "A line has too many or too few values, or no patient_id.",
                where=f"{source}, case {number - 1}",
                hint="Every case names its patient: a split that divides patients would leak.",
            )
    return header, rows


def _is_file(label: str, source: Path) -> bool:
    """Tell a mask from a class or a number, which stay as they are."""
    name = label.rpartition("#")[0] or label
    known = name.lower().endswith((".nii", ".nii.gz", ".dcm", ".nrrd", *PICTURES))
    return bool(name.strip()) and (known or (source.parent / name).exists())


def _take(part: _Part, reference: str, source: Path) -> str:
    """Give the part a file or folder that a list refers to; return its place, as a list's path.

    What lies in the list's folder keeps its place. What lies outside goes under ``elsewhere``,
    kept apart by a hash, so that no two files meet. A fragment (``file#1``) stays.
    """
    base, mark, fragment = (
        reference.strip().rpartition("#") if "#" in reference else (reference.strip(), "", "")
    )
    folder = Path(os.path.abspath(source.parent))  # noqa: PTH100 - resolve() would follow links
    full = Path(os.path.abspath(folder / base))  # noqa: PTH100
    if not base or full == folder or not full.exists():
        raise ConsiliumError(
            "data.missing-file",
            "A file that is listed does not exist.",
            where=str(source),
            hint="Paths are relative to the file that lists them; check them and try again.",
        )
    if full.is_relative_to(folder):
        place = full.relative_to(folder)
    else:
        apart = hashlib.sha256(str(full).encode()).hexdigest()[:12]
        place = Path("elsewhere") / apart / full.name
    if full.is_dir():
        files = sorted(file for file in full.rglob("*") if file.is_file())
        part.files |= {place / file.relative_to(full): file for file in files}
    else:
        part.files[place] = full
    return f"{place.as_posix()}{mark}{fragment}"


def _class_folders(folder: Path) -> list[Path]:
    return sorted(
        one
        for one in folder.iterdir()
        if one.is_dir() and not one.name.startswith(".") and _pictures(one)
    )


def _pictures(folder: Path) -> list[Path]:
    return sorted(
        one
        for one in folder.iterdir()
        if one.suffix.lower() in PICTURES and not one.name.startswith(".") and one.is_file()
    )


def _write(part: _Part, target: Path) -> Hospital:
    with new_folder(target) as draft:
        for place, source in part.files.items():
            goal = draft / place
            goal.parent.mkdir(parents=True, exist_ok=True)
            try:
                goal.hardlink_to(source.resolve())
            except OSError:
                # Another disk, or one without hard links.
                shutil.copyfile(source, goal)
        if part.list_name:
            (draft / part.list_name).write_text(part.list_text, encoding="utf-8")
    return Hospital(part.name, target, part.format, part.patients)
