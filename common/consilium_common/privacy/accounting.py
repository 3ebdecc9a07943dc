"""ε of a patient's events: PLD is the accountant of record, PRV and RDP check it.

Every number here is for unit patient, adjacency add or remove one. ε is always computed from
events and never stored. All three accountants give upper bounds; PLD (Google's dp-accounting) is
the tight one whose discretisation error stays below .01 for up to 1e7 steps and ε <= 30.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from consilium_common.errors import ConsiliumError
from consilium_common.privacy.events import (
    ADJACENCY,
    UNIT,
    History,
    PrivacyEvent,
    PrivacyParameters,
    grouped,
)

if TYPE_CHECKING:
    from consilium_common.study.schema import Study

#: Largest difference of PLD and PRV, absolute below ε = 1 and relative above.
TOLERANCE: Final = 0.02
#: dp-accounting's own default grid, so that `PLDAccountant()` gives an auditor the same number.
INTERVAL: Final = 1e-4
#: Beyond so many steps the rounding of many tiny losses adds up: a finer grid.
STEPS_OF_INTERVAL: Final = 100_000
#: Beyond this ε nothing is protected; the RDP bound is returned without building a huge grid.
MEANINGLESS: Final = 1000.0
#: Calibrated noise multipliers are multiples of this.
NOISE_STEP: Final = 1e-3
#: Range of calibrated noise multipliers, in multiples of NOISE_STEP; the study schema's range.
NOISE_RANGE: Final = (201, 10_000_000)


@dataclass(frozen=True)
class CrossCheck:
    """ε of the same events by three accountants at one δ.

    Parameters
    ----------
    delta : float
        δ of all three.
    pld, rdp : float
        The accountant of record, and the ceiling.
    prv : float or None
        None where opacus' PRV cannot compute it; ``note`` says why.
    agreement : str
        ``agrees`` when PLD and PRV differ by at most .02 (absolute below ε = 1, relative above),
        ``differs``, or ``not-computed``.
    below_ceiling : bool
        PLD is not above RDP (within PLD's own discretisation error).
    versions : dict
        Versions of the accountants' packages.
    """

    delta: float
    pld: float
    prv: float | None
    rdp: float
    agreement: Literal["agrees", "differs", "not-computed"]
    below_ceiling: bool
    note: str
    versions: dict[str, str]

    @property
    def ok(self) -> bool:
        """Nothing contradicts the accountant of record."""
        return self.agreement != "differs" and self.below_ceiling

    def to_dict(self) -> dict[str, Any]:
        """Return plain values with unit and adjacency, for ``--json`` and reports."""
        return {
            "unit": UNIT,
            "adjacency": ADJACENCY,
            "delta": self.delta,
            "epsilon": {
                "pld": _plain(self.pld),
                "prv": None if self.prv is None else _plain(self.prv),
                "rdp": _plain(self.rdp),
            },
            "agreement": self.agreement,
            "below_ceiling": self.below_ceiling,
            "note": self.note,
            "versions": self.versions,
        }


def epsilon_of(events: Sequence[PrivacyEvent], delta: float) -> float:
    """Return ε of the composition of ``events`` at ``delta``, by PLD: the accountant of record.

    Events of equal (q, σ) are merged first, so rounds cost no more to compute than one event.
    Results are cached. Source: Doroshenko et al. 2022 ("connect the dots"), dp-accounting.

    Parameters
    ----------
    events : sequence of PrivacyEvent
        Everything that happened to one patient; empty means ε = 0.
    delta : float
        δ, 1e-12 <= δ < 1.

    Returns
    -------
    float
        An upper bound of ε, >= 0; the RDP bound where that is beyond 1000.

    Raises
    ------
    ConsiliumError
        ``privacy.delta-invalid``.
    """
    return _epsilon_pld(grouped(events), _checked_delta(delta))


def epsilon_rdp(events: Sequence[PrivacyEvent], delta: float) -> float:
    """Return ε by Rényi accounting (dp-accounting): a looser bound, the ceiling of PLD."""
    return _epsilon_rdp(grouped(events), _checked_delta(delta))


def epsilon_prv(events: Sequence[PrivacyEvent], delta: float) -> float:
    """Return ε by opacus' PRV accountant (Gopi et al. 2021), an independent implementation.

    Its error bound is .01 (a thousandth of ε above 10) and is included in the result. Guarded
    against the faults of opacus 1.6.0: σ = 0 cannot be an event, a negative ε is 0, and inputs
    that exhaust its floating point or memory are refused.

    Raises
    ------
    ConsiliumError
        ``privacy.prv-unavailable`` when opacus cannot compute this composition.
    """
    return _epsilon_prv(grouped(events), _checked_delta(delta))


def cross_check(events: Sequence[PrivacyEvent], delta: float) -> CrossCheck:
    """Compute ε by PLD, PRV and RDP, and say whether they bear each other out."""
    delta = _checked_delta(delta)
    history = grouped(events)
    pld = _epsilon_pld(history, delta)
    rdp = _epsilon_rdp(history, delta)
    prv: float | None = None
    note = ""
    agreement: Literal["agrees", "differs", "not-computed"] = "not-computed"
    try:
        prv = _epsilon_prv(history, delta)
        differs = abs(pld - prv) > TOLERANCE * max(1.0, pld)
        agreement = "differs" if differs else "agrees"
    except ConsiliumError as error:
        note = error.message
    return CrossCheck(delta, pld, prv, rdp, agreement, pld <= rdp + 0.01, note, _versions())


@functools.lru_cache(maxsize=256)
def calibrate(epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """Return the smallest σ, a multiple of .001, whose ε over ``steps`` is at most ``epsilon``.

    Parameters
    ----------
    epsilon, delta : float
        The promise to keep, by PLD.
    sampling_rate : float
        q of every step.
    steps : int
        Steps over the whole study.

    Returns
    -------
    float
        σ between .201 and 10 000; one thousandth less would break the promise, except at .201,
        below which no study may go.

    Raises
    ------
    ConsiliumError
        ``privacy.unreachable`` when even σ = 10 000 does not keep it.
    """
    delta = _checked_delta(delta)
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ConsiliumError("privacy.epsilon-invalid", "The target ε must be positive.")

    def fine(n: int) -> bool:
        event = PrivacyEvent(sampling_rate, _noise(n), steps)
        return _epsilon_pld((event,), delta) <= epsilon

    # Rounding adds about steps·interval²/4 to the loss's variance: small beside a target this size.
    rounding = steps if sampling_rate < 1 else 1
    interval = min(1e-2, max(INTERVAL, 0.03 * min(1.0, epsilon) / math.sqrt(rounding)))

    def coarse(n: int) -> bool:
        event = PrivacyEvent(sampling_rate, _noise(n), steps)
        if rough((event,), delta) > 4 * epsilon + 20:
            return False  # far away: no need for a grid
        return _pld_epsilon_at((event,), delta, interval) <= epsilon

    low, high = NOISE_RANGE[0] - 1, NOISE_RANGE[1]  # the search never asks at its low end
    if not fine(high):
        raise ConsiliumError(
            "privacy.unreachable",
            f"No noise keeps ε at {epsilon:g} (δ = {delta:g}) over {steps} steps at "
            f"sampling rate {sampling_rate:g}.",
            hint="Take fewer rounds or steps, a lower sampling rate, or a larger ε.",
        )
    # The coarse grid brackets cheaply; the grid of record has the last word.
    near = _first_true(coarse, low, high, start=1000) if coarse(high) else high
    return _noise(_first_true(fine, low, high, start=near, stride=1))


def parameters(study: Study) -> PrivacyParameters | None:
    """Return the study's mechanism, its noise calibrated where it names ε; None without privacy.

    Raises
    ------
    ConsiliumError
        ``privacy.unreachable`` when the study's ε cannot be kept with any noise.
    """
    privacy = study.privacy
    if privacy.mode == "none":
        return None
    sigma = privacy.noise_multiplier
    if sigma is None:
        assert privacy.epsilon is not None  # the schema asks for one of the two
        sigma = calibrate(privacy.epsilon, privacy.delta, privacy.sampling_rate, study.total_steps)
    released = len(study.evaluations) if study.evaluation.epsilon is not None else 0
    return PrivacyParameters(
        sampling_rate=privacy.sampling_rate,
        clip_norm=privacy.clip_norm,
        noise_multiplier=sigma,
        steps_per_round=study.training.steps_per_round,
        rounds=study.federation.rounds,
        delta=privacy.delta,
        evaluations=released,
        evaluation_noise=calibrate(study.evaluation.epsilon, privacy.delta, 1.0, released)
        if study.evaluation.epsilon is not None
        else None,
        statistics_tables=0 if study.statistics is None else study.statistics.tables,
        statistics_noise=calibrate(study.statistics.epsilon, privacy.delta, 1.0, 1)
        if study.statistics is not None
        else None,
    )


def _checked_delta(delta: float) -> float:
    # Below 1e-12 the mass that the accountants cut off themselves would dominate.
    if not (isinstance(delta, float | int) and 1e-12 <= delta < 1):
        raise ConsiliumError(
            "privacy.delta-invalid",
            f"δ is {delta!r}, not in [1e-12, 1).",
            hint="Choose δ well below 1 divided by the number of patients.",
        )
    return float(delta)


def _noise(n: int) -> float:
    # n / 1000 is the float nearest to the decimal, so that it prints with three decimals.
    return n / 1000


def _first_true(holds: Any, low: int, high: int, *, start: int, stride: int = 0) -> int:
    """Return the least n in (low, high] where ``holds`` (False at low, True at high) is True.

    Gallops from ``start``, doubling its stride, then bisects.
    """
    n = min(max(start, low + 1), high)
    stride = stride or n
    if holds(n):
        high = n
        while high - stride > low and holds(high - stride):
            high -= stride
            stride *= 2
        low = max(low, high - stride)
    else:
        low = n
        while low + stride < high and not holds(low + stride):
            low += stride
            stride *= 2
        high = min(high, low + stride)
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high


@functools.lru_cache(maxsize=4096)
def _epsilon_pld(history: History, delta: float) -> float:
    if not history:
        return 0.0
    ceiling = rough(history, delta)
    if ceiling > MEANINGLESS:
        return _epsilon_rdp(history, delta)
    steps = sum(event.steps for event in history if event.sampling_rate < 1)
    if ceiling > 30:
        # The grid's length grows with ε; a coarser one keeps the relative error far below 1 %.
        interval = INTERVAL * 10 ** math.ceil(math.log10(ceiling / 30))
    elif steps > STEPS_OF_INTERVAL:
        interval = INTERVAL / 10
    else:
        interval = INTERVAL
    return _pld_epsilon_at(history, delta, interval)


def _pld_epsilon_at(history: History, delta: float, interval: float) -> float:
    return float(composed(history, interval).get_epsilon_for_delta(delta))


# Each distribution is a few megabytes; histories that begin alike share their beginning.
@functools.lru_cache(maxsize=48)
def composed(history: History, interval: float) -> Any:
    *rest, last = history
    if not rest:
        return _distribution(last, interval)
    return composed(tuple(rest), interval).compose(_distribution(last, interval))


@functools.lru_cache(maxsize=32)
def _distribution(event: PrivacyEvent, interval: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution as pld

    if event.sampling_rate == 1:
        # T Gaussians of σ are exactly one of σ/√T.
        return pld.from_gaussian_mechanism(
            event.noise_multiplier / math.sqrt(event.steps), value_discretization_interval=interval
        )
    return _one_step(event.sampling_rate, event.noise_multiplier, interval).self_compose(
        event.steps
    )


@functools.lru_cache(maxsize=32)
def _one_step(sampling_rate: float, noise_multiplier: float, interval: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution as pld

    return pld.from_gaussian_mechanism(
        noise_multiplier, sampling_prob=sampling_rate, value_discretization_interval=interval
    )


#: Integer orders have a short closed form: enough to know the size of a grid beforehand.
_ROUGH_ORDERS: Final = (2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256)


@functools.lru_cache(maxsize=4096)
def _epsilon_rdp(history: History, delta: float) -> float:
    return _renyi(history, delta, None)


@functools.lru_cache(maxsize=4096)
def rough(history: History, delta: float) -> float:
    return _renyi(history, delta, _ROUGH_ORDERS)


def _renyi(history: History, delta: float, orders: tuple[int, ...] | None) -> float:
    if not history:
        return 0.0
    from dp_accounting import dp_event
    from dp_accounting.rdp import RdpAccountant

    # An order whose series does not converge is left out, which keeps the bound a bound.
    logging.getLogger("absl").addFilter(_converges)
    accountant = RdpAccountant(orders=orders)
    for event in history:
        step = dp_event.GaussianDpEvent(event.noise_multiplier)
        if event.sampling_rate < 1:
            step = dp_event.PoissonSampledDpEvent(event.sampling_rate, step)
        accountant.compose(step, event.steps)
    return float(accountant.get_epsilon(delta))


@functools.lru_cache(maxsize=1024)
def _epsilon_prv(history: History, delta: float) -> float:
    if not history:
        return 0.0
    ceiling = _epsilon_rdp(history, delta)
    if ceiling > MEANINGLESS:
        raise _no_prv(f"ε is beyond {MEANINGLESS:g}")
    error_bound = max(0.01, ceiling / 1000)
    steps = sum(event.steps for event in history)
    # Size of opacus' grid: its domain over its mesh (Gopi et al. 2021, remark 5.6).
    points = 2 * (ceiling + 30) * math.sqrt(steps * math.log(12e3 / delta) / 2) / error_bound
    if points > 2**25:
        raise _no_prv("its grid would not fit into memory")
    import warnings

    import numpy as np
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(e.noise_multiplier, e.sampling_rate, e.steps) for e in history]
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            epsilon = float(accountant.get_epsilon(delta, eps_error=error_bound))
    except (RuntimeError, ValueError, ArithmeticError, MemoryError, IndexError) as error:
        raise _no_prv("it fails numerically") from error
    if not math.isfinite(epsilon):
        raise _no_prv("it gives no finite number")
    return max(0.0, epsilon)


def _converges(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("_compute_log_a_frac failed to converge")


def _no_prv(why: str) -> ConsiliumError:
    return ConsiliumError(
        "privacy.prv-unavailable",
        f"opacus' PRV accountant cannot check these events: {why}.",
        hint="PLD is the accountant of record; compare it with RDP instead.",
    )


@functools.lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"dp-accounting": version("dp-accounting"), "opacus": version("opacus")}


def _plain(value: float) -> float | str:
    # JSON has no infinity.
    return value if math.isfinite(value) else "infinite"
