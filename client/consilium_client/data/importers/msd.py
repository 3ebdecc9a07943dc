"""The Medical Segmentation Decathlon's layout: ``dataset.json`` beside imagesTr and labelsTr."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

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


class MsdImporter:
    """Reads ``dataset.json``: modalities, labels and the training pairs."""

    name = "msd"
    understands: frozenset[str] = frozenset()

    def detect(self, folder: Path) -> str | None:
        """See :class:`~consilium_client.data.importers.base.Importer`."""
        path = folder / _FILE
        if not path.is_file():
            return None
        try:
            content = read_dataset_json(path)
        except ConsiliumError:
            return f"a {_FILE}"  # broken, and said so when it is read
        return f"a {_FILE}" if "training" in content or "channel_names" not in content else None

    def cases(self, folder: Path) -> Found:
        """List the training pairs; the layout names no patients, so each case is its own.

        Raises
        ------
        ConsiliumError
            ``data.dataset-json``, or ``data.outside`` for a path that leaves the folder.
        """
        path = folder / _FILE
        content = read_dataset_json(path)
        modalities = _table(content.get("modality"), "modality", path)
        inputs = unique_inputs([modalities[key] for key in sorted(modalities, key=_number)])
        pairs = content.get("training")
        if not isinstance(pairs, list) or not pairs:
            raise broken_dataset_json(path, "it lists no training pairs")
        cases = tuple(_case(pair, inputs, path) for pair in pairs)
        names = [case.case_id for case in cases]
        if len(set(names)) != len(names):
            raise broken_dataset_json(path, "it lists one image twice")
        return Found(
            root=folder,
            cases=cases,
            label_kind="mask",
            inputs=inputs,
            labels=_labels(content, path),
            notes=(NO_PATIENTS,),
        )


def _case(pair: Any, inputs: tuple[str, ...], path: Path) -> Case:
    if isinstance(pair, str):
        pair = {"image": pair}
    if not isinstance(pair, dict) or not isinstance(pair.get("image"), str):
        raise broken_dataset_json(path, "a training entry has no image")
    image = inside(pair["image"], path)
    label = pair.get("label")
    images = (
        {inputs[0]: image}
        if len(inputs) == 1
        else {name: f"{image}#{number}" for number, name in enumerate(inputs)}
    )
    return new_case(
        path,
        case_id=without_suffix(Path(image).name),
        images=images,
        label=inside(label, path) if isinstance(label, str) and label else "",
    )


def _labels(content: Mapping[str, Any], path: Path) -> dict[str, int | str]:
    labels = {}
    for value, name in _table(content.get("labels"), "labels", path).items():
        labels[name] = _number(value)
    if len(set(labels.values())) != len(labels):
        raise broken_dataset_json(path, "labels has two names for one value, or one name twice")
    return {str(name): value for name, value in labels.items()}


def _table(value: Any, what: str, path: Path) -> dict[str, str]:
    good = isinstance(value, dict) and value and all(str(key).isdecimal() for key in value)
    if not good:
        raise broken_dataset_json(path, f"{what} is not a table of numbers to names")
    return {str(key): str(name) for key, name in value.items()}


def _number(key: str) -> int:
    return int(key)
