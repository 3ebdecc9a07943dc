"""The steps of `consilium server doctor`, in an order in which each relies on those before it."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Final

from cryptography import x509

from consilium_common.audit.acts import read_acts, verify_acts
from consilium_common.diagnosis.exchange import Exchange
from consilium_common.diagnosis.machine import (
    check_disk,
    check_memory,
    check_open_files,
    check_secrets,
)
from consilium_common.diagnosis.reaching import addresses_of, is_literal, try_tcp
from consilium_common.diagnosis.standing import check_clock, check_standing, expiring
from consilium_common.diagnosis.steps import Check, Found
from consilium_common.diagnosis.target import Target, joined, parse_address
from consilium_common.diagnosis.tls import try_tls
from consilium_common.errors import ConsiliumError
from consilium_common.identity.certificates import Role, load_certificate, read_certificate
from consilium_common.identity.keys import is_locked
from consilium_common.identity.trust import Trust
from consilium_common.identity.words import fingerprint_words
from consilium_common.processes import check_port_free
from consilium_common.report.wording import listed, moment, plural
from consilium_common.wire.channel import Caller, Credentials
from consilium_common.wire.unavailable import own_trouble
from consilium_server.doctor.processes import processes
from consilium_server.home import ServerConfig, ServerHome
from consilium_server.issuing import AGGREGATOR, OPERATOR_NAME
from consilium_server.limits import Limits
from consilium_server.registry import Registry
from consilium_server.tables import APPEND_ONLY, ActRow, Member
from consilium_server.waiting import CertificateRequest

#: Connections and their files on disk, of a consortium of some dozen sites.
_OPEN_FILES: Final = 4096
#: Model, optimiser and checkpoints of a study or two; the running mean lies in memory.
_ROOM: Final = 10 * 10**9
_AUTHORITY_ENDS: Final = timedelta(days=180)
_EVERYWHERE: Final = ("", "0.0.0.0", "::")  # noqa: S104 - told apart, not listened on
_BACKUP: Final = "Restore it from your backup."


@dataclass
class ServerDoctor:
    """What is found on the way, so that later steps can use it."""

    home: ServerHome
    config: ServerConfig | None = None
    #: As sites reach it.
    public: Target | None = None
    #: As it is reached from this machine; None while the aggregator does not run.
    local: Target | None = None

    @property
    def folder(self) -> Path:
        """The identity folder, as it is."""
        return self.home.path / "identity"

    def checks(self) -> Iterator[Check]:
        """Yield all steps."""
        yield Check("configuration", "read server.json", self._configuration)
        yield Check("rights", "looked who may read the aggregator's files", self._rights)
        yield Check("clock", "compared this machine's clock with certificates", self._clock)
        # Before anything opens it for writing, which would mend what is to be found.
        yield Check("registry", "checked the database's integrity", self._registry)
        yield Check("identity", "judged the server's own certificate", self._identity)
        yield Check("operator", "judged the certificate of this folder's operator", self._operator)
        yield Check("authority", "looked where the consortium's key is", self._authority)
        yield Check("audit log", "verified every hash and signature", self._log)
        yield Check("members", "looked when their certificates end", self._members)
        yield Check("open files", "read the limit", partial(check_open_files, _OPEN_FILES))
        room = partial(check_disk, self.home.path, needed=_ROOM)
        yield Check("disk", "looked for room for checkpoints", room)
        yield Check("memory", "looked for free memory", check_memory)
        yield Check("processes", "read what was started again", partial(processes, self.home))
        yield from self.network_checks()

    def network_checks(self) -> Iterator[Check]:
        """Yield the steps of the port: on this machine, then as sites see it."""
        yield Check("port", "looked who listens on it", self._port)
        if (local := self.local) is not None:
            shake = partial(self._shake_hands, local)
            yield Check("TLS", "shook hands with it on this machine", shake)
            yield from self._operator_checks(local)
        yield Check("DNS", "looked up the name in the invitations", self._name)
        if self.local is not None:
            yield Check("outside", "connected to the address in the invitations", self._outside)

    def _operator_checks(self, local: Target) -> Iterator[Check]:
        exchange = Exchange(lambda: Caller(local.address, self._operators_credentials()))
        try:
            yield Check("services", "called it as the operator", exchange.admitted)
            yield Check("version", "compared with this command's release", exchange.fits)
            yield Check("speed", "sent and fetched a few MB on this machine", exchange.speed)
        finally:
            exchange.close()

    # --- its own files -----------------------------------------------------------------------

    def configuration(self) -> Target:
        """Read ``server.json`` and the authorities; what everything else rests on.

        Raises
        ------
        ConsiliumError
            ``state.bad-config``, ``usage.limits``, ``identity.no-certificate``,
            ``identity.bad-certificate``.
        """
        file = self.home.config_file
        try:
            self.config = self.home.load_config()
        except (OSError, ValueError, TypeError) as error:
            raise ConsiliumError(
                "state.bad-config", "server.json is damaged.", where=str(file), hint=_BACKUP
            ) from error
        Limits.read(file)
        host, port = parse_address(self.config.address, where=str(file))
        self.public = Target(host, port, Trust.read(self.folder / "authority.pem"))
        return self.public

    def _configuration(self) -> Found:
        target = self.configuration()
        assert self.config is not None
        return Found(f"{self.config.consortium!r}; sites connect to {target.address}")

    def _rights(self) -> Found:
        keys = [*self.folder.glob("*key*.pem"), *self.folder.glob("*.openssh")]
        check_secrets(sorted(keys))
        looked = (self.home.path, *(one for one in self.home.path.iterdir() if one.is_dir()))
        opened = [path for path in looked if path.stat().st_mode & 0o077]
        database = self.home.database
        opened += [one for one in (database,) if one.exists() and one.stat().st_mode & 0o077]
        if opened:
            names = listed(str(path) for path in opened)
            return Found.warning(
                f"open to other users of this machine: {names}",
                f"Run `chmod -R go= {self.home.path}`.",
                open=[str(path) for path in opened],
            )
        return Found("yours alone")

    def _clock(self) -> Found:
        known = [
            (f"The {name}'s", read_certificate(self.folder / f"{name}.pem"))
            for name in ("authority", "server")
        ]
        return check_clock(known, [self.home.config_file, self.home.database])

    def _identity(self) -> Found:
        return self._own("server", Role.SERVER, AGGREGATOR)

    def _operator(self) -> Found:
        found = self._own("operator", Role.OPERATOR, OPERATOR_NAME)
        trouble = own_trouble(self._operators_credentials())
        if trouble is not None:
            raise trouble
        return found

    def _own(self, file: str, role: Role, name: str) -> Found:
        certificate = read_certificate(self.folder / f"{file}.pem")
        trust = Trust.read(self.folder / "authority.pem")
        try:
            return check_standing(certificate, trust, role, name, by_itself=True)
        except ConsiliumError as error:
            if error.code == "identity.expired":
                error.hint = (
                    "Start the aggregator (`consilium server start`): it renews its own "
                    "certificates, where the authority's key is at hand."
                )
            raise

    def _authority(self) -> Found:
        key = self.folder / "authority-key.pem"
        trust = Trust.read(self.folder / "authority.pem")
        authority = trust.authorities[0]
        ends = authority.not_valid_after_utc
        if not key.exists():
            where, todo = "the key is not on this machine", ""
        elif is_locked(key):
            where, todo = "the key is here, under a passphrase", ""
        else:
            where = "the key is here, under no passphrase"
            todo = (
                "Whoever copies this folder is the consortium: `consilium server lock-authority` "
                "puts the key under a passphrase. Keep backups locked."
            )
        words = fingerprint_words(authority)
        said = f"{where}; until {moment(ends)}; words: {words}"
        facts = {
            "key": "offline" if not key.exists() else "locked" if is_locked(key) else "open",
            "valid_until": ends.isoformat(),
            "words": words,
        }
        if ends - datetime.now(UTC) < _AUTHORITY_ENDS:
            return Found.warning(
                said, "Replace it in time: `consilium server rotate authority`.", **facts
            )
        with Registry(self.home.database).transaction() as session:
            waiting = session.query(CertificateRequest).filter_by(state="waiting").count()
        if waiting:
            return Found.warning(
                f"{said}; {plural(waiting, 'request')} wait for it",
                "Take them to the machine that has the key: `consilium server sign-offline`.",
                **facts,
                waiting=waiting,
            )
        return Found(said, todo, facts=facts)

    def _registry(self) -> Found:
        file = self.home.database
        if self.config is not None and self.config.database:
            Registry(file)  # opens it, and puts guards back where they were removed
            return Found("PostgreSQL answers; its evidence can only grow")
        try:
            with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=20)) as base:
                said = [str(row[0]) for row in base.execute("PRAGMA quick_check(3)")]
                guards = {
                    str(row[0])
                    for row in base.execute(
                        "SELECT tbl_name FROM sqlite_master WHERE type='trigger'"
                    )
                }
        except sqlite3.Error as error:
            raise _broken_registry(file, "it cannot be read") from error
        if said != ["ok"]:
            raise _broken_registry(file, "its pages contradict each other")
        missing = sorted(set(APPEND_ONLY) - guards)
        if missing:
            return Found.warning(
                f"sound; nothing guards {listed(missing)} against changes",
                "Somebody removed the guards; starting the aggregator puts them back. Find out who "
                "and when, and compare with your backups.",
                unguarded=missing,
            )
        return Found("sound, and its evidence can only grow")

    def _log(self) -> Found:
        with Registry(self.home.database).transaction() as session:
            rows = [row.record for row in session.query(ActRow).order_by(ActRow.sequence)]
        if not rows:
            return Found("empty")
        key = read_certificate(self.folder / "witness.pem").public_key()
        head = verify_acts(
            read_acts(rows, where=str(self.home.database)),
            key,  # type: ignore[arg-type] # a witness's key is Ed25519; another fails to verify
            where=str(self.home.database),
        )
        return Found(
            f"{plural(len(rows), 'entry')}, unbroken; head {str(head)[:24]}…",
            facts={"entries": len(rows), "head": str(head)},
        )

    def _members(self) -> Found:
        with Registry(self.home.database).transaction() as session:
            active = session.query(Member).filter_by(status="active").order_by(Member.name).all()
        known: list[tuple[str, x509.Certificate]] = [
            (one.name, load_certificate(one.certificate_pem.encode())) for one in active
        ]
        return expiring(known)

    # --- the port ----------------------------------------------------------------------------

    def _port(self) -> Found:
        target = self.public or self.configuration()
        running = self._running()
        if running is None:
            check_port_free("0.0.0.0", target.port)  # noqa: S104 - as `server start` would
            return Found.skipped(
                f"the aggregator does not run; port {target.port} is free",
                "Start it with `consilium server start`, then ask the doctor again.",
            )
        pid, host, port = running
        here = "127.0.0.1" if host in _EVERYWHERE else host
        self.local = Target(here, port, target.trust)
        try_tcp(self.local)
        said = f"the aggregator (process {pid}) listens on {joined(host, port)}"
        if port != target.port:
            said += f"; sites connect to port {target.port}, which somebody must forward here"
        return Found(said, facts={"pid": pid, "listening": joined(host, port)})

    def _running(self) -> tuple[int, str, int] | None:
        """Return process and place of the aggregator that runs from this folder."""
        try:
            status = json.loads((self.home.path / "run" / "status.json").read_bytes())
            pid = int(status["pid"])
            host, _, port = str(status["address"]).rpartition(":")
            os.kill(pid, 0)  # signals nothing: only asks whether it lives
            return pid, host.strip("[]"), int(port)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _name(self) -> Found:
        target = self.public or self.configuration()
        if is_literal(target.host):
            return Found(f"{target.host} is an address; there is no name to look up")
        found = addresses_of(target.host, target.port)
        return Found(f"{target.host} is {listed(found)}", facts={"addresses": list(found)})

    def _outside(self) -> Found:
        assert self.public is not None
        try:
            try_tcp(self.public)
        except ConsiliumError as error:
            return Found.warning(
                f"{error.message} From this machine that may be right: many routers do not lead "
                "out and in again.",
                "Try it from another network: `consilium site doctor --invitation FILE`. If it "
                "fails there, `consilium server doctor --ticket` says what to forward.",
            )
        return self._shake_hands(self.public)

    def _shake_hands(self, target: Target) -> Found:
        """Shake hands as the operator, whose certificate and key later steps judge."""
        try:
            own = self._operators_credentials()
        except ConsiliumError:
            return try_tls(target)
        return try_tls(replace(target, credentials=own))

    def _operators_credentials(self) -> Credentials:
        try:
            return Credentials(
                Trust.read(self.folder / "authority.pem").tls_pem(),
                (self.folder / "operator.pem").read_bytes(),
                (self.folder / "operator-key.pem").read_bytes(),
            )
        except OSError as error:
            raise ConsiliumError(
                "identity.no-key",
                f"Cannot read the operator's key: {error.strerror or error}.",
                where=str(self.folder),
                hint=_BACKUP,
            ) from error


def _broken_registry(file: Path, what: str) -> ConsiliumError:
    return ConsiliumError(
        "state.registry",
        f"The aggregator's registry is damaged: {what}.",
        where=str(file),
        hint="Stop the aggregator, put the damaged file aside, and restore it from your backup.",
    )
