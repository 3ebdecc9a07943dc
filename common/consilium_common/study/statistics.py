"""The tables of a study's federated statistics: public bins, and what one patient adds at most.

Each table is a share per bin for one patient: numbers from 0 up whose sum is at most 1, so that
their L2 norm is at most 1. A table of several independent yes-or-no answers (a class is present or
not) is scaled by 1/√(number of answers) to keep to that. Whoever sums T tables of many patients
therefore sees one patient move the sum by at most √T.

Unit: the patient. Adjacency: add or remove one.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from consilium_common.study.schema import Study

#: Inner edges of the bins of a voxel's edge length, in mm; the outer bins are open.
SPACING_EDGES: Final = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
#: Inner edges of the bins of an image's number of voxels: powers of four, the outer bins open.
SIZE_EDGES: Final = tuple(float(4**power) for power in range(6, 15))
#: Bins of the normalised intensity.
INTENSITY_BINS: Final = 16
#: Where those bins begin and end; beyond, an intensity counts in the outermost bin.
INTENSITY_RANGE: Final = {"zscore": (-4.0, 4.0), "percentile": (0.0, 1.0), "window": (0.0, 1.0)}


@dataclass(frozen=True)
class Table:
    """One histogram over public bins.

    Parameters
    ----------
    name : str
        ``classes``, ``intensity``, ``spacing.smallest``, ``spacing.largest`` or ``size``.
    title : str
        What the shares are of, in words.
    bins : tuple of str
        What each bin holds, in words.
    edges : tuple of float
        Inner edges of the bins; empty for classes.
    weight : float
        What a patient adds to a bin that holds all of the patient; the released sum is divided by
        it, so that it reads in patients.
    """

    name: str
    title: str
    bins: tuple[str, ...]
    edges: tuple[float, ...] = ()
    weight: float = 1.0

    @property
    def figures(self) -> tuple[str, ...]:
        """The names of the released numbers, one per bin."""
        return tuple(f"{self.name}.{index}" for index in range(len(self.bins)))


def tables(study: Study) -> tuple[Table, ...]:
    """Return the tables that a study's sites release, in order; none where it asks for none."""
    if study.statistics is None:
        return ()
    found: list[Table] = []
    for what in study.statistics.of:
        if what == "classes":
            found.append(_classes(study))
        elif what == "intensity":
            found.append(_intensity(study))
        elif what == "spacing":
            bins = _bins(SPACING_EDGES, " mm")
            for which in ("smallest", "largest"):
                title = f"{which.capitalize()} edge of a voxel, before preprocessing"
                found.append(Table(f"spacing.{which}", title, bins, SPACING_EDGES))
        else:
            title = "Voxels of an image, before preprocessing"
            found.append(Table("size", title, _bins(SIZE_EDGES, ""), SIZE_EDGES))
    return tuple(found)


def _classes(study: Study) -> Table:
    task = study.task
    if task.kind == "segmentation":
        names = tuple(task.classes[1:])
        title = "Images in which the class is present"
    elif task.multi_label:
        names, title = tuple(task.classes), "Images that have the class"
    else:
        return Table("classes", "Images of the class", tuple(task.classes))
    return Table("classes", title, names, weight=1 / math.sqrt(len(names)))


def _intensity(study: Study) -> Table:
    kind = study.preprocessing.intensity.kind
    low, high = INTENSITY_RANGE[kind]
    width = (high - low) / INTENSITY_BINS
    edges = tuple(low + width * index for index in range(1, INTENSITY_BINS))
    title = f"Voxels by intensity, after preprocessing ({kind})"
    return Table("intensity", title, _bins(edges, ""), edges)


def _bins(edges: tuple[float, ...], unit: str) -> tuple[str, ...]:
    shown = [f"{edge:,.0f}" if edge >= 1000 else f"{edge:g}" for edge in edges]
    inner = [f"{low} to {high}{unit}" for low, high in itertools.pairwise(shown)]
    return (f"below {shown[0]}{unit}", *inner, f"{shown[-1]}{unit} or more")
