"""Joining a consortium: this site's keys are made here, and two signing requests leave.

Over the network, or by a file that is carried to the aggregator and one that is carried back. Keys
of a request that waits for its answer lie in a folder of their own; the answer is stored in one
step, so a site has its old identity or its new one and never half of one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from consilium_client.home import SiteHome
from consilium_client.identity import (
    ANSWER,
    JOINING,
    LOGIN_FILE,
    SiteConfig,
    complete_join,
    read_config,
)
from consilium_client.lock import only_one
from consilium_common import __version__
from consilium_common.errors import ConsiliumError
from consilium_common.files import private_folder, require_new, write_atomic
from consilium_common.identity.authority import signing_request
from consilium_common.identity.certificates import Role
from consilium_common.identity.enrolment import (
    Certificates,
    check_answer,
    join_request,
    read_form,
    write_form,
)
from consilium_common.identity.invitation import Invitation, read_invitation
from consilium_common.identity.keys import (
    load_signing_key,
    load_tls_key,
    new_signing_key,
    new_tls_key,
    openssh_pem,
    private_pem,
    public_pem,
    save_private,
)
from consilium_common.identity.trust import Trust
from consilium_common.identity.words import fingerprint_words
from consilium_common.wire.channel import Caller, Credentials
from consilium_common.wire.methods import ENROL, PROTOCOL
from consilium_common.wire.proxy import check_setting, choose_proxy, read_login

_POLL_SECONDS: Final = 10.0


@dataclass(frozen=True)
class Joined:
    """How joining stands.

    Attributes
    ----------
    config : SiteConfig
        Name of the site, consortium and address.
    authority_words, own_words : str
        Fingerprints of the consortium's authority and of this site's key, to compare by telephone.
    waiting : bool
        Whether the answer is still to come: nothing of the identity is in place yet.
    """

    config: SiteConfig
    authority_words: str
    own_words: str
    waiting: bool


@dataclass(frozen=True)
class Wishes:
    """What the person who joins asks for besides.

    Attributes
    ----------
    again : bool
        Replace the TLS identity of a site that has joined; ledger key, policy and data stay.
    proxy : str or None
        As :func:`consilium_common.wire.proxy.check_setting` takes it; None: as it was, else none.
    login_file : Path or None
        File with ``user:password`` for the proxy; copied into the identity folder.
    expect_words : str
        The authority's words as the operator said them; another authority is refused.
    """

    again: bool = False
    proxy: str | None = None
    login_file: Path | None = None
    expect_words: str = ""


@dataclass(frozen=True)
class _Attempt:
    """An enrolment under way: its folder, invitation and keys."""

    folder: Path
    invitation: Invitation
    key: ec.EllipticCurvePrivateKey
    signer: ed25519.Ed25519PrivateKey
    config: SiteConfig
    login: str

    def requests(self) -> tuple[bytes, bytes]:
        """Return the signing requests: all of the keys that ever leaves."""
        name = self.invitation.name
        return signing_request(self.key, name), signing_request(self.signer, name)

    def joined(self, *, waiting: bool) -> Joined:
        """Return how this attempt stands."""
        authority = self.invitation.trust.authorities[0]
        own = fingerprint_words(self.key.public_key())
        return Joined(self.config, fingerprint_words(authority), own, waiting)


def join(
    home: SiteHome,
    invitation_file: Path,
    wishes: Wishes = Wishes(),
    *,
    wait: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Joined:
    """Join over the network.

    Where the authority is offline the answer may wait: the same call later, with the same
    invitation, asks again with the same keys. ``wait`` asks until the answer has come.

    Raises
    ------
    ConsiliumError
        ``identity.*`` of the invitation, ``network.*``, ``state.exists``, ``state.running``.
    """
    with only_one(home):
        attempt = _prepare(home, invitation_file, wishes)
        request_pem, signer_request_pem = attempt.requests()
        request = {
            "request_pem": request_pem.decode(),
            "signer_request_pem": signer_request_pem.decode(),
            "version": __version__,
            "protocol": PROTOCOL,
        }
        answer = _ask(attempt, request)
        if _waits(answer) and wait:
            say("the consortium's authority is offline: waiting until it has signed")
        while _waits(answer):
            if not wait:
                return attempt.joined(waiting=True)
            time.sleep(_POLL_SECONDS)
            answer = _ask(attempt, request)
        return _finish(home, attempt, answer)


def write_request(
    home: SiteHome, invitation_file: Path, request_file: Path, wishes: Wishes = Wishes()
) -> Joined:
    """Make the keys and write the request that is carried to the aggregator.

    Raises
    ------
    ConsiliumError
        ``identity.*`` of the invitation, ``state.exists``, ``state.running``.
    """
    with only_one(home):
        require_new(request_file)
        attempt = _prepare(home, invitation_file, wishes)
        request_pem, signer_request_pem = attempt.requests()
        form = join_request(
            attempt.invitation,
            request_pem=request_pem,
            signer_request_pem=signer_request_pem,
            version=__version__,
        )
        write_form(request_file, form)
        return attempt.joined(waiting=True)


def take_certificates(home: SiteHome, certificate_file: Path) -> Joined:
    """Take the aggregator's answer that was carried here.

    Raises
    ------
    ConsiliumError
        ``identity.no-request`` when no request of this site waits; ``identity.*`` of the answer.
    """
    with only_one(home):
        attempt = _waiting(home)
        if attempt is None:
            raise ConsiliumError(
                "identity.no-request",
                "No request of this site waits for certificates.",
                where=str(home.path),
                hint="Make one with `consilium site join INVITATION --request FILE`.",
            )
        return _finish(home, attempt, read_form(Certificates, certificate_file).model_dump())


def _ask(attempt: _Attempt, request: dict[str, Any]) -> Any:
    """Enrol, with the invitation's certificate as ours."""
    invitation, config = attempt.invitation, attempt.config
    bootstrap = Credentials(
        invitation.trust.tls_pem(),
        invitation.certificate_pem.encode(),
        invitation.private_key_pem.encode(),
    )
    proxy = choose_proxy(config.proxy, config.address, login=attempt.login)
    with Caller(config.address, bootstrap, proxy) as caller:
        return caller.call(ENROL, request)


def _waits(answer: Any) -> bool:
    return isinstance(answer, dict) and answer.get("waiting") is True


def _read(file: Path, expect_words: str) -> Invitation:
    """Read an invitation for a site, by the authority that the operator has named."""
    invitation = read_invitation(file)
    if invitation.role != Role.SITE.value:
        raise ConsiliumError(
            "identity.wrong-role",
            f"The invitation is for an {invitation.role}, not for a site.",
            where=str(file),
            hint="On their own computer: consilium identity join INVITATION",
        )
    words = fingerprint_words(invitation.trust.authorities[0])
    if expect_words and expect_words.lower().split() != words.split():
        raise ConsiliumError(
            "identity.wrong-words",
            "The authority in the invitation has other words than those you were told.",
            where=str(file),
            hint="Do not use this invitation. Call the aggregator operator on a number you know.",
        )
    return invitation


def _prepare(home: SiteHome, invitation_file: Path, wishes: Wishes) -> _Attempt:
    """Make the keys of an attempt, or take those of the same one that waits already."""
    complete_join(home)
    invitation = _read(invitation_file, wishes.expect_words)
    config = _config(home, invitation, again=wishes.again)
    if wishes.proxy is not None:
        config = replace(config, proxy=check_setting(wishes.proxy))
    kept = home.identity / LOGIN_FILE
    login = given_login(wishes.login_file) if wishes.login_file else read_login(kept)
    waiting = _waiting(home)
    if waiting is not None and waiting.invitation == invitation:
        attempt = replace(waiting, config=config, login=login)
    else:
        folder = private_folder(home.path / JOINING)
        kept = home.identity / "ledger-key.pem"
        signer = load_signing_key(kept) if wishes.again else new_signing_key()
        attempt = _Attempt(folder, invitation, new_tls_key(), signer, config, login)
        save_private(folder / "site-key.pem", attempt.key)
        save_private(folder / "ledger-key.pem", attempt.signer)
    state = {
        "invitation": attempt.invitation.model_dump(mode="json", by_alias=True),
        "config": asdict(config),
        "login": login,
    }
    # Last: without it there is no attempt.
    write_atomic(attempt.folder / "attempt.json", json.dumps(state).encode())
    return attempt


def given_login(file: Path) -> str:
    """Read the proxy's login from a file that a person named, so it has to be there.

    Raises
    ------
    ConsiliumError
        ``identity.bad-login``, ``identity.key-exposed``.
    """
    login = read_login(file)
    if not login:
        raise ConsiliumError(
            "identity.bad-login",
            "There is no such file with a login for the proxy.",
            where=str(file),
            hint="It holds one line, user:password.",
        )
    return login


def _waiting(home: SiteHome) -> _Attempt | None:
    folder = home.path / JOINING
    file = folder / "attempt.json"
    if not file.is_file():
        return None
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        return _Attempt(
            folder,
            Invitation.model_validate(state["invitation"]),
            load_tls_key(folder / "site-key.pem"),
            load_signing_key(folder / "ledger-key.pem"),
            SiteConfig(**state["config"]),
            state["login"],
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ConsiliumError(
            "state.bad-config",
            "What was kept of the enrolment under way is damaged.",
            where=str(file),
            hint="Remove that folder and join anew; the invitation is still good if it was not"
            " answered.",
        ) from error


def _config(home: SiteHome, invitation: Invitation, *, again: bool) -> SiteConfig:
    """Return what ``site.json`` will say, and check that this invitation is for this site."""
    if not home.config.exists():
        if again:
            raise ConsiliumError(
                "identity.not-joined",
                "This site has not joined a consortium, so it cannot join again.",
                where=str(home.path),
                hint="Run it without --again.",
            )
        return SiteConfig(invitation.name, invitation.consortium, invitation.address)
    if not again:
        raise ConsiliumError(
            "state.exists",
            "This site has joined already.",
            where=str(home.path),
            hint="With --again its certificate and key are replaced, and ledger and policy stay;"
            " to join a second consortium choose another folder with --home.",
        )
    config = read_config(home)
    trust = Trust.read(home.identity / "authority.pem")
    if invitation.trust.consortium != trust.consortium:
        raise ConsiliumError(
            "identity.foreign",
            "The invitation is of another consortium than this site's.",
            hint="To join a second consortium choose another folder with --home.",
        )
    if invitation.name != config.name:
        raise ConsiliumError(
            "identity.other-name",
            f"The invitation is for {invitation.name!r}, and this site's ledger is kept as"
            f" {config.name!r}.",
            hint=f"Ask the aggregator operator for an invitation for {config.name!r}.",
        )
    return replace(config, consortium=invitation.consortium, address=invitation.address)


def _finish(home: SiteHome, attempt: _Attempt, answer: Any) -> Joined:
    """Check the answer and put the identity in place."""
    if not isinstance(answer, dict):
        raise ConsiliumError("network.bad-answer", "The aggregator's answer holds no certificates.")
    trust = Trust.load(attempt.invitation.authority_pem.encode())
    signer = attempt.signer.public_key()
    holder = attempt.invitation.name, Role.SITE
    check_answer(answer, trust, holder, attempt.key.public_key(), signer)
    files = {
        "site-key.pem": private_pem(attempt.key),
        # Flower reads OpenSSH's format only; it is the same key.
        "site-key.openssh": openssh_pem(attempt.key),
        "ledger-key.pem": private_pem(attempt.signer),
        "authority.pem": trust.pem(),
        "site.pem": answer["certificate_pem"].encode(),
        "ledger-signer.pem": answer["signer_pem"].encode(),
        "ledger-public.pem": public_pem(signer),
    }
    if attempt.login:
        files[LOGIN_FILE] = attempt.login.encode() + b"\n"
    content = {
        "files": {name: pem.decode() for name, pem in files.items()},
        "config": asdict(attempt.config),
    }
    write_atomic(attempt.folder / ANSWER, json.dumps(content).encode())
    complete_join(home)
    return attempt.joined(waiting=False)
