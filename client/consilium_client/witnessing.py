"""Have the aggregator witness this site's ledger, so that neither side rewrites it unseen.

After each new entry its signed head goes to the aggregator, which countersigns and keeps it. No
content of an entry leaves: a sequence, a hash and a signature do. A site that was offline catches
up. An aggregator that has seen what the ledger does not have means that the ledger was rolled back:
nothing is charged from then on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ed25519

from consilium_client.home import SiteHome
from consilium_client.identity import SiteIdentity
from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.identity.certificates import (
    Role,
    describe,
    load_certificate,
    read_certificate,
)
from consilium_common.ledger.conflict import mark_conflict, refuse_conflict
from consilium_common.ledger.entries import Entry
from consilium_common.ledger.store import Ledger
from consilium_common.ledger.witness import MalformedRecordError, WitnessRecord
from consilium_common.wire.methods import SITE_WITNESS

_log = logging.getLogger(__name__)

#: Name that the witness's certificate carries.
WITNESS_NAME: Final = "aggregator"
#: Heads sent at once.
BATCH: Final = 500
_POLL_SECONDS: Final = 0.5
_LONGEST_PAUSE_SECONDS: Final = 60.0


class Witnessing:
    """Keeps the aggregator's knowledge of this ledger's heads up to date.

    Parameters
    ----------
    say : callable
        Tells the site operator what they should know.
    """

    def __init__(self, home: SiteHome, identity: SiteIdentity, say: Callable[[str], None]) -> None:
        self._home = home
        self._identity = identity
        self._say = say
        self._caller = identity.caller()
        self._ledger: Ledger | None = None
        self._file: tuple[int, int] | None = None
        #: What the aggregator knew last; None: to be asked.
        self._known: int | None = None
        #: The ledger's change counter when everything was witnessed.
        self._settled: int | None = None
        self._reported = ""

    async def witness_for_ever(self) -> None:
        """Send new heads as they appear; while that fails, try again ever more slowly."""
        pause = _POLL_SECONDS
        try:
            while True:
                failed = await self._in_thread()
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS) if failed else _POLL_SECONDS
                await asyncio.sleep(pause)
        finally:
            self.close()

    def close(self) -> None:
        """Close ledger and connection."""
        self._caller.close()
        self._close_ledger()

    def catch_up(self) -> None:
        """Have every entry witnessed that is not yet; cheap where nothing has changed.

        Raises
        ------
        ConsiliumError
            ``privacy.witness-conflict`` when the aggregator has seen what this ledger does not
            have: the ledger is marked, and ``privacy.ledger-rolled-back`` follows until that is
            mended. ``privacy.witness-invalid``, ``identity.*`` when the answer cannot be trusted;
            ``network.*`` when there is none.
        """
        try:
            refuse_conflict(self._home.ledger)
            ledger = self._current_ledger()
            counter = None if ledger is None else ledger.change_counter()
            if self._known is not None and counter == self._settled:
                return
            if self._known is None:
                self._known = self._ask(ledger, []).known
            if ledger is not None:
                self._send_missing(ledger)
            self._settled = counter
        except ConsiliumError as error:
            self._known = self._settled = None
            if error.code == "privacy.witness-conflict":
                self._close_ledger()
                mark_conflict(self._home.ledger, error)
            raise

    def _send_missing(self, ledger: Ledger) -> None:
        assert self._known is not None
        witnessed = ledger.witnessed
        ours = -1 if witnessed is None else witnessed.sequence
        if self._known < ours:
            self._say(
                f"the aggregator has lost its records of this ledger after entry {self._known}: "
                "they are sent again"
            )
        first = min(ours, self._known) + 1
        while entries := ledger.from_entry(first, BATCH):
            answer = self._ask(ledger, entries)
            ledger.add_witness(answer.records, answer.key)
            first = entries[-1].sequence + 1
            self._known = answer.known

    def _ask(self, ledger: Ledger | None, entries: Sequence[Entry]) -> _Answer:
        heads = [
            {"sequence": entry.sequence, "hash": entry.hash, "signature": entry.signature}
            for entry in entries
        ]
        answer = self._checked(self._caller.call(SITE_WITNESS, {"heads": heads}))
        if [record.head for record in answer.records] != [entry.head for entry in entries]:
            raise _bad_answer(self._identity, "it witnesses other entries than were sent")
        newest = -1 if ledger is None else ledger.head.sequence
        if answer.known > newest:
            raise ConsiliumError(
                "privacy.witness-conflict",
                f"The aggregator has seen an entry {answer.known} that this ledger does not have: "
                f"the ledger was rolled back (it ends after entry {newest}).",
                where=str(self._home.ledger),
                hint="Was an old copy of ledger.db put back? Restore the newest one.",
            )
        return answer

    def _checked(self, answer: Any) -> _Answer:
        try:
            pem, known, listed = answer["witness_pem"], answer["known"], answer["records"]
            if not isinstance(pem, str) or type(known) is not int or known < -1:
                raise TypeError
            records = tuple(WitnessRecord.from_dict(value) for value in listed)
        except (KeyError, TypeError, MalformedRecordError) as error:
            raise _bad_answer(self._identity, "its form is not that of witness records") from error
        return _Answer(records, known, self._witness_key(pem))

    def _witness_key(self, pem: str) -> ed25519.Ed25519PublicKey:
        """Return the key of the witness that this consortium certified, the same one always."""
        certified = self._identity.trust.check(load_certificate(pem.encode()))
        key = certified.public_key
        if (
            certified.role is not Role.WITNESS
            or certified.name != WITNESS_NAME
            or not isinstance(key, ed25519.Ed25519PublicKey)
        ):
            raise ConsiliumError(
                "identity.bad-certificate",
                "What the aggregator shows is not the certificate of its witness key.",
                where=self._identity.config.address,
                hint="Tell the aggregator operator; the ledger is not witnessed until then.",
            )
        path = self._home.witness_certificate
        if not path.exists():
            write_atomic(path, pem.encode())
        elif describe(read_certificate(path)).public_key != key:
            raise ConsiliumError(
                "identity.witness-changed",
                "The aggregator's witness key is another one than before.",
                where=str(path),
                hint="Ask the aggregator operator, by another way than the network, whether and "
                "why it changed. Earlier records verify with the old key alone: keep that file, "
                "and only then move it away to accept the new key.",
            )
        return key

    def _current_ledger(self) -> Ledger | None:
        """Return the open ledger; None where the site has none. Another file is opened anew."""
        try:
            found = self._home.ledger.stat()
            file = (found.st_dev, found.st_ino)
        except FileNotFoundError:
            file = None
        if file != self._file:
            self._close_ledger()
            self._known = self._settled = None
            if file is not None:
                self._ledger = Ledger.open(
                    self._home.ledger, self._identity.signer(), site=self._identity.config.name
                )
            self._file = file
        return self._ledger

    def _close_ledger(self) -> None:
        if self._ledger is not None:
            self._ledger.close()
        self._ledger = self._file = None

    async def _in_thread(self) -> bool:
        """Catch up once, beside the loop; return whether it failed."""
        work = asyncio.ensure_future(asyncio.to_thread(self._try))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            # A thread cannot be cancelled; without its connection it ends at once.
            self._caller.close()
            with contextlib.suppress(Exception):
                await work
            raise

    def _try(self) -> bool:
        try:
            self.catch_up()
        except ConsiliumError as error:
            self._report(error)
            return True
        except Exception as error:
            _log.exception("unforeseen")
            self._report(ConsiliumError("internal.unexpected", type(error).__name__))
            return True
        if self._reported:
            self._reported = ""
            _log.info("the ledger is witnessed again")
        return False

    def _report(self, error: ConsiliumError) -> None:
        """Say each trouble once; that the aggregator is not there is said by the link."""
        if error.code == self._reported:
            return
        self._reported = error.code
        if error.code.startswith("network.") and error.code != "network.bad-answer":
            _log.info("the ledger's heads wait: %s", error)
        else:
            self._say(f"the ledger is not witnessed: {error}")


@dataclass(frozen=True)
class _Answer:
    """What the aggregator answered, its form and the witness's certificate checked."""

    records: tuple[WitnessRecord, ...]
    known: int
    key: ed25519.Ed25519PublicKey


def _bad_answer(identity: SiteIdentity, what: str) -> ConsiliumError:
    return ConsiliumError(
        "network.bad-answer",
        f"The aggregator's answer is of no use: {what}.",
        where=identity.config.address,
        hint="Site and aggregator may run versions that do not fit; update the older one.",
    )
