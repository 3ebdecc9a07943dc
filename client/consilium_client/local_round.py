"""One release of a site: approval, policy, charge, work, storing, in the order that keeps faith.

The order is what a crash cannot undo: the charge is durable before data is touched, the result is
stored before it is released, and what was stored is never computed again. A round's update, the
figures of an evaluation and the statistics go the same way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from consilium_client.budget.charging import charge_round, require_permitted
from consilium_client.budget.policy import Policy, load_policy
from consilium_client.encoding import encoded_update
from consilium_client.faults import fault_point
from consilium_client.home import SiteHome
from consilium_client.identity import SiteIdentity
from consilium_client.score_query import ScoreQuery
from consilium_client.standing import Standing
from consilium_client.statistics_query import StatisticsQuery
from consilium_client.store import Decision, StoredUpdate, StudyStore
from consilium_client.training.evaluation import Evaluation, exact_figures, patient_scores
from consilium_client.training.session import TrainingSession
from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.ledger.entries import Purpose
from consilium_common.ledger.store import Ledger
from consilium_common.models.weights import Array, pack, unpack
from consilium_common.privacy.accounting import parameters
from consilium_common.privacy.events import SCORE_SENSITIVITY, PrivacyEvent
from consilium_common.wire.messages import Instructions

if TYPE_CHECKING:
    from consilium_client.data.cohort import CaseData, Patient

_log = logging.getLogger(__name__)

#: The one figure of a released evaluation: the noised sum of centred scores.
SUM: Final = "sum"


class LocalRounds:
    """Trains and evaluates the rounds of one approved study, and counts its patients.

    Parameters
    ----------
    session : TrainingSession
        The study's network, data and device.
    patients : sequence of str
        Keyed hashes of every patient that training may sample.
    evaluated : sequence of Patient
        Every patient that a released evaluation scores, in the order of the session's cohort.
    """

    def __init__(
        self,
        home: SiteHome,
        identity: SiteIdentity,
        decision: Decision,
        session: TrainingSession,
        patients: Sequence[str],
        *,
        evaluated: Sequence[Patient] = (),
    ) -> None:
        self._home = home
        self._identity = identity
        self._study = decision.study
        #: Looked at between steps: withdrawal ends the work at the next one.
        self.standing = Standing(home, decision)
        self._cohort_size = decision.cohort_size
        self._session = session
        self._patients = tuple(patients)
        self._evaluated = tuple(evaluated)
        self._store = StudyStore(home)
        self._ledger: Ledger | None = None

    def train(
        self,
        instructions: Instructions,
        weights: bytes,
        progress: Callable[[int, int], None],
    ) -> StoredUpdate:
        """Return the round's update: the stored one, or a newly computed one.

        Raises
        ------
        ConsiliumError
            ``study.not-approved``, ``privacy.*`` (policy, budget, ledger, truth check), ``run.*``.
        """
        self._require_cohort_size(instructions)
        policy = self._permitted()
        number = instructions.round_index
        private = parameters(self._study)
        # Before anything is charged: nobody pays for a round that has lost what it begins with.
        stored = self._store.update(self._study.digest, number)
        kept = None if stored is not None else self._kept()
        if private is None:
            return stored or self._train(instructions, weights, kept or {}, progress)
        # Where clipping adapts, a round begins with the norm that the site's last one left.
        clip_norm = self._store.clip_norm_after(self._study.digest, number) or private.clip_norm
        return self._once(
            "training",
            number,
            lambda: self._train(
                instructions,
                weights,
                kept or {},
                charged=private.event_per_round,
                clip_norm=clip_norm,
            ),
            policy=policy,
            patients=self._patients,
            event=private.event_per_round,
            clip_norm=clip_norm,
        )

    def evaluate(
        self, instructions: Instructions, evaluation: Callable[[], Evaluation]
    ) -> dict[str, float]:
        """Evaluate, and return the figures that may leave: none, exact ones or the noised sum.

        Parameters
        ----------
        evaluation : callable
            Evaluates the model on this site's test patients. Where the noised sum leaves it is
            called once for a number of rounds done, after the charge; asked again, the site sends
            what it stored.

        Raises
        ------
        ConsiliumError
            As :meth:`train`; ``privacy.no-test-patients`` when there is nobody to evaluate on.
        """
        policy = self._permitted()
        private = parameters(self._study)
        if private is None or private.evaluation_noise is None:
            found = evaluation()
            self.standing.require()
            return exact_figures(found) if self._releases_exact(policy) else {}
        if not self._evaluated:
            raise ConsiliumError(
                "privacy.no-test-patients",
                "The study releases evaluation figures and this site has no patients for them.",
                hint="Raise the share of test patients in site.yaml, or decline the study.",
            )
        query = ScoreQuery(private.evaluation_noise)

        def release() -> StoredUpdate:
            scores = patient_scores(evaluation(), self._evaluated)
            fault_point("evaluation.scored")
            figures = {SUM: query.release(scores)}
            return self._store.keep_update(
                self._study.digest,
                instructions.round_index,
                canonical_json(figures),
                figures,
                purpose="evaluation",
                under=self.standing.decision,
            )

        return self._once(
            "evaluation",
            instructions.round_index,
            release,
            policy=policy,
            patients=[patient.key for patient in self._evaluated],
            event=query.event,
            clip_norm=SCORE_SENSITIVITY,
        ).figures

    def statistics(
        self, instructions: Instructions, patients: Sequence[Patient]
    ) -> dict[str, float]:
        """Return the study's noised statistics: the stored ones, or newly counted ones.

        Parameters
        ----------
        patients : sequence of Patient
            The training patients: those who are counted are those who are charged. Their cases
            are read after the charge; asked again, the site sends what it stored and reads
            nothing.

        Raises
        ------
        ConsiliumError
            As :meth:`train`; ``privacy.nothing-to-charge`` when the study has no statistics.
        """
        self._require_cohort_size(instructions)
        policy = self._permitted()
        query = StatisticsQuery.of(self._study)
        if query is None:
            raise ConsiliumError(
                "privacy.nothing-to-charge",
                "The aggregator asks for statistics that the study does not have.",
                hint="Propose a study with a `statistics` part.",
            )

        def release() -> StoredUpdate:
            figures = query.release(self._cases_of(patients))
            return self._store.keep_update(
                self._study.digest,
                instructions.round_index,
                canonical_json(figures),
                figures,
                purpose="statistics",
                under=self.standing.decision,
            )

        return self._once(
            "statistics",
            instructions.round_index,
            release,
            policy=policy,
            patients=[patient.key for patient in patients],
            event=query.event,
            clip_norm=query.sensitivity,
        ).figures

    def _require_cohort_size(self, instructions: Instructions) -> None:
        if instructions.cohort_size != self._cohort_size:
            raise ConsiliumError(
                "run.cohort-size",
                "The aggregator names another cohort size than this site declared.",
                hint="Approve the study again; the figure stands in the signed approval.",
            )

    def _permitted(self) -> Policy:
        # Read afresh every time: an approval can be withdrawn while the worker lives.
        self._store.approved(self._study.digest)
        policy = load_policy(self._home)
        self.standing.begin(policy)
        require_permitted(policy, self._study, self._patients)
        return policy

    def _once(
        self,
        purpose: Purpose,
        number: int,
        compute: Callable[[], StoredUpdate],
        *,
        policy: Policy,
        patients: Sequence[str],
        event: PrivacyEvent,
        clip_norm: float,
    ) -> StoredUpdate:
        """Return what is stored of a round, or charge, compute and store it, and release it."""
        digest = self._study.digest
        ledger = self._open_ledger()
        stored = self._store.update(digest, number, purpose)
        charge = ledger.find_charge(digest, number, purpose)
        if stored is not None:
            if charge is None:
                raise ConsiliumError(
                    "privacy.uncharged-update", "An update was stored that was never charged."
                )
            # Killed between storing and recording: recording again changes nothing.
            ledger.release(charge, stored.sha256)
            fault_point(f"{purpose}.released")
            return stored
        if charge is not None and charge.state == "open":
            # Killed in mid-work. Nothing was stored, and only what is stored can leave.
            fault_point(f"{purpose}.before-void")
            ledger.void(charge, f"nothing was stored; the {purpose} process died")
            fault_point(f"{purpose}.voided")
        elif charge is not None and charge.state == "released":
            raise ConsiliumError(
                "privacy.update-lost",
                "This round's update was released and is gone; it cannot be computed again.",
                hint="Restore studies.db and the releases folder from your backup.",
            )
        fault_point(f"{purpose}.before-charge")
        entry = charge_round(
            ledger,
            policy,
            self._study,
            number,
            patients,
            event=event,
            clip_norm=clip_norm,
            purpose=purpose,
        )
        fault_point(f"{purpose}.charged")
        update = compute()
        ledger.release(entry, update.sha256)
        fault_point(f"{purpose}.released")
        return update

    def _train(
        self,
        instructions: Instructions,
        weights: bytes,
        kept: dict[str, Array],
        progress: Callable[[int, int], None] | None = None,
        *,
        charged: PrivacyEvent | None = None,
        clip_norm: float | None = None,
    ) -> StoredUpdate:
        digest, number = self._study.digest, instructions.round_index

        def step(done: int, steps: int) -> None:
            fault_point("training.step")
            self.standing.require()
            # How long a private step takes tells how many patients were drawn: none is reported.
            if progress is not None:
                progress(done, steps)

        model = unpack(weights)
        result = self._session.train(
            model,
            number,
            self._cohort_size,
            step,
            clip_norm=clip_norm,
            kept=kept,
        )
        if result.realised != charged:
            raise ConsiliumError(
                "privacy.truth", "What ran is not what was charged; the update is discarded."
            )
        # The loss is local in a private study; exact figures leave only where both sides say so.
        figures = {"loss": result.loss} if self._releases_exact(load_policy(self._home)) else {}
        _log.info("round %d: loss %.4f (local)", number + 1, result.loss)
        site = self._identity.config.name
        blob, lost = encoded_update(
            self._study, result.tensors, model, kept, site=site, round_index=number
        )
        # What this round does not replace stays: a personal model that diverged, for one.
        kept = kept | result.kept | lost
        return self._store.keep_update(
            digest,
            number,
            blob,
            figures,
            clip_norm=result.clip_norm,
            # With the update or not at all: a round that is begun anew begins with what it was.
            kept=pack(kept) if kept else None,
            under=self.standing.decision,
        )

    def _kept(self) -> dict[str, Array]:
        """Return what the study kept here after the round before."""
        kept = self._store.kept(self._study.digest)
        return {} if kept is None else unpack(kept)

    def _cases_of(self, patients: Sequence[Patient]) -> Iterator[Sequence[CaseData]]:
        """Yield the cases of each patient as long as the approval stands."""
        for patient in patients:
            self.standing.require()
            yield patient.cases

    def _open_ledger(self) -> Ledger:
        if self._ledger is None:
            # Opened once, in this process: opening reads and checks the whole chain.
            self._ledger = Ledger.open(
                self._home.ledger, self._identity.signer(), site=self._identity.config.name
            )
        return self._ledger

    def _releases_exact(self, policy: Policy) -> bool:
        """Return whether exact figures of this study may leave the site."""
        return (
            self._study.privacy.mode == "none"
            and self._study.evaluation.release == "exact"
            and policy.release_exact_metrics
        )
