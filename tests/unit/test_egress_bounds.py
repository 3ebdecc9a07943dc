"""What the policy approved by itself leaves within the policy's bounds, to the last piece."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable
from itertools import chain, repeat
from typing import Any

import pytest
from budget_samples import policy
from egress_samples import (
    DECLARED,
    NAME,
    Question,
    SuperLink,
    SuperNode,
    charge,
    converse,
    judge,
    private_study,
    reference,
    refused,
    update_of,
    update_reply,
)
from site_samples import JoinedSite

from consilium_client.budget.policy import default_policy_text
from consilium_client.budget.policy_automatic import Asked
from consilium_client.egress import EgressGate
from consilium_client.link import Link
from consilium_client.store import StudyStore
from consilium_common.study import Study
from consilium_common.wire.messages import to_server

RULE: dict[str, Any] = {
    "operators": ["op"],
    "tasks": ["segmentation"],
    "epsilon_per_study": 1.0,
    "hours": "20:00-06:00",
}
NIGHT = dt.datetime(2026, 3, 2, 5, 59, 59)
MORNING = dt.datetime(2026, 3, 2, 6, 0)


def with_rule(site: JoinedSite, **changes: Any) -> None:
    rules = policy(approve_automatically={**RULE, **changes})
    site.home.policy.write_text(default_policy_text(rules))


@pytest.fixture
def study() -> Study:
    return private_study()


@pytest.fixture
def blob(site: JoinedSite, study: Study) -> bytes:
    """A round's update, stored and charged under an approval by the policy."""
    with_rule(site)
    store = StudyStore(site.home)
    store.decide(study, "approved", 20, "", automatic=Asked("op", "segmentation", 1.0))
    content = update_of(study)
    kept = store.keep_update(study.digest, 0, content, {})
    charge(site, study, kept.sha256)
    return content


def gate_at(site: JoinedSite, clock: Callable[[], dt.datetime]) -> EgressGate:
    return EgressGate(site.home, NAME, lambda: site.signer, DECLARED, clock=clock)


def test_what_was_stored_within_the_hours_leaves_within_them_alone(
    site: JoinedSite, study: Study, blob: bytes
) -> None:
    now = [MORNING]
    gate = gate_at(site, lambda: now[0])
    content = to_server(reference(blob), None)
    assert refused(lambda: judge(gate, Question(study), content), "study.outside-hours")
    assert not site.home.receipts.exists()  # what does not leave has none
    now[0] = NIGHT
    passed = judge(gate, Question(study), content)
    gate.require_standing(passed)
    now[0] = MORNING  # in mid-delivery
    assert refused(lambda: gate.require_standing(passed), "study.outside-hours")
    now[0] = NIGHT + dt.timedelta(days=1)
    gate.require_standing(passed)
    again = judge(gate, Question(study, created_at=1.9e9 + 9), content)
    assert again.receipt == passed.receipt


def test_a_bound_that_was_narrowed_holds_for_what_was_stored_before(
    site: JoinedSite, study: Study, blob: bytes
) -> None:
    gate = gate_at(site, lambda: NIGHT)
    content = to_server(reference(blob), None)
    passed = judge(gate, Question(study), content)
    for changed, code in (
        ({"epsilon_per_study": 0.5}, "study.automatic-bounds"),
        ({"operators": ["al"]}, "study.automatic-bounds"),
        ({"days": ["friday"]}, "study.outside-hours"),
    ):
        with_rule(site, **changed)
        assert refused(lambda: gate.require_standing(passed), code)
        assert refused(lambda: judge(gate, Question(study), content), code)
    site.home.policy.write_text(default_policy_text(policy()))
    assert refused(lambda: gate.require_standing(passed), "study.automatic-ended")
    site.home.policy.write_text("nonsense: [")
    assert refused(lambda: judge(gate, Question(study), content), "privacy.policy-invalid")
    # A person's approval has no such bound.
    StudyStore(site.home).decide(study, "approved", 20, "")
    assert judge(gate, Question(study), content).receipt == passed.receipt


def test_at_the_end_of_the_hours_an_error_leaves_and_the_update_when_it_is_asked_for_again(
    site: JoinedSite, study: Study, blob: bytes
) -> None:
    first, second = Question(study), Question(study, created_at=1.9e9 + 5)
    superlink = SuperLink(first, second)
    # Judged at night; the hours end before the first piece is sent.
    times = chain([NIGHT, MORNING], repeat(NIGHT))

    async def talk(node: SuperNode, link: Link) -> None:
        link._gate._clock = lambda: next(times)
        await node.take(first)
        assert await node.send(update_reply(first, blob)) == [403]
        assert superlink.files == {}
        await node.take(second)
        assert set(await node.send(update_reply(second, blob))) == {200}

    (said,) = converse(site, superlink, talk)
    assert "outside its hours" in said
    error, reply = (one.messages_list[0] for one in superlink.replies)
    assert json.loads(error.error.reason)["code"] == "study.outside-hours"
    assert not reply.HasField("error")
    assert list(superlink.files.values()) == [blob]
