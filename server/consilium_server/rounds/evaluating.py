"""Evaluations of the global model at the sites: asked for, checked, kept."""

from __future__ import annotations

import hashlib
import logging
import time
from typing import Any

from consilium_common.canonical import canonical_json
from consilium_common.report.wording import plus_minus
from consilium_common.wire.messages import Reference
from consilium_server.asking import Participant, Reply, missing
from consilium_server.checkpoint import Checkpoint
from consilium_server.released import checked_figures, noisy_score
from consilium_server.rounds.board import Board
from consilium_server.rounds.context import BackOff, Run, named_reasons
from consilium_server.tables import EvaluationRow, now

_log = logging.getLogger(__name__)


def evaluate(run: Run, checkpoint: Checkpoint) -> EvaluationRow:
    """Have the sites evaluate a model, and keep what they release.

    The starting model of a private study is evaluated before any budget is spent on training, so
    that evaluation waits for a quorum of scores. A later one takes who is there.

    Raises
    ------
    Interrupted
        The study is to be paused, and the quorum is not there.
    ConsiliumError
        ``run.sites-away``, ``run.stuck``, ``state.*``.
    """
    study, asking = run.study, run.asking
    done = checkpoint.rounds_done
    started = time.monotonic()
    board = Board(run.registry, run.digest, done, "evaluation", study.federation.longest_seconds)

    patience = board.patience(run)
    # Noise of a released sum; computed before a site is asked, so that it can be shown.
    noise = released_noise(run)
    fewest = study.federation.quorum if done == 0 and noise is not None else 0
    model = asking.files.offer(checkpoint.result, checkpoint.sha256_of(checkpoint.result))
    back_off = BackOff()
    figures: dict[str, dict[str, float]] = {}
    accepted: set[str] = set()
    dropped: dict[str, str] = {}
    asked: dict[str, Participant] = {}

    def accept(site: Participant, reply: Reply) -> None:
        found = checked_figures(reply.figures, study.evaluation.release)
        if found:
            run.note(site.name, "evaluation", done, content_of(found))
            figures[site.name] = found

    while True:
        there = asking.wait_for_quorum(patience) if done == 0 else asking.participants()
        if back_off.due(time.monotonic()):
            there = [site for site in there if site.name not in accepted]
            asked |= {site.name: site for site in there}
            board.asked(there)
            last = done == study.federation.rounds
            replies = asking.ask(there, done, model, "evaluate", accept=accept, last=last)
            accepted |= set(replies.accepted)
            dropped |= replies.dropped
            for site, why in replies.dropped.items():
                board.failed(site, why)
                _log.warning("evaluation at %s: %s", site, why)
        if len(figures) >= fewest:
            break
        why = named_reasons((s, w) for s, w in dropped.items() if s not in accepted)
        patience(f"{missing(fewest - len(figures))}; {why}")
        time.sleep(0.1)
    row = EvaluationRow(
        digest=run.digest,
        rounds_done=done,
        sites=sorted(accepted),
        dropped={s: why for s, why in dropped.items() if s not in accepted},
        figures=figures,
        declared={name: asked[name].evaluation_size for name in figures},
        noise=noise,
        seconds=time.monotonic() - started,
        ended_at=now(),
    )
    with run.registry.transaction() as session:
        session.add(row)
    return row


def content_of(figures: dict[str, float]) -> Reference:
    """Return the name under which released figures are noted: that of their canonical JSON."""
    content = canonical_json(figures)
    return Reference(hashlib.sha256(content).hexdigest(), len(content))


def released_noise(run: Run) -> float | None:
    """Return the standard deviation of the noise on a site's score; None where none is released."""
    if run.study.evaluation.release != "private":
        return None
    from consilium_common.privacy.accounting import parameters

    plan = parameters(run.study)
    assert plan is not None  # the schema asks for a private study
    return plan.evaluation_deviation


def sufficient(run: Run, evaluation: Any) -> str:
    """Return why the starting model is all that is needed; empty where it is not."""
    enough = run.study.evaluation.sufficient
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
