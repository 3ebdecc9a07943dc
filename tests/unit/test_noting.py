"""Each privileged act of a remote caller is one entry of the audit log, however it is asked for."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from aggregator_samples import Aggregator
from site_samples import plain_study
from state_samples import put

from consilium_common import __version__
from consilium_common.audit.acts import Act
from consilium_common.errors import ConsiliumError
from consilium_common.identity.authority import signing_request
from consilium_common.identity.certificates import Role, describe, load_certificate
from consilium_common.identity.keys import new_signing_key, new_tls_key, public_fingerprint
from consilium_common.study import Study
from consilium_common.study.load import study_from_canonical
from consilium_common.wire import methods
from consilium_common.wire.statements import (
    approval_statement,
    cosignature_statement,
    proposal_statement,
    sign,
)
from consilium_server import members
from consilium_server.peers import Peer
from consilium_server.services import of_registrars

WEIGHTS = b"public weights" * 100
WEIGHTS_SHA256 = hashlib.sha256(WEIGHTS).hexdigest()


@dataclass
class Person:
    """A member and its keys; before it has joined, the holder of an invitation."""

    peer: Peer
    key: Any
    signer: Any

    @property
    def fingerprint(self) -> str:
        return public_fingerprint(self.key.public_key())

    def request(self) -> dict[str, Any]:
        return {
            "request_pem": signing_request(self.key, self.peer.name).decode(),
            "signer_request_pem": signing_request(self.signer, self.peer.name).decode(),
            "version": __version__,
        }


@dataclass
class Case:
    """A call that is done, and its entry in the log."""

    who: Person
    request: dict[str, Any]
    act: str
    subject: str
    digest: Callable[[dict[str, Any]], str]  #: of the answer


class Desk:
    """An aggregator's handlers without its port, and a few people who call them."""

    def __init__(self, folder: Path) -> None:
        self.aggregator = Aggregator(folder)
        self.table = self.aggregator.services()
        self.numbers = count()
        self.ada, self.ben = (self.joined(name, Role.OPERATOR) for name in ("ada", "ben"))
        self.sites = [self.joined(name) for name in ("north", "south")]

    @property
    def log(self) -> list[Act]:
        return self.aggregator.log

    def call(self, who: Person, method: str, request: dict[str, Any]) -> dict[str, Any]:
        async def done() -> dict[str, Any]:
            answer: dict[str, Any] = await self.table[method](who.peer, request)
            return answer

        return asyncio.run(done())

    def invited(self, name: str, role: Role = Role.SITE) -> Person:
        letter = members.invite(self.aggregator.home, name, timedelta(hours=1), role)
        certified = describe(load_certificate(letter.certificate_pem.encode()))
        return Person(Peer(certified, None), new_tls_key(), new_signing_key())

    def joined(self, name: str, role: Role = Role.SITE) -> Person:
        person = self.invited(name, role)
        answer = self.call(person, methods.ENROL, person.request())
        certified = describe(load_certificate(answer["certificate_pem"].encode()))
        person.peer = Peer(certified, self.aggregator.member(name))
        return person

    def study(self, state: str = "", *, approved: bool = False) -> Study:
        """A study of a name of its own, proposed by ada."""
        canonical = plain_study().to_canonical()
        canonical["name"] = f"study-{next(self.numbers)}"
        canonical["federation"] |= {"quorum": 2}
        canonical["approval"] = {"operators": ["ada", "ben"], "signatures": 1}
        study = Study.model_validate(canonical)
        if state:
            self.call(self.ada, methods.OPERATOR_PROPOSE, self.proposal(study))
            for site in self.sites if approved else ():
                self.call(site, methods.SITE_DECIDE, self.decision(site, study))
            put(self.aggregator.registry, study.digest, state)
        return study

    def proposal(self, study: Study) -> dict[str, Any]:
        signature = sign(self.ada.signer, proposal_statement(study.digest, "ada"))
        return {"canonical": study.to_canonical(), "signature": signature}

    def decision(self, site: Person, study: Study) -> dict[str, Any]:
        said: dict[str, Any] = {
            "decision": "approved",
            "cohort_size": 3,
            "evaluation_size": 1,
            "why": "",
        }
        statement = approval_statement(study.digest, site.peer.name, **said)
        return {"digest": study.digest, **said, "signature": sign(site.signer, statement)}

    # --- one call of every method ----------------------------------------------------------------

    def case(self, method: str) -> Case:
        name = method.rpartition("/")[2].lower()
        made = getattr(self, f"_{name}", None)
        if made is not None:
            case: Case = made()
            return case
        states = {"pause": "running", "resume": "paused", "run": "stopped", "stop": "running"}
        study = self.study(states[name], approved=True)
        return self._of_study(self.ada, {"digest": study.digest}, name, study)

    def _of_study(self, who: Person, request: dict[str, Any], act: str, study: Study) -> Case:
        return Case(who, request, act, study.name, lambda _: study.digest)

    def _enrol(self) -> Case:
        new = self.invited(name := f"site-{next(self.numbers)}")
        return Case(new, new.request(), "enrol", f"site {name}", lambda _: new.fingerprint)

    def _renew(self) -> Case:
        request = self.ada.request()
        return Case(self.ada, request, "renew", "operator ada", lambda _: self.ada.fingerprint)

    def _decide(self) -> Case:
        site, study = self.sites[0], self.study("proposed")
        return self._of_study(site, self.decision(site, study), "approve", study)

    def _propose(self) -> Case:
        study = self.study()
        return self._of_study(self.ada, self.proposal(study), "propose", study)

    def _sign(self) -> Case:
        study = self.study("proposed")
        signature = sign(self.ben.signer, cosignature_statement(study.digest, "ben"))
        request = {"digest": study.digest, "signature": signature}
        return self._of_study(self.ben, request, "sign", study)

    def _invite(self) -> Case:
        key, name = new_tls_key(), f"auditor-{next(self.numbers)}"
        request_pem = signing_request(key, name).decode()
        request = {"role": "auditor", "hours": 1, "name": name, "request_pem": request_pem}
        fingerprint = public_fingerprint(key.public_key())
        return Case(self.ada, request, "invite", f"auditor {name}", lambda _: fingerprint)

    def _revoke(self) -> Case:
        old = self.joined(f"site-{next(self.numbers)}")
        request, subject = {"name": old.peer.name}, f"site {old.peer.name}"
        return Case(self.ada, request, "revoke", subject, lambda _: old.fingerprint)

    def _records(self) -> Case:
        return Case(self.ada, {"site": "north"}, "records", "north", lambda a: a["sha256"])

    def _log(self) -> Case:
        return Case(self.ada, {}, "log", "audit log", lambda a: a["sha256"])


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tmp_path_factory.mktemp("noting"))


@pytest.mark.parametrize("method", sorted(methods.PRIVILEGED))
def test_an_act_is_one_entry_that_says_who_did_what_to_whom(desk: Desk, method: str) -> None:
    case = desk.case(method)
    before = len(desk.log)
    answer = desk.call(case.who, method, case.request)
    (entry,) = desk.log[before:]
    who = case.who.peer
    assert (entry.who, entry.role) == (who.name, who.certified.role)
    assert (entry.act, entry.subject, entry.outcome) == (case.act, case.subject, "done")
    assert entry.digest == case.digest(answer) and len(entry.digest) == 64


@pytest.mark.parametrize("method", sorted(methods.PRIVILEGED))
def test_nothing_that_a_request_says_besides_keeps_an_act_out_of_the_log_or_changes_its_entry(
    desk: Desk, method: str
) -> None:
    case = desk.case(method)
    # Where the method reads one of them, it refuses; everywhere else it is the caller's own word.
    said = {"offset": 1, "start": 0, "fingerprint": "f" * 64, "sha256": "f" * 64}
    said |= {"name": "somebody", "site": "elsewhere", "digest": "f" * 64} | case.request
    before = len(desk.log)
    try:
        answer = desk.call(case.who, method, said)
    except ConsiliumError as error:
        assert method in (methods.OPERATOR_PROPOSE, methods.AUDIT_RECORDS, methods.AUDIT_LOG)
        (entry,) = desk.log[before:]
        assert entry.outcome == f"refused: {error.code}"
    else:
        (entry,) = desk.log[before:]
        assert (entry.outcome, entry.digest) == ("done", case.digest(answer))
        assert entry.subject == case.subject
    assert entry.act == case.act


def test_calls_that_the_table_does_not_name_as_noted_leave_no_entry(desk: Desk) -> None:
    before = len(desk.log)
    study = desk.study().digest  # known to nobody
    for method in sorted(methods.SERVICE_ROLES.keys() - methods.PRIVILEGED):
        for request in ({}, {"digest": study}):
            who = desk.sites[0] if Role.SITE in methods.SERVICE_ROLES[method] else desk.ada
            with contextlib.suppress(ConsiliumError):
                desk.call(who, method, request)
    assert len(desk.log) == before


def test_a_document_is_noted_with_its_first_piece_and_cannot_be_had_from_another(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    from consilium_server.services import of_auditors

    monkeypatch.setattr(of_auditors, "PIECE", 1000)
    before = len(desk.log)
    for method, request in ((methods.AUDIT_LOG, {}), (methods.AUDIT_RECORDS, {"site": "south"})):
        first = desk.call(desk.ada, method, request)
        later = {**request, "offset": 1, "sha256": first["sha256"]}
        assert desk.call(desk.ada, method, later)["piece"][:-1] == first["piece"][1:]
        with pytest.raises(ConsiliumError, match="not being handed over"):
            desk.call(desk.ben, method, later)
    found = [(act.who, act.act, act.subject, act.outcome) for act in desk.log[before:]]
    gone = "refused: network.piece-gone"
    assert found == [
        ("ada", "log", "audit log", "done"),
        ("ben", "log", "audit log", gone),
        ("ada", "records", "south", "done"),
        ("ben", "records", "south", gone),
    ]


def test_starting_weights_are_noted_once_when_they_are_whole(desk: Desk) -> None:
    before = len(desk.log)
    for start, end in ((0, 0), (0, 500), (0, 500), (500, len(WEIGHTS))):
        piece = {
            "sha256": WEIGHTS_SHA256,
            "offset": start,
            "total": len(WEIGHTS),
            "data": base64.b64encode(WEIGHTS[start:end]).decode(),
        }
        assert len(desk.log) == before
        # A study in the same request is not looked at: nothing is proposed by a piece.
        study = desk.study()
        desk.call(desk.ada, methods.OPERATOR_PROPOSE, {"start": piece, **desk.proposal(study)})
        with pytest.raises(ConsiliumError):
            desk.aggregator.registry.study(study.digest)
    (entry,) = desk.log[before:]
    assert (entry.act, entry.subject, entry.digest, entry.outcome) == (
        "propose",
        "starting weights",
        WEIGHTS_SHA256,
        "done",
    )


class Held:
    """A revocation that waits, in its thread, until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

        def revoke(registry: Any, name: str) -> Any:
            self.begun.set()
            assert self.go_on.wait(20)
            return members.revoke_member(registry, name)

        monkeypatch.setattr(of_registrars, "revoke_member", revoke)

    async def hang_up(self, desk: Desk, name: str) -> None:
        """Call and hang up while it is under way."""
        work = desk.table[methods.OPERATOR_REVOKE](desk.ada.peer, {"name": name})
        call = asyncio.ensure_future(work)
        await asyncio.to_thread(self.begun.wait, 20)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call


def test_an_act_whose_caller_has_hung_up_is_done_and_noted(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, site = Held(monkeypatch), desk.joined(f"site-{next(desk.numbers)}")
    before = len(desk.log)

    async def scenario() -> None:
        await held.hang_up(desk, site.peer.name)
        held.go_on.set()
        async with asyncio.timeout(20):
            while len(desk.log) == before:
                await asyncio.sleep(0.01)

    asyncio.run(scenario())
    assert desk.aggregator.member(site.peer.name).status == "revoked"
    (entry,) = desk.log[before:]
    assert (entry.who, entry.act, entry.digest, entry.outcome) == (
        "ada",
        "revoke",
        site.fingerprint,
        "done",
    )


def test_an_act_that_the_aggregator_s_end_cuts_short_is_noted_as_that(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, site = Held(monkeypatch), desk.joined(f"site-{next(desk.numbers)}")
    before = len(desk.log)

    async def scenario() -> None:
        await held.hang_up(desk, site.peer.name)
        # Once all is cancelled, the process still waits for its threads.
        asyncio.get_running_loop().call_later(0, threading.Timer(0.2, held.go_on.set).start)

    asyncio.run(scenario())
    (entry,) = desk.log[before:]
    assert (entry.act, entry.subject, entry.outcome) == ("revoke", site.peer.name, "cut short")


def test_the_log_names_what_a_refused_act_was_about(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    study = desk.study("proposed")
    name, digest = study.name, study.digest
    other = study.to_canonical() | {"name": "another"}
    for method, request, act, subject, about in (
        (methods.OPERATOR_RUN, {"digest": digest}, "run", name, digest),
        (methods.OPERATOR_STOP, {"digest": digest[:12]}, "stop", name, digest),
        (methods.OPERATOR_STOP, {"digest": "f" * 64}, "stop", "an unknown study", "f" * 64),
        (methods.OPERATOR_RUN, {"digest": 7, "name": name}, "run", "an unknown study", ""),
        (
            methods.OPERATOR_PROPOSE,
            {"canonical": other, "signature": "00"},
            "propose",
            "another",
            study_from_canonical(other).digest,
        ),
        (methods.OPERATOR_PROPOSE, {}, "propose", "a study that cannot be read", ""),
        (
            methods.OPERATOR_PROPOSE,
            {"start": {"sha256": "ab"}},
            "propose",
            "starting weights",
            "ab",
        ),
        (methods.OPERATOR_REVOKE, {"name": "nobody"}, "revoke", "nobody", ""),
        (methods.AUDIT_RECORDS, {"site": "nowhere"}, "records", "nowhere", ""),
        # A lone surrogate is a character in JSON and in nothing else.
        (
            methods.MEMBER_RENEW,
            {"request_pem": "\ud800"},
            "renew",
            "operator ada",
            desk.ada.fingerprint,
        ),
    ):
        with pytest.raises(ConsiliumError):
            desk.call(desk.ada, method, request)
        noted = desk.log[-1]
        assert (noted.act, noted.subject, noted.digest) == (act, subject, about)
        assert noted.outcome.startswith("refused: "), request
