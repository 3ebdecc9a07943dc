"""What an ended study leaves at its site is removed, but for the model that is the site's own.

A study that has finished, or that the site has withdrawn from, needs no longer what it kept here
from round to round (control variates, what encodings lost) nor the models that it was sent. What
stays: the reports, the site's own model, and every stored release, so that a round that is asked
for again is sent again and charges nobody. A study that was stopped or has failed may go on, so all
of it stays until the site declines it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Final

from consilium_client.home import SiteHome
from consilium_client.identity import SiteIdentity
from consilium_client.kept import drop_rounds, own_file, read_kept, round_file, rounds_of
from consilium_client.proposals import proposals_over
from consilium_client.received import drop_models
from consilium_client.store import Decision, StudyStore
from consilium_client.store_tables import transaction
from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.study.strategies import Ditto, FedBN, FedRep

LOOK_SECONDS: Final = 60.0
_FINISHED: Final = "finished"


def forget(home: SiteHome, decision: Decision, *, finished: bool = False) -> None:
    """Remove what an ended study kept here and was sent; one that may go on loses nothing.

    Where the site has layers or a model of its own and the last evaluation has not written them
    beside the results, they are kept under a name of their own (:func:`own_model`).

    Parameters
    ----------
    decision : Decision
        The site's, as it was read; unless it is its decision still, nothing happens.
    finished : bool
        Whether the aggregator says so. Were that a lie, the site would begin anew with what it
        kept, and no more: nothing of it leaves by this.

    Raises
    ------
    ConsiliumError
        ``state.kept-lost`` when the site's own model is altered: all stays as it is.
        ``state.disk``, ``state.store``.
    """
    digest = decision.study.digest
    with transaction(home.studies) as connection:
        # Until the end nobody decides and no round is stored.
        connection.execute("BEGIN IMMEDIATE")
        now = connection.execute(
            "SELECT decided_at, decision FROM decisions WHERE digest = ?", (digest,)
        ).fetchone()
        if now != (decision.decided_at, decision.decision) or (
            decision.decision == "approved" and not finished
        ):
            return
        last = connection.execute(
            "SELECT round, kept FROM updates WHERE digest = ? AND purpose = 'training'"
            " AND kept IS NOT NULL ORDER BY rowid DESC LIMIT 1",
            (digest,),
        ).fetchone()
        if last is not None:
            _set_apart(home, decision, *last)
        connection.execute("UPDATE updates SET kept = NULL WHERE digest = ?", (digest,))
    # A crash before this leaves files that no row names; the next look removes them.
    drop_rounds(home, digest)
    drop_models(home, digest)


def own_model(home: SiteHome, digest: str) -> Path | None:
    """Return where the site's own model of a study lies that has ended; None where it has none."""
    places = (_result(home, digest), own_file(home, digest))
    return next((path for path in places if path.is_file()), None)


async def tidy_for_ever(home: SiteHome, identity: SiteIdentity, say: Callable[[str], None]) -> None:
    """Look every minute for what ended studies left here; whatever goes wrong is said once."""
    said = ""
    while True:
        try:
            await tidy(home, identity)
            said = ""
        except (ConsiliumError, OSError) as error:
            # The link itself says when there is no connection.
            quiet = isinstance(error, ConsiliumError) and error.code.startswith("network.")
            if not quiet and str(error) != said:
                said = str(error)
                say(f"what an ended study left cannot be removed: {said}")
        await asyncio.sleep(LOOK_SECONDS)


async def tidy(home: SiteHome, identity: SiteIdentity) -> None:
    """Look once; raises as :func:`forget`, and what asking the aggregator raises."""
    idle = await asyncio.to_thread(_forget_withdrawn, home)
    if not idle:
        return
    caller = identity.caller()
    try:
        known = await asyncio.to_thread(proposals_over, caller, identity)
    finally:
        caller.close()  # of a site that stops nobody waits for an answer
    ended = {one.study.digest for one in known if one.state == _FINISHED}
    for decision in idle:
        if decision.study.digest in ended:
            await asyncio.to_thread(forget, home, decision, finished=True)


def _forget_withdrawn(home: SiteHome) -> list[Decision]:
    """Forget what was withdrawn from; return the approved studies that left something and rest."""
    left = rounds_of(home) | {path.name for path in home.models.iterdir()}
    if not left:
        return []
    try:
        running = set(json.loads(home.running.read_bytes()))
    except (OSError, ValueError):
        running = set()  # not said yet; the aggregator is asked before anything is removed
    idle = []
    for decision in StudyStore(home).decisions():
        digest = decision.study.digest
        if digest[:16] not in left:
            continue
        if decision.decision != "approved":
            forget(home, decision)
        elif digest not in running:
            idle.append(decision)
    return idle


def _set_apart(home: SiteHome, decision: Decision, round_index: int, sha256: str) -> None:
    """Keep what is the site's own of what a round kept, where the results do not hold it."""
    study = decision.study
    if not isinstance(study.federation.strategy, FedBN | FedRep | Ditto):
        return
    if _result(home, study.digest).is_file():
        return
    if not round_file(home, study.digest, round_index).exists():
        return  # somebody has removed it: there is nothing to keep
    from consilium_client.encoding import LOST
    from consilium_common.models.exchange import CONTROL
    from consilium_common.models.weights import pack, unpack

    kept = unpack(read_kept(home, study.digest, round_index, sha256))
    own = {name: one for name, one in kept.items() if not name.startswith((CONTROL, LOST))}
    if own:
        write_atomic(own_file(home, study.digest), pack(own))


def _result(home: SiteHome, digest: str) -> Path:
    """Return where the last evaluation writes the site's whole model."""
    return home.reports / digest[:16] / "personal.safetensors"
