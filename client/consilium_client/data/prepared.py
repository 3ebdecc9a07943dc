"""The cache of cases prepared for studies: one folder per way of preparing, one in it per case."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np

from consilium_client.data.ingest.cache import Ingested
from consilium_client.data.ingest.room import in_words, make_room
from consilium_client.data.ingest.volume import Array
from consilium_client.data.match import Match
from consilium_client.data.prepare import prepare, prepared_bytes
from consilium_client.home import SiteHome
from consilium_common.canonical import digest
from consilium_common.study.schema import Study

#: Raised whenever the same case would now be prepared differently.
FORMAT: Final = 2


def recipe_of(study: Study, match: Match) -> str:
    """Return the name of the folder that holds cases prepared in this way."""
    return digest(
        {
            "format": FORMAT,
            "kind": study.task.kind,
            "dimensions": study.task.dimensions,
            "preprocessing": study.preprocessing.model_dump(mode="json"),
            "channels": list(match.channels),
            "values": sorted([value, index] for value, index in match.values.items()),
        }
    )[:32]


def prepare_case(
    entry: Ingested, study: Study, match: Match
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return the arrays of a case as the study trains on it, and what its case.json holds."""
    label = None
    if study.task.kind == "segmentation":
        values = entry.label()
        table = np.zeros(int(np.iinfo(values.dtype).max) + 1, dtype=np.uint8)
        for value, index in match.values.items():
            if value < table.size:
                table[value] = index
        label = table[values]
    images = [entry.image(name) for name in match.channels]
    image, label, affine = prepare(images, label, entry.affine, study)
    arrays: dict[str, Array] = {"image": image}
    if label is not None:
        arrays["label"] = label
    return arrays, {"affine": affine.tolist()}


def content_of(folder: Path) -> dict[str, Any] | None:
    """Return what the case.json of a prepared case holds, or None where there is none."""
    try:
        content: dict[str, Any] = json.loads((folder / "case.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return content


def require_room(
    home: SiteHome,
    folder: Path,
    entries: Iterable[Ingested],
    study: Study,
    *,
    quota_gib: float | None,
    say: Callable[[str], None] | None,
) -> None:
    """Say how much room the cases still to be prepared in ``folder`` take; see that it is there.

    Raises
    ------
    ConsiliumError
        ``state.quota`` or ``state.disk``.
    """
    unprepared = {
        entry.content: entry for entry in entries if not (folder / entry.content).exists()
    }
    if not unprepared:
        return
    sizes = (prepared_bytes(entry.shape, entry.affine, study) for entry in unprepared.values())
    needed = sum(sizes)
    free = make_room(home, needed, quota_gib)
    if say is not None:
        say(
            f"{len(unprepared)} cases to prepare: {in_words(needed)} in the cache; "
            f"{in_words(free)} are free on its disk."
        )
