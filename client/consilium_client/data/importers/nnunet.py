"""nnU-Net's raw data: ``imagesTr/CASE_0000.nii.gz`` per channel, ``labelsTr/CASE.nii.gz``."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from consilium_client.data.findings import Finding
from consilium_client.data.importers.base import (
    NO_PATIENTS,
    Found,
    broken_dataset_json,
    inside,
    new_case,
    read_dataset_json,
    unique_inputs,
    without_suffix,
)
from consilium_client.data.schema import Case
from consilium_common.errors import ConsiliumError

_FILE: Final = "dataset.json"
_IMAGES: Final = "imagesTr"
_LABELS: Final = "labelsTr"
_CHANNEL: Final = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")


class NnunetImporter:
    """Reads ``dataset.json`` of both versions: channels, labels and, where it lists them, cases."""

    name = "nnunet"
    understands: frozenset[str] = frozenset()

    def detect(self, folder: Path) -> str | None:
        """See :class:`~consilium_client.data.importers.base.Importer`."""
        if not (folder / _FILE).is_file():
            return None
        try:
            content = read_dataset_json(folder / _FILE)
        except ConsiliumError:
            return None
        if "channel_names" in content:
            return f"a {_FILE} with channel_names"
        if (folder / _IMAGES).is_dir() and any((folder / _IMAGES).glob("*_0000.*")):
            return f"a {_FILE} and {_IMAGES}/*_0000"
        return None

    def cases(self, folder: Path) -> Found:
        """List the training cases; the layout names no patients, so each case is its own.

        Raises
        ------
        ConsiliumError
            ``data.dataset-json``, or ``data.outside`` for a path that leaves the folder.
        """
        path = folder / _FILE
        content = read_dataset_json(path)
        ending = content.get("file_ending", ".nii.gz")
        if not isinstance(ending, str) or not re.fullmatch(r"(\.[A-Za-z0-9]+)+", ending):
            raise broken_dataset_json(path, "file_ending is not a file's ending")
        inputs = _inputs(content, path)
        labels, notes = _label_names(content, path)
        listed = content.get("dataset")
        pairs = _found(folder, ending, path) if listed is None else _listed(listed, path)
        cases: list[Case] = []
        findings: list[Finding] = []
        for name, (files, label) in pairs.items():
            if len(files) != len(inputs):
                findings.append(_incomplete(name, len(files), len(inputs), folder / _IMAGES))
                continue
            channels = dict(zip(inputs, files, strict=True))
            cases.append(new_case(path, case_id=name, images=channels, label=label))
        return Found(
            root=folder,
            cases=tuple(cases),
            label_kind="mask",
            inputs=inputs,
            labels=labels,
            findings=tuple(findings),
            notes=(NO_PATIENTS, *notes),
        )


def _inputs(content: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    table = content.get("channel_names", content.get("modality"))
    if not isinstance(table, dict) or set(table) != {str(n) for n in range(max(1, len(table)))}:
        raise broken_dataset_json(path, "channel_names is not a table of 0, 1, … to names")
    return unique_inputs([str(table[str(number)]) for number in range(len(table))])


def _label_names(
    content: Mapping[str, Any], path: Path
) -> tuple[dict[str, int | str], tuple[str, ...]]:
    """Return the name of each value in the masks, and what a person should know about it."""
    table = content.get("labels")
    if not isinstance(table, dict) or not table:
        raise broken_dataset_json(path, "labels is not a table of names to values")
    if all(str(key).isdecimal() for key in table):  # the first version: value to name
        table = {str(name): int(value) for value, name in table.items()}
    if "ignore" in table:
        raise ConsiliumError(
            "data.dataset-json",
            "The data set has an ignore label: voxels that nobody has labelled.",
            where=str(path),
            hint="Such voxels would be learnt as background. Label them, or leave those cases out "
            "and remove `ignore` from labels.",
        )
    single: dict[str, int] = {}
    regions: list[str] = []
    values: set[int] = set()
    for name, value in table.items():
        parts = value if isinstance(value, list) else [value]
        if not parts or not all(_is_value(part) for part in parts):
            raise broken_dataset_json(path, "a label's value is not a whole number from 0 on")
        values.update(parts)
        if len(parts) == 1:
            single[str(name)] = parts[0]
        else:
            regions.append(str(name))
    if len(set(single.values())) != len(single):
        raise broken_dataset_json(path, "labels gives one value to two names")
    unnamed = sorted(values - set(single.values()))
    named: dict[str, int | str] = {**single, **{f"value-{value}": value for value in unnamed}}
    if not regions:
        return named, ()
    return named, (
        f"The regions {', '.join(regions)} are unions of values; a mask's values are imported one "
        "by one. Map several of them to one class of a study under `classes` in site.yaml.",
    )


def _is_value(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _listed(listed: Any, path: Path) -> dict[str, tuple[list[str], str]]:
    good = (
        isinstance(listed, dict)
        and listed
        and all(
            isinstance(entry, dict)
            and isinstance(entry.get("label", ""), str)
            and isinstance(entry.get("images"), list)
            and all(isinstance(image, str) for image in entry["images"])
            for entry in listed.values()
        )
    )
    if not good:
        raise broken_dataset_json(path, "dataset is not a table of cases with images and a label")
    return {
        without_suffix(str(name)): (
            [inside(image, path) for image in entry["images"]],
            inside(entry["label"], path) if entry.get("label") else "",
        )
        for name, entry in listed.items()
    }


def _found(folder: Path, ending: str, path: Path) -> dict[str, tuple[list[str], str]]:
    """Return each case's files in the channels' order, and its mask."""
    files: dict[str, dict[int, str]] = defaultdict(dict)
    images = folder / _IMAGES
    for file in sorted(images.glob(f"*{ending}")) if images.is_dir() else ():
        match = _CHANNEL.fullmatch(file.name.removesuffix(ending))
        if match and not file.name.startswith("."):
            files[match["case"]][int(match["channel"])] = f"{_IMAGES}/{file.name}"
    if not files:
        raise broken_dataset_json(path, f"{_IMAGES} has no files CASE_0000{ending}")
    return {
        # A gap in the numbers shortens the list: no later channel takes the missing one's place.
        name: (
            [channels[number] for number in range(len(channels)) if number in channels],
            mask if (folder / (mask := f"{_LABELS}/{name}{ending}")).is_file() else "",
        )
        for name, channels in files.items()
    }


def _incomplete(name: str, found: int, wanted: int, where: Path) -> Finding:
    error = ConsiliumError(
        "data.missing",
        f"The case has {found} of {wanted} channels.",
        where=f"{where}/{name}_*",
        hint="Restore the missing files, or leave the case out (--skip-bad does).",
    )
    return Finding.of(name, error)
