"""A compromised aggregator, with all of the consortium's keys, against a real, running site.

The site refuses each thing with its reason, charges nothing for it, and goes on to serve what is
honest.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compromised import (
    COHORT,
    HONEST_RUN,
    HOSPITAL,
    Compromised,
    Lie,
    Scene,
    witness_key,
)
from federation import PRIVATE, Federation, add_hospitals, wait_for
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.cli.build import build_fab_from_files

from consilium_common.flower_bundle import bundle_hash
from consilium_common.identity.authority import Authority, certificate_pem
from consilium_common.identity.certificates import Role
from consilium_common.identity.keys import new_signing_key
from consilium_common.ledger.store import Ledger
from consilium_common.models.registry import initial_weights
from consilium_common.models.weights import pack
from consilium_common.wire.messages import INSTRUCTIONS, Instructions, Reference, to_site
from consilium_common.wire.methods import MEMBER_TRUST, SITE_HELLO, SITE_STUDIES, SITE_WITNESS
from consilium_server.home import ServerHome
from consilium_server.registry import Registry
from consilium_server.witness import Witness

#: The first test waits for all of them to start.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with Federation(tmp_path_factory.mktemp("compromised")) as federation:
        add_hospitals(federation, [HOSPITAL], started=())
        aggregator = Compromised(federation)
        scene = Scene(federation, aggregator)
        scene.approve()
        scene.decide("declined", ["declined"])
        scene.decide("withdrawn", ["approved", "declined"])
        federation.stop()
        with aggregator.serving():
            scene.site.start()
            yield scene


# --- code ----------------------------------------------------------------------------------------


def foreign_bundle() -> bytes:
    """Return a sound bundle of Flower's whose code is not the installed release."""
    pyproject = (
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "evil"\nversion = "1.0.0"\ndescription = ""\n'
        'license = { file = "LICENSE" }\ndependencies = ["flwr>=1.41"]\n'
        '[tool.flwr.app]\npublisher = "evil"\nfab-format-version = 1\n'
        'flwr-version-target = "1.41.0"\n'
        '[tool.flwr.app.components]\nserverapp = "evil:app"\nclientapp = "evil:app"\n'
        "[tool.flwr.app.config]\n"
    )
    code = b"raise SystemExit('foreign code ran')\n"
    files = {"pyproject.toml": pyproject.encode(), "LICENSE": b"none", "evil.py": code}
    content: bytes = build_fab_from_files(files)[0]
    return content


def test_a_foreign_bundle_is_refused_under_its_own_hash_and_under_ours(scene: Scene) -> None:
    foreign, garbage = foreign_bundle(), b"no bundle at all"
    with scene.nothing_charged():
        for run_id, (claimed, content) in enumerate(
            [
                (hashlib.sha256(foreign).hexdigest(), foreign),
                (bundle_hash(), foreign),
                (hashlib.sha256(garbage).hexdigest(), garbage),
                (bundle_hash(), b""),
            ],
            start=HONEST_RUN + 1,
        ):
            scene.aggregator.send_bundle(run_id, claimed, content)
            assert scene.refused("train", run_id=run_id) == "run.foreign-bundle"
    running = scene.site.running
    assert running is not None
    said = "the link refused GetFab: [run.foreign-bundle] The aggregator sent code that is not this"
    # The reply may be here before the site has said why.
    wait_for(lambda: running.output.count(said) >= 4, "the refusals", timeout=10)
    assert running.output.count(said) == 4


# --- studies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("study", ["declined", "withdrawn", "f" * 64])
def test_a_study_that_was_not_approved_gets_nothing(scene: Scene, study: str) -> None:
    with scene.nothing_charged():
        for kind in ("train", "evaluate", "query"):
            assert scene.refused(kind, study=study) == "study.not-approved"


def test_a_study_changed_under_its_digest_is_noticed_and_the_approved_one_stays(
    scene: Scene,
) -> None:
    def noiseless(_: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
        for row in said["studies"]:
            row["canonical"]["privacy"]["noise_multiplier"] = 0.3
        return said

    scene.aggregator.lies[SITE_STUDIES] = noiseless
    try:
        assert scene.site("studies").code == "study.digest"
        assert scene.site("review", scene.digests["approved"]).code == "study.digest"
    finally:
        scene.aggregator.lies.clear()
    scene.released("train", 0)
    with Ledger.open(scene.site.home / "ledger.db", site=HOSPITAL) as ledger:
        charge = ledger.find_charge(scene.digests["approved"], 0, "training")
    assert charge is not None
    assert charge.event.noise_multiplier == PRIVATE["privacy"]["noise_multiplier"]


# --- rounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "purpose"),
    [("train", "training"), ("evaluate", "evaluation"), ("query", "statistics")],
)
def test_what_is_asked_again_gets_the_same_bytes_and_costs_nothing(
    scene: Scene, kind: str, purpose: str
) -> None:
    first = scene.released(kind, 0)
    assert scene.charges(purpose, 0) == 1
    with scene.nothing_charged():
        assert scene.released(kind, 0) == first
        if kind != "query":
            # With another model as well: what was released is never computed again.
            zeros = {
                name: 0 * one for name, one in initial_weights(scene.study("approved")).items()
            }
            assert scene.released(kind, 0, blob=pack(zeros)) == first


@pytest.mark.parametrize(
    ("kind", "number", "code"),
    [
        ("train", 6, "privacy.round-unknown"),
        ("train", -1, "privacy.round-unknown"),
        ("evaluate", 99, "privacy.round-unknown"),
        ("query", 1, "privacy.round-unknown"),
    ],
)
def test_a_round_that_never_was_costs_and_gets_nothing(
    scene: Scene, kind: str, number: int, code: str
) -> None:
    with scene.nothing_charged():
        assert scene.refused(kind, number) == code


def test_another_cohort_size_than_was_declared_is_refused(scene: Scene) -> None:
    # The denominator of noisy gradients: 1 would make every patient's share the largest.
    with scene.nothing_charged():
        assert scene.refused("train", 1, cohort=1) == "run.cohort-size"


def test_messages_that_are_no_instructions_are_refused(scene: Scene) -> None:
    digest = scene.digests["approved"]
    model = scene.aggregator.offer(scene.model())
    twice = to_site(Instructions(digest, 1, COHORT, model=model))
    asking = dict(twice[INSTRUCTIONS])
    twice["further"] = ConfigRecord({**asking, "round": 2})
    with scene.nothing_charged():
        for content in (
            RecordDict(),
            RecordDict({INSTRUCTIONS: ConfigRecord({**asking, "round": "1"})}),
            RecordDict({INSTRUCTIONS: ConfigRecord({**asking, "model": "../../ledger.db"})}),
            RecordDict({INSTRUCTIONS: ConfigRecord({**asking, "model": ""})}),
            RecordDict({INSTRUCTIONS: ConfigRecord({**asking, "model_bytes": 2**62})}),
            RecordDict({"model": ArrayRecord()}),
        ):
            assert scene.refused("train", content=content) == "run.bad-message"
    # With two records of settings it is open which of them was meant: nothing leaves.
    assert scene.refused("train", content=twice) == "privacy.egress"
    # What it may have cost is not lost: asked for in earnest it is sent, and costs nothing more.
    scene.released("train", 1)
    assert scene.charges("training", 1) == 1


# --- models --------------------------------------------------------------------------------------


def broken_models(scene: Scene) -> Iterator[tuple[str, bytes, str]]:
    """Give models that are not the study's, and the error: nothing too large is fetched."""
    large, wrong = "run.bad-message", "run.bad-update"
    tensors = initial_weights(scene.study("approved"))
    name, tensor = next(iter(tensors.items()))
    yield "other shape", scene.model(**{name: np.zeros((*tensor.shape, 2), np.float32)}), large
    yield "fewer tensors", scene.model(**{name: None}), wrong
    yield "other tensors", scene.model(**{name: None, "patients": tensor}), wrong
    yield "more tensors", scene.model(patients=np.zeros(1000, np.float32)), large
    yield "not finite", scene.model(**{name: np.full_like(tensor, np.nan)}), wrong
    yield "oversized", scene.model(**{name: np.zeros(8_000_000, np.float32)}), large
    yield "garbage", bytes(range(256)) * 4, wrong
    yield "a header without end", (2**62).to_bytes(8, "little") + b"{}", wrong


def test_a_model_that_is_not_the_study_s_is_refused_before_anything_is_charged(
    scene: Scene,
) -> None:
    for what, blob, code in broken_models(scene):
        with scene.nothing_charged():
            assert scene.refused("train", 2, blob=blob) == code, what
    # What comes under a name is not what the name says, or nothing does.
    sound = scene.aggregator.offer(scene.model())
    for what, sent, code in (
        ("another file", scene.model()[:-1] + b"x", "run.bad-message"),
        ("half of it", scene.model()[:-500], "run.bad-message"),
        ("more than it", scene.model() + b"x" * 5_000_000, "run.bad-message"),
        ("nothing", b"", "run.bad-message"),
        ("none", None, "run.no-model"),
    ):
        named = Reference(hashlib.sha256(what.encode()).hexdigest(), sound.bytes)
        if sent is not None:
            scene.aggregator.models[named.sha256] = sent
        with scene.nothing_charged():
            assert scene.refused("train", 2, model=named) == code, what
    digest = scene.digests["approved"]
    with scene.nothing_charged():
        without = to_site(Instructions(digest, 2, COHORT))
        assert scene.refused("train", content=without) == "run.bad-update"
    with scene.nothing_charged():
        after = scene.study("approved").evaluations[-1]
        assert scene.refused("evaluate", after, blob=b"garbage") == "run.bad-update"
    # The round is still there for a sound model, and costs once.
    scene.released("train", 2)
    assert scene.charges("training", 2) == 1


# --- trust and witness ---------------------------------------------------------------------------


def test_an_authority_that_the_old_one_did_not_certify_is_never_trusted(scene: Scene) -> None:
    trusted = scene.site.home / "identity" / "authority.pem"
    before = trusted.read_bytes()
    foreign = certificate_pem(Authority.create("tests").certificate).decode()
    asked = threading.Event()

    def other(_: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
        asked.set()
        return {**said, "authority_pem": foreign + said["authority_pem"], "cross_pem": foreign}

    scene.aggregator.lies |= {
        SITE_HELLO: lambda _, said: {**said, "trust": "0" * 64},
        MEMBER_TRUST: other,
    }
    try:
        assert asked.wait(60)
        time.sleep(1)
        assert trusted.read_bytes() == before
    finally:
        scene.aggregator.lies.clear()


def true_witness(scene: Scene) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return what answers as the aggregator's witness should."""
    home = ServerHome.existing(scene.federation.home)
    witness = Witness(Registry(home.database), witness_key(home))
    signer = (scene.site.home / "identity" / "ledger-signer.pem").read_text()
    return lambda request: witness.countersign(HOSPITAL, signer, request["heads"])


def another_key(scene: Scene) -> str:
    """Return a certificate of a second witness, by the consortium's own authority."""
    authority = Authority.load(ServerHome.existing(scene.federation.home).identity)
    key = new_signing_key().public_key()
    return certificate_pem(authority.issue(key, Role.WITNESS, "aggregator")).decode()


def test_a_forged_witness_is_told_from_the_true_one_and_training_goes_on(scene: Scene) -> None:
    true, pem = true_witness(scene), another_key(scene)
    lies: list[tuple[Lie, str]] = [
        (lambda request, _: {**true(request), "witness_pem": pem}, "is another one than before"),
        (lambda request, _: {**true(request), "records": []}, "other entries than were sent"),
    ]
    assert scene.site.running is not None
    certificate = scene.site.home / "identity" / "witness.pem"
    kept = certificate.read_bytes()
    for number, (lie, said) in enumerate(lies, start=3):
        scene.aggregator.lies[SITE_WITNESS] = lie
        try:
            scene.released("train", number)  # new entries, to be witnessed
            scene.site.running.wait_until_says(said)
        finally:
            scene.aggregator.lies.clear()
    assert certificate.read_bytes() == kept


def test_a_witness_that_claims_an_older_head_is_sent_what_it_says_it_lost(scene: Scene) -> None:
    true = true_witness(scene)
    sent: list[int] = []

    def forgetful(request: dict[str, Any], _: dict[str, Any]) -> dict[str, Any]:
        said = true(request)
        if not request["heads"]:
            return {**said, "known": 0}
        sent.extend(head["sequence"] for head in request["heads"])
        return said

    before = scene.ledger()
    scene.site.stop()
    scene.aggregator.lies[SITE_WITNESS] = forgetful
    try:
        scene.site.start()
        assert scene.site.running is not None
        scene.site.running.wait_until_says("lost its records of this ledger after entry 0")
        wait_for(lambda: bool(sent), "the heads")
    finally:
        scene.aggregator.lies.clear()
    # Heads alone, from the one after; the ledger itself is what it was.
    assert sent[0] == 1
    assert scene.ledger()[: len(before)] == before


def test_a_witness_that_claims_to_have_seen_more_stops_all_charging_until_a_person_looked(
    scene: Scene,
) -> None:
    def ahead(request: dict[str, Any], _: dict[str, Any]) -> dict[str, Any]:
        pem = (scene.federation.home / "identity" / "witness.pem").read_text()
        return {"records": [], "known": 10_000, "witness_pem": pem}

    mark = scene.site.home / "ledger.conflict"
    scene.site.stop()
    scene.aggregator.lies[SITE_WITNESS] = ahead
    try:
        scene.site.start()
        wait_for(mark.exists, "the mark of a conflict")
        with scene.nothing_charged():
            assert scene.refused("train", 5) == "privacy.ledger-rolled-back"
    finally:
        scene.aggregator.lies.clear()
    # A person looked: the ledger was whole. What is honest is served as before.
    scene.site.stop()
    mark.unlink()
    scene.site.start()
    scene.released("train", 5)
    assert scene.charges("training", 5) == 1


def test_everything_that_left_has_a_receipt_and_a_charge(scene: Scene, tmp_path: Path) -> None:
    scene.site("evidence", tmp_path / "evidence").data  # noqa: B018
    lines = (tmp_path / "evidence" / "receipts.jsonl").read_text().splitlines()
    releases = [json.loads(line)["release"] for line in lines]
    rounds = {(one["purpose"], one["round"]) for one in releases}
    assert len(rounds) == len(releases)
    assert {one["study"] for one in releases} == {scene.digests["approved"]}
    charged = {(row[2], row[3]) for row in scene.ledger() if row[1] == "charge"}
    assert rounds == charged
