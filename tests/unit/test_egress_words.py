"""Error replies and progress: fixed words and public facts leave, and nothing else does."""

from __future__ import annotations

import json
from typing import Any

from egress_samples import (
    Question,
    judge,
    plain_study,
    private_study,
    refused,
)
from flwr.app import Error
from hypothesis import given, settings
from hypothesis import strategies as st
from site_samples import JoinedSite

from consilium_client.egress import EgressGate, public_progress
from consilium_client.error_replies import PUBLIC_CODES, error_reason, listed_code
from consilium_client.flower_private_fleet import CRASHED_REASON
from consilium_client.store import StudyStore
from consilium_common.errors import ConsiliumError


def test_an_error_reply_leaves_with_a_listed_code_and_our_fixed_words_alone(
    gate: EgressGate,
) -> None:
    plain = error_reason(ConsiliumError("data.truncated", "Doe", where="Doe.dcm", hint="Doe"))
    assert "Doe" not in plain
    question = Question(plain_study())
    passed = judge(gate, question, Error(code=0, reason=plain))
    assert b"data.truncated" in passed.reply.body
    told = json.loads(plain)
    for reason in (
        "",
        "Traceback: patient Doe",
        "null",
        "[]",
        json.dumps({**told, "message": "patient Doe"}, sort_keys=True),
        json.dumps({**told, "extra": "Doe"}, sort_keys=True),
        json.dumps({**told, "code": "data.patient-doe-1970"}, sort_keys=True),
        plain + " ",
        json.dumps(told, sort_keys=True, indent=1),
    ):
        assert refused(lambda r=reason: judge(gate, question, Error(code=0, reason=r))), reason  # type: ignore[misc]


def test_a_code_that_is_not_listed_leaves_as_a_failed_site() -> None:
    assert "data.patient-doe" not in PUBLIC_CODES
    reason = error_reason(ConsiliumError("data.patient-doe", ""))
    assert listed_code(reason) == "run.site-failed"
    for code in PUBLIC_CODES:
        assert listed_code(error_reason(ConsiliumError(code, "any"))) == code


def test_a_crashed_task_is_told_of_in_our_words(gate: EgressGate) -> None:
    passed = judge(gate, Question(plain_study()), Error(code=8, reason=CRASHED_REASON))
    assert b"run.site-failed" in passed.reply.body
    assert refused(
        lambda: judge(gate, Question(plain_study()), Error(code=9, reason=CRASHED_REASON))
    )


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=60))
def test_no_words_of_a_task_pass_as_an_error(words: str) -> None:
    assert listed_code(words) is None


def test_progress_says_public_facts_alone(site: JoinedSite) -> None:
    store = StudyStore(site.home)
    plain, private = plain_study(), private_study()
    for study in (plain, private):
        store.decide(study, "approved", 20, "")
    honest = {"digest": plain.digest, "phase": "training", "round": 1, "step": 2, "steps": 8}
    quiet = {**honest, "digest": private.digest, "step": 0, "steps": 0}

    def public(value: Any) -> Any:
        return public_progress(json.dumps(value).encode(), store)

    assert public(honest) == honest
    assert public(quiet) == quiet
    for change in (
        {"note": "patient Doe"},
        {"phase": "Doe"},
        {"phase": ["training"]},
        {"round": 4},
        {"round": -1},
        {"round": 1.5},
        {"step": 9},
        {"steps": 10**9},
        {"digest": "d" * 64},
        {"digest": 5},
    ):
        assert public({**honest, **change}) is None, change
    assert public({**quiet, "step": 3, "steps": 8}) is None  # of a private study
    for content in (b"", b"Doe", b"[]", b"{}", b"\xff"):
        assert public_progress(content, store) is None
    # Withdrawn from in mid-round: the aggregator hears that the work has ended, and nothing else.
    store.decide(plain, "declined", 0, "an audit")
    assert public(honest) == {**honest, "phase": "failed", "step": 0, "steps": 0}
    assert public({**honest, "round": 4}) is None
