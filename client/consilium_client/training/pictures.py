"""Pictures of slices with the contours of label and prediction. They show patients: local only."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from consilium_client.training.cases import Array
from consilium_common.errors import ConsiliumError

#: Colours that stay apart for colour-blind readers (Okabe and Ito 2008), by foreground class.
_COLOURS: Final = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2")


def slice_picture(
    image: NDArray[np.float32],
    label: Array,
    prediction: Array,
    classes: Sequence[str],
    *,
    slices: int = 3,
    channel: int = 0,
    spacing: Sequence[float] | None = None,
) -> bytes:
    """Draw the most telling slices of one case.

    Parameters
    ----------
    image : float32, (channels, \\*spatial)
        Two- or three-dimensional; slices are taken along the last axis.
    label, prediction : integer, (\\*spatial)
        Class indices.
    classes : sequence of str
        Class names by index; the first, the background, is not drawn.
    slices : int
        How many slices side by side (default: 3; one for a two-dimensional image).
    channel : int
        Which channel to show (default: the first).
    spacing : sequence of float or None
        Voxel size in millimetres per axis, for the aspect ratio; None for cubes.

    Returns
    -------
    bytes
        PNG. Label contours are solid lines, prediction contours dashed.

    Raises
    ------
    ConsiliumError
        ``data.geometry`` when image, label and prediction differ in shape.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    pixels = image[channel]
    if not pixels.shape == label.shape == prediction.shape or pixels.ndim not in (2, 3):
        raise ConsiliumError(
            "data.geometry",
            f"Image {pixels.shape}, label {label.shape} and prediction {prediction.shape} "
            "do not fit each other.",
            hint="Give arrays of one case, in two or three dimensions.",
        )
    if pixels.ndim == 2:
        pixels, label, prediction = (a[..., np.newaxis] for a in (pixels, label, prediction))
    chosen = telling_slices(label, prediction, slices)
    low, high = np.percentile(pixels, (1, 99))
    aspect = 1.0 if spacing is None else float(spacing[1]) / float(spacing[0])

    figure = Figure(figsize=(2.6 * len(chosen), 3.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(1, len(chosen)))
    for axis, index in zip(axes, chosen, strict=True):
        # Transposed and from below: the first axis runs to the right, the second upwards.
        axis.imshow(
            pixels[..., index].T, cmap="gray", vmin=low, vmax=high, origin="lower", aspect=aspect
        )
        for value in range(1, len(classes)):
            _contour(axis, label[..., index] == value, _colour(value), "solid")
            _contour(axis, prediction[..., index] == value, _colour(value), "dashed")
        axis.set_axis_off()
        if label.shape[2] > 1:
            axis.set_title(f"slice {index + 1} of {label.shape[2]}", fontsize=8)
    handles = [
        Line2D([], [], color=_colour(value), linewidth=2, label=classes[value])
        for value in range(1, len(classes))
    ]
    handles.append(Line2D([], [], color="0.2", linestyle="solid", label="label"))
    handles.append(Line2D([], [], color="0.2", linestyle="dashed", label="prediction"))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(handles), 2 + len(chosen)),
        fontsize=8,
        frameon=False,
    )
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def telling_slices(label: Array, prediction: Array, count: int) -> list[int]:
    """Return up to ``count`` slices along the last axis, in order, that show the most.

    The span that holds any foreground is cut into ``count`` parts. Each part gives the slice with
    the most foreground, disagreements counted twice. Without foreground: evenly spread slices.
    """
    depth = label.shape[-1]
    count = min(count, depth)
    seen = (label > 0) | (prediction > 0)
    weight = (seen.astype(np.int64) + (label != prediction)).sum(axis=(0, 1))
    occupied = np.flatnonzero(weight)
    if len(occupied) < count:
        spread = np.linspace(0, depth - 1, count + 2)[1:-1].round().astype(int)
        # Slices that show something first, then evenly spread ones until there are enough.
        found = list(dict.fromkeys([*occupied.tolist(), *spread.tolist(), *range(depth)]))
        return sorted(found[:count])
    parts = np.array_split(np.arange(occupied[0], occupied[-1] + 1), count)
    return [int(part[int(weight[part].argmax())]) for part in parts]


def _contour(axis: Any, mask: NDArray[np.bool_], colour: str, style: str) -> None:
    if mask.any() and not mask.all():
        axis.contour(
            mask.T.astype(float), levels=[0.5], colors=[colour], linestyles=style, linewidths=1.3
        )


def _colour(value: int) -> str:
    return _COLOURS[(value - 1) % len(_COLOURS)]
