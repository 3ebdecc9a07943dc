"""What a study would cost and whether it could be heard, before anybody spends budget on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from consilium_common.errors import ConsiliumError
from consilium_common.privacy.accounting import calibrate, epsilon_of, epsilon_rdp
from consilium_common.privacy.events import ADJACENCY, UNIT, PrivacyParameters
from consilium_common.privacy.noise import noise_to_signal

if TYPE_CHECKING:
    from rich.console import Console

    from consilium_common.study.schema import Study

#: Nobody runs more rounds than the schema allows.
_MOST_ROUNDS: Final = 10_000
_WORDS: Final = {"clear": "clear", "weak": "weak", "drowned": "DROWNED"}


@dataclass(frozen=True)
class PlannedSite:
    """One cohort size: the mechanism, its price, and what the patients can say against the noise.

    Parameters
    ----------
    patients : int
        Patients the site trains on.
    mechanism : PrivacyParameters
        With σ calibrated where ε was given.
    epsilon : float
        Of the whole training, and of released statistics, for a patient who takes part, at the
        mechanism's δ.
    rounds_left : int
        Rounds of the same kind that the budget has left after the study; negative where the study
        itself overruns it. Counted up to 10 000 rounds in all.
    second : float
        ε after a second equal study with the same patients.
    per_step, over_study : float or None
        Noise norm over the largest possible signal norm, averaged over the sites; None where the
        number of trained values is not known.
    verdict : str or None
        ``clear``, ``weak`` or ``drowned``, by ``over_study``.
    """

    patients: int
    mechanism: PrivacyParameters
    epsilon: float
    evaluation_epsilon: float | None
    rounds_left: int
    second: float
    per_step: float | None
    over_study: float | None
    verdict: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        mechanism = self.mechanism
        return {
            "patients": self.patients,
            "sampling_rate": mechanism.sampling_rate,
            "noise_multiplier": mechanism.noise_multiplier,
            "clip_norm": mechanism.clip_norm,
            "noise_std": mechanism.noise_multiplier * mechanism.clip_norm,
            "steps": mechanism.event_total.steps,
            "rounds": mechanism.rounds,
            "delta": mechanism.delta,
            "epsilon": self.epsilon,
            "evaluation_epsilon": self.evaluation_epsilon,
            "rounds_left": self.rounds_left,
            "epsilon_after_second_study": self.second,
            "noise_to_signal": None
            if self.per_step is None
            else {"per_step": self.per_step, "over_study": self.over_study},
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class AuditPlan:
    """A study planned for several cohort sizes; unit patient, adjacency add or remove one."""

    budget: float
    sites: int
    values: int | None
    rows: tuple[PlannedSite, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for ``--json``."""
        return {
            "unit": UNIT,
            "adjacency": ADJACENCY,
            "accountant": "PLD",
            "budget": self.budget,
            "sites": self.sites,
            "trained_values": self.values,
            "plans": [row.to_dict() for row in self.rows],
            "warnings": list(self.warnings),
        }

    def print_to(self, console: Console) -> None:
        """Print the table and the warnings."""
        from rich.table import Table

        first = self.rows[0].mechanism
        values = "an unknown number of" if self.values is None else f"{self.values:,}"
        console.print(
            f"{first.event_total.steps} steps in {first.rounds} rounds, {values} trained values, "
            f"mean over {self.sites} site{'s' if self.sites != 1 else ''} of each size; "
            f"budget ε {self.budget:g} per patient.\n"
            "Unit patient, adjacency add or remove one, ε by PLD. Noise: its length over the "
            "largest that the patients' signal can have.",
            markup=False,
        )
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        for name in (
            *("\npatients", "\nq", "\nδ", "\nσ", "\nε", "rounds\nleft"),
            *("ε after\na 2nd", "budget\nleft", "noise\na step", "noise\nstudy", "\n"),
        ):
            table.add_column(name, justify="right" if name.strip() else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*_cells(row, self.budget))
        console.print(table)
        for warning in self.warnings:
            console.print(f"! {warning}", style="yellow", markup=False)
        if self.values is None:
            console.print(
                "Give --study or --values to compare the noise with the signal.", markup=False
            )


def plan_for(
    patients: Sequence[int],
    *,
    epsilon: float,
    delta: float | None,
    steps: int,
    rounds: int,
    rate: float | None,
    per_step: int | None,
    clip_norm: float,
    values: int | None,
    budget: float,
    sites: int,
) -> AuditPlan:
    """Plan training at a target ε for each cohort size.

    Parameters
    ----------
    patients : sequence of int
        Cohort sizes N, each >= 1.
    epsilon : float
        Target of the whole training.
    delta : float or None
        None: 1/(10 N) of each size.
    steps, rounds : int
        Local steps over all rounds, and rounds; ``rounds`` divides ``steps``.
    rate, per_step : float or int, one of them
        Sampling rate q, or patients drawn in a step on average (q = that/N).
    clip_norm : float
        C; neither ε nor the comparison depends on it.
    values : int or None
        Trained values.
    budget : float
        ε that each patient may ever spend.
    sites : int
        Sites of that size whose updates are averaged.

    Raises
    ------
    ConsiliumError
        ``usage.plan`` for what cannot be planned; ``privacy.…`` as :func:`calibrate`.
    """
    if (rate is None) == (per_step is None):
        raise _usage("Give either --rate or --per-step, and not both.")
    if rounds < 1 or steps < 1 or steps % rounds:
        raise _usage(f"{steps} steps cannot be cut into {rounds} rounds of equal length.")
    _check_sizes(patients, sites, budget)
    mechanisms = []
    for number in patients:
        q = rate if rate is not None else min(1.0, (per_step or 0) / number)
        if not 0 < q <= 1:
            raise _usage(f"The sampling rate comes to {q:g}, which is not in (0, 1].")
        at = 1 / (10 * number) if delta is None else delta
        sigma = calibrate(epsilon, at, q, steps)
        mechanisms.append(PrivacyParameters(q, clip_norm, sigma, steps // rounds, rounds, at))
    return _plan(patients, mechanisms, values=values, budget=budget, sites=sites)


def plan_study(
    study: Study, patients: Sequence[int], *, values: int, budget: float, sites: int
) -> AuditPlan:
    """Plan a study as it is written, for each cohort size.

    Raises
    ------
    ConsiliumError
        ``usage.plan`` (a study without privacy); ``privacy.…`` as :func:`calibrate`.
    """
    from consilium_common.privacy.accounting import parameters

    mechanism = parameters(study)
    if mechanism is None:
        raise _usage("The study has no differential privacy, so there is nothing to plan.")
    _check_sizes(patients, sites, budget)
    return _plan(patients, [mechanism] * len(patients), values=values, budget=budget, sites=sites)


def affordable_rounds(mechanism: PrivacyParameters, budget: float) -> int:
    """Return the most rounds of this mechanism whose ε stays within ``budget``, up to 10 000."""

    def cost(of: Callable[..., float]) -> Callable[[int], bool]:
        return lambda rounds: of(mechanism.events_of(rounds), mechanism.delta) <= budget

    # RDP is quick and never below PLD: what it allows is allowed, and PLD goes on from there.
    return _most(cost(epsilon_of), at_least=_most(cost(epsilon_rdp)))


def _plan(
    patients: Sequence[int],
    mechanisms: Sequence[PrivacyParameters],
    *,
    values: int | None,
    budget: float,
    sites: int,
) -> AuditPlan:
    rows = []
    warnings = []
    for number, mechanism in zip(patients, mechanisms, strict=True):
        once = mechanism.events_of(mechanism.rounds)
        epsilon = epsilon_of(once, mechanism.delta)
        evaluation = mechanism.evaluation_event
        scored = [evaluation] * mechanism.evaluations if evaluation is not None else []
        per_step = over_study = verdict = None
        if values is not None:
            found = noise_to_signal(mechanism, number, values, sites)
            per_step, over_study = found.per_step, found.over_study
            verdict = found.verdict
        rows.append(
            PlannedSite(
                patients=number,
                mechanism=mechanism,
                epsilon=epsilon,
                evaluation_epsilon=epsilon_of(scored, mechanism.delta) if scored else None,
                rounds_left=affordable_rounds(mechanism, budget) - mechanism.rounds,
                second=epsilon_of([*once, *once], mechanism.delta),
                per_step=per_step,
                over_study=over_study,
                verdict=verdict,
            )
        )
        warnings += _warnings(rows[-1], budget)
    return AuditPlan(budget, sites, values, tuple(rows), tuple(warnings))


def _warnings(row: PlannedSite, budget: float) -> list[str]:
    who = "1 patient" if row.patients == 1 else f"{row.patients} patients"
    found = []
    if row.mechanism.delta * row.patients >= 1:
        found.append(
            f"{who}: δ = {row.mechanism.delta:g} is not below 1/{row.patients}, so publishing one "
            "whole record would keep the promise. Take a smaller δ."
        )
    if row.verdict == "drowned":
        found.append(
            f"{who}: over the whole study the noise is {row.over_study:.1f} times the most the "
            "patients can say. The budget would be spent for nothing: train fewer values, begin "
            "with public weights, or bring more patients or sites."
        )
    elif row.verdict == "weak":
        found.append(
            f"{who}: over the whole study the noise is {row.over_study:.2g} times the most the "
            "patients can say; expect a clearly lower score than without privacy."
        )
    if row.epsilon > budget:
        found.append(
            f"{who}: ε {row.epsilon:.2f} overruns the budget of {budget:g}; a site would refuse."
        )
    return found


def _most(holds: Callable[[int], bool], at_least: int = 0) -> int:
    """Return the most rounds for which ``holds``, which is true up to some number."""
    low, stride = at_least, max(1, at_least // 16)
    while low + stride <= _MOST_ROUNDS and holds(low + stride):
        low += stride
        stride *= 2
    high = min(low + stride, _MOST_ROUNDS + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low


def _cells(row: PlannedSite, budget: float) -> tuple[str, ...]:
    most = _MOST_ROUNDS - row.mechanism.rounds
    rounds = f"{row.rounds_left}" if row.rounds_left < most else f">{most}"
    return (
        str(row.patients),
        f"{row.mechanism.sampling_rate:.3g}",
        f"{row.mechanism.delta:.2g}",
        f"{row.mechanism.noise_multiplier:.3f}",
        f"{row.epsilon:.2f}",
        rounds if row.rounds_left >= 0 else "none",
        f"{row.second:.2f}",
        f"{budget - row.second:.2f}" if row.second <= budget else "refused",
        "–" if row.per_step is None else f"{row.per_step:.3g}",
        "–" if row.over_study is None else f"{row.over_study:.2g}",
        "" if row.verdict is None else _WORDS[row.verdict],
    )


def _check_sizes(patients: Sequence[int], sites: int, budget: float) -> None:
    if not patients or min(patients) < 1:
        raise _usage("A cohort has at least one patient.")
    if sites < 1:
        raise _usage("There is at least one site.")
    if not (math.isfinite(budget) and budget > 0):
        raise _usage("The budget must be a positive ε.")


def _usage(what: str) -> ConsiliumError:
    return ConsiliumError("usage.plan", what, hint="See `consilium audit plan --help`.")
