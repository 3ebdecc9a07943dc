"""Labels that carry names of their own: which are meant, and one value for each voxel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np

from consilium_client.data.ingest.volume import Array
from consilium_common.errors import ConsiliumError

#: Between names in a reference: ``seg.dcm#Liver|Tumour``.
BETWEEN: Final = "|"


def choose(
    present: Sequence[str], wanted: str, labels: Mapping[str, int], where: str
) -> tuple[str, ...]:
    """Return the names to read, in the order in which they are laid over each other.

    Parameters
    ----------
    present : sequence of str
        Names in the file, in its order.
    wanted : str
        What the case list says behind ``#``: one name, or several separated by ``|``. Empty means
        all that are present.
    labels : mapping
        The names that site.yaml lists, and their values.
    where : str
        The file. Names go behind it: an error's message may travel, and names are the file's own
        text.

    Raises
    ------
    ConsiliumError
        ``data.label-unknown`` or ``data.label-values``.
    """
    if not wanted or wanted in present:
        chosen = (wanted,) if wanted else tuple(present)
    else:
        chosen = tuple(part.strip() for part in wanted.split(BETWEEN) if part.strip())
    absent = [name for name in chosen if name not in present]
    if absent:
        raise ConsiliumError(
            "data.label-unknown",
            f"The file has no segment of this name; it has {len(present)} others.",
            where=f"{where}#{absent[0]}",
            hint="Correct the name behind # in the case list; spelling and case count.",
        )
    unknown = sorted(set(chosen) - set(labels))
    if unknown:
        raise ConsiliumError(
            "data.label-unknown",
            "The file has a segment that site.yaml does not list.",
            where=f"{where}#{unknown[0]}",
            hint="Add it under `labels` in site.yaml, or name the segments that are meant in the "
            "case list: FILE#NAME, or FILE#NAME|OTHER.",
        )
    listed = list(present)
    if len(set(chosen)) != len(chosen) or any(listed.count(name) > 1 for name in chosen):
        raise ConsiliumError(
            "data.label-values",
            "Two segments have the same name.",
            where=where,
            hint="Give each segment its own name, or merge them.",
        )
    return chosen


def lay_over(
    masks: Iterable[tuple[int, Array]], shape: tuple[int, ...], *, later_wins: bool, where: str
) -> Array:
    """Return one value per voxel from masks, uint16, background 0.

    Parameters
    ----------
    masks : iterable of (value, bool array)
        Each on the grid of ``shape``.
    later_wins : bool
        Whether a person has said the order, so that a later mask covers an earlier one. Without,
        an overlap is refused.

    Raises
    ------
    ConsiliumError
        ``data.overlap``.
    """
    values = np.zeros(shape, dtype=np.uint16)
    taken = np.zeros(shape, dtype=bool)
    for value, mask in masks:
        if not later_wins:
            shared = int(np.count_nonzero(taken & mask))
            if shared:
                raise overlap(where, f" ({shared} voxels)")
            taken |= mask
        values[mask] = value
    return values


def overlap(where: str, extent: str = "") -> ConsiliumError:
    """Return the error for segments that overlap while nobody has said which counts."""
    return ConsiliumError(
        "data.overlap",
        f"Segments overlap{extent}: a voxel would have two labels.",
        where=where,
        hint="Say in the case list which are meant: FILE#NAME takes one segment; FILE#ORGAN|LESION "
        "takes several, and where they overlap the later one counts.",
    )
