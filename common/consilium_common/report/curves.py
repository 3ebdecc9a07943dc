"""Curves of a study's report as SVG: vector, deterministic, legible without colour."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's palette, told apart with every common colour blindness; its yellow is too light
#: on white and is left out.
PALETTE: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B57900", "#4A90C2", "#333333")
_MARKERS: Final = "osD^vPX"
_DASHES: Final[tuple[Any, ...]] = ("-", (0, (6, 2)), (0, (2, 1.4)), (0, (7, 2, 1.5, 2)))
_INK: Final = "#1c2733"
MUTED: Final = "#55616f"
_GRID: Final = "#e3e7ec"
_STYLE: Final = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    # Names are names: a dollar sign in one is not mathematics.
    "text.parse_math": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "consilium",
    "axes.edgecolor": "#aab3bd",
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlecolor": _INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "legend.fontsize": 9,
}

#: A curve: round numbers and values.
Curve = tuple[Sequence[int], Sequence[float]]


def over_rounds(
    curves: Mapping[str, Curve],
    *,
    title: str,
    limits: Mapping[str, float] | None = None,
    last: int,
) -> bytes:
    """Draw one curve per name over the rounds.

    Parameters
    ----------
    curves : mapping
        Name (a site) to round numbers and values; a value that is not finite leaves a gap.
    limits : mapping, optional
        Name of a limit to its value: a dashed line across, labelled (a budget).
    last : int
        Last round of the study, planned or run: the end of the axis.

    Returns
    -------
    bytes
        An SVG image.
    """
    with drawing() as (figure, axes):
        for index, (name, (rounds, values)) in enumerate(curves.items()):
            finite = [value if math.isfinite(value) else math.nan for value in values]
            axes.plot(
                rounds,
                finite,
                color=PALETTE[index % len(PALETTE)],
                linestyle=_DASHES[index // len(PALETTE) % len(_DASHES)],
                # Curves of equal values lie on each other: earlier ones are wider, so all show.
                linewidth=max(1.4, 6.2 - 2.4 * index) if len(curves) <= 4 else 1.6,
                marker=_MARKERS[index % len(_MARKERS)] if len(rounds) <= 40 else None,
                markersize=max(3.2, 8.6 - 2.6 * index) if len(curves) <= 4 else 3.6,
                label=name,
            )
        for name, value in (limits or {}).items():
            axes.axhline(value, color=MUTED, linestyle=(0, (5, 3)), linewidth=1.2)
            axes.annotate(
                name,
                (0.0, value),
                xycoords=("axes fraction", "data"),
                xytext=(4, 3),
                textcoords="offset points",
                color=MUTED,
                fontsize=9,
            )
        _round_axis(axes, last)
        lowest, highest = axes.get_ylim()
        if limits or lowest >= 0:
            # Room above for a limit's label.
            axes.set_ylim(bottom=0, top=highest * (1.12 if limits else 1.02))
        axes.set_title(title, pad=24 if len(curves) > 1 else 10)
        if len(curves) > 1:
            axes.legend(
                loc="lower left",
                bbox_to_anchor=(-0.012, 0.99),
                ncols=min(len(curves), 6),
                handlelength=1.6,
                columnspacing=1.4,
                borderaxespad=0,
            )
        return as_svg(figure)


def round_times(seconds: Sequence[tuple[int, float, bool]], *, title: str, last: int) -> bytes:
    """Draw a bar per round: its number, its seconds, and whether every site answered.

    Rounds with a site missing are hatched as well as coloured.
    """
    with drawing(height=2.1) as (figure, axes):
        for complete, color, hatch, label in (
            (True, PALETTE[0], "", "all sites answered"),
            (False, "#E69F00", "////", "a site was missing"),
        ):
            bars = [(n, value) for n, value, whole in seconds if whole is complete]
            if bars:
                axes.bar(
                    [n for n, _ in bars],
                    [value for _, value in bars],
                    width=0.72,
                    color=color,
                    hatch=hatch,
                    edgecolor="white",
                    linewidth=0.4,
                    label=label,
                )
        _round_axis(axes, last)
        mixed = len({whole for _, _, whole in seconds}) == 2
        axes.set_title(title, pad=24 if mixed else 10)
        if mixed:
            axes.legend(loc="lower left", bbox_to_anchor=(-0.012, 0.99), ncols=2, borderaxespad=0)
        return as_svg(figure)


@contextmanager
def drawing(height: float = 2.7) -> Iterator[tuple[Figure, Axes]]:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        # Not through pyplot: it keeps figures, and it is not safe in several threads.
        figure = Figure(figsize=(6.4, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.add_subplot()


def _round_axis(axes: Axes, last: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0.4, max(last, 2) + 0.6)
    axes.set_xlabel("round", loc="right")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))


def as_svg(figure: Figure) -> bytes:
    stream = io.BytesIO()
    # Without a date, so that equal reports are equal files.
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return stream.getvalue()
