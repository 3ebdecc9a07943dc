"""The Medical Segmentation Decathlon's layout: ``dataset.json`` beside imagesTr and labelsTr."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from consilium_client.data.importers.base import Found, case_name, unique_inputs
from consilium_client.data.schema import Case
from consilium_common.errors import ConsiliumError

_FILE: Final = "dataset.json"


class MsdImporter:
    """Reads ``dataset.json``: modalities, labels and the training pairs."""

    name = "msd"

    def detect(self, folder: Path) -> str | None:
        """See :class:`~consilium_client.data.importers.base.Importer`."""
        return f"a {_FILE}" if (folder / _FILE).is_file() else None

    def cases(self, folder: Path) -> Found:
        """List the training pairs; the layout names no patients, so each case is its own.

        Raises
        ------
        ConsiliumError
            ``data.dataset-json``, or ``data.outside`` for a path that leaves the folder.
        """
        path = folder / _FILE
        content = _read(path)
        modalities = _table(content.get("modality"), "modality", path)
        inputs = unique_inputs([modalities[key] for key in sorted(modalities, key=_number)])
        pairs = content.get("training")
        if not isinstance(pairs, list) or not pairs:
            raise _broken(path, "it lists no training pairs")
        cases = tuple(_case(pair, inputs, folder, path) for pair in pairs)
        names = [case.case_id for case in cases]
        if len(set(names)) != len(names):
            raise _broken(path, "it lists one image twice")
        return Found(
            root=folder,
            cases=cases,
            label_kind="mask",
            inputs=inputs,
            labels=_labels(content, path),
            notes=(
                "The Decathlon's layout names no patients: every case counts as a patient of its "
                "own. If patients have several cases, give --patients FILE.csv (case_id, "
                "patient_id); privacy per patient depends on it.",
            ),
        )


def _case(pair: Any, inputs: tuple[str, ...], folder: Path, path: Path) -> Case:
    if isinstance(pair, str):
        pair = {"image": pair}
    if not isinstance(pair, dict) or not isinstance(pair.get("image"), str):
        raise _broken(path, "a training entry has no image")
    image = _inside(pair["image"], folder, path)
    label = pair.get("label")
    images = (
        {inputs[0]: image}
        if len(inputs) == 1
        else {name: f"{image}#{number}" for number, name in enumerate(inputs)}
    )
    name = case_name(Path(image).name)
    return Case(
        case_id=name,
        patient_id=name,
        images=images,
        label=_inside(label, folder, path) if isinstance(label, str) and label else "",
    )


def _inside(reference: str, folder: Path, path: Path) -> str:
    # The file came from elsewhere: it may not point at anything but its own folder.
    relative = Path(reference)
    if relative.is_absolute() or ".." in relative.parts:
        raise ConsiliumError(
            "data.outside",
            f"A path in {_FILE} leaves the folder: {reference[:200]}.",
            where=str(path),
            hint="List such images in a CSV file of your own instead.",
        )
    return str(relative)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _broken(path, "it cannot be read as JSON") from error
    if not isinstance(content, dict):
        raise _broken(path, "it holds no object")
    if "channel_names" in content and "training" not in content:
        raise ConsiliumError(
            "data.dataset-json",
            f"This {_FILE} is nnU-Net's, which lists no cases.",
            where=str(path),
            hint="List the cases in a CSV file: case_id, patient_id, image, label.",
        )
    return content


def _labels(content: Mapping[str, Any], path: Path) -> dict[str, int | str]:
    labels = {}
    for value, name in _table(content.get("labels"), "labels", path).items():
        labels[name] = _number(value)
    if len(set(labels.values())) != len(labels):
        raise _broken(path, "labels has two names for one value, or one name twice")
    return {str(name): value for name, value in labels.items()}


def _table(value: Any, what: str, path: Path) -> dict[str, str]:
    good = isinstance(value, dict) and value and all(str(key).isdecimal() for key in value)
    if not good:
        raise _broken(path, f"{what} is not a table of numbers to names")
    return {str(key): str(name) for key, name in value.items()}


def _number(key: str) -> int:
    return int(key)


def _broken(path: Path, why: str) -> ConsiliumError:
    return ConsiliumError(
        "data.dataset-json",
        f"{_FILE} is not in the Decathlon's layout: {why}.",
        where=str(path),
        hint="Mend it, or list the cases in a CSV file: case_id, patient_id, image, label.",
    )
