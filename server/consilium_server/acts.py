"""Writes the aggregator's audit log: every privileged act, by whomever and from wherever."""

from __future__ import annotations

import logging
import os
import pwd
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy.exc import SQLAlchemyError

from consilium_common.audit.acts import LOG_SCHEMA, Act, signed_act
from consilium_common.errors import ConsiliumError
from consilium_common.identity.certificates import read_certificate
from consilium_common.identity.keys import load_signing_key
from consilium_common.identity.trust import Trust
from consilium_common.ledger.entries import time_text
from consilium_common.wire.statements import sign
from consilium_server.database import hold_alone
from consilium_server.home import ServerHome
from consilium_server.registry import Registry
from consilium_server.tables import ActRow, now
from consilium_server.witness import WitnessKey

_log = logging.getLogger(__name__)

#: The same refused attempt of the same caller is noted at most this often.
_REFUSAL_SECONDS: Final = 60.0
_REFUSALS_KEPT: Final = 4096
#: Role in the log of a person at the aggregator's own computer, who needs no certificate.
LOCAL = "local"


class Acts:
    """Appends to the log; several processes may do so at a time.

    Parameters
    ----------
    registry
        Holds the log, and what its entries are about.
    witness
        The aggregator's Ed25519 key, which signs each entry.
    """

    def __init__(self, registry: Registry, witness: WitnessKey) -> None:
        self.registry = registry
        self._witness = witness
        self._refusals: dict[tuple[str, str, str, str], float] = {}

    def note(
        self,
        who: str,
        role: str,
        act: str,
        subject: str,
        *,
        digest: str = "",
        outcome: str = "done",
    ) -> Act:
        """Append one act, durably, and return its entry.

        The log lies in the registry's own database: where it cannot be written, what the act
        changes can hardly have been written either.
        """
        with self.registry.transaction() as session:
            # Held from reading the newest entry to writing the next: the chain never forks.
            hold_alone(session, ActRow.__tablename__)
            newest = session.query(ActRow).order_by(ActRow.sequence.desc()).first()
            entry = signed_act(
                self._witness.key,
                None if newest is None else Act.model_validate(newest.record),
                time=now(),
                who=who,
                role=role,
                act=act,
                subject=subject,
                digest=digest,
                outcome=outcome,
            )
            session.add(ActRow(sequence=entry.sequence, record=entry.model_dump()))
        _log.info("%s (%s): %s %s: %s", who, role, act, subject, outcome)
        return entry

    def note_refused(
        self, who: str, role: str, act: str, subject: str, code: str, *, digest: str = ""
    ) -> None:
        """Append a refused attempt; the same again only once a minute, so that nobody fills it.

        What refuses says so in any case: a log that cannot be written is said in the process's own.
        """
        key, moment = (who, role, act, code), time.monotonic()
        if moment - self._refusals.get(key, -_REFUSAL_SECONDS) < _REFUSAL_SECONDS:
            return
        if len(self._refusals) >= _REFUSALS_KEPT:
            self._refusals.clear()
        self._refusals[key] = moment
        try:
            self.note(who, role, act, subject, digest=digest, outcome=f"refused: {code}")
        except SQLAlchemyError:
            _log.critical("the audit log cannot be written: %s (%s) %s", who, role, act)

    def document(self, trust: Trust) -> dict[str, Any]:
        """Return the whole log as a signed document, which `consilium audit verify` reads."""
        with self.registry.transaction() as session:
            rows = session.query(ActRow).order_by(ActRow.sequence).all()
        content = {
            "schema": LOG_SCHEMA,
            "consortium": trust.consortium,
            "written_at": time_text(datetime.now(UTC)),
            "witness_pem": self._witness.pem,
            "authority_pem": trust.pem().decode(),
            "entries": [row.record for row in rows],
        }
        return {"content": content, "signature": sign(self._witness.key, content)}


def witness_of(home: ServerHome) -> WitnessKey:
    """Read the aggregator's witness key, for a command at its own computer."""
    folder = home.identity
    return WitnessKey(
        load_signing_key(folder / "witness-key.pem"), read_certificate(folder / "witness.pem")
    )


def acts_of(home: ServerHome) -> Acts:
    """Open the log of the aggregator in ``home``, for a command at its own computer."""
    return Acts(Registry(home.database), witness_of(home))


def note_local(
    home: ServerHome, act: str, subject: str, *, digest: str = "", outcome: str = "done"
) -> None:
    """Note an act of the person at the aggregator's own computer, by the system's user name."""
    acts_of(home).note(local_user(), LOCAL, act, subject, digest=digest, outcome=outcome)


@contextmanager
def local_refusals(home: ServerHome, act: str, subject: str) -> Iterator[None]:
    """Note whatever a block raises as a refused act of the person at the aggregator's computer."""
    try:
        yield
    except Exception as error:
        try:
            acts = acts_of(home)
        except (ConsiliumError, OSError) as unreadable:
            _log.critical("the audit log cannot be written: %s", unreadable)
        else:
            acts.note_refused(local_user(), LOCAL, act, subject, refusal_code(error))
        raise


def refusal_code(error: Exception) -> str:
    """Return the code that an error has in the log."""
    return error.code if isinstance(error, ConsiliumError) else "internal.unexpected"


def local_user() -> str:
    """Return ``local:<user>`` of this process; from the system, not from the environment."""
    number = os.getuid()
    try:
        return f"local:{pwd.getpwuid(number).pw_name}"
    except KeyError:  # a container may run under a number alone
        return f"local:{number}"
