"""Pictures of an audit as SVG, in the style of the study report: legible in print, and grey."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.privacy.accounting import epsilon_of
from consilium_common.privacy.noise import DROWNED_FROM, WEAK_FROM
from consilium_common.report.curves import MUTED, PALETTE, as_svg, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from consilium_common.audit.planning import AuditPlan
    from consilium_common.ledger.spend import Bin
    from consilium_common.privacy.events import PrivacyParameters
    from consilium_common.privacy.tradeoff import OperatingPoint

_DASHES = ("-", (0, (6, 2)), (0, (2, 1.4)), (0, (7, 2, 1.5, 2)))


def spend_over_time(points: Sequence[tuple[datetime, float]], *, budget: float | None) -> bytes:
    """Draw ε of the patient who has spent most, as steps over time."""
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    with drawing() as (figure, axes):
        # matplotlib plots moments; its stubs know numbers only.
        times: Any = [time for time, _ in points]
        values = [value for _, value in points]
        axes.step(times, values, where="post", color=PALETTE[0], linewidth=1.8)
        axes.plot(times, values, "o", color=PALETTE[0], markersize=3)
        if budget is not None:
            _limit(axes, budget, f"budget {budget:g}")
        axes.set_ylim(0, max([*values, budget or 0.0, 0.1]) * 1.15)
        locator = AutoDateLocator(minticks=2, maxticks=6)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
        axes.set_title("ε of the patient who has spent most, over time (UTC)", pad=10)
        return as_svg(figure)


def patients_by_spend(bins: Sequence[Bin], *, budget: float | None) -> bytes:
    """Draw how many patients have spent how much."""
    with drawing() as (figure, axes):
        for part in bins:
            axes.bar(
                part.low,
                part.patients,
                width=(part.high - part.low) or 0.1,
                align="edge",
                color=PALETTE[0],
                edgecolor="white",
                linewidth=0.8,
            )
            if part.patients:
                axes.annotate(
                    str(part.patients),
                    ((part.low + part.high) / 2, part.patients),
                    xytext=(0, 2),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8.5,
                )
        if budget is not None:
            axes.axvline(budget, color=MUTED, linestyle=(0, (5, 3)), linewidth=1.2)
            axes.annotate(
                f"budget {budget:g}",
                (budget, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(-4, -4),
                textcoords="offset points",
                color=MUTED,
                fontsize=9,
                ha="right",
                va="top",
            )
        axes.set_xlim(0, max([part.high for part in bins] + [budget or 0.0, 0.1]) * 1.04)
        axes.set_ylim(0, max(part.patients for part in bins) * 1.15)
        axes.set_title("Patients by ε spent over all studies", pad=10)
        axes.set_xlabel("ε", loc="right")
        return as_svg(figure)


def trade_off(curves: Mapping[str, Sequence[OperatingPoint]]) -> bytes:
    """Draw the bound on true positives over false positives, which are on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter

    with drawing(3.2) as (figure, axes):
        rates: list[float] = []
        for index, (name, points) in enumerate(curves.items()):
            rates = [point.false_positive_rate for point in points]
            axes.plot(
                rates,
                [point.true_positive_rate for point in points],
                color=PALETTE[index % len(PALETTE)],
                linestyle=_DASHES[index % len(_DASHES)],
                linewidth=1.9,
                label=name,
            )
        axes.plot(rates, rates, color=MUTED, linestyle=(0, (1, 2)), linewidth=1.4, label="guessing")
        axes.set_xscale("log")
        axes.set_xlim(rates[0], 1)
        axes.set_ylim(0, 1.02)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
        axes.grid(visible=True, axis="both")
        axes.set_title("Patients recognised at most", pad=24)
        axes.set_xlabel("false alarms", loc="right")
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.012, 0.99),
            ncols=3,
            handlelength=2.4,
            columnspacing=1.4,
            borderaxespad=0,
        )
        return as_svg(figure)


def check_plot(path: Path) -> str:
    """Return the kind of picture that the file's name asks for, ``png`` or ``svg``.

    Raises
    ------
    ConsiliumError
        ``usage.plot`` for any other name.
    """
    kind = path.suffix.lower().lstrip(".")
    if kind not in ("png", "svg"):
        raise ConsiliumError(
            "usage.plot",
            "A plot ends in .png or .svg.",
            where=str(path),
            hint="Name the file like plan.png.",
        )
    return kind


def draw_plan(plan: AuditPlan, path: Path) -> None:
    """Draw the plan into a ``.png`` or ``.svg`` file.

    Raises
    ------
    ConsiliumError
        ``usage.plot``, ``state.disk``.
    """
    write_atomic(path, plan_plot(plan, check_plot(path)), mode=0o644)


def plan_plot(plan: AuditPlan, kind: str) -> bytes:
    """Draw a plan: ε over the rounds of two equal studies, and noise against the cohort's size."""
    with drawing(3.1) as (figure, single):
        single.remove()
        if plan.values is None:
            _rounds(figure.add_subplot(), plan)
        else:
            figure.set_size_inches(9.6, 3.1)
            left, right = figure.subplots(1, 2)
            _rounds(left, plan)
            _noise(right, plan)
        if kind == "svg":
            return as_svg(figure)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=160)
        return stream.getvalue()


def _epsilon_after(mechanism: PrivacyParameters, rounds: int) -> float:
    """Return ε after so many rounds of one study, and from there of a second equal one."""
    first = min(rounds, mechanism.rounds)
    events = mechanism.events_of(first)
    if rounds > first:
        events += mechanism.events_of(rounds - first)
    return epsilon_of(events, mechanism.delta)


def _rounds(axes: Axes, plan: AuditPlan) -> None:
    drawn: dict[tuple[float, ...], tuple[PrivacyParameters, list[str]]] = {}
    for row in plan.rows:
        mechanism = row.mechanism
        key = (mechanism.sampling_rate, mechanism.noise_multiplier, mechanism.delta)
        drawn.setdefault(key, (mechanism, []))[1].append(str(row.patients))
    for index, (mechanism, sizes) in enumerate(drawn.values()):
        last = 2 * mechanism.rounds
        marks = sorted({1, *(max(1, round(last * part / 12)) for part in range(1, 13))})
        axes.plot(
            marks,
            [_epsilon_after(mechanism, n) for n in marks],
            color=PALETTE[index % len(PALETTE)],
            linestyle=_DASHES[index % len(_DASHES)],
            label=f"{', '.join(sizes)} patients",
        )
    rounds = plan.rows[0].mechanism.rounds
    axes.axvline(rounds, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
    axes.annotate(
        "second study →",
        (rounds, 0),
        xytext=(4, 4),
        textcoords="offset points",
        color=MUTED,
        fontsize=8.5,
    )
    _limit(axes, plan.budget, f"budget {plan.budget:g}")
    axes.set_ylim(0, max(plan.budget, *(row.second for row in plan.rows)) * 1.15)
    axes.set_title("ε of a patient over the rounds")
    axes.set_xlabel("round", loc="right")
    if len(drawn) > 1:
        axes.legend(loc="lower right")


def _noise(axes: Axes, plan: AuditPlan) -> None:
    from matplotlib.ticker import FuncFormatter

    rows = sorted(plan.rows, key=lambda row: row.patients)
    ratios = [row.over_study if row.over_study is not None else math.nan for row in rows]
    axes.plot([row.patients for row in rows], ratios, "o-", color=PALETTE[0])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(min([*ratios, WEAK_FROM]) / 1.8, max([*ratios, DROWNED_FROM]) * 1.8)
    axes.set_xticks([row.patients for row in rows], [str(row.patients) for row in rows])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _limit(axes, WEAK_FROM, "weak from here up", right=True)
    _limit(axes, DROWNED_FROM, "drowned from here up", right=True)
    axes.set_title("Noise over signal, whole study")
    axes.set_xlabel("patients at a site", loc="right")


def _limit(axes: Axes, value: float, name: str, *, right: bool = False) -> None:
    axes.axhline(value, color=MUTED, linestyle=(0, (5, 3)), linewidth=1.2)
    axes.annotate(
        name,
        (1.0 if right else 0.0, value),
        xycoords=("axes fraction", "data"),
        xytext=(-4 if right else 4, 3),
        textcoords="offset points",
        ha="right" if right else "left",
        color=MUTED,
        fontsize=9,
    )
