"""A cohort's statistics for a person: a table at the terminal, and one page of plots."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from consilium_client.data.looking.montage import COLOURS
from consilium_client.data.looking.stats import UNKNOWN, CohortStatistics, Spread
from consilium_common.files import write_atomic
from consilium_common.report.wording import plural

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console

_AXES: Final = ("x", "y", "z")
_MOST_BARS: Final = 10
_BAR: Final = "#4878a8"
#: From so many times the usual range on, intensities are drawn by their logarithm.
_WIDE: Final = 20


def statistics_table(console: Console, found: CohortStatistics) -> None:
    """Print the statistics."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, show_lines=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, value: str) -> None:
        table.add_row(Text(name), Text(value))

    unusable = f"; {found.unusable} more cannot be used" if found.unusable else ""
    row("cohort", f"{_size_of(found)}{unusable}")
    for split, (patients, cases) in found.splits.items():
        row(f"  {split}", f"{patients} patients, {cases} cases")
    row("voxels", " × ".join(_spread(one) for one in found.shapes))
    row("spacing", " × ".join(_spread(one) for one in found.spacings) + " mm" * any(found.spacings))
    for name, figures in found.channels.items():
        shown = ", ".join(f"{figure} {_spread(one)}" for figure, one in figures.items())
        row(f"channel {name}", shown)
    for name, one in found.classes.items():
        size = f", {_spread(one.millilitres)} ml in each" if one.millilitres else ""
        row(f"class {name}", f"{one.cases} cases, {one.patients} patients{size}")
    for name, counts in (
        ("modality", found.modalities),
        ("scanner", found.scanners),
        ("orientation", found.axes),
    ):
        row(name, _counted(counts))
    for name, values in found.covariates.items():
        missing = f"; {values['missing']} missing" if values["missing"] else ""
        numbers = values.get("numbers")
        shown = _spread(numbers) if numbers else _counted(values["words"])
        row(f"covariate {name}", shown + missing)
    console.print(table)
    console.print("Ranges read: least … median … most.", style="dim")


def _spread(one: Spread) -> str:
    if one.low == one.high:
        return f"{one.low:.4g}"
    return f"{one.low:.4g}…{one.median:.4g}…{one.high:.4g}"


def _counted(counts: Mapping[str, int]) -> str:
    shown = [f"{name} {number}" for name, number in list(counts.items())[:_MOST_BARS]]
    more = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _size_of(found: CohortStatistics) -> str:
    return f"{plural(found.cases, 'case')} of {plural(found.patients, 'patient')}"


def write_plots(found: CohortStatistics, path: Path) -> Path:
    """Write one PNG page of plots and return its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(found)
    rows = -(-len(panels) // 3)
    figure = Figure(figsize=(12, 3.1 * rows + 0.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{found.site}: {_size_of(found)}. For this site alone.")
    cells = figure.subplots(rows, 3, squeeze=False).ravel()
    for cell in cells[len(panels) :]:
        cell.set_axis_off()
    for cell, draw in zip(cells, panels, strict=False):
        draw(cell)
        cell.spines[["top", "right"]].set_visible(False)
        cell.tick_params(labelsize=8)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, stream.getvalue())
    return path


def _panels(found: CohortStatistics) -> list[Callable[[Axes], None]]:
    """Return what draws each panel; panels that would say nothing are left out."""
    drawn = found.drawn
    panels: list[Callable[[Axes], None]] = [
        lambda cell: _bars(
            cell, "patients by split", {name: of for name, (of, _) in found.splits.items()}
        ),
        lambda cell: _bars(
            cell, "cases by class", {name: one.cases for name, one in found.classes.items()}
        ),
    ]
    if drawn.volumes:
        panels.append(lambda cell: _boxes(cell, "volume per case (ml)", drawn.volumes))
    panels += [_intensities(name, values) for name, values in drawn.intensities.items()]
    panels.append(
        lambda cell: _boxes(cell, "voxels by axis", dict(zip(_AXES, drawn.shapes, strict=False)))
    )
    if drawn.spacings:
        panels.append(
            lambda cell: _boxes(
                cell, "spacing by axis (mm)", dict(zip(_AXES, drawn.spacings, strict=False))
            )
        )
    for title, counts in (
        ("scanner", found.scanners),
        ("modality", found.modalities),
        ("orientation of the original", found.axes),
    ):
        if set(counts) != {UNKNOWN}:
            panels.append(_counts_panel(title, counts))
    for name, values in found.covariates.items():
        if "words" in values:
            panels.append(_counts_panel(name, {**values["words"], "missing": values["missing"]}))
    return panels


def _counts_panel(title: str, counts: Mapping[str, int]) -> Callable[[Axes], None]:
    return lambda cell: _bars(cell, f"cases by {title}", counts)


def _bars(cell: Axes, title: str, counts: Mapping[str, int]) -> None:
    shown = list(counts.items())[:_MOST_BARS][::-1]
    names = [name if len(name) <= 28 else name[:27] + "…" for name, _ in shown]
    bars = cell.barh(range(len(shown)), [number for _, number in shown], color=_BAR)
    cell.set_yticks(range(len(shown)), names)
    cell.bar_label(bars, fontsize=8, padding=2)
    cell.margins(x=0.12)
    cell.set_title(title, fontsize=10)


def _boxes(cell: Axes, title: str, values: Mapping[str, Any]) -> None:
    boxes = cell.boxplot(
        list(values.values()), patch_artist=True, medianprops={"color": "black"}, widths=0.5
    )
    for number, box in enumerate(boxes["boxes"]):
        box.set_facecolor(COLOURS[number % len(COLOURS)])
    cell.set_xticks(range(1, len(values) + 1), list(values))
    cell.set_title(title, fontsize=10)


def _intensities(name: str, values: Any) -> Callable[[Axes], None]:
    """Draw each case as a line from its first to its 99th percentile, ordered by mean."""

    def draw(cell: Axes) -> None:
        ordered = sorted(values, key=lambda one: one[1])
        places = range(len(ordered))
        lows, means, highs = zip(*ordered, strict=True)
        cell.vlines(places, lows, highs, color=_BAR, linewidth=1, alpha=0.6)
        cell.plot(places, means, ".", color="black", markersize=3)
        if max(highs) - min(lows) > _WIDE * (sorted(highs)[len(highs) // 2] - min(lows)):
            cell.set_yscale("symlog")  # a few cases in other units would flatten the rest
        cell.set_title(f"{name}: mean, 1st to 99th percentile", fontsize=10)
        cell.set_xlabel("cases by mean", fontsize=8)

    return draw
