"""The gate: what may leave a site is decided here, by what was asked, approved, stored and charged.

The process that trains announces a reply; nothing of what it announces is sent. The gate knows what
the aggregator asked, takes from the store what was stored for that, checks it against the study's
document and the ledger, and makes the reply anew. What was announced must name the very same
objects. Before it leaves, its receipt is on the disk.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import math
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from consilium_client.budget.policy import load_policy
from consilium_client.declared import Declarations
from consilium_client.error_replies import error_reason, listed_code
from consilium_client.flower_private_fleet import (
    Announced,
    Asked,
    Outgoing,
    crashed,
    outgoing,
    refusal,
)
from consilium_client.home import SiteHome
from consilium_client.receipts import Receipts
from consilium_client.standing import now_here, require_within_bounds
from consilium_client.store import Decision, StoredUpdate, StudyStore, still_stands
from consilium_common.audit.receipts import Paid, Receipt, Release, SentTensor
from consilium_common.canonical import canonical_json, digest
from consilium_common.errors import ConsiliumError
from consilium_common.ledger.entries import Purpose
from consilium_common.ledger.store import Ledger
from consilium_common.models.compression import check_encoded, encoded_specs
from consilium_common.models.weights import TensorSpec
from consilium_common.study import Study
from consilium_common.study.statistics import tables
from consilium_common.wire.messages import (
    Instructions,
    Reference,
    instructions_of,
    to_server,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_log = logging.getLogger(__name__)

#: What a message of Flower's kind asks for.
PURPOSES: Final[dict[str, Purpose]] = {
    "train": "training",
    "evaluate": "evaluation",
    "query": "statistics",
}


_MOST_STEPS: Final = 1_000_000


class _Progress(BaseModel):
    """The five values of ``progress.json``."""

    model_config = ConfigDict(extra="forbid", strict=True)
    digest: str
    phase: Literal["downloading", "training", "evaluating", "counting", "sending", "done", "failed"]
    round: int
    step: int
    steps: int


@dataclass(frozen=True)
class Passed:
    """A reply that may leave.

    ``approval`` is None for an error reply; ``receipt`` is None for a reply that releases nothing:
    an error, or an evaluation without figures.
    """

    reply: Outgoing
    approval: Decision | None = None
    receipt: Receipt | None = None
    #: The file that goes before the reply, which names it; None where there is none.
    file: Path | None = None
    update: Reference | None = None


class EgressGate:
    """Judges replies; what it has to remember is in the receipts.

    Parameters
    ----------
    home : SiteHome
        Its ledger and store are read afresh for every message.
    site : str
        Name of the site in the ledger.
    signer : callable
        Returns the site's ledger key, which signs the receipts.
    declarations : Declarations, optional
        What studies declare (default: computed by a process of its own).
    clock : callable
        Returns the time by which the hours of an automatic approval count (default: this
        machine's).
    """

    def __init__(
        self,
        home: SiteHome,
        site: str,
        signer: Callable[[], Ed25519PrivateKey],
        declarations: Declarations | None = None,
        *,
        clock: Callable[[], dt.datetime] = now_here,
    ) -> None:
        self._home = home
        self._site = site
        self._signer = signer
        self._declarations = declarations or Declarations()
        self._clock = clock
        self._store = StudyStore(home)
        self._ledger: Ledger | None = None
        self._receipts: Receipts | None = None
        self._lock = threading.Lock()
        #: Approved before the site started: what of these does not run may never run again.
        self._before: frozenset[str] | None = None

    def prepare(self, asked: Asked) -> None:
        """Compute ahead what the study asked for declares, while its round is at work."""
        try:
            study = self._store.approved(_instructions(asked).study).study
            self._declarations.of(study)
        except ConsiliumError as error:
            _log.warning("%s", error)  # the reply is judged anew, and refused for this then

    def stop(self) -> None:
        """Keep nobody waiting for what a study declares: the site stops."""
        self._declarations.stop()

    def prepare_ahead(self, running: Collection[str]) -> None:
        """Compute what studies declare that run, or were approved since this was first called.

        So the first round of a study does not wait for it. Cheap where nothing has changed.
        """
        try:
            approved = {
                one.study.digest: one.study
                for one in self._store.decisions()
                if one.decision == "approved"
            }
            if self._before is None:
                self._before = frozenset(approved)
            for digest, study in approved.items():
                if digest in running or digest not in self._before:
                    self._declarations.of(study)
        except ConsiliumError as error:
            _log.warning("%s", error)

    def judge(self, asked: Asked, announced: Announced, node_id: int) -> Passed:
        """Return the reply that may leave for what was announced.

        Raises
        ------
        ConsiliumError
            ``privacy.egress``, ``study.not-approved``, ``study.withheld``, those of
            :func:`~consilium_client.standing.require_within_bounds`, ``privacy.*`` of the ledger
            and the receipts, ``state.*``: nothing leaves.
        """
        with self._lock:
            passed = self._judge(asked, announced, node_id)
            _only_reply(asked, passed.reply)
            asked.replied = passed.reply.message_id
            return passed

    def wanted_model(self, asked: Asked) -> tuple[str, Reference] | None:
        """Return study and model that a message names, where the site takes part in that study."""
        try:
            instructions = _instructions(asked)
            if instructions.model is None:
                return None
            self._store.approved(instructions.study)
        except ConsiliumError as error:
            _log.warning("%s", error)  # the executor refuses the message for it
            return None
        return instructions.study, instructions.model

    def require_fitting(self, study: str, model: Reference) -> None:
        """Raise when a model is larger than any that the study's rounds send.

        Whoever speaks for the aggregator must not fill the disk. May compute for a while. Raises
        ``run.bad-message``, ``run.declared``, ``study.not-approved``.
        """
        most = self._declarations.of(self._store.approved(study).study).most_received
        if model.bytes > most:
            raise ConsiliumError(
                "run.bad-message",
                f"The round's model has {model.bytes} bytes; the study's has at most {most}.",
                where=study[:12],
                hint="Ask the aggregator operator; nothing was fetched.",
            )

    def require_standing(self, passed: Passed) -> None:
        """Raise when the site has withdrawn meanwhile, or has decided anew about the study, or
        when what the policy approved by itself is no longer within its bounds.

        What was under way at a withdrawal is withheld for good, also from a later approval. What
        is outside a bound waits: it leaves when its round asks again and every bound holds.
        Raises ``study.withdrawn``, ``study.decided-anew``, and those of
        :func:`~consilium_client.standing.require_within_bounds`.
        """
        if passed.approval is not None:
            found = self._store.decision(passed.approval.study.digest)
            still_stands(passed.approval, found)
            self._require_within_bounds(passed.approval)

    def kept_back(self, asked: Asked, passed: Passed) -> None:
        """Note that a reply that was let out does not leave: an error may take its place."""
        with self._lock:
            if asked.replied == passed.reply.message_id and not asked.left:
                asked.replied = ""

    def sent(self, receipt: Receipt) -> None:
        """Note that the aggregator has taken a whole release."""
        self._open_receipts().sent(receipt)

    def instead(self, asked: Asked, error: ConsiliumError, node_id: int) -> Passed | None:
        """Return the error reply in place of a refused one; None when there was a reply already."""
        with self._lock:
            reply = outgoing(asked, node_id, reason=error_reason(error))
            if asked.replied not in ("", reply.message_id):
                return None
            asked.replied = reply.message_id
            return Passed(reply)

    def _judge(self, asked: Asked, announced: Announced, node_id: int) -> Passed:
        if announced.error is not None:
            code = (
                "run.site-failed" if crashed(announced.error) else listed_code(announced.error[1])
            )
            if code is None:
                raise refusal("an error reply with words of its own")
            reason = error_reason(ConsiliumError(code, ""))
            return Passed(outgoing(asked, node_id, reason=reason))
        instructions = _instructions(asked)
        purpose = PURPOSES.get(asked.kind)
        if purpose is None:
            raise refusal("a reply of a kind that no study has")
        approval = self._store.approved(instructions.study)
        self._require_within_bounds(approval)
        study = approval.study
        if purpose == "evaluation":
            nothing = outgoing(asked, node_id, content=to_server(None, None))
            if announced.is_of(nothing):
                return Passed(nothing, approval)
        update = self._store.update(study.digest, instructions.round_index, purpose)
        if update is None:
            raise refusal("a result that was never stored")
        figures = self._checked_figures(study, update)
        named = None
        tensors: list[SentTensor] = []
        if purpose == "training":
            specs = self._declarations.of(study).tensors
            _check_tensors(study, update.file, specs)
            named = Reference(update.sha256, update.bytes)
            tensors = [
                SentTensor(name=one.name, shape=list(one.shape), dtype=one.dtype)
                for one in encoded_specs(study, specs)
            ]
        reply = outgoing(asked, node_id, content=to_server(named, figures))
        if not announced.is_of(reply):
            raise refusal("other content than the site has stored")
        release = Release(
            study=study.digest,
            purpose=purpose,
            round=instructions.round_index,
            tensors=tensors,
            figures=sorted(figures),
            bytes=update.bytes,
            sha256=update.sha256,
            objects=digest(list(reply.content_ids())),
            event=self._paid(study, update),
        )
        # Before its receipt: what does not leave has none.
        _only_reply(asked, reply)
        receipt = self._open_receipts().issue(release)
        return Passed(reply, approval, receipt, None if named is None else update.file, named)

    def _require_within_bounds(self, approval: Decision) -> None:
        if approval.automatic is not None:
            # Read afresh: a bound may have been narrowed since the update was stored.
            require_within_bounds(approval, load_policy(self._home), self._clock())

    def _checked_figures(self, study: Study, update: StoredUpdate) -> dict[str, float]:
        """Return the figures of a release, which are exactly those that may leave."""
        figures = update.figures
        if update.purpose != "training":
            content = update.blob
            try:
                figures = json.loads(content)
                canonical = canonical_json(figures) == content
            except (ValueError, TypeError, RecursionError):
                canonical = False
            if not canonical or not isinstance(figures, dict):
                raise refusal("figures that are not in canonical form")
        expected = permitted_figures(study, update.purpose)
        given = frozenset(figures)
        # The loss of a plain training leaves where the site's policy permits, and may be left out.
        if given != expected and not (update.purpose == "training" and not given):
            raise refusal("figures that the study does not release")
        if not all(type(value) is float and math.isfinite(value) for value in figures.values()):
            raise refusal("a figure that is no finite number")
        exact = figures and study.privacy.mode == "none"
        if exact and not load_policy(self._home).release_exact_metrics:
            raise refusal("exact figures that the site's policy keeps here")
        return dict(figures)

    def _paid(self, study: Study, update: StoredUpdate) -> Paid | None:
        """Return the charge that covers a release, None where the study has no privacy.

        Raises
        ------
        ConsiliumError
            ``privacy.egress`` unless the ledger has charged what the study declares and released
            exactly this.
        """
        if study.privacy.mode == "none":
            return None
        charge = self._open_ledger().find_charge(update.digest, update.round_index, update.purpose)
        if charge is None or charge.state != "released" or charge.update != update.sha256:
            raise refusal(f"the result of a private {update.purpose} that was never released")
        if charge.event != self._declarations.of(study).events.get(update.purpose):
            raise refusal(f"a {update.purpose} charged for less or more than the study declares")
        return Paid(sequence=charge.entry.sequence, hash=charge.entry.hash)

    def _open_ledger(self) -> Ledger:
        if self._ledger is None:
            # Kept open: opening reads the whole chain, later looks read what was appended.
            try:
                self._ledger = Ledger.open(self._home.ledger, site=self._site)
            except ConsiliumError as error:
                _log.error("%s", error)
                raise refusal("an update while the ledger cannot be read") from error
        return self._ledger

    def _open_receipts(self) -> Receipts:
        if self._receipts is None:
            self._receipts = Receipts(self._home.receipts, self._signer(), self._site)
        return self._receipts


def permitted_figures(study: Study, purpose: Purpose) -> frozenset[str]:
    """Return the names of exactly the figures that a study releases of one kind."""
    release = study.evaluation.release
    private = study.privacy.mode == "patient"
    if purpose == "statistics":
        names = [name for table in tables(study) for name in table.figures]
        return frozenset(names if private else ())
    if private:
        return frozenset({"sum"} if purpose == "evaluation" and release == "private" else ())
    if release != "exact":
        return frozenset()
    if purpose == "training":
        return frozenset({"loss"})
    if study.task.kind == "segmentation":
        of = ("total", "count")
        classes = (f"dice.{name}.{what}" for name in study.task.classes[1:] for what in of)
        return frozenset({"cases", *classes})
    return frozenset({"cases", "correct", "decisions"})


def public_progress(content: bytes, store: StudyStore) -> dict[str, Any] | None:
    """Return what may leave of ``progress.json``; None when it is not what we write.

    The file is written by the process that runs tasks. Phase and round are public; steps are told
    of studies without privacy alone, since how long a private step takes depends on data. Of a
    study that is approved no longer all that is told is that its work has failed.
    """
    try:
        given = _Progress.model_validate_json(content)
    except ValidationError:
        return None
    decided = store.decision(given.digest)
    if decided is None:
        return None
    study = decided.study
    number, step, steps = given.round, given.step, given.steps
    known = steps == 0 if study.privacy.mode == "patient" else steps <= _MOST_STEPS
    if not (0 <= number <= study.federation.rounds and 0 <= step <= steps and known):
        return None
    if decided.decision != "approved":
        # Withdrawn from in the middle of a round: its work comes to nothing, whatever is said.
        return {**given.model_dump(), "phase": "failed", "step": 0, "steps": 0}
    return given.model_dump()


def _instructions(asked: Asked) -> Instructions:
    try:
        return instructions_of(asked.settings())
    except ConsiliumError as error:
        raise refusal("a reply to a message that asks for no round") from error


def _only_reply(asked: Asked, reply: Outgoing) -> None:
    if asked.replied not in ("", reply.message_id):
        raise refusal("a second reply to a message")


def _check_tensors(study: Study, file: Path, specs: Sequence[TensorSpec]) -> None:
    try:
        check_encoded(study, specs, file)
    except ConsiliumError as error:
        _log.error("%s", error)
        raise refusal("an update that is not of the study's tensors") from error
