"""Every privileged act of a remote caller goes into the audit log, done or refused."""

from __future__ import annotations

from asyncio import to_thread
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from consilium_common.errors import ConsiliumError
from consilium_common.identity.authority import requested_key
from consilium_common.identity.certificates import Role
from consilium_common.identity.keys import public_fingerprint
from consilium_common.study.load import study_from_canonical
from consilium_common.wire import methods
from consilium_server.acts import Acts
from consilium_server.gateway import Service
from consilium_server.peers import Peer
from consilium_server.registry import Registry
from consilium_server.services.fields import text

#: Methods about members, whose digest is that of the key.
_OWN_KEY = frozenset({methods.ENROL, methods.MEMBER_RENEW})
#: What a site's decision is called.
_DECISIONS = {"approved": "approve", "declined": "decline"}


def noted(acts: Acts, method: str, service: Service) -> Service:
    """Return the handler with its acts noted after each call."""

    async def handle(peer: Peer, request: dict[str, Any]) -> Any:
        who, role = peer.name, peer.certified.role
        try:
            answer = await service(peer, request)
        except Exception as error:
            code = error.code if isinstance(error, ConsiliumError) else "internal.unexpected"
            await to_thread(_note_refused, acts, method, peer, request, code)
            raise
        if not _one_of_many(request):
            act, subject, digest = _described(method, peer, request, answer)
            outcome = "waiting" if answer.get("waiting") else "done"
            await to_thread(acts.note, who, role, act, subject, digest=digest, outcome=outcome)
        return answer

    return handle


def _note_refused(acts: Acts, method: str, peer: Peer, request: dict[str, Any], code: str) -> None:
    act, subject, digest = _described(method, peer, request, {})
    if not subject:
        # There is no answer to name the study: whoever reads the log wants to know which it was.
        subject, digest = (
            _proposed(request)
            if method == methods.OPERATOR_PROPOSE
            else _claimed(acts.registry, request)
        )
    acts.note_refused(peer.name, peer.certified.role, act, subject, code, digest=digest)


def _proposed(request: dict[str, Any]) -> tuple[str, str]:
    """Return name and digest of the study that somebody tried to propose."""
    if "start" in request:
        piece = request["start"]
        sha256 = piece.get("sha256") if isinstance(piece, dict) else None
        return "starting weights", sha256 if isinstance(sha256, str) else ""
    try:
        study = study_from_canonical(request.get("canonical"))
    except ConsiliumError:
        return "a study that cannot be read", ""
    return study.name, study.digest


def _claimed(registry: Registry, request: dict[str, Any]) -> tuple[str, str]:
    """Return name and digest of the study that a request is about, as the registry knows it."""
    which = request.get("digest")
    try:
        row = registry.study(text(request, "digest"))
    except (ConsiliumError, SQLAlchemyError):
        return "an unknown study", which if isinstance(which, str) else ""
    return row.name, row.digest


def _one_of_many(request: dict[str, Any]) -> bool:
    """Whether it is a further piece of a document, or a piece of public weights: no act itself."""
    return bool(request.get("offset")) or "start" in request


def _described(
    method: str, peer: Peer, request: dict[str, Any], answer: dict[str, Any]
) -> tuple[str, str, str]:
    """Return an act's name, subject and digest."""
    act = method.rpartition("/")[2].lower()

    def said(key: str) -> str:
        # What the answer says was looked up; what the request says is only claimed.
        value = answer.get(key, request.get(key))
        return value if isinstance(value, str) else ""

    if method in _OWN_KEY:
        # An invitation names its role in the register alone.
        role = answer.get("role", peer.certified.role)
        return act, f"{role} {peer.name}", _requested_key(peer, request)
    if method == methods.SITE_DECIDE:
        return _DECISIONS.get(said("decision"), act), said("name"), said("digest")
    if method in (methods.OPERATOR_INVITE, methods.OPERATOR_REVOKE):
        return act, f"{said('role')} {said('name')}".strip(), said("fingerprint")
    if method in (methods.AUDIT_RECORDS, methods.AUDIT_LOG):
        return act, said("site") or "audit log", said("sha256")
    return act, said("name"), said("digest")


def _requested_key(peer: Peer, request: dict[str, Any]) -> str:
    """Return the fingerprint of the key that is to be certified, else of the one that calls."""
    try:
        key = requested_key(str(request["request_pem"]).encode(), Role.SITE)
    except (ConsiliumError, KeyError):
        return peer.certified.fingerprint
    return public_fingerprint(key)
