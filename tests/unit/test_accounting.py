"""ε is what the literature and the libraries say it is, and calibration keeps its promise."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from consilium_common.errors import ConsiliumError
from consilium_common.ledger.store import Ledger
from consilium_common.privacy import accounting
from consilium_common.privacy.accounting import (
    calibrate,
    cross_check,
    epsilon_of,
    epsilon_prv,
    epsilon_rdp,
    parameters,
)
from consilium_common.privacy.events import PrivacyEvent, PrivacyParameters, grouped
from consilium_common.study.schema import Study

#: σ, q, T, δ, then ε by RDP, opacus PRV, PLD, and PLD for replacing one patient.
REFERENCE = [
    (1.1, 256 / 60000, 14062, 1e-5, 2.597, 2.392, 2.382, 4.22),
    (4.0, 0.01, 10_000, 1e-5, 1.035, 0.957, 0.947, 1.99),
    (1.5, 0.04, 2250, 1e-5, 7.329, 6.779, 6.769, 13.5),
    (1.0, 0.032, 1563, 1e-4, 8.118, 7.335, 7.324, 12.8),
    (0.6, 0.0027, 3700, 6e-6, 5.067, 4.174, 4.163, 4.78),
]


def direct(
    *events: PrivacyEvent,
    neighbours: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
) -> PLDAccountant:
    """Compose events with dp-accounting itself, round by round, without anything of ours."""
    accountant = PLDAccountant(neighbours)
    for event in events:
        step = dp_event.PoissonSampledDpEvent(
            event.sampling_rate, dp_event.GaussianDpEvent(event.noise_multiplier)
        )
        accountant.compose(step, event.steps)
    return accountant


STUDY = {
    "schema": "consilium/study/v1",
    "name": "priced",
    "task": {
        "kind": "segmentation",
        "dimensions": 2,
        "inputs": ["image"],
        "classes": ["background", "organ"],
    },
    "model": {"network": "unet"},
    "training": {"steps_per_round": 20},
    "privacy": {
        "mode": "patient",
        "sampling_rate": 0.1,
        "clip_norm": 1.0,
        "noise_multiplier": 2.0,
        "delta": 1e-3,
    },
    "federation": {"rounds": 20},
}


def study(**privacy: object) -> Study:
    merged = {**STUDY["privacy"], **privacy}  # type: ignore[dict-item]
    return Study.model_validate(
        {**STUDY, "privacy": {k: v for k, v in merged.items() if v is not None}}
    )


@pytest.mark.parametrize("row", REFERENCE, ids=lambda row: f"sigma {row[0]}, T {row[2]}")
def test_all_accountants_give_the_reference_numbers(row: tuple[float, ...]) -> None:
    sigma, q, steps, delta, rdp, prv, pld, replace_one = row
    event = PrivacyEvent(q, sigma, int(steps))
    assert epsilon_of([event], delta) == pytest.approx(pld, abs=0.02)
    assert epsilon_prv([event], delta) == pytest.approx(prv, abs=0.02)
    assert epsilon_rdp([event], delta) == pytest.approx(rdp, abs=0.02)
    # What the promise would be against replacing a patient; the table has three digits of it.
    other = direct(event, neighbours=NeighboringRelation.REPLACE_ONE)
    digits = 0.05 if replace_one > 10 else 0.005
    assert other.get_epsilon(delta) == pytest.approx(replace_one, abs=0.02 + digits)
    check = cross_check([event], delta)
    assert check.agreement == "agrees"
    assert check.below_ceiling
    assert check.ok
    assert check.versions["dp-accounting"] == "0.6.0"


def test_composing_is_an_order_of_magnitude_below_summing() -> None:
    one = epsilon_of([PrivacyEvent(0.032, 1.0, 1)], 1e-4)
    all_of_them = epsilon_of([PrivacyEvent(0.032, 1.0, 1000)], 1e-4)
    assert all_of_them == pytest.approx(5.68, abs=0.02)
    assert 1000 * one > 10 * all_of_them


@pytest.mark.parametrize(("sigma", "steps", "delta"), [(20.0, 1, 1e-5), (5.0, 30, 1e-3)])
def test_full_batch_equals_the_exact_gaussian(sigma: float, steps: int, delta: float) -> None:
    mu = math.sqrt(steps) / sigma

    def excess(epsilon: float) -> float:  # Balle & Wang 2018, theorem 8
        return (
            norm.cdf(mu / 2 - epsilon / mu)
            - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
            - delta
        )

    exact = brentq(excess, 1e-6, 100)
    found = epsilon_of([PrivacyEvent(1.0, sigma, steps)], delta)
    assert exact <= found + 1e-9
    assert found == pytest.approx(exact, abs=1e-3)


@pytest.mark.parametrize(
    ("patients", "per_step", "sigmas"),
    [
        (100, 10, (4.57, 1.97, 1.07)),
        pytest.param(1000, 100, (5.63, 2.29, 1.18), marks=pytest.mark.long),
        pytest.param(20_000, 256, (2.55, 1.15, 0.73), marks=pytest.mark.long),
    ],
)
def test_calibrated_noise_for_thirty_epochs_matches_the_reference(
    patients: int, per_step: int, sigmas: tuple[float, float, float]
) -> None:
    q = per_step / patients
    for epsilon, sigma in zip((1.0, 3.0, 8.0), sigmas, strict=True):
        found = calibrate(epsilon, 1 / (10 * patients), q, round(30 / q))
        assert found == pytest.approx(sigma, abs=0.02)


@pytest.mark.parametrize(
    ("epsilon", "delta", "q", "steps"),
    [(8.0, 1e-3, 0.3, 160), (3.0, 1e-3, 1.0, 20), (0.2, 1e-4, 0.01, 50)],
)
def test_calibration_is_the_least_noise_in_thousandths_that_keeps_the_promise(
    epsilon: float, delta: float, q: float, steps: int
) -> None:
    sigma = calibrate(epsilon, delta, q, steps)
    assert round(sigma * 1000) / 1000 == sigma
    assert epsilon_of([PrivacyEvent(q, sigma, steps)], delta) <= epsilon
    less = round(sigma * 1000 - 1) / 1000
    assert epsilon_of([PrivacyEvent(q, less, steps)], delta) > epsilon


def test_calibration_never_goes_below_the_least_noise_of_a_study() -> None:
    assert calibrate(100.0, 0.01, 1.0, 1) == 0.201


def test_calibration_says_when_no_noise_is_enough() -> None:
    with pytest.raises(ConsiliumError) as caught:
        calibrate(1e-4, 1e-9, 1.0, 10**9)
    assert caught.value.code == "privacy.unreachable"


#: Two studies at one site, and a third at another: q, σ and steps of a round, rounds.
FIRST, SECOND, ELSEWHERE = (
    (PrivacyEvent(0.2, 3.0, 10), 6),
    (PrivacyEvent(0.1, 2.0, 25), 4),
    (PrivacyEvent(0.05, 1.5, 10), 5),
)


def test_studies_compose_as_dp_accounting_composes_them_directly() -> None:
    rounds = [event for event, number in (FIRST, SECOND, ELSEWHERE) for _ in range(number)]
    whole = [
        PrivacyEvent(event.sampling_rate, event.noise_multiplier, event.steps * number)
        for event, number in (FIRST, SECOND, ELSEWHERE)
    ]
    # Ours from the rounds as a ledger has them; theirs from the whole studies.
    assert epsilon_of(rounds, 1e-4) == pytest.approx(direct(*whole).get_epsilon(1e-4), abs=1e-6)
    assert cross_check(rounds, 1e-4).ok


def test_sites_compose_in_parallel_for_a_patient_of_one_and_together_for_one_of_two(
    tmp_path: Path,
) -> None:
    def ledger(
        site: str, studies: dict[str, tuple[PrivacyEvent, int]], patients: list[str]
    ) -> Ledger:
        opened = Ledger.open(tmp_path / f"{site}.db", Ed25519PrivateKey.generate(), site=site)
        for study, (event, rounds) in studies.items():
            for index in range(rounds):
                opened.charge(
                    study=study,
                    round_index=index,
                    event=event,
                    clip_norm=1.0,
                    delta=1e-4,
                    patients=patients,
                )
        return opened

    here, everywhere = "1" * 32, "2" * 32
    north = ledger("north", {"a" * 64: FIRST, "b" * 64: SECOND}, [here, everywhere])
    south = ledger("south", {"c" * 64: ELSEWHERE}, [everywhere])

    def repeated(*parts: tuple[PrivacyEvent, int]) -> list[PrivacyEvent]:
        return [event for event, number in parts for _ in range(number)]

    with north, south:
        # Parallel composition: a patient of one site has spent that site's events and no others.
        one_site = direct(*repeated(FIRST, SECOND)).get_epsilon(1e-4)
        assert epsilon_of(north.events_of(here), 1e-4) == pytest.approx(one_site, abs=1e-3)
        assert south.events_of(here) == ()
        # A patient of both has spent the composition, which is less than the sum.
        both = (*north.events_of(everywhere), *south.events_of(everywhere))
        together = direct(*repeated(FIRST, SECOND, ELSEWHERE)).get_epsilon(1e-4)
        assert epsilon_of(both, 1e-4) == pytest.approx(together, abs=1e-3)
        apart = epsilon_of(south.events_of(everywhere), 1e-4)
        assert one_site < together < one_site + apart


def test_many_steps_of_tiny_loss_are_not_rounded_up_into_a_large_one() -> None:
    # On the default grid this would come out a tenth too large.
    found = epsilon_of([PrivacyEvent(0.01, 100.0, 200_000)], 1e-5)
    assert found == pytest.approx(epsilon_prv([PrivacyEvent(0.01, 100.0, 200_000)], 1e-5), abs=0.02)
    assert found <= epsilon_rdp([PrivacyEvent(0.01, 100.0, 200_000)], 1e-5)


def test_no_events_cost_nothing() -> None:
    assert epsilon_of([], 1e-5) == 0
    assert cross_check([], 1e-5).ok


def test_hopeless_noise_is_priced_at_once_by_the_ceiling() -> None:
    events = [PrivacyEvent(1.0, 0.01, 10**6)]
    check = cross_check(events, 1e-5)
    assert check.pld == check.rdp > 1000
    assert check.prv is None
    assert check.agreement == "not-computed"
    assert "beyond" in check.note


def test_prv_is_never_negative_where_there_is_hardly_any_loss() -> None:
    assert epsilon_prv([PrivacyEvent(0.001, 1e4, 1)], 0.01) >= 0


@pytest.mark.parametrize("fault", [RuntimeError("no"), ValueError("no"), ZeroDivisionError()])
def test_a_failing_prv_is_reported_and_not_hidden(
    monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    import opacus.accountants

    def fails(*_: object, **__: object) -> float:
        raise fault

    monkeypatch.setattr(opacus.accountants.PRVAccountant, "get_epsilon", fails)
    check = cross_check([PrivacyEvent(0.1, 7.125, 3)], 1e-4)
    assert check.prv is None
    assert check.agreement == "not-computed"
    assert "numerically" in check.note


def test_a_prv_that_disagrees_is_said_to_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "_epsilon_prv", lambda history, delta: 0.5)
    check = cross_check([PrivacyEvent(0.1, 1.0, 100)], 1e-4)
    assert check.agreement == "differs"
    assert not check.ok


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-3, 1e-13, float("nan")])
def test_a_delta_out_of_range_is_refused(delta: float) -> None:
    with pytest.raises(ConsiliumError) as caught:
        epsilon_of([PrivacyEvent(0.1, 1.0, 1)], delta)
    assert caught.value.code == "privacy.delta-invalid"


events_ = st.builds(
    PrivacyEvent,
    st.sampled_from([0.05, 1.0]),
    st.sampled_from([2.5, 4.0]),
    st.sampled_from([1, 7, 30]),
)


@settings(max_examples=5, deadline=None)
@given(st.lists(events_, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_order_and_cutting_into_rounds_change_nothing(
    events: list[PrivacyEvent], random: object
) -> None:
    cut = [
        PrivacyEvent(e.sampling_rate, e.noise_multiplier, 1) for e in events for _ in range(e.steps)
    ]
    random.shuffle(cut)  # type: ignore[attr-defined]
    assert grouped(cut) == grouped(events)
    assert epsilon_of(cut, 1e-3) == epsilon_of(events, 1e-3)


@settings(max_examples=5, deadline=None)
@given(st.lists(events_, max_size=3), events_)
def test_one_more_event_never_costs_less(events: list[PrivacyEvent], more: PrivacyEvent) -> None:
    assert epsilon_of([*events, more], 1e-3) >= epsilon_of(events, 1e-3)


@given(events_)
def test_an_event_survives_writing_and_reading(event: PrivacyEvent) -> None:
    assert PrivacyEvent.from_dict(event.to_dict()) == event
    assert event.to_dict()["unit"] == "patient"
    assert event.to_dict()["adjacency"] == "add-or-remove-one"


@pytest.mark.parametrize(
    ("q", "sigma", "steps"),
    [
        (0, 1, 1),
        (1.1, 1, 1),
        (0.5, 0, 1),
        (0.5, -1, 1),
        (0.5, float("inf"), 1),
        (float("nan"), 1, 1),
        (0.5, 1, 0),
        (0.5, 1, 1.5),
        (0.5, 1, True),
        ("0.5", 1, 1),
        (None, 1, 1),
    ],
)
def test_an_impossible_event_is_refused(q: object, sigma: object, steps: object) -> None:
    with pytest.raises(ConsiliumError) as caught:
        PrivacyEvent(q, sigma, steps)  # type: ignore[arg-type]
    assert caught.value.code == "privacy.event-invalid"


@pytest.mark.parametrize(
    "change",
    [
        {"unit": "slice"},
        {"adjacency": "replace-one"},
        {"mechanism": "laplace"},
        {"extra": 1},
        {"steps": None},
        {"sampling_rate": "0.1"},
    ],
)
def test_an_event_of_another_promise_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConsiliumError):
        PrivacyEvent.from_dict({**PrivacyEvent(0.1, 1.0, 5).to_dict(), **change})


def test_a_study_without_privacy_has_no_parameters() -> None:
    assert parameters(Study.model_validate({**STUDY, "privacy": {"mode": "none"}})) is None


def test_a_study_names_its_mechanism_by_noise() -> None:
    assert parameters(study()) == PrivacyParameters(0.1, 1.0, 2.0, 20, 20, 1e-3)


def test_a_study_that_names_epsilon_gets_the_noise_that_keeps_it() -> None:
    found = parameters(study(noise_multiplier=None, epsilon=3.0))
    assert found is not None
    assert found.event_total.steps == 400
    assert 2.9 < epsilon_of([found.event_total], found.delta) <= 3.0
    assert grouped([found.event_per_round] * 20) == (found.event_total,)
