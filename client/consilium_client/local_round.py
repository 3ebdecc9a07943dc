"""One round at a site: approval, policy, charge, training, storing, in the order that keeps faith.

The order is what a crash cannot undo: the charge is durable before data is touched, the update is
stored before it is released, and a round that was stored is never computed again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from consilium_client.budget import charge_round, require_permitted
from consilium_client.home import SiteHome
from consilium_client.identity import SiteIdentity
from consilium_client.policy import load_policy
from consilium_client.store import Decision, StoredUpdate, StudyStore
from consilium_client.training.session import TrainingSession
from consilium_common.errors import ConsiliumError
from consilium_common.ledger.store import Ledger
from consilium_common.models.weights import pack, unpack
from consilium_common.privacy.accounting import parameters
from consilium_common.wire.messages import Instructions

_log = logging.getLogger(__name__)


class LocalRounds:
    """Trains the rounds of one approved study.

    Parameters
    ----------
    session : TrainingSession
        The study's network, data and device.
    patients : sequence of str
        Keyed hashes of every patient that training may sample.
    """

    def __init__(
        self,
        home: SiteHome,
        identity: SiteIdentity,
        decision: Decision,
        session: TrainingSession,
        patients: Sequence[str],
    ) -> None:
        self._home = home
        self._identity = identity
        self._study = decision.study
        self._cohort_size = decision.cohort_size
        self._session = session
        self._patients = tuple(patients)
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
        digest, number = self._study.digest, instructions.round_index
        if instructions.cohort_size != self._cohort_size:
            raise ConsiliumError(
                "run.cohort-size",
                "The aggregator names another cohort size than this site declared.",
                hint="Approve the study again; the figure stands in the signed approval.",
            )
        # Read afresh every round: an approval can be withdrawn while the worker lives.
        self._store.approved(digest)
        policy = load_policy(self._home)
        require_permitted(policy, self._study, self._patients)
        private = parameters(self._study)
        stored = self._store.update(digest, number)
        if private is None:
            return stored or self._compute(instructions, weights, progress)
        if self._ledger is None:
            # Opened once, in this process: opening reads and checks the whole chain.
            self._ledger = Ledger.open(
                self._home.ledger, self._identity.signer(), site=self._identity.config.name
            )
        ledger = self._ledger
        charge = ledger.find_charge(digest, number)
        if stored is not None:
            if charge is None:
                raise ConsiliumError(
                    "privacy.uncharged-update", "An update was stored that was never charged."
                )
            # Killed between storing and recording: recording again changes nothing.
            ledger.release(charge, stored.sha256)
            return stored
        if charge is not None and charge.state == "open":
            # Killed while training. Nothing was stored, and only what is stored can leave.
            ledger.void(charge, "no update was stored; the training process died")
        elif charge is not None and charge.state == "released":
            raise ConsiliumError(
                "privacy.update-lost",
                "This round's update was released and is gone; it cannot be computed again.",
                hint="Restore studies.db and the releases folder from your backup.",
            )
        entry = charge_round(
            ledger,
            policy,
            self._study,
            number,
            self._patients,
            event=private.event_per_round,
            clip_norm=private.clip_norm,
        )
        update = self._compute(instructions, weights, progress)
        ledger.release(entry, update.sha256)
        return update

    def _compute(
        self,
        instructions: Instructions,
        weights: bytes,
        progress: Callable[[int, int], None],
    ) -> StoredUpdate:
        private = self._study.privacy.mode == "patient"
        # How long a private step takes tells how many patients were drawn: no step is reported.
        result = self._session.train(
            unpack(weights),
            instructions.round_index,
            self._cohort_size,
            None if private else progress,
        )
        charged = parameters(self._study)
        if charged is not None and result.realised != charged.event_per_round:
            raise ConsiliumError(
                "privacy.truth", "What ran is not what was charged; the update is discarded."
            )
        # The loss is local in a private study; exact figures leave only where both sides say so.
        figures = {"loss": result.loss} if self.may_release() else {}
        _log.info("round %d: loss %.4f (local)", instructions.round_index + 1, result.loss)
        return self._store.keep_update(
            self._study.digest, instructions.round_index, pack(result.tensors), figures
        )

    def may_release(self) -> bool:
        """Return whether exact figures of this study may leave the site."""
        return (
            self._study.privacy.mode == "none"
            and self._study.evaluation.release == "exact"
            and load_policy(self._home).release_exact_metrics
        )
