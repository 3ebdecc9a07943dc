"""A study may ask for k of n operators' signatures: the site counts them itself, by digest."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from budget_samples import refused
from cryptography.hazmat.primitives.asymmetric import ed25519
from hypothesis import given, settings
from hypothesis import strategies as st
from server_samples import House, a_study
from site_samples import JoinedSite, joined_site

from consilium_client.identity import SiteIdentity
from consilium_client.proposals import Proposal, find, proposals
from consilium_common.errors import ConsiliumError
from consilium_common.identity.authority import certificate_pem
from consilium_common.identity.certificates import Role
from consilium_common.identity.keys import new_signing_key
from consilium_common.identity.trust import Trust
from consilium_common.study import Study
from consilium_common.study.approval import Approval, in_words, standing
from consilium_common.study.comparison import compare, cost_differences, differences
from consilium_common.study.cost import cost
from consilium_common.study.examples import example_files
from consilium_common.study.load import load_study, parse_study, study_from_canonical
from consilium_common.wire.statements import cosignature_statement, proposal_statement, sign
from consilium_server.cosigning import require_signatures, signature_rows, signatures_overview
from consilium_server.services.signatures import Signatures

#: Digests of studies without `approval`, taken before studies could ask for signatures.
DIGESTS = {
    "brain-mri": "92ece2c4e126a1ac197f89afa108fdce069dc26cad12da8211f3db9db0c1a62e",
    "chest-xray": "5dde1e8e46390273d8cb7604aa2e9af1ba2f747569472ba179942873754fc796",
    "hippocampus": "c5148bb35d1f50a73407b7b47cb1527132e0383aa1917cf50755b2fae29b79fb",
    "hippocampus-private": "b8ed4ffc7c45e7982964713f6ddf7e8acb8858996b8fbee6880304625fb63802",
    "liver-ct": "78fb2ebb29111df47dfc49ca3865b77e8fcb912c82981cd7a8931c587b7dd8fb",
    "mednist": "441b660dd6c9800b327d46c40f8fbfccf3bda7de1236fe34967ae0f522d807d7",
}
OPERATORS = ("alice", "bob", "carol", "dora")


def asking(signatures: int = 2, operators: tuple[str, ...] = OPERATORS[:3]) -> Study:
    approval = {"operators": list(operators), "signatures": signatures}
    return Study.model_validate({**a_study().to_canonical(), "approval": approval})


def test_a_study_that_asks_for_no_signatures_keeps_the_digest_it_always_had() -> None:
    files = {path.stem: path for path in example_files()}
    assert {name: load_study(files[name]).digest for name in DIGESTS} == DIGESTS
    plain = a_study().to_canonical()
    assert "approval" not in plain
    # Written out as null it would be a second form of the same study.
    with refused("study.invalid"):
        study_from_canonical({**plain, "approval": None})


def test_whose_signatures_are_asked_for_is_part_of_the_digest_and_of_the_words() -> None:
    study = asking()
    assert study_from_canonical(study.to_canonical()) == study
    assert len({study.digest, asking(3).digest, a_study().digest}) == 3
    assert in_words(study.approval) == "The signatures of any 2 of alice, bob and carol."
    assert in_words(asking(3).approval) == "The signatures of alice, bob and carol."
    assert standing(study.approval, ["bob"], "alice") == "2 of 2 signatures (alice, bob)"
    assert "may still sign: bob, carol" in standing(study.approval, ["mallory"], "alice")


@pytest.mark.parametrize(
    ("approval", "says"),
    [
        ("{operators: [alice, bob], signatures: 3}", "asks for 3 of 2"),
        ("{operators: [alice, alice], signatures: 1}", "twice"),
        ("{operators: [alice], signatures: 0}", "signatures"),
        ("{operators: [], signatures: 1}", "operators"),
        ("{operators: [Alice Miller], signatures: 1}", "operators"),
        ("{operators: [alice], signature: 1}", "signature"),
        ("{operators: [alice]}", "signatures"),
    ],
)
def test_a_wrong_approval_is_refused_with_its_key(approval: str, says: str) -> None:
    text = (example_files()[0]).read_text(encoding="utf-8")
    with pytest.raises(ConsiliumError, match=says):
        parse_study(f"{text}\napproval: {approval}\n", "study.yaml")


# --- at the site -----------------------------------------------------------------------------


class Consortium:
    """A site, operators with certified signing keys, and what the aggregator shows."""

    def __init__(self, site: JoinedSite) -> None:
        self.site = site
        self.keys = {name: new_signing_key() for name in (*OPERATORS, "mallory")}
        self.rows: list[dict[str, Any]] = []

    def pem(
        self,
        name: str,
        key: ed25519.Ed25519PrivateKey | None = None,
        role: Role = Role.PROPOSER,
    ) -> str:
        key = key or self.keys[name]
        issued = self.site.authority.issue(key.public_key(), role, name)
        return certificate_pem(issued).decode()

    def propose(self, study: Study, proposer: str, *cosigners: str) -> None:
        self.rows = [
            {
                "digest": study.digest,
                "canonical": study.to_canonical(),
                "proposed_by": proposer,
                "proposed_at": "now",
                "signature": sign(self.keys[proposer], proposal_statement(study.digest, proposer)),
                "signer_pem": self.pem(proposer),
                "state": "proposed",
                "decision": None,
                "signatures": [self.row(study, name) for name in cosigners],
            }
        ]

    def row(self, study: Study, name: str) -> dict[str, str]:
        signature = sign(self.keys[name], cosignature_statement(study.digest, name))
        return {"operator": name, "signature": signature, "signer_pem": self.pem(name)}

    def call(self, _: str, __: dict[str, Any]) -> dict[str, Any]:
        return {"studies": self.rows}

    def shown(self) -> Proposal:
        return proposals(self.site.identity)[0]


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    found = Consortium(joined_site(tmp_path_factory.mktemp("hospital") / "site"))

    @contextmanager
    def caller(_: SiteIdentity) -> Iterator[Consortium]:
        yield found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SiteIdentity, "caller", caller)
        yield found


@settings(max_examples=25, deadline=None)
@given(
    named=st.sets(st.sampled_from(OPERATORS), min_size=1),
    needed=st.integers(1, 4),
    proposer=st.sampled_from((*OPERATORS, "mallory")),
    cosigners=st.lists(st.sampled_from((*OPERATORS, "mallory")), max_size=6),
)
def test_a_site_counts_distinct_named_operators_and_nobody_else(
    consortium: Consortium, named: set[str], needed: int, proposer: str, cosigners: list[str]
) -> None:
    study = asking(min(needed, len(named)), tuple(sorted(named)))
    consortium.propose(study, proposer, *cosigners)
    shown = consortium.shown()
    counted = named & {proposer, *cosigners}
    enough = len(counted) >= min(needed, len(named))
    assert (shown.missing == 0) is enough
    if enough:
        shown.require_signed()
    else:
        with refused("study.signatures-missing"):
            shown.require_signed()


def test_a_forged_signature_is_an_alarm_and_not_merely_uncounted(consortium: Consortium) -> None:
    study = asking()
    other = asking(3)
    forgeries = (
        {**consortium.row(study, "bob"), "signature": "00" * 64},
        # Of another study, of another operator, of a key that nobody certified for the name.
        {**consortium.row(other, "bob")},
        {**consortium.row(study, "carol"), "operator": "bob"},
        {**consortium.row(study, "bob"), "signer_pem": consortium.pem("bob", new_signing_key())},
        # Of a site that has the operator's name: its key is certified for approvals and its ledger.
        {**consortium.row(study, "bob"), "signer_pem": consortium.pem("bob", role=Role.SIGNER)},
    )
    for forged in forgeries:
        consortium.propose(study, "alice")
        consortium.rows[0]["signatures"] = [forged]
        with refused("identity.bad-signature"):
            consortium.shown()


def test_what_a_site_signed_is_no_proposal(consortium: Consortium) -> None:
    consortium.propose(asking(), "alice")
    consortium.rows[0]["signer_pem"] = consortium.pem("alice", role=Role.SIGNER)
    with refused("identity.bad-signature"):
        consortium.shown()


@pytest.mark.parametrize(
    "change",
    [
        {"canonical": None},
        {"signatures": [{"operator": "bob"}]},
        {"signatures": ["bob"]},
        {"signatures": 7},
        {"digest": "0" * 64},
    ],
)
def test_what_the_aggregator_garbles_is_one_clear_error(
    consortium: Consortium, change: dict[str, Any]
) -> None:
    consortium.propose(asking(), "alice", "bob")
    consortium.rows[0] |= change
    with pytest.raises(ConsiliumError) as caught:
        consortium.shown()
    assert caught.value.code in ("network.garbage", "study.invalid", "study.digest")


def test_a_study_of_an_aggregator_that_knows_no_further_signatures_is_read_all_the_same(
    consortium: Consortium,
) -> None:
    consortium.propose(a_study(), "alice")
    del consortium.rows[0]["signatures"]
    shown = consortium.shown()
    assert (shown.signed_by, shown.missing) == (("alice",), 0)
    assert find([shown], shown.study.digest[:9]) is shown
    with refused("study.unknown"):
        find([shown], "")


# --- at the aggregator -----------------------------------------------------------------------


def test_the_aggregator_takes_named_signatures_alone_and_runs_nothing_before_them(
    tmp_path: Path, consortium: Consortium
) -> None:
    study = asking()
    house = House(tmp_path, study)
    with house.registry.transaction() as session:
        session.get_one(
            type(house.registry.study(study.digest)), study.digest
        ).proposed_by = "alice"
    trust = Trust.of(consortium.site.authority.certificate)
    service = Signatures(house.registry, SimpleNamespace(trust=trust))  # type: ignore[arg-type]

    def gives(name: str, of: Study = study) -> Any:
        peer = SimpleNamespace(
            member=SimpleNamespace(name=name, signer_pem=consortium.pem(name)), name=name
        )
        signature = sign(consortium.keys[name], cosignature_statement(of.digest, name))
        request = {"digest": study.digest, "signature": signature}
        return asyncio.run(service.sign(peer, request))  # type: ignore[arg-type]

    row = house.registry.study(study.digest)
    with refused("study.signatures-missing"):
        require_signatures(house.registry, row)
    with refused("study.signature-not-asked"):
        gives("mallory")
    with refused("identity.bad-signature"):
        gives("bob", asking(3))
    with refused("study.signatures-missing"):
        require_signatures(house.registry, row)
    answer = gives("bob")
    assert (answer["known"], answer["missing"]) == (False, 0)
    assert gives("bob")["known"]
    require_signatures(house.registry, row)
    assert signatures_overview(house.registry, row)["standing"] == "2 of 2 signatures (alice, bob)"
    # What it hands to a site is what the site accepts.
    consortium.propose(study, "alice")
    consortium.rows[0]["signatures"] = signature_rows(house.registry, study.digest)
    consortium.shown().require_signed()


def test_a_study_that_asks_for_none_takes_none(tmp_path: Path, consortium: Consortium) -> None:
    house = House(tmp_path, a_study())
    row = house.registry.study(a_study().digest)
    require_signatures(house.registry, row)
    assert signature_rows(house.registry, row.digest) == []
    assert Approval(operators=["alice"], signatures=1).missing(["bob"]) == 1


# --- what changed ----------------------------------------------------------------------------


def test_what_changed_is_said_key_by_key_and_in_epsilon() -> None:
    files = {path.stem: path for path in example_files()}
    old = load_study(files["hippocampus-private"])
    plain = old.to_canonical()
    plain["training"] |= {"steps_per_round": plain["training"]["steps_per_round"] * 2}
    plain["approval"] = {"operators": ["alice"], "signatures": 1}
    new = Study.model_validate(plain)
    lines = compare(old, new)
    steps = old.training.steps_per_round
    assert f"training.steps_per_round: {steps} → {steps * 2}" in lines
    assert "approval.operators: [alice] is new" in lines
    assert {one.topic for one in differences(old, new)} == {"Training", "Whose signatures it needs"}
    assert compare(old, old) == []
    # The noise is calibrated to the same ε, whatever the steps.
    assert list(cost_differences(cost(old), cost(new))) == []
    dearer = old.to_canonical()
    dearer["privacy"] |= {"epsilon": 9.0}
    (line,) = cost_differences(cost(old), cost(Study.model_validate(dearer)))
    assert line.startswith("ε of the whole study for a training patient: 8.00 at δ 0.001 → 9.")
