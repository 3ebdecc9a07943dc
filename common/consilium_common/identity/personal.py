"""An operator's or auditor's identity on a computer of their own: one private folder.

With it a person works from anywhere over the aggregator's one port. The keys are made there and
never leave it. The certificate renews itself when it is used within its last days, and a
change of the consortium's authority is followed when the one that is trusted vouches for it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519

from consilium_common.console import note
from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.identity.authority import signing_request
from consilium_common.identity.certificates import (
    Certified,
    Role,
    check_issued,
    describe,
    load_certificate,
    read_certificate,
)
from consilium_common.identity.keys import (
    PublicKey,
    load_signing_key,
    load_tls_key,
)
from consilium_common.identity.trust import Trust
from consilium_common.wire import methods
from consilium_common.wire.channel import Caller, Credentials
from consilium_common.wire.proxy import NO_PROXY, Proxy, check_setting, choose_proxy, read_login
from consilium_common.wire.statements import sign

#: Names the folder for commands without --connect.
CONNECT_VARIABLE: Final = "CONSILIUM_CONNECT"
#: Roles of people.
PEOPLE: Final = frozenset({Role.OPERATOR, Role.AUDITOR})


@dataclass(frozen=True)
class Files:
    """Names of the files of an identity in its folder."""

    certificate: str = "member.pem"
    key: str = "member-key.pem"
    signer: str = "signer.pem"
    signing_key: str = "signing-key.pem"


#: The first operator's files, in the identity folder of the aggregator's own home.
AT_HOME: Final = Files(
    "operator.pem", "operator-key.pem", "operator-signer.pem", "operator-signing-key.pem"
)


@dataclass(frozen=True)
class Settings:
    """What ``identity.json`` holds."""

    name: str
    role: str
    consortium: str  #: its name, for people
    address: str  #: ``host:port`` of the aggregator
    proxy: str = NO_PROXY  #: ``none``, ``environment`` or ``http://host:port``


@dataclass(frozen=True)
class Personal:
    """A person's identity, checked."""

    folder: Path
    settings: Settings
    files: Files = Files()

    @classmethod
    def read(cls, folder: Path) -> Personal:
        """Open a folder that `consilium identity join` made.

        Raises
        ------
        ConsiliumError
            ``identity.not-joined``, ``state.bad-config``, and ``identity.*`` of the certificate.
        """
        folder = folder.expanduser().resolve()
        file = folder / "identity.json"
        try:
            settings = Settings(**json.loads(file.read_text(encoding="utf-8")))
            check_setting(settings.proxy)
        except FileNotFoundError as error:
            raise ConsiliumError(
                "identity.not-joined",
                "There is no operator's or auditor's identity here.",
                where=str(folder),
                hint="Make one with `consilium identity join INVITATION`, and give its folder"
                " with --connect.",
            ) from error
        except (OSError, ValueError, TypeError) as error:
            raise _bad_config(file) from error
        return cls(folder, settings)._checked()

    @classmethod
    def at_home(cls, home: Path) -> Personal:
        """Open the first operator's identity in the aggregator's own home."""
        home = home.expanduser().resolve()
        file = home / "server.json"
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            consortium, address = str(config["consortium"]), str(config["address"])
        except FileNotFoundError as error:
            raise ConsiliumError(
                "state.no-server",
                "There is no aggregator here.",
                where=str(home),
                hint="Give its folder with --home, or from elsewhere your own identity with"
                " --connect FOLDER.",
            ) from error
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise _bad_config(file) from error
        settings = Settings("operator", Role.OPERATOR, consortium, address)
        return cls(home / "identity", settings, AT_HOME)._checked()

    @property
    def name(self) -> str:
        """The person's name in the consortium, as certified."""
        return self.settings.name

    @property
    def role(self) -> Role:
        """Operator or auditor, as certified."""
        return Role(self.settings.role)

    @property
    def trust(self) -> Trust:
        """The consortium's authorities, as this person trusts them."""
        return Trust.read(self.folder / "authority.pem")

    @property
    def certificate(self) -> x509.Certificate:
        """The certificate in use."""
        return read_certificate(self.folder / self.files.certificate)

    def credentials(self) -> Credentials:
        """Return what a mutual TLS connection needs, as it stands on disk now."""
        load_tls_key(self.folder / self.files.key)  # and refuses one that others can read
        return Credentials(
            self.trust.tls_pem(),
            (self.folder / self.files.certificate).read_bytes(),
            (self.folder / self.files.key).read_bytes(),
        )

    def sign(self, statement: dict[str, Any]) -> str:
        """Sign a statement with the person's own key.

        Raises
        ------
        ConsiliumError
            ``identity.wrong-role`` for an auditor, who signs nothing.
        """
        return sign(self._signing_key(), statement)

    def caller(self) -> Caller:
        """Return a connection to the aggregator, after renewing what is due."""
        caller = _OwnCaller(self)
        if self.files == AT_HOME:
            return caller  # the aggregator itself renews what lies in its home
        try:
            self._keep_fresh(caller)
        except ConsiliumError as error:
            if error.code.startswith("network."):
                caller.close()
                raise
            if error.code == "identity.refused":
                return caller  # the command itself will say so
            left = describe(self.certificate).not_after
            note(f"Your certificate, valid to {left:%Y-%m-%d}, was not renewed: {error}")
        return caller

    def proxy(self) -> Proxy | None:
        """Return the way out of this person's network; None: straight."""
        login = read_login(self.folder / "proxy-login")
        return choose_proxy(self.settings.proxy, self.settings.address, login=login)

    def certified(self, answer: dict[str, Any], trust: Trust) -> tuple[bytes, bytes | None]:
        """Return certificate and signer's of an answer, if they are of our keys, name and role.

        Raises
        ------
        ConsiliumError
            ``identity.bad-certificate``, or what :func:`check_issued` raises.
        """
        key = load_tls_key(self.folder / self.files.key).public_key()
        certificate = self._fitting(answer.get("certificate_pem"), trust, self.role, key)
        if self.role is not Role.OPERATOR:
            return certificate, None
        signing_key = self._signing_key().public_key()
        return certificate, self._fitting(
            answer.get("signer_pem"), trust, Role.PROPOSER, signing_key
        )

    def _fitting(self, pem: object, trust: Trust, role: Role, key: PublicKey) -> bytes:
        content = str(pem).encode()
        found = check_issued(load_certificate(content), trust)
        if (found.name, found.role, found.public_key) != (self.name, role, key):
            raise ConsiliumError(
                "identity.bad-certificate",
                "The aggregator certified another key, name or role than was asked for.",
                hint="Nothing was stored. Tell the aggregator operator.",
            )
        return content

    def check(self) -> Certified:
        """Judge the person's own certificate."""
        return check_issued(self.certificate, self.trust)

    def _checked(self) -> Personal:
        certified = self.check()
        if (certified.name, certified.role) != (self.settings.name, self.settings.role):
            raise ConsiliumError(
                "identity.bad-certificate",
                "The certificate is of another name or role than the folder says.",
                where=str(self.folder),
                hint="Restore the folder from its backup, or join again with a new invitation.",
            )
        return self

    def _signing_key(self) -> ed25519.Ed25519PrivateKey:
        if self.role is not Role.OPERATOR:
            raise ConsiliumError(
                "identity.wrong-role",
                f"{self.name!r} is {self.role}, and only an operator signs.",
                where=str(self.folder),
                hint="Use an operator's identity with --connect.",
            )
        return load_signing_key(self.folder / self.files.signing_key)

    def _keep_fresh(self, caller: Caller) -> None:
        self._follow_trust(caller)
        if self.trust.wants_renewal(self.certificate):
            self._renew(caller)

    def _follow_trust(self, caller: Caller) -> None:
        trust = self.trust
        answer = caller.call(methods.MEMBER_TRUST, {"trust": trust.digest})
        cross = answer["cross_pem"]
        followed = trust.follow(answer["authority_pem"].encode(), cross.encode() if cross else None)
        if followed.digest != trust.digest:
            write_atomic(self.folder / "authority.pem", followed.pem(), mode=0o644)
            caller.call(methods.MEMBER_TRUST, {"trust": followed.digest})

    def _renew(self, caller: Caller) -> None:
        """Ask for a new certificate of the same keys; where it waits, the same is asked later."""
        pending = self.folder / "renewal.json"
        if pending.exists():
            request = json.loads(pending.read_text(encoding="utf-8"))
        else:
            request = self.request()
            write_atomic(pending, json.dumps(request).encode())
        answer = caller.call(methods.MEMBER_RENEW, request)
        if answer.get("waiting"):
            note("Your certificate waits for the consortium's authority; it is asked again later.")
            return
        pem, signer_pem = self.certified(answer, self.trust)
        if signer_pem is not None:
            write_atomic(self.folder / self.files.signer, signer_pem, mode=0o644)
        write_atomic(self.folder / self.files.certificate, pem, mode=0o644)
        pending.unlink()

    def request(self) -> dict[str, str | None]:
        """Return the signing requests for the person's keys."""
        key = load_tls_key(self.folder / self.files.key)
        signer = None
        if self.role is Role.OPERATOR:
            signer = signing_request(self._signing_key(), self.name).decode()
        return {
            "request_pem": signing_request(key, self.name).decode(),
            "signer_request_pem": signer,
        }


class _OwnCaller(Caller):
    """Says by itself what the caller's role does not allow: the aggregator gives no reasons."""

    def __init__(self, person: Personal) -> None:
        super().__init__(person.settings.address, person.credentials, person.proxy())
        self._person = person

    def call(self, method: str, request: dict[str, Any], *, timeout: float = 20.0) -> Any:
        allowed = methods.SERVICE_ROLES.get(method, methods.MEMBER_ROLES)
        if self._person.role not in allowed:
            raise ConsiliumError(
                "identity.wrong-role",
                f"{self._person.name!r} is {self._person.role}; this needs one of:"
                f" {', '.join(sorted(allowed))}.",
                where=str(self._person.folder),
                hint="Use an identity with that role, with --connect FOLDER.",
            )
        return super().call(method, request, timeout=timeout)


def person(folder: Path | None, server_home: Path | None = None) -> Personal:
    """Return who works here: the identity in ``folder``, else the operator of the server's home.

    Raises
    ------
    ConsiliumError
        As :meth:`Personal.read`; ``identity.not-joined`` where neither is given.
    """
    if folder is not None:
        return Personal.read(folder)
    if server_home is not None:
        return Personal.at_home(server_home)
    raise ConsiliumError(
        "identity.not-joined",
        "It is not said who is calling.",
        hint=f"Give the folder of your identity with --connect or {CONNECT_VARIABLE}.",
    )


def connect(folder: Path | None, server_home: Path | None = None) -> Caller:
    """Return a connection to the aggregator as :func:`person`; close it after use."""
    return person(folder, server_home).caller()


def _bad_config(file: Path) -> ConsiliumError:
    return ConsiliumError(
        "state.bad-config",
        f"{file.name} is damaged.",
        where=str(file),
        hint="Restore it from a backup.",
    )
