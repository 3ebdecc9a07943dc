"""A study's run: statistics, the starting model evaluated, rounds trained, the result kept."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.ledger.entries import Purpose, time_text
from consilium_common.models.registry import initial_weights, start_weights, trained_specs
from consilium_common.models.weights import pack
from consilium_common.report.wording import plus_minus
from consilium_common.study import Study
from consilium_common.wire.messages import figures_of, weights_of
from consilium_server.aggregation import RunningMean, cohort_weights, running_average
from consilium_server.asking import Asking, Participant, Replies
from consilium_server.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from consilium_server.home import ServerHome
from consilium_server.registry import Registry
from consilium_server.released import checked_figures, noisy_score
from consilium_server.starts import PublicStarts
from consilium_server.statistics import gather
from consilium_server.tables import EvaluationRow, Received, Round, now

if TYPE_CHECKING:
    from flwr.serverapp import Grid

_log = logging.getLogger(__name__)

#: A round that misses its quorum is asked again this often; sites answer a repeated round from
#: their store, so asking again costs no privacy.
_ATTEMPTS: Final = 3


class StudyRun:
    """Runs one study from its last checkpoint to its end.

    Parameters
    ----------
    grid : flwr.serverapp.Grid
        Connection to the SuperLink.
    """

    def __init__(self, home: ServerHome, registry: Registry, digest: str, grid: Grid) -> None:
        row = registry.study(digest)
        self.study: Study = row.study
        self.digest = row.digest
        self._home = home
        self._registry = registry
        self._asking = Asking(home, registry, self.study, grid)
        self._folder = home.study_folder(self.digest)
        self._specs = trained_specs(self.study)

    def run(self) -> None:
        """Go on from the last checkpoint: count, train, evaluate where asked, keep the model.

        What was evaluated is not evaluated again: stage 0, the starting model, is one of these.
        """
        checkpoint = load_checkpoint(self._folder) or Checkpoint(0, self._starting_weights())
        if checkpoint.rounds_done == 0:
            gather(
                self.study,
                self._asking,
                self._registry,
                lambda site, content: self._note(site, "statistics", 0, content),
            )
        while True:
            done = checkpoint.rounds_done
            if done in self.study.evaluations:
                evaluation = self._registry.evaluation(self.digest, done)
                if evaluation is None:
                    evaluation = self._evaluate(checkpoint)
                reason = self._sufficient(evaluation) if done == 0 else ""
                if reason:
                    return self._finish(checkpoint, reason)
            if done >= self.study.federation.rounds:
                return self._finish(checkpoint)
            checkpoint = self._round(checkpoint)

    def _starting_weights(self) -> dict[str, NDArray[np.float32]]:
        start = self.study.model.start
        if start is None:
            return initial_weights(self.study)
        blob = PublicStarts(self._home.starts).read(start.sha256)
        return start_weights(self.study, blob)

    def _finish(self, checkpoint: Checkpoint, reason: str = "") -> None:
        write_atomic(self._folder / "model.safetensors", pack(checkpoint.result))
        self._registry.set_study_state(self.digest, "finished", reason)

    # --- training --------------------------------------------------------------------------

    def _round(self, checkpoint: Checkpoint) -> Checkpoint:
        number = checkpoint.rounds_done
        started = time.monotonic()
        blob = pack(checkpoint.weights)
        dropped: dict[str, str] = {}
        for attempt in range(_ATTEMPTS):
            participants = self._asking.wait_for_quorum()
            weights = cohort_weights(
                {p.name: p.cohort_size for p in participants}, self.study.federation.weighting
            )
            mean = RunningMean(self._specs)
            losses: list[float] = []

            def accept(site: Participant, content: Any) -> None:
                update = weights_of(content)
                figures = self._exact_figures(content)
                mean.add(update, weights[site.name])  # noqa: B023 - called within this attempt
                if "loss" in figures:
                    losses.append(figures["loss"])  # noqa: B023
                self._note(site.name, "training", number, update)

            replies = self._asking.ask(participants, number, blob, "train", accept=accept)
            dropped |= replies.dropped
            if len(replies.accepted) >= self.study.federation.quorum:
                break
            _log.warning("round %d attempt %d missed its quorum", number + 1, attempt + 1)
        else:
            raise self._missed_quorum(f"Round {number + 1}", dropped)
        trained = mean.mean()
        _check_finite(trained)
        after = Checkpoint(
            number + 1, {**checkpoint.weights, **trained}, self._average(checkpoint, trained)
        )
        # The record first: a crash in between repeats the round from the sites' stores, and the ε
        # that is shown never leaves a round out.
        self._record(number, time.monotonic() - started, replies, dropped, losses)
        save_checkpoint(self._folder, after)
        return after

    def _average(
        self, before: Checkpoint, trained: Mapping[str, NDArray[np.float32]]
    ) -> dict[str, NDArray[np.float32]]:
        decay = self.study.federation.averaging
        if not decay:
            return {}
        return running_average(
            before.result, trained, decay=decay, rounds_done=before.rounds_done + 1
        )

    def _record(
        self,
        number: int,
        seconds: float,
        replies: Replies,
        dropped: dict[str, str],
        losses: list[float],
    ) -> None:
        with self._registry.transaction() as session:
            session.merge(
                Round(
                    digest=self.digest,
                    number=number,
                    seconds=seconds,
                    sites=sorted(replies.accepted),
                    dropped=dropped,
                    loss=float(np.mean(losses)) if losses else None,
                    metrics={},
                    ended_at=now(),
                )
            )

    # --- evaluation ------------------------------------------------------------------------

    def _evaluate(self, checkpoint: Checkpoint) -> EvaluationRow:
        """Have the sites evaluate the model, and keep what they release."""
        done = checkpoint.rounds_done
        started = time.monotonic()
        blob = pack(checkpoint.result)
        # Noise of a released sum; computed before a site is asked, so that it can be shown.
        noise = self._released_noise()
        must = done == 0 and noise is not None
        dropped: dict[str, str] = {}
        for _ in range(_ATTEMPTS if must else 1):
            participants = (
                self._asking.wait_for_quorum() if done == 0 else self._asking.participants()
            )
            figures: dict[str, dict[str, float]] = {}

            def accept(site: Participant, content: Any) -> None:
                found = checked_figures(figures_of(content), self.study.evaluation.release)
                if found:
                    self._note(site.name, "evaluation", done, canonical_json(found))
                    figures[site.name] = found  # noqa: B023 - called within this attempt

            replies = self._asking.ask(
                participants,
                done,
                blob,
                "evaluate",
                accept=accept,
                last=done == self.study.federation.rounds,
            )
            dropped |= replies.dropped
            if not must or len(figures) >= self.study.federation.quorum:
                break
        else:
            raise self._missed_quorum("The evaluation of the starting model", dropped)
        for site, why in dropped.items():
            _log.warning("evaluation at %s: %s", site, why)
        row = EvaluationRow(
            digest=self.digest,
            rounds_done=done,
            sites=sorted(replies.accepted),
            dropped={s: why for s, why in dropped.items() if s not in replies.accepted},
            figures=figures,
            declared={p.name: p.evaluation_size for p in participants if p.name in figures},
            noise=noise,
            seconds=time.monotonic() - started,
            ended_at=now(),
        )
        with self._registry.transaction() as session:
            session.add(row)
        return row

    def _released_noise(self) -> float | None:
        if self.study.evaluation.release != "private":
            return None
        from consilium_common.privacy.accounting import parameters

        plan = parameters(self.study)
        assert plan is not None  # the schema asks for a private study
        return plan.evaluation_deviation

    def _exact_figures(self, content: Any) -> dict[str, float]:
        if self.study.evaluation.release != "exact":
            return {}
        return checked_figures(figures_of(content), "exact")

    def _sufficient(self, evaluation: EvaluationRow) -> str:
        """Return why the starting model is all that is needed; empty where it is not."""
        enough = self.study.evaluation.sufficient
        if enough is None or evaluation.noise is None or not evaluation.figures:
            return ""
        found = noisy_score(evaluation.figures, evaluation.declared, evaluation.noise)
        if found["score"] < enough:
            return ""
        return (
            f"the starting model already scores "
            f"{plus_minus(found['score'], found['standard_error'])}:"
            " no budget was spent on training"
        )

    # --- both ------------------------------------------------------------------------------

    def _note(self, site: str, purpose: Purpose, number: int, content: bytes) -> None:
        """Note what came of a site, and say it aloud when it sent something else before."""
        changed = self._registry.note_received(
            Received(
                study=self.digest,
                site=site,
                purpose=purpose,
                round=number,
                sha256=hashlib.sha256(content).hexdigest(),
                bytes=len(content),
                time=time_text(datetime.now(UTC)),
            )
        )
        if changed and self.study.privacy.mode == "patient":
            self._registry.raise_alarm(
                site,
                "privacy.second-release",
                f"In study {self.digest[:12]} the site sent two different answers for one"
                f" {purpose}, round {number}; one charge covers one of them.",
            )

    def _missed_quorum(self, what: str, dropped: Mapping[str, str]) -> ConsiliumError:
        return ConsiliumError(
            "run.quorum",
            f"{what} missed its quorum {_ATTEMPTS} times: "
            + "; ".join(f"{site}: {why}" for site, why in sorted(dropped.items())),
            hint="Mend what the sites report, then go on with `consilium study run`.",
        )


def _check_finite(weights: Mapping[str, NDArray[np.float32]]) -> None:
    # Each update was finite, but a sum of huge ones may still overflow float32.
    for name, tensor in weights.items():
        if not np.isfinite(tensor).all():
            raise ConsiliumError("run.diverged", f"The mean of {name} is not finite.")
