"""Asked for statistics, a site charges first, counts once, sends what it stored, and no more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from egress_samples import NODE, Question, Reply, gate_of, reference
from round_samples import COHORT_SIZE, NAME, RoundsAtSite, deciding_site, tiny_study
from statistics_samples import counted_cohort, counting_study

from consilium_client import local_round
from consilium_client.budget.price import Price
from consilium_client.evidence import egress_rows
from consilium_client.faults import STATISTICS_POINTS
from consilium_client.statistics_query import StatisticsQuery
from consilium_client.store import StudyStore
from consilium_common.canonical import digest
from consilium_common.errors import ConsiliumError
from consilium_common.ledger.state import Charge
from consilium_common.ledger.store import Ledger
from consilium_common.study import Study
from consilium_common.wire.messages import Instructions, to_server

STUDY = counting_study()


@dataclass(frozen=True)
class Watched:
    """A patient who says when their cases are read."""

    patient: Any
    note: Callable[[], None]

    @property
    def key(self) -> str:
        key: str = self.patient.key
        return key

    @property
    def cases(self) -> Any:
        self.note()
        return self.patient.cases


class CountingSite(RoundsAtSite):
    """A site that is asked for statistics, and counts how often a patient was read."""

    def __init__(self, folder: Path, study: Study = STUDY) -> None:
        super().__init__(deciding_site(folder / "site", study), study, counted_cohort())
        self.read = 0

    def restart(self) -> None:
        """Let a new worker take over."""
        self.rounds = RoundsAtSite(self.site, self.study, self.cohort).rounds

    def members(self) -> list[Any]:
        return list(self.cohort.splits["train"])

    def count(self, cohort_size: int = COHORT_SIZE, number: int = 0) -> dict[str, float]:
        told = Instructions(self.study.digest, number, cohort_size)
        watched: list[Any] = [Watched(patient, self.note) for patient in self.members()]
        return self.rounds.statistics(told, watched)

    def note(self) -> None:
        self.read += 1

    def charges(self) -> list[Charge]:
        if not self.site.home.ledger.exists():
            return []
        with Ledger.open(self.site.home.ledger, site=NAME) as ledger:
            return list(ledger.state.charges.values())


@pytest.fixture
def counting(tmp_path: Path) -> CountingSite:
    return CountingSite(tmp_path)


def code_of(call: Any, *arguments: Any) -> str:
    with pytest.raises(ConsiliumError) as caught:
        call(*arguments)
    return caught.value.code


def test_asked_again_the_site_sends_the_same_numbers_and_reads_no_patient(
    counting: CountingSite,
) -> None:
    first = counting.count()
    assert counting.count() == first
    assert counting.read == len(counting.members())
    (charge,) = counting.charges()
    assert (charge.purpose, charge.round_index, charge.state) == ("statistics", 0, "released")
    assert charge.update == digest(first)
    assert charge.clip_norm == pytest.approx(5**0.5)
    with Ledger.open(counting.site.home.ledger, site=NAME) as ledger:
        members = ledger.state.cohorts[charge.cohort]
    assert set(members) == {patient.key for patient in counting.members()}


def test_the_numbers_are_the_exact_sums_and_charged_noise(counting: CountingSite) -> None:
    told = np.array(list(counting.count().values()))
    query = StatisticsQuery.of(STUDY)
    assert query is not None
    exact = query.total(patient.cases for patient in counting.members())
    off = (told - exact) / query.deviation
    assert np.abs(off).min() > 0
    assert np.abs(off).max() < 8
    assert 0.3 < off.std() < 2


def test_the_charge_is_durable_before_a_patient_is_read(counting: CountingSite) -> None:
    seen: list[str] = []
    counting.note = lambda: seen.extend(  # type: ignore[method-assign]
        charge.state for charge in counting.charges()
    )
    counting.count()
    assert seen == ["open"] * len(counting.members())


class Killed(BaseException):
    """What happens to a worker at any moment."""


def kill_at(counting: CountingSite, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    """Ask the site, and let its worker die at this point; a new one takes over."""

    def killed(name: str) -> None:
        if name == point:
            raise Killed

    with monkeypatch.context() as dying:
        dying.setattr(local_round, "fault_point", killed)
        dying.setattr("consilium_client.store.fault_point", killed)
        with pytest.raises(Killed):
            counting.count()
    counting.restart()


@pytest.mark.parametrize("point", STATISTICS_POINTS)
def test_killed_at_any_point_a_site_charges_right_and_sends_one_answer(
    counting: CountingSite, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    if point in ("statistics.before-void", "statistics.voided"):
        kill_at(counting, monkeypatch, "statistics.charged")  # so that there is a charge to void
    kill_at(counting, monkeypatch, point)
    stored = StudyStore(counting.site.home).update(STUDY.digest, 0, "statistics")
    kept = [stored.figures] if stored is not None else []
    found = counting.count()
    assert all(found == one for one in kept)
    standing = [charge for charge in counting.charges() if charge.state != "voided"]
    assert [(c.purpose, c.state, c.update) for c in standing] == [
        ("statistics", "released", digest(found))
    ]


def test_a_site_whose_policy_lets_no_figures_out_counts_nothing(tmp_path: Path) -> None:
    counting = CountingSite(tmp_path)
    policy = counting.site.home.policy
    text = policy.read_text()
    policy.write_text(text + "private_metrics_epsilon: null\n")
    assert code_of(counting.count) == "privacy.metrics-refused"
    policy.write_text(text + "private_metrics_epsilon: 0.4\n")
    assert code_of(counting.count) == "privacy.metrics-refused"
    assert counting.read == 0
    assert counting.charges() == []
    policy.write_text(text + "private_metrics_epsilon: 0.6\n")
    counting.count()


def test_what_the_study_does_not_have_is_neither_counted_nor_charged(tmp_path: Path) -> None:
    counting = CountingSite(tmp_path, tiny_study())
    assert code_of(counting.count) == "privacy.nothing-to-charge"
    other = CountingSite(tmp_path / "other")
    assert code_of(other.count, COHORT_SIZE + 5) == "run.cohort-size"
    StudyStore(other.site.home).decide(STUDY, "declined", 0, "no")
    assert code_of(other.count) == "study.not-approved"
    assert counting.charges() == other.charges() == []


@pytest.mark.parametrize("number", [-1, 1, 7])
def test_asked_under_another_number_a_site_counts_nothing_again(
    counting: CountingSite, number: int
) -> None:
    first = counting.count()
    before = counting.read
    assert code_of(counting.count, COHORT_SIZE, number) == "privacy.round-unknown"
    assert counting.read == before
    assert len(counting.charges()) == 1
    assert counting.count() == first


def test_whoever_is_counted_is_charged_although_the_cohort_changed_since_a_crash(
    counting: CountingSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_at(counting, monkeypatch, "statistics.charged")
    counting.cohort = counted_cohort(9)
    counting.restart()
    first = counting.count()
    voided, standing = counting.charges()
    assert (voided.state, standing.state) == ("voided", "released")
    keys = {patient.key for patient in counting.members()}
    assert len(keys) == counting.read == 9
    with Ledger.open(counting.site.home.ledger, site=NAME) as ledger:
        assert set(ledger.state.cohorts[standing.cohort]) == keys
    # Whoever comes later is in no number that left, and is not charged for it.
    counting.cohort = counted_cohort(12)
    counting.restart()
    assert counting.count() == first
    assert counting.read == 9
    assert counting.charges() == [voided, standing]


def test_lost_after_the_release_statistics_are_not_drawn_a_second_time(
    counting: CountingSite,
) -> None:
    counting.count()
    before = counting.read
    (stored,) = counting.site.home.releases.glob("*-statistics.json")
    stored.unlink()
    assert code_of(counting.count) == "privacy.update-lost"
    counting.site.home.studies.unlink()
    StudyStore(counting.site.home).decide(STUDY, "approved", COHORT_SIZE, "")
    counting.restart()
    assert code_of(counting.count) == "privacy.update-lost"
    assert counting.read == before


def test_statistics_and_training_are_charged_to_the_same_patients(counting: CountingSite) -> None:
    counting.count()
    counting.train(0)
    assert [charge.purpose for charge in counting.charges()] == ["statistics", "training"]
    with Ledger.open(counting.site.home.ledger, site=NAME) as ledger:
        (history,) = ledger.state.histories()
    assert sorted(event.steps for event in history) == [1, 2]


# --- the gate ----------------------------------------------------------------------------------


def test_the_gate_passes_the_released_statistics_and_no_other_number(
    counting: CountingSite,
) -> None:
    gate = gate_of(counting.site)

    def judged(content: Any, kind: str = "query") -> str | None:
        question = Question(STUDY, kind)
        announced = Reply(question, content).announced()
        try:
            gate.judge(question.asked(), announced, NODE)
        except ConsiliumError as error:
            return error.code
        return None

    assert judged(to_server(None, dict.fromkeys(["size.0"], 1.0))) == "privacy.egress"
    figures = counting.count()
    assert judged(to_server(None, figures)) is None
    for content, kind in (
        (to_server(None, {**figures, "size.0": figures["size.0"] + 1e-9}), "query"),
        (to_server(None, {name: v for name, v in figures.items() if name != "size.0"}), "query"),
        (to_server(None, None), "query"),
        (to_server(reference(b"weights"), None), "query"),
        (to_server(None, figures), "evaluate"),
        (to_server(None, figures), "train"),
        (to_server(None, figures), "query.other"),
    ):
        assert judged(content, kind) == "privacy.egress"
    (row,) = egress_rows(counting.site.home)
    assert (row["purpose"], row["sha256"]) == ("statistics", digest(figures))


# --- the price ---------------------------------------------------------------------------------


def test_the_price_in_words_says_what_statistics_cost() -> None:
    from budget_samples import policy
    from ledger_samples import patients

    from consilium_client.budget.charging import price
    from consilium_common.ledger.state import LedgerState
    from consilium_common.privacy.accounting import epsilon_of, parameters

    def priced(study: Study, **rules: Any) -> Price:
        return price(LedgerState(site="north"), policy(**rules), study, patients(20))

    plan = parameters(STUDY)
    assert plan is not None
    found = priced(STUDY)
    without = priced(tiny_study(release="none"))
    composed = epsilon_of(plan.events_of(plan.rounds), plan.delta)
    assert found.study_epsilon == found.declared_epsilon == found.after == composed
    assert without.study_epsilon is not None
    assert without.study_epsilon < composed < without.study_epsilon + 0.5  # they compose
    assert found.statistics_epsilon == pytest.approx(0.5, abs=0.01)
    assert found.statistics_left == 1
    assert "statistics of the training patients" in found.sentence()
    assert (without.statistics_epsilon, without.statistics_left) == (None, 0)
    assert "statistics" not in without.sentence()
    assert priced(STUDY, private_metrics_epsilon=0.4).code == "privacy.metrics-refused"
    assert priced(STUDY, per_study_epsilon=composed - 0.01).code == "privacy.budget"


def test_an_approved_study_keeps_its_statistics_reserved_until_they_are_charged(
    counting: CountingSite,
) -> None:
    from budget_samples import policy
    from ledger_samples import patients

    from consilium_client.budget.charging import price

    decisions = StudyStore(counting.site.home).decisions()
    other = counting_study(["size"], name="other")
    members = [patient.key for patient in counting.members()]

    def after(people: list[str]) -> float:
        with Ledger.open(counting.site.home.ledger, counting.site.signer, site=NAME) as ledger:
            found = price(ledger, policy(), other, people, others=decisions)
        assert found.after is not None
        return found.after

    before = after(members)
    assert after(patients(6, start=50)) == before  # nobody is known to be in it yet
    counting.count()
    # Charged instead of reserved: the same for its patients.
    assert after(members) == before
    assert after(patients(6, start=50)) < before
