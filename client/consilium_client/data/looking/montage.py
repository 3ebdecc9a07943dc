"""One picture of one case: slices side by side as radiologists look at them, labels as contours."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from consilium_client.data.ingest.facts import ChannelFacts
from consilium_client.data.ingest.volume import Affine, Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colours that stay apart for colour-blind readers (Okabe and Ito 2008), by label.
COLOURS: Final = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2")
#: Soft tissue, in Hounsfield units: what most labels are drawn on.
_SOFT_TISSUE: Final = (-160.0, 240.0)
_AIR: Final = -900.0
_COLUMNS: Final = 4
_EVENLY: Final = 8
_LABELLED: Final = 4
_INCHES: Final = 2.4
_DPI: Final = 110
_GROUND, _TEXT, _FAINT = "#101214", "#f2f2f2", "#a8adb3"


@dataclass(frozen=True, eq=False)
class Channel:
    """One channel as it is to be shown."""

    name: str
    values: Array
    facts: ChannelFacts
    modality: str = ""

    @property
    def hounsfield(self) -> bool:
        """Whether the values are Hounsfield units, as the header or the air around tells."""
        return self.modality == "CT" or (self.modality == "" and self.facts.p01 <= _AIR)

    @property
    def window(self) -> tuple[float, float]:
        """Values that become black and white."""
        if self.hounsfield:
            return _SOFT_TISSUE
        low, high = self.facts.p01, self.facts.p99
        return (low, high) if high > low else (self.facts.low, max(self.facts.high, low + 1))


def montage(
    channels: Sequence[Channel],
    label: Array | None,
    names: Mapping[int, str],
    affine: Affine,
    *,
    title: str,
    spacing_known: bool = True,
) -> bytes:
    """Draw a case.

    Parameters
    ----------
    channels : sequence of Channel
        On one grid: (I, J, K) in the nearest RAS+ order, or (rows, columns).
    label : array, optional
        Mask on the same grid, the site's own values.
    names : mapping
        Mask value to name; 0 is background and not drawn.
    affine : array
        4×4, index to RAS millimetres.
    title : str
        Must name nobody: pictures are copied.

    Returns
    -------
    bytes
        PNG. Of a volume, axial slices seen from the feet: the patient's right is on the left.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plane = channels[0].values.ndim == 2
    depth = 1 if plane else channels[0].values.shape[2]
    if len(channels) > 1:  # channels below each other, a slice per column
        slices = chosen_slices(label, depth, evenly=4, labelled=3)
        rows, columns = len(channels), len(slices)
    else:
        slices = chosen_slices(label, depth)
        columns = min(_COLUMNS, len(slices))
        rows = -(-len(slices) // columns)
    spacing = np.linalg.norm(affine[:3, :3], axis=0) if spacing_known else np.ones(3)
    shown = _shown(channels[0].values, 0).shape
    # Rows and columns of the shown plane against millimetres.
    aspect = float(spacing[0] / spacing[1]) if plane else float(spacing[1] / spacing[0])
    height = min(2.0, max(0.4, shown[0] * aspect / shown[1]))
    width = 2 * _INCHES if plane else _INCHES
    figure = Figure(
        figsize=(max(width * columns, 4.2), width * height * rows + 0.8),
        dpi=_DPI,
        layout="constrained",
        facecolor=_GROUND,
    )
    FigureCanvasAgg(figure)
    figure.suptitle(title, color=_TEXT, fontsize=10)
    cells = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for cell in cells:
        cell.set_axis_off()
    drawn: set[int] = set()
    for place, cell in enumerate(cells[: len(slices) * len(channels)]):
        row, column = divmod(place, columns) if len(channels) > 1 else (0, place)
        channel, index = channels[row], slices[column]
        _draw(cell, channel, index, aspect)
        if label is not None:
            drawn |= _contours(cell, _shown(label, index))
            cell.set_xlim(-0.5, shown[1] - 0.5)
            cell.set_ylim(shown[0] - 0.5, -0.5)
        if column == 0 and len(channels) > 1:
            _write(cell, 0.02, 0.94, channel.name)
        if not plane:
            height_mm = float((affine @ [*(np.array(shape_of(channels)) - 1)[:2] / 2, index, 1])[2])
            cell.set_title(
                f"{index + 1}/{depth}  S {height_mm:+.0f} mm", color=_FAINT, fontsize=7, pad=2
            )
    if not plane:
        _write(cells[0], 0.02, 0.5, "R")
        _write(cells[0], 0.93, 0.5, "L")
    _legend(figure, channels, names, drawn)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", facecolor=_GROUND, metadata={"Software": None})
    return stream.getvalue()


def shape_of(channels: Sequence[Channel]) -> tuple[int, ...]:
    """Return the shape that all channels share."""
    return tuple(channels[0].values.shape)


def chosen_slices(
    label: Array | None, depth: int, *, evenly: int = _EVENLY, labelled: int = _LABELLED
) -> list[int]:
    """Return slices along the third axis, in order: ``evenly`` spread ones, and of each of so many
    parts of the ``labelled`` span the one with the most label.
    """
    if depth <= evenly:
        return list(range(depth))
    chosen = set(np.linspace(0, depth - 1, evenly + 2)[1:-1].round().astype(int).tolist())
    if label is not None:
        weight = np.count_nonzero(label, axis=(0, 1))
        occupied = np.flatnonzero(weight)
        if occupied.size:
            span = np.arange(occupied[0], occupied[-1] + 1)
            for part in np.array_split(span, min(labelled, span.size)):
                chosen.add(int(part[int(weight[part].argmax())]))
    return sorted(chosen)


def _shown(values: Array, index: int) -> Array:
    """Return a plane as rows from top to bottom; of a volume, the patient's right on the left."""
    if values.ndim == 2:
        return np.asarray(values)
    return np.asarray(values[:, :, index]).T[::-1, ::-1]


def _draw(cell: Axes, channel: Channel, index: int, aspect: float) -> None:
    low, high = channel.window
    cell.imshow(
        _shown(channel.values, index),
        cmap="gray",
        vmin=low,
        vmax=high,
        aspect=aspect,
        interpolation="antialiased",
    )


def _contours(cell: Axes, mask: Array) -> set[int]:
    """Draw the border of each label and return the values that are there."""
    values = [int(value) for value in np.unique(mask) if value]
    for value in values:
        # A ring of background, so that a label at the border has a contour there as well.
        padded: npt.NDArray[Any] = np.pad(mask == value, 1).astype(np.float32)
        rows, columns = (np.arange(size) - 1 for size in padded.shape)
        cell.contour(columns, rows, padded, levels=[0.5], colors=[_colour(value)], linewidths=1.1)
    return set(values)


def _write(cell: Axes, x: float, y: float, text: str) -> None:
    """Write on a picture, readable on any ground."""
    from matplotlib.patheffects import withStroke

    edge = [withStroke(linewidth=2, foreground=_GROUND)]
    place = cell.transAxes
    cell.text(x, y, text, transform=place, color=_TEXT, fontsize=8, va="center", path_effects=edge)


def _colour(value: int) -> str:
    return COLOURS[(value - 1) % len(COLOURS)]


def _legend(
    figure: Figure, channels: Sequence[Channel], names: Mapping[int, str], drawn: set[int]
) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=_colour(value), linewidth=2, label=names.get(value, f"value {value}"))
        for value in sorted(drawn)
    ]
    for channel in channels:
        low, high = channel.window
        unit = " HU" if channel.hounsfield else ""
        text = f"{channel.name}: {low:.4g} to {high:.4g}{unit}"
        handles.append(Line2D([], [], linestyle="none", label=text))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(handles), 4),
        fontsize=8,
        frameon=False,
        labelcolor=_TEXT,
    )
