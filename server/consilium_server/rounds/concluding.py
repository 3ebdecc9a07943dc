"""The end of a round: the next model made of what was taken, recorded, kept.

In what order things become durable decides what a crash may cost. An update counts once it is
named as taken. The record of a round comes before its checkpoint: a crash in between repeats the
aggregation of what was taken, and the ε that is shown never leaves a round out. What was taken is
removed after the checkpoint, and does not count for another round if it is not.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from consilium_common.canonical import digest
from consilium_common.errors import ConsiliumError
from consilium_server.aggregation import aggregate, running_average
from consilium_server.checkpoint import Checkpoint, save_checkpoint
from consilium_server.rounds.board import Board
from consilium_server.rounds.context import Run
from consilium_server.rounds.drawing import Drawing
from consilium_server.rounds.taking import Taken
from consilium_server.tables import Round, now

_log = logging.getLogger(__name__)


def conclude(
    run: Run, before: Checkpoint, taken: Mapping[str, Taken], board: Board, drawing: Drawing
) -> Checkpoint:
    """Aggregate, record and keep a round; return its checkpoint.

    Parameters
    ----------
    taken : mapping of str to Taken
        By site.
    board : Board
        Gets each site's figures, and goes on record.

    Raises
    ------
    ConsiliumError
        ``run.quorum``: too few can be used; nothing was recorded then. ``run.diverged``,
        ``state.*``.
    """
    work, number = run.work, before.rounds_done
    model = work / "model.safetensors"
    combined = aggregate(
        run.study,
        before.model,
        [one.update for one in taken.values()],
        before.state,
        out=model,
        out_state=work / "state.safetensors",
        round_index=number,
        sites=len(run.approved()),
    )
    for site, cosine in combined.cosines.items():
        board.cosine(site, cosine)
    for site in combined.passed_over:
        board.passed_over(site)
    if combined.passed_over:
        chosen = [site for site in combined.kept if site not in combined.passed_over]
        _log.info("the strategy chose the updates of %s", ", ".join(chosen))
    for site, why in combined.left_out.items():
        board.left_out(site, why)
        _log.warning("left out the update of %s: %s", site, why)
    sent = {site: taken[site].reference.sha256 for site in combined.kept}
    after = Checkpoint(
        number + 1,
        model,
        combined.state,
        _average(run, before, model),
        drawing.state(),
        digest([before.history, number, sent]),
    )
    losses = [taken[site].figures["loss"] for site in sent if "loss" in taken[site].figures]
    with run.registry.transaction() as session:
        session.merge(
            Round(
                digest=run.digest,
                number=number,
                seconds=board.seconds,
                sites=list(combined.kept),
                dropped=board.dropped,
                loss=fmean(losses) if losses else None,
                metrics={},
                ended_at=now(),
                history=after.history,
            )
        )
        board.keep(session)
    return save_checkpoint(run.folder, after)


def require_recorded(run: Run, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose last round is not the one on record: one of the two is restored.

    The record may be ahead: of the round that a crash ended before its checkpoint was there, and
    of those that a damaged checkpoint had. They are made again and recorded anew. What earlier
    releases recorded without a digest is not compared.

    Raises
    ------
    ConsiliumError
        ``state.checkpoint``.
    """
    number = checkpoint.rounds_done
    with run.registry.transaction() as session:
        row = session.get(Round, (run.digest, number - 1))
    if number == 0 or (row is not None and row.history in ("", checkpoint.history)):
        return
    raise ConsiliumError(
        "state.checkpoint",
        f"The study's checkpoint is of round {number}, and the registry has"
        f" {'no such round' if row is None else 'another round of that number'} on record.",
        where=str(checkpoint.model.parent),
        hint="One of the two comes from an older backup: restore the registry and the folder of"
        " the study from one and the same.",
    )


def _average(run: Run, before: Checkpoint, model: Path) -> Path | None:
    decay = run.study.federation.averaging
    if not decay:
        return None
    out = run.work / "average.safetensors"
    running_average(before.result, model, decay=decay, rounds_done=before.rounds_done + 1, out=out)
    return out
