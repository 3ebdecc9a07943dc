"""Nothing passes the gate that was not asked, approved, stored, well-formed and charged."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from egress_samples import (
    DECLARED,
    FIGURES,
    FLAT,
    NODE,
    Question,
    Reply,
    charge,
    evaluated,
    evaluating_study,
    exact_study,
    gate_of,
    judge,
    plain_study,
    private_study,
    reference,
    refused,
    trained,
    update_of,
    update_reply,
)
from flwr.app import Error
from hypothesis import given, settings
from hypothesis import strategies as st
from site_samples import JoinedSite, joined_site

from consilium_client.budget.policy import write_default_policy
from consilium_client.declared import Apart, declared
from consilium_client.egress import EgressGate, Passed, permitted_figures
from consilium_client.error_replies import error_reason
from consilium_client.store import StudyStore
from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.ledger.store import Ledger
from consilium_common.models.compression import check_encoded
from consilium_common.models.registry import trained_specs
from consilium_common.models.weights import pack
from consilium_common.study import Study
from consilium_common.wire.messages import to_server

# --- what was asked and approved ----------------------------------------------------------------


def test_a_reply_needs_an_approved_study_and_what_was_stored_for_the_round_asked(
    site: JoinedSite, gate: EgressGate
) -> None:
    study = plain_study()
    blob = update_of(study)
    question = Question(study)
    assert refused(
        lambda: judge(gate, question, to_server(reference(blob), None)), "study.not-approved"
    )
    StudyStore(site.home).decide(study, "approved", 20, "")
    assert refused(lambda: judge(gate, question, to_server(reference(blob), None)))
    trained(site, study)
    assert judge(gate, question, to_server(reference(blob), None)).receipt is not None
    later = Question(study, number=1)
    assert refused(lambda: judge(gate, later, to_server(reference(blob), None)))


def test_a_study_that_is_declined_meanwhile_sends_no_more(
    site: JoinedSite, gate: EgressGate
) -> None:
    study = plain_study()
    content = to_server(reference(trained(site, study)), None)
    store = StudyStore(site.home)
    before = judge(gate, Question(study), content)
    gate.require_standing(before)
    store.decide(study, "declined", 0, "no")
    question = Question(study, created_at=1.9e9 + 1)
    assert refused(lambda: judge(gate, question, content), "study.not-approved")
    assert refused(lambda: gate.require_standing(before), "study.withdrawn")
    # What was on its way stays withheld, however soon the site takes part again.
    store.decide(study, "approved", 20, "")
    assert refused(lambda: gate.require_standing(before), "study.decided-anew")
    assert refused(lambda: judge(gate, question, content), "study.withheld")


def test_a_message_that_asks_for_no_round_gets_an_error_reply_at_most(
    site: JoinedSite, gate: EgressGate
) -> None:
    from flwr.app import ConfigRecord

    study = plain_study()
    blob = trained(site, study)
    twice = Question(study).message.content
    twice["more"] = ConfigRecord({"study": "x"})
    for content in (to_site_without_instructions(), twice):
        question = Question(study, content=content)
        assert refused(lambda q=question: judge(gate, q, to_server(reference(blob), None)))  # type: ignore[misc]
        error = Error(code=0, reason=error_reason(ConsiliumError("run.bad-message", "")))
        assert judge(gate, question, error).receipt is None


def to_site_without_instructions() -> Any:
    from flwr.app import ArrayRecord, RecordDict

    return RecordDict({"model": ArrayRecord()})


def test_one_message_has_one_reply_and_the_same_one_again(
    site: JoinedSite, gate: EgressGate
) -> None:
    study = evaluating_study()
    evaluated(site, study, FIGURES)
    asked = Question(study, "evaluate")
    known = asked.asked()

    def send(content: Any) -> Passed:
        return gate.judge(known, Reply(asked, content).announced(), NODE)

    first = send(to_server(None, FIGURES))
    assert send(to_server(None, FIGURES)) == first
    assert refused(lambda: send(to_server(None, None)))
    assert refused(
        lambda: send(Error(code=0, reason=error_reason(ConsiliumError("run.round", ""))))
    )
    assert gate.instead(known, ConsiliumError("run.round", ""), NODE) is None


# --- what the study declares --------------------------------------------------------------------


def forged(study: Study) -> dict[str, bytes]:
    """Return blobs that a compromised training process might store in an update's place."""
    honest = update_of(study)
    tensors = {s.name: np.full(s.shape, FLAT, np.float32) for s in trained_specs(study)}
    first = next(iter(tensors))
    length = int.from_bytes(honest[:8], "little")
    header = json.loads(honest[8 : 8 + length])

    def rewritten(header: dict[str, Any], body: bytes) -> bytes:
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + body

    body = honest[8 + length :]
    pixels = np.zeros(tensors[first].size + 1, np.float32)
    nan = np.frombuffer(np.uint32(0x7FC0_1234).tobytes(), "<f4")[0]
    return {
        "pixels as weights": pack({**tensors, first: pixels}),
        "a tensor beside them": pack({**tensors, "pixels": pixels}),
        "a tensor less": pack({name: t for name, t in tensors.items() if name != first}),
        "another name": pack({("x" if n == first else n): t for n, t in tensors.items()}),
        "a NaN with a message": pack({**tensors, first: np.full_like(tensors[first], nan)}),
        "infinity": pack({**tensors, first: np.full_like(tensors[first], np.inf)}),
        "metadata": rewritten({"__metadata__": {"patient": "Doe"}, **header}, body),
        "another order": rewritten(dict(reversed(header.items())), body),
        "bytes at the end": honest + b"Doe",
        "spaces in the header": rewritten(
            {name: {**one, "shape": [*one["shape"]]} for name, one in header.items()}, body + b"\0"
        ),
        "half of it": honest[: len(honest) // 2],
        "no tensors": b"a list of patients",
        "nothing": b"",
    }


@pytest.mark.parametrize("study", [plain_study(), private_study()], ids=["plain", "private"])
def test_an_update_of_another_form_never_leaves_though_it_was_stored_and_charged(
    tmp_path: Path, study: Study
) -> None:
    for number, (what, blob) in enumerate(forged(study).items()):
        site = joined_site(tmp_path / str(number))
        store = StudyStore(site.home)
        store.decide(study, "approved", 20, "")
        kept = store.keep_update(study.digest, 0, blob, {})
        if study.privacy.mode == "patient":
            charge(site, study, kept.sha256)
        gate = gate_of(site)
        named = reference(blob or b"something")
        assert refused(lambda g=gate, n=named: judge(g, Question(study), to_server(n, None))), what  # type: ignore[misc]
        assert not site.home.receipts.exists(), what


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_an_update_with_any_byte_changed_in_its_header_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    study, file = plain_study(), tmp_path_factory.getbasetemp() / "update.safetensors"
    specs = DECLARED.of(study).tensors
    honest = update_of(study)
    file.write_bytes(honest)
    check_encoded(study, specs, file)
    length = 8 + int.from_bytes(honest[:8], "little")
    at = data.draw(st.integers(0, length - 1))
    other = data.draw(st.integers(0, 255).filter(lambda value: value != honest[at]))
    file.write_bytes(honest[:at] + bytes([other]) + honest[at + 1 :])
    assert refused(lambda: check_encoded(study, specs, file), "run.bad-update")


def test_the_link_learns_what_a_study_declares_from_a_process_of_its_own() -> None:
    apart = Apart()
    try:
        # One process for all studies: it imports torch once.
        for study in (evaluating_study(), plain_study()):
            assert apart(study) == declared(study)
    finally:
        apart.end()
    assert set(declared(evaluating_study()).events) == {"training", "evaluation"}
    assert declared(plain_study()).events == {}


# --- what the ledger has charged ----------------------------------------------------------------


def test_a_private_update_leaves_only_as_the_ledger_released_it(
    site: JoinedSite, gate: EgressGate
) -> None:
    study = private_study()
    store = StudyStore(site.home)
    store.decide(study, "approved", 20, "")
    blob = update_of(study)
    kept = store.keep_update(study.digest, 0, blob, {})
    content = to_server(reference(blob), None)
    assert refused(lambda: judge(gate, Question(study), content))  # no ledger yet
    charge(site, study, None)
    assert refused(lambda: judge(gate, Question(study), content))  # charged and not released
    with Ledger.open(site.home.ledger, site.signer, site="north-clinic") as ledger:
        found = ledger.find_charge(study.digest, 0)
        assert found is not None
        ledger.release(found, kept.sha256)
    passed = judge(gate, Question(study), content)
    assert passed.receipt is not None
    assert passed.receipt.release.event is not None
    assert passed.receipt.release.event.hash == found.entry.hash


def test_a_private_update_other_than_the_released_one_is_refused(
    site: JoinedSite, gate: EgressGate
) -> None:
    study = private_study()
    store = StudyStore(site.home)
    store.decide(study, "approved", 20, "")
    blob = update_of(study, 0.5)
    store.keep_update(study.digest, 0, blob, {})
    charge(site, study, hashlib.sha256(update_of(study)).hexdigest())
    assert refused(lambda: judge(gate, Question(study), to_server(reference(blob), None)))


def test_a_charge_for_another_mechanism_than_the_study_s_pays_for_nothing(
    site: JoinedSite, gate: EgressGate
) -> None:
    study = private_study()
    cheaper = Study.model_validate(
        {
            **study.to_canonical(),
            "privacy": {**study.to_canonical()["privacy"], "noise_multiplier": 50.0},
        }
    )
    store = StudyStore(site.home)
    store.decide(study, "approved", 20, "")
    blob = update_of(study)
    kept = store.keep_update(study.digest, 0, blob, {})
    event = declared(cheaper).events["training"]
    with Ledger.open(site.home.ledger, site.signer, site="north-clinic") as ledger:
        entry = ledger.charge(
            study=study.digest,
            round_index=0,
            event=event,
            clip_norm=1.0,
            delta=1e-3,
            patients=["0" * 32],
        )
        ledger.release(entry, kept.sha256)
    assert refused(lambda: judge(gate, Question(study), to_server(reference(blob), None)))


def test_a_reply_holds_the_stored_update_and_nothing_else(
    site: JoinedSite, gate: EgressGate
) -> None:
    study = private_study()
    blob = trained(site, study)
    for content in (
        to_server(reference(update_of(study, 0.5)), None),
        to_server(replace(reference(blob), bytes=len(blob) + 1), None),
        to_server(reference(blob), {"loss": 0.25}),
        to_server(None, {"loss": 0.25}),
        to_server(None, None),
        with_records(to_server(reference(blob), None)),
    ):
        assert refused(lambda c=content: judge(gate, Question(study), c))  # type: ignore[misc]
        # Called an evaluation it leaves no more than called an update.
        if content:
            assert refused(lambda c=content: judge(gate, Question(study, "evaluate"), c))  # type: ignore[misc]
    assert not site.home.receipts.exists()


def test_the_length_that_leaves_is_the_file_s_whatever_the_store_was_made_to_say(
    site: JoinedSite, gate: EgressGate
) -> None:
    study = plain_study()
    blob = trained(site, study)
    with sqlite3.connect(site.home.studies) as db:
        db.execute("UPDATE updates SET bytes = 19700101")
    lie = to_server(replace(reference(blob), bytes=19700101), None)
    assert refused(lambda: judge(gate, Question(study), lie))
    passed = judge(gate, Question(study), to_server(reference(blob), None))
    assert passed.update == reference(blob)
    assert passed.receipt is not None and passed.receipt.release.bytes == len(blob)


def test_a_reply_s_file_is_the_stored_one_and_figures_alone_have_none(
    site: JoinedSite, gate: EgressGate
) -> None:
    study = evaluating_study()
    evaluated(site, study, FIGURES)
    passed = judge(gate, Question(study, "evaluate"), to_server(None, FIGURES))
    assert (passed.file, passed.update) == (None, None)
    blob = trained(site, study)
    passed = judge(gate, Question(study), to_server(reference(blob), None))
    assert passed.file is not None and passed.file.read_bytes() == blob
    assert passed.file.parent == site.home.releases


def with_records(content: Any) -> Any:
    from flwr.app import ConfigRecord

    content["notes"] = ConfigRecord({"patient": "Doe"})
    return content


# --- figures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("study", [private_study(), evaluating_study(), plain_study()])
def test_an_evaluation_without_figures_passes_and_releases_nothing(
    site: JoinedSite, gate: EgressGate, study: Study
) -> None:
    StudyStore(site.home).decide(study, "approved", 20, "")
    assert judge(gate, Question(study, "evaluate"), to_server(None, None)).receipt is None
    assert refused(lambda: judge(gate, Question(study, "evaluate"), to_server(None, FIGURES)))


def test_noised_figures_leave_only_as_the_ledger_released_them(
    site: JoinedSite, gate: EgressGate
) -> None:
    study = evaluating_study()
    evaluated(site, study, FIGURES)
    asked = Question(study, "evaluate")
    assert judge(gate, asked, to_server(None, FIGURES)).receipt is not None
    for other in (
        {"sum": 1.0625000000000002},
        {**FIGURES, "cases": 3.0},
        {"total": 1.0625},
        {"sum": 1},
    ):
        assert refused(lambda o=other: judge(gate, asked, to_server(None, o))), other  # type: ignore[misc]
    blob = update_of(study)
    assert refused(lambda: judge(gate, asked, to_server(reference(blob), FIGURES)))


@pytest.mark.parametrize(
    "content",
    [
        canonical_json({"sum": 1.0, "patient Doe, born 1970": 1.0}),
        canonical_json({"x" * 10_000: 1.0}),
        b'{"sum":NaN}',
        b'{"sum":1e999}',
        b'{"sum": 1.0}',
        b'{"sum":1.0,"sum":2.0}',
        b'{"sum":"Doe"}',
        b'{"sum":[1.0]}',
        b'{"sum":1}',
        b"[1.0]",
        b"Doe",
        b"",
    ],
)
def test_charged_figures_of_another_form_never_leave(
    site: JoinedSite, gate: EgressGate, content: bytes
) -> None:
    study = evaluating_study()
    store = StudyStore(site.home)
    store.decide(study, "approved", 20, "")
    kept = store.keep_update(study.digest, 0, content, FIGURES, purpose="evaluation")
    charge(site, study, kept.sha256, "evaluation")
    assert refused(lambda: judge(gate, Question(study, "evaluate"), to_server(None, FIGURES)))


def test_exact_figures_leave_as_the_study_names_them_and_where_the_policy_permits(
    site: JoinedSite, gate: EgressGate
) -> None:
    study = exact_study()
    figures = dict.fromkeys(sorted(permitted_figures(study, "evaluation")), 2.0)
    assert set(figures) == {"cases", "dice.organ.total", "dice.organ.count"}
    evaluated(site, study, figures)
    asked = Question(study, "evaluate")
    write_default_policy(site.home)
    permission = "release_exact_metrics: {}"
    text = site.home.policy.read_text()
    assert permission.format("false") in text
    assert refused(lambda: judge(gate, asked, to_server(None, figures)))
    site.home.policy.write_text(text.replace(permission.format("false"), permission.format("true")))
    assert judge(gate, asked, to_server(None, figures)).receipt is not None


# --- receipts -----------------------------------------------------------------------------------


def test_what_left_once_cannot_be_exchanged_for_something_else(
    site: JoinedSite, gate: EgressGate
) -> None:
    study = plain_study()
    blob = trained(site, study)
    judge(gate, Question(study), to_server(reference(blob), None))
    other = update_of(study, 0.5)
    (path,) = site.home.releases.iterdir()
    path.write_bytes(other)
    with sqlite3.connect(site.home.studies) as db:
        db.execute("UPDATE updates SET sha256 = ?", (hashlib.sha256(other).hexdigest(),))
    again = Question(study, created_at=1.9e9 + 9)
    assert refused(
        lambda: judge(gate, again, to_server(reference(other), None)), "privacy.second-release"
    )
    assert update_reply(again, other).announced().children  # it was announced as it stands
