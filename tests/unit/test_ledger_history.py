"""What a ledger says of a patient's past: by study, by year, and since a time."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_samples import (
    EVENT,
    KEY,
    OTHER_STUDY,
    STUDY,
    charge,
    open_ledger,
    patients,
)

from consilium_common.errors import ConsiliumError
from consilium_common.ledger import append
from consilium_common.ledger.entries import Entry, sign_entry, time_text
from consilium_common.ledger.spend import Bin, spend
from consilium_common.ledger.state import LedgerState, year_bounds
from consilium_common.ledger.store import Ledger
from consilium_common.ledger.verify import verify_file
from consilium_common.privacy.accounting import epsilon_of
from consilium_common.privacy.events import PrivacyEvent, grouped

DELTA = 1e-3
ALICE, BOB, CAROL = patients(3)
OTHER_EVENT = PrivacyEvent(0.2, 3.0, 10)


class Clock:
    """The site's clock, set by the test."""

    def __init__(self) -> None:
        self.now = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)

    def set(self, *date: int) -> None:
        self.now = dt.datetime(*date, tzinfo=dt.UTC)  # type: ignore[misc]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()

    def sign(*args: object, **more: object) -> Entry:
        return sign_entry(*args, **more, time=clock.now)  # type: ignore[arg-type]

    monkeypatch.setattr(append, "sign_entry", sign)
    return clock


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock) -> Iterator[Ledger]:
    """Three years: Alice in both studies, Bob in the first, Carol in the second alone."""
    with open_ledger(tmp_path / "ledger.db") as opened:
        charge(opened, 0, members=[ALICE, BOB])
        clock.set(2030, 12, 31, 23, 59, 59, 999999)
        charge(opened, 1, members=[ALICE, BOB])
        clock.set(2031, 1, 1)
        charge(opened, 2, members=[ALICE, BOB])
        clock.set(2032, 6, 1)
        charge(opened, 0, study=OTHER_STUDY, members=[ALICE, CAROL], event=OTHER_EVENT)
        yield opened


def times(count: int) -> PrivacyEvent:
    return PrivacyEvent(EVENT.sampling_rate, EVENT.noise_multiplier, EVENT.steps * count)


def test_a_patient_s_charges_are_told_by_study_and_by_year(ledger: Ledger) -> None:
    state = ledger.state
    assert [(c.study, c.round_index) for c in state.charges_of(ALICE)] == [
        (STUDY, 0),
        (STUDY, 1),
        (STUDY, 2),
        (OTHER_STUDY, 0),
    ]
    assert [c.round_index for c in state.charges_of(BOB, STUDY)] == [0, 1, 2]
    assert state.charges_of(BOB, OTHER_STUDY) == []
    assert state.years() == [2030, 2031, 2032]
    by_year = {
        year: [len(state.charges_of(p, None, *year_bounds(year))) for p in (ALICE, BOB, CAROL)]
        for year in state.years()
    }
    assert by_year == {2030: [2, 2, 0], 2031: [1, 1, 0], 2032: [1, 0, 1]}
    assert state.charges_of("f" * 32) == []


def test_a_time_counts_the_charges_from_it_on(ledger: Ledger) -> None:
    state = ledger.state
    since = year_bounds(2031)[0]
    assert state.events_of(ALICE) == grouped([times(3), OTHER_EVENT])
    assert state.events_of(ALICE, since=since) == grouped([times(1), OTHER_EVENT])
    assert state.events_of(ALICE, STUDY, since) == (times(1),)
    assert state.histories(since=since) == {
        grouped([times(1), OTHER_EVENT]): 1,
        (times(1),): 1,
        (OTHER_EVENT,): 1,
    }
    assert state.histories([ALICE, BOB], since=year_bounds(2032)[0]) == {(OTHER_EVENT,): 1, (): 1}
    assert state.histories([ALICE, BOB, CAROL], study=STUDY, since=since) == {(times(1),): 2, (): 1}
    exactly = "2032-06-01T00:00:00.000000Z"
    assert len(state.standing(since=exactly)) == 1
    assert len(state.standing(since="2032-06-01T00:00:00.000001Z")) == 0
    assert len(state.standing(until=exactly)) == 3


def test_a_clock_set_back_never_makes_a_charge_older(tmp_path: Path, clock: Clock) -> None:
    with open_ledger(tmp_path / "ledger.db") as ledger:
        clock.set(2031, 5, 5)
        charge(ledger, 0)
        clock.set(1970, 1, 1)
        entry = charge(ledger, 1)
        assert entry.time < "1971"
        assert len(ledger.state.standing(since=time_text(dt.datetime(2031, 1, 1, tzinfo=dt.UTC))))
        assert ledger.state.events_of(ALICE, since=year_bounds(2031)[0]) == (times(2),)
        assert ledger.state.years() == [2031]


def test_the_spend_of_each_year_is_that_of_its_worst_patient(ledger: Ledger) -> None:
    found = ledger.spent(DELTA)
    assert [(y.year, y.charges, y.patients) for y in found.years] == [
        (2030, 2, 2),
        (2031, 1, 2),
        (2032, 1, 2),
    ]
    assert [y.epsilon for y in found.years] == [
        epsilon_of([times(2)], DELTA),
        epsilon_of([times(1)], DELTA),
        epsilon_of([OTHER_EVENT], DELTA),
    ]
    assert found.to_dict()["years"][0]["year"] == 2030


def test_the_spend_since_a_time_leaves_out_what_was_before(ledger: Ledger) -> None:
    found = ledger.spent(DELTA, year_bounds(2032)[0])
    assert (found.patients, found.histories) == (2, 1)
    assert found.most == found.least == epsilon_of([OTHER_EVENT], DELTA)
    assert [(s.study, s.rounds, s.patients) for s in found.studies] == [(OTHER_STUDY, 1, 2)]
    assert found.to_dict()["since"] == "2032-01-01T00:00:00.000000Z"
    nothing = ledger.spent(DELTA, year_bounds(2040)[0])
    assert (nothing.patients, nothing.most, nothing.histogram) == (0, 0.0, ())


def test_the_histogram_counts_every_patient_once_in_equal_bins(ledger: Ledger) -> None:
    found = ledger.spent(DELTA)
    assert sum(part.patients for part in found.histogram) == found.patients == 3
    assert (found.histogram[0].low, found.histogram[-1].high) == (0.0, found.most)
    assert found.histogram[-1].patients >= 1
    widths = [part.high - part.low for part in found.histogram]
    assert max(widths) == pytest.approx(min(widths))
    for before, after in zip(found.histogram, found.histogram[1:], strict=False):
        assert before.high == after.low
    for patient in (ALICE, BOB, CAROL):
        epsilon = epsilon_of(ledger.events_of(patient), DELTA)
        last = found.histogram[-1]
        assert any(p.patients and (p.low <= epsilon < p.high or p is last) for p in found.histogram)


def test_patients_who_spent_nothing_measurable_stand_in_one_bin(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "ledger.db") as ledger:
        charge(ledger, 0, event=PrivacyEvent(0.01, 1e6, 1))
        assert ledger.spent(0.5).histogram == (Bin(0.0, 0.0, 3),)
    assert spend(LedgerState(), DELTA).histogram == ()


def test_an_evaluation_and_a_training_of_one_number_are_two_charges(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "ledger.db") as ledger:
        trained = charge(ledger, 0)
        evaluated = charge(ledger, 0, purpose="evaluation", members=[CAROL], event=OTHER_EVENT)
        found = ledger.find_charge(STUDY, 0, "evaluation")
        assert found is not None
        assert (found.entry, found.purpose, found.model) == (evaluated, "evaluation", "silo-local")
        ledger.void(trained, "killed")
        found = ledger.find_charge(STUDY, 0, "evaluation")
        assert found is not None and found.stands
        assert ledger.events_of(CAROL) == (OTHER_EVENT,)
        spent = ledger.spent(DELTA).studies[0]
        assert (spent.rounds, spent.evaluations) == (0, 1)


moments = st.datetimes(dt.datetime(2030, 1, 1), dt.datetime(2033, 1, 1))


@settings(max_examples=20, deadline=None)
@given(st.lists(moments, min_size=1, max_size=6), moments)
def test_a_period_and_what_was_before_it_make_the_whole(
    tmp_path_factory: pytest.TempPathFactory, said: list[dt.datetime], border: dt.datetime
) -> None:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(append, "sign_entry", lambda *a, **m: sign_entry(*a, **m, time=clock.now))
        with open_ledger(tmp_path_factory.mktemp("time") / "ledger.db") as ledger:
            for index, moment in enumerate(said):
                clock.now = moment.replace(tzinfo=dt.UTC)
                charge(ledger, index, members=patients(1 + index % 3))
            state = ledger.state
    since = time_text(border.replace(tzinfo=dt.UTC))
    for patient in patients(3):
        parts = (
            *state.events_of(patient, until=since),
            *state.events_of(patient, since=since),
        )
        assert grouped(parts) == state.events_of(patient)
    assert len(state.standing(since=since)) + len(state.standing(until=since)) == len(said)
    # Every charge made in the period counts in it, and more where the clock was set back.
    assert len(state.standing(since=since)) >= sum(moment >= border for moment in said)


def test_patients_of_equal_history_are_counted_together(tmp_path: Path) -> None:
    other = PrivacyEvent(0.2, 3.0, 20)
    with open_ledger(tmp_path / "ledger.db") as ledger:
        for index in range(3):
            charge(ledger, index, members=patients(10))
        charge(ledger, 0, study=OTHER_STUDY, members=patients(4, start=8), event=other)
        three = (PrivacyEvent(0.1, 2.0, 60),)
        assert ledger.histories() == {
            three: 8,
            grouped([*three, other]): 2,
            (other,): 2,
        }
        assert ledger.histories(patients(1) + patients(3, start=100)) == {three: 1, (): 3}
        spent = ledger.spent(1e-3)
        assert (spent.patients, spent.histories) == (12, 3)
        assert spent.most == epsilon_of([*three, other], 1e-3)
        assert spent.median == epsilon_of(three, 1e-3)
        assert spent.least == min(epsilon_of([other], 1e-3), spent.median)
        assert [(s.study, s.rounds, s.patients) for s in spent.studies] == [
            (STUDY, 3, 10),
            (OTHER_STUDY, 1, 4),
        ]
        assert spent.studies[1].epsilon == epsilon_of([other], 1e-3)


charges_ = st.lists(
    st.tuples(
        st.sampled_from([STUDY, OTHER_STUDY]),
        st.integers(0, 3),
        st.sampled_from([1.0, 2.0]),
        st.sets(st.integers(0, 5), min_size=1),
        st.sampled_from(["open", "released", "voided"]),
    ),
    max_size=12,
)


@settings(max_examples=15, deadline=None)
@given(charges_)
def test_every_patient_s_history_is_what_a_simple_list_would_say(
    tmp_path_factory: pytest.TempPathFactory,
    charges: list[tuple[str, int, float, set[int], str]],
) -> None:
    names = patients(6)
    said: dict[str, list[PrivacyEvent]] = {name: [] for name in names}
    standing: set[tuple[str, int]] = set()
    path = tmp_path_factory.mktemp("model") / "ledger.db"
    with open_ledger(path) as ledger:
        for study, index, sigma, members, fate in charges:
            event = PrivacyEvent(0.1, sigma, 5)
            chosen = [names[i] for i in members]
            if (study, index) in standing:
                with pytest.raises(ConsiliumError, match="already-charged"):
                    charge(ledger, index, study=study, event=event, members=chosen)
                continue
            entry = charge(ledger, index, study=study, event=event, members=chosen)
            if fate == "voided":
                ledger.void(entry, "test")
                continue
            if fate == "released":
                ledger.release(entry, "c" * 64)
            standing.add((study, index))
            for name in chosen:
                said[name].append(event)
        for name in names:
            assert ledger.events_of(name) == grouped(said[name])
        expected: dict[tuple[PrivacyEvent, ...], int] = {}
        for events in said.values():
            if events:
                expected[grouped(events)] = expected.get(grouped(events), 0) + 1
        assert ledger.histories() == expected
    assert verify_file(path, KEY.public_key()).ok
