"""A public start arrives whole and as named, or not at all, over however many calls."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from site_samples import plain_study, private_study
from state_samples import put

from consilium_client.greeting import greeting, studies_at_once
from consilium_client.home import SiteHome
from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.identity.authority import Authority, certificate_pem
from consilium_common.identity.certificates import SIGNING_ROLE_OF, Role, describe
from consilium_common.identity.keys import new_signing_key, new_tls_key
from consilium_common.study import Study
from consilium_common.wire import methods
from consilium_common.wire.methods import MAX_MESSAGE_BYTES, OPERATOR_PROPOSE
from consilium_common.wire.statements import approval_statement, proposal_statement, sign
from consilium_server import starts
from consilium_server.home import ServerHome
from consilium_server.issuing import load_issuer
from consilium_server.peers import Peer
from consilium_server.registry import Registry
from consilium_server.scheduler import Scheduler
from consilium_server.services import services
from consilium_server.starts import CHUNK_BYTES, PublicStarts, send_start
from consilium_server.tables import Member, now
from consilium_server.witness import Witness, WitnessKey

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def piece(offset: int, data: bytes, **changes: Any) -> dict[str, Any]:
    values = {
        "sha256": SHA256,
        "offset": offset,
        "total": len(CONTENT),
        "data": base64.b64encode(data).decode(),
    }
    return {**values, **changes}


class Wire:
    """Stands in for the connection; may break after a number of calls."""

    def __init__(self, kept: PublicStarts, breaks_after: int = 10**6) -> None:
        self.kept = kept
        self.left = breaks_after
        self.largest = 0

    def call(self, method: str, request: dict[str, Any], *, timeout: float) -> Any:
        assert method == OPERATOR_PROPOSE
        assert timeout > 0
        self.largest = max(self.largest, len(canonical_json(request)))
        if self.left == 0:
            raise ConsiliumError("network.failed", "The connection broke.")
        self.left -= 1
        return self.kept.take(request["start"])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12_000), st.lists(st.integers(0, 6), max_size=4))
def test_it_arrives_whole_though_connections_break(
    tmp_path_factory: pytest.TempPathFactory, chunk: int, breaks: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("starts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(starts, "CHUNK_BYTES", max(chunk, 300))
        for calls in breaks:
            try:
                send_start(Wire(PublicStarts(folder), calls), CONTENT)  # type: ignore[arg-type]
            except ConsiliumError as error:
                assert error.code == "network.failed"
        send_start(Wire(PublicStarts(folder)), CONTENT)  # type: ignore[arg-type]
    kept = PublicStarts(folder)
    assert kept.path(SHA256).read_bytes() == CONTENT
    assert [path.name for path in folder.iterdir()] == [f"{SHA256}.safetensors"]
    assert kept.path(SHA256).stat().st_mode & 0o077 == 0


def test_a_call_stays_below_the_largest_message(tmp_path: Path) -> None:
    wire = Wire(PublicStarts(tmp_path))
    send_start(wire, bytes(CHUNK_BYTES + 1))  # type: ignore[arg-type]
    assert CHUNK_BYTES < wire.largest < MAX_MESSAGE_BYTES


def test_what_is_not_the_file_its_hash_names_is_never_kept(tmp_path: Path) -> None:
    kept = PublicStarts(tmp_path)
    with pytest.raises(ConsiliumError) as caught:
        kept.take(piece(0, CONTENT[:-1] + b"\x00"))
    assert caught.value.code == "study.start"
    assert not kept.path(SHA256).exists()
    assert list(tmp_path.iterdir()) == []
    assert kept.take(piece(0, CONTENT)) == {"held": len(CONTENT)}
    # The same file again is known at once.
    assert kept.take(piece(0, b"")) == {"held": len(CONTENT)}


@pytest.mark.parametrize(
    "bad",
    [
        None,
        {},
        piece(0, b"", sha256="../../etc/passwd"),
        piece(0, b"", sha256=7),
        piece(-1, b""),
        piece(0, b"", total=0),
        piece(0, b"", total=10**12),
        piece(True, b""),
        {**piece(0, b""), "data": "%%%"},
        {**piece(0, b""), "data": None},
    ],
)
def test_a_piece_of_another_form_is_refused(tmp_path: Path, bad: object) -> None:
    with pytest.raises(ConsiliumError) as caught:
        PublicStarts(tmp_path).take(bad)
    assert caught.value.code == "study.start"
    assert list(tmp_path.iterdir()) == []


# --- services ----------------------------------------------------------------------------------


class Office:
    """The services over a real registry, without Flower; two members who sign."""

    def __init__(self, folder: Path) -> None:
        home = ServerHome.create(folder)
        self.authority = Authority.create("tests")
        self.authority.save(home.identity)
        self.registry = Registry(home.database)
        key = WitnessKey.ensure(home.identity, self.authority)
        self.services = services(
            home,
            self.registry,
            load_issuer(home),
            None,  # type: ignore[arg-type]
            Witness(self.registry, key),
            scheduler=Scheduler(home, self.registry, None, lambda: False),  # type: ignore[arg-type]
        )
        self.keys = {name: new_signing_key() for name in ("operator", "north")}
        self.peers = {
            "operator": self._join("operator", Role.OPERATOR),
            "north": self._join("north", Role.SITE),
        }

    def _join(self, name: str, role: Role) -> Peer:
        certificate = self.authority.issue(new_tls_key().public_key(), role, name)
        signing = SIGNING_ROLE_OF[role]
        signer = self.authority.issue(self.keys[name].public_key(), signing, name)
        member = Member(
            name=name,
            role=role,
            status="active",
            serial=name,
            certificate_pem=certificate_pem(certificate).decode(),
            signer_pem=certificate_pem(signer).decode(),
            node_id="7",
            joined_at=now(),
        )
        with self.registry.transaction() as session:
            session.add(member)
        return Peer(describe(certificate), member)

    def propose(self, study: Study) -> Any:
        statement = proposal_statement(study.digest, "operator")
        request = {
            "canonical": study.to_canonical(),
            "signature": sign(self.keys["operator"], statement),
        }
        return self.ask("operator", methods.OPERATOR_PROPOSE, request)

    def decide(self, study: Study, said: dict[str, Any], **sent: Any) -> Any:
        statement = approval_statement(study.digest, "north", "approved", why="", **said)
        request = {
            "digest": study.digest,
            "decision": "approved",
            "why": "",
            "signature": sign(self.keys["north"], statement),
            **said,
            **sent,
        }
        return self.ask("north", methods.SITE_DECIDE, request)

    def ask(self, who: str, method: str, request: dict[str, Any]) -> Any:
        return asyncio.run(self.services[method](self.peers[who], request))

    def refusal(self, call: Any, *arguments: Any, **named: Any) -> str:
        with pytest.raises(ConsiliumError) as caught:
            call(*arguments, **named)
        return caught.value.code


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path)


def test_a_study_with_a_public_start_is_taken_once_its_weights_are_here(office: Office) -> None:
    canonical = plain_study().to_canonical()
    canonical["model"]["start"] = {"sha256": SHA256, "data": "ten public volumes"}
    study = Study.model_validate(canonical)
    assert office.refusal(office.propose, study) == "study.start"
    assert office.ask("operator", methods.OPERATOR_PROPOSE, {"start": piece(0, CONTENT)}) == {
        "held": len(CONTENT)
    }
    assert office.propose(study)["known"] is False
    assert office.propose(study)["known"] is True


def test_the_declared_sizes_are_those_that_were_signed(office: Office) -> None:
    study = plain_study()
    office.propose(study)
    said = {"cohort_size": 20, "evaluation_size": 5}
    office.decide(study, said)
    (approval,) = office.registry.approvals(study.digest)
    assert (approval.cohort_size, approval.evaluation_size) == (20, 5)
    assert office.refusal(office.decide, study, said, evaluation_size=6) == (
        "identity.bad-signature"
    )
    for bad in (-1, True, 5.0, "5", None):
        assert office.refusal(office.decide, study, said, evaluation_size=bad) == (
            "study.bad-decision"
        )


def test_scores_are_released_over_at_least_one_declared_patient(office: Office) -> None:
    canonical = private_study().to_canonical()
    canonical["evaluation"] |= {"release": "private", "epsilon": 0.5}
    study = Study.model_validate(canonical)
    office.propose(study)
    nobody = {"cohort_size": 20, "evaluation_size": 0}
    assert office.refusal(office.decide, study, nobody) == "study.bad-decision"
    office.decide(study, {**nobody, "evaluation_size": 1})


def test_a_site_is_told_which_studies_run(office: Office) -> None:
    study = plain_study()
    office.propose(study)
    request = {"session": "s", "version": "1", "protocol": methods.PROTOCOL}
    assert office.ask("north", methods.SITE_HELLO, request)["running"] == []
    put(office.registry, study.digest, "running")
    assert office.ask("north", methods.SITE_HELLO, request)["running"] == [study.digest]


def test_a_site_says_in_how_many_studies_it_takes_part_at_a_time(
    office: Office, tmp_path: Path
) -> None:
    def says(policy: str) -> int | None:
        (tmp_path / "policy.yaml").write_text(f"schema: consilium/policy/v1\n{policy}")
        sent = json.loads(greeting("s", "", studies_at_once(SiteHome(tmp_path))))
        office.ask("north", methods.SITE_HELLO, sent)
        member = office.registry.member("north")
        assert member is not None
        return member.studies_at_once

    assert says("studies_at_once: 2\n") == 2
    assert says("") is None
    assert says("studies_at_once: 1\n") == 1
    assert says("studies_at_once: none of your business\n") is None, "it stays online"
    wrong = {"session": "s", "version": "1", "protocol": methods.PROTOCOL, "studies_at_once": -1}
    assert office.refusal(office.ask, "north", methods.SITE_HELLO, wrong) == "network.garbage"


def test_heads_are_countersigned_in_the_caller_s_name(office: Office) -> None:
    assert office.ask("north", methods.SITE_WITNESS, {"heads": []})["known"] == -1
    assert office.refusal(office.ask, "north", methods.SITE_WITNESS, {}) == "privacy.witness-form"
