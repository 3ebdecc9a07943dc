"""Every privileged act of a remote caller goes into the audit log, done or refused."""

from __future__ import annotations

from asyncio import CancelledError, to_thread
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from consilium_common.errors import ConsiliumError
from consilium_common.identity.authority import requested_key
from consilium_common.identity.certificates import Role
from consilium_common.identity.keys import public_fingerprint
from consilium_common.study.load import study_from_canonical
from consilium_common.wire import methods
from consilium_server.acts import Acts, refusal_code
from consilium_server.gateway import Service
from consilium_server.outliving import Outliving
from consilium_server.peers import Peer
from consilium_server.registry import Registry
from consilium_server.services.fields import text

#: Methods about the caller itself, whose digest is that of the key.
_OWN_KEY = frozenset({methods.ENROL, methods.MEMBER_RENEW})
#: Methods about other members.
_MEMBERS = frozenset({methods.OPERATOR_INVITE, methods.OPERATOR_REVOKE})
#: Methods that hand over a document in pieces.
_DOCUMENTS = frozenset({methods.AUDIT_RECORDS, methods.AUDIT_LOG})
#: What a site's decision is called.
_DECISIONS = {"approved": "approve", "declined": "decline"}
#: What an act was done to, and its digest.
_About = tuple[str, str]


def noted(acts: Acts, method: str, service: Service) -> Service:
    """Return the handler with its acts noted after each call."""
    under_way = Outliving()

    async def handle(peer: Peer, request: dict[str, Any]) -> Any:
        # A call ends when its caller hangs up, and its act may be done by then: act and entry
        # are one piece of work, which goes on without the caller.
        return await under_way.wait(act(peer, request))

    async def act(peer: Peer, request: dict[str, Any]) -> Any:
        who, role = peer.name, peer.certified.role
        try:
            answer = await service(peer, request)
        except CancelledError:
            # The aggregator ends in the middle of it, and waits for nothing any more.
            name, (subject, digest) = _name(method, request), _claimed(acts, method, peer, request)
            acts.note(who, role, name, subject, digest=digest, outcome="cut short")
            raise
        except Exception as error:
            code = refusal_code(error)
            await to_thread(_note_refused, acts, method, peer, request, code)
            raise
        if not _is_piece(method, request, answer):
            subject, digest = _done(method, peer, request, answer)
            name = _name(method, answer)
            outcome = "waiting" if answer.get("waiting") else "done"
            await to_thread(acts.note, who, role, name, subject, digest=digest, outcome=outcome)
        return answer

    return handle


def _note_refused(acts: Acts, method: str, peer: Peer, request: dict[str, Any], code: str) -> None:
    subject, digest = _claimed(acts, method, peer, request)
    acts.note_refused(
        peer.name, peer.certified.role, _name(method, request), subject, code, digest=digest
    )


def _is_piece(method: str, request: dict[str, Any], answer: dict[str, Any]) -> bool:
    """Whether a call was but a part of an act, which is noted with another of its calls.

    Judged by what the method itself takes for a piece: any other key of a request is the caller's
    own. A document is noted with its first piece, for nobody has a later one without it; starting
    weights with the piece that makes them whole, for before they are nothing.
    """
    if method in _DOCUMENTS:
        return bool(request.get("offset", 0))
    if method == methods.OPERATOR_PROPOSE and "start" in request:
        return bool(answer["held"] < request["start"]["total"])
    return False


def _name(method: str, said: dict[str, Any]) -> str:
    """Return an act's name; ``said`` is the answer of one that was done, else the request."""
    name = method.rpartition("/")[2].lower()
    return _DECISIONS.get(_text(said, "decision"), name) if method == methods.SITE_DECIDE else name


def _done(method: str, peer: Peer, request: dict[str, Any], answer: dict[str, Any]) -> _About:
    """Return what an act was done to: by the answer, which was looked up.

    The request is read only where the service has held the caller to that very part of it.
    """
    if method in _OWN_KEY:
        # An invitation names its role in the register alone.
        role = answer.get("role", peer.certified.role)
        return f"{role} {peer.name}", _requested_key(peer, request)
    if method in _MEMBERS:
        return f"{answer['role']} {answer['name']}", answer["fingerprint"]
    if method in _DOCUMENTS:
        return answer.get("site", "audit log"), answer["sha256"]
    if method == methods.OPERATOR_PROPOSE and "start" in request:
        return "starting weights", request["start"]["sha256"]
    return answer["name"], answer["digest"]


def _claimed(acts: Acts, method: str, peer: Peer, request: dict[str, Any]) -> _About:
    """Return what an act would have been done to, as far as its request can be believed."""
    if method in _OWN_KEY:
        return f"{peer.certified.role} {peer.name}", _requested_key(peer, request)
    if method in _MEMBERS:
        return f"{_text(request, 'role')} {_text(request, 'name')}".strip(), ""
    if method == methods.AUDIT_RECORDS:
        return _text(request, "site") or "an unknown site", ""
    if method == methods.AUDIT_LOG:
        return "audit log", ""
    if method == methods.OPERATOR_PROPOSE:
        return _proposed(request)
    return _study(acts.registry, request)


def _proposed(request: dict[str, Any]) -> _About:
    """Return name and digest of the study that somebody tried to propose."""
    if "start" in request:
        piece = request["start"]
        return "starting weights", _text(piece, "sha256") if isinstance(piece, dict) else ""
    try:
        study = study_from_canonical(request.get("canonical"))
    except ConsiliumError:
        return "a study that cannot be read", ""
    return study.name, study.digest


def _study(registry: Registry, request: dict[str, Any]) -> _About:
    """Return name and digest of the study that a request is about, as the registry knows it."""
    try:
        row = registry.study(text(request, "digest"))
    except (ConsiliumError, SQLAlchemyError):
        return "an unknown study", _text(request, "digest")
    return row.name, row.digest


def _requested_key(peer: Peer, request: dict[str, Any]) -> str:
    """Return the fingerprint of the key that is to be certified, else of the one that calls."""
    try:
        key = requested_key(_text(request, "request_pem").encode(errors="replace"), Role.SITE)
    except ConsiliumError:
        return peer.certified.fingerprint
    return public_fingerprint(key)


def _text(said: dict[str, Any], key: str) -> str:
    value = said.get(key)
    return value if isinstance(value, str) else ""
