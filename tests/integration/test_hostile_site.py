"""A hostile member against a real aggregator: it hurts itself, is named, and nobody else is hurt.

It holds a site's own, valid certificate and keys, and speaks the wire by hand.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from egress_samples import reference
from federation import Federation, add_hospitals, small_study, wait_for
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hostile import Hostile, Refused, Task, give_up

from consilium_common.demo.hospitals import NAMES
from consilium_common.errors import ConsiliumError
from consilium_common.flower_bundle import bundle_hash
from consilium_common.identity.keys import new_signing_key
from consilium_common.ledger.entries import _signed_message
from consilium_common.models.weights import pack, unpack
from consilium_common.wire.messages import Reference, to_server
from consilium_common.wire.methods import SITE_STUDIES, SITE_WITNESS

HONEST, HOSTILE = NAMES[1], NAMES[2]
#: All that the replies to a site's last four messages may have together.
ALLOWANCE = 4 * 2 * 1024 * 1024


# --- what it does in each round ------------------------------------------------------------------


def changed(hostile: Hostile, task: Task, change: Callable[[dict[str, Any]], None]) -> RecordDict:
    tensors = dict(unpack(task.weights))
    change(tensors)
    return hostile.updated(task, pack(tensors))


def honestly(hostile: Hostile, task: Task) -> None:
    hostile.earlier = hostile.send(task, hostile.updated(task, task.weights))


def misshaped(hostile: Hostile, task: Task) -> None:
    def grow(tensors: dict[str, Any]) -> None:
        name = next(iter(tensors))
        tensors[name] = np.zeros((*tensors[name].shape, 3), np.float32)

    hostile.send(task, changed(hostile, task, grow))


def scalars(hostile: Hostile, task: Task) -> None:
    """One number for each tensor: what is added carelessly is broadcast."""

    def shrink(tensors: dict[str, Any]) -> None:
        for name in tensors:
            tensors[name] = np.ones((1,), np.float32)

    hostile.send(task, changed(hostile, task, shrink))


def further_tensors(hostile: Hostile, task: Task) -> None:
    hostile.send(task, changed(hostile, task, lambda t: t.update(more=np.zeros(1000, np.float32))))


def garbage(hostile: Hostile, task: Task) -> None:
    hostile.send(task, hostile.updated(task, bytes(range(256)) * 40))


def nothing_behind_the_name(hostile: Hostile, task: Task) -> None:
    """Name an update that was never delivered."""
    hostile.send(task, to_server(reference(task.weights), None))


def another_behind_the_name(hostile: Hostile, task: Task) -> None:
    """Deliver something under another's name, more than announced, and more than there may be."""
    named = reference(task.weights)
    for content, announced, code in (
        (bytes(named.bytes), named, "run.bad-update"),
        (task.weights + b"x", named, "run.bad-update"),
        (b"", Reference(named.sha256, 10**9), "run.not-expected"),
        (b"", Reference("a" * 64, 10**9), "run.not-expected"),
    ):
        with pytest.raises(Refused, match=f"^{code}$"):
            hostile.deliver(task.study, content, named=announced)
    with pytest.raises(Refused, match=r"^run\.no-model$"):
        hostile.fetch(task.study, Reference("b" * 64, 5))
    with pytest.raises(Refused, match=r"^study\.not-approved$"):
        hostile.deliver("f" * 64, task.weights)
    hostile.send(task, to_server(named, None))


def another_form(hostile: Hostile, task: Task) -> None:
    array = Array(dtype="object", shape=(3,), stype="numpy.ndarray", data=b"\x80\x04cos\nsystem\n")
    records = {"model": ArrayRecord({"weights": array}), "settings": ConfigRecord({"study": "x"})}
    hostile.send(task, RecordDict({**records, "figures": MetricRecord({"loss": -1e300})}))


def replay(hostile: Hostile, task: Task) -> None:
    """Answer with what it sent two rounds ago, word for word."""
    old = hostile.earlier
    assert old is not None
    with contextlib.suppress(Refused):
        hostile.push(task, old, hostile.announce(old))
    give_up(hostile, task)


def in_another_name(hostile: Hostile, task: Task) -> None:
    other = hostile.other
    reply = hostile.reply(task, to_server(reference(task.weights), None))
    reply.request.node.node_id = other
    with pytest.raises(Refused, match=r"^identity\.refused$"):
        hostile.announce(reply)
    reply = hostile.reply(task, to_server(reference(task.weights), None))
    reply.request.messages_list[0].metadata.src_node_id = other
    with pytest.raises(Refused, match=r"^identity\.refused$"):
        hostile.announce(reply)
    give_up(hostile, task)


def twice(hostile: Hostile, task: Task) -> None:
    """Answer, and then answer something else."""
    hostile.send(task, hostile.updated(task, task.weights))
    with contextlib.suppress(Refused):
        # Its file stays here: one that came would take the place of the first, at its own cost.
        negative = pack({name: -tensor for name, tensor in unpack(task.weights).items()})
        hostile.send(task, to_server(reference(negative), None))


def endless(hostile: Hostile, task: Task) -> None:
    """Send a reply without end: it stops at what so small a question may have for an answer."""
    named = to_server(reference(task.weights), {"loss": 1.0})
    response = hostile.announce(hostile.reply(task, named))
    sent = 0
    with pytest.raises(Refused) as caught:
        while sent < 2 * ALLOWANCE:
            content = sent.to_bytes(8, "big") + bytes(200_000)
            hostile.fleet(
                "PushObject",
                node={"node_id": hostile.node},
                run_id=task.asked.run_id,
                object_id=hashlib.sha256(content).hexdigest(),
                object_content=content,
                session_id=response.session_id,
            )
            sent += len(content)
    hostile.stopped_at = (sent, caught.value.code)


#: Never three failures running: that is another matter, and has the site benched.
ROUNDS: list[tuple[Callable[[Hostile, Task], None], str]] = [
    (honestly, ""),
    (misshaped, "run.bad-update"),
    (replay, "run.site-failed"),
    (honestly, ""),
    (scalars, "run.bad-update"),
    (further_tensors, "run.bad-update"),
    (honestly, ""),
    (garbage, "run.bad-update"),
    (nothing_behind_the_name, "run.bad-update"),
    (honestly, ""),
    (another_behind_the_name, "run.bad-update"),
    (another_form, "run.bad-message"),
    (honestly, ""),
    (in_another_name, "run.site-failed"),
    (twice, ""),
    (endless, "no reply before the deadline"),
]


#: The first test waits for the whole besieged study.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with Federation(tmp_path_factory.mktemp("hostile")) as running:
        add_hospitals(running, (HONEST, HOSTILE))
        running.sites[HOSTILE].stop()
        yield running


@pytest.fixture(scope="module")
def hostile(consortium: Federation) -> Iterator[Hostile]:
    with Hostile(consortium, consortium.sites[HOSTILE]) as found:
        node = json.loads((consortium.sites[HONEST].home / "run" / "node.json").read_text())
        found.other = node["node_id"]
        yield found


def log_of(consortium: Federation) -> str:
    assert consortium.running is not None
    return consortium.running.output


@pytest.fixture(scope="module")
def found(consortium: Federation, hostile: Hostile) -> dict[str, Any]:
    """A study to its end, in each round of which the hostile member does something else."""
    federation = {"rounds": len(ROUNDS), "quorum": 1, "deadline_seconds": 25.0}
    digest = consortium.propose(
        small_study("besieged", federation=federation, evaluation={"release": "none"})
    )
    consortium.approve(digest, HONEST, HOSTILE)
    consortium.study("run", digest).data  # noqa: B018

    def serve() -> bool:
        try:
            task = hostile.task()
        except Refused:
            task = None  # the run has ended meanwhile
        if task is not None and task.kind == "train":
            ROUNDS[task.round][0](hostile, task)
        elif task is not None:
            give_up(hostile, task)
        return consortium.show(digest)["state"] != "running"

    wait_for(serve, "the study's end", timeout=280, pause=0.3)
    return consortium.show(digest)


def test_the_study_finishes_with_every_round_of_the_honest_site(found: dict[str, Any]) -> None:
    assert found["state"] == "finished", found["reason"]
    assert [row["number"] for row in found["rounds"]] == list(range(len(ROUNDS)))
    assert all(HONEST in row["sites"] for row in found["rounds"])
    assert all(HONEST not in row["dropped"] for row in found["rounds"])


@pytest.mark.parametrize("number", range(len(ROUNDS)), ids=lambda n: ROUNDS[n][0].__name__)
def test_what_a_hostile_site_sends_is_left_out_and_it_is_named(
    found: dict[str, Any], number: int
) -> None:
    row, expected = found["rounds"][number], ROUNDS[number][1]
    if expected:
        assert HOSTILE not in row["sites"]
        assert row["dropped"][HOSTILE].startswith(expected), row["dropped"]
    else:
        # The control: what is sound in form is taken, once.
        assert sorted(row["sites"]) == sorted((HONEST, HOSTILE))


def test_a_second_answer_to_one_question_is_never_counted(
    consortium: Federation, hostile: Hostile, found: dict[str, Any]
) -> None:
    with sqlite3.connect(f"file:{consortium.home / 'registry.db'}?mode=ro", uri=True) as database:
        rows = database.execute(
            "SELECT round, count(*) FROM received WHERE site = ? AND study = ? GROUP BY round",
            (HOSTILE, found["digest"]),
        ).fetchall()
    assert rows == [(number, 1) for number, (_, expected) in enumerate(ROUNDS) if not expected]


def test_a_reply_without_end_stops_at_the_site_s_allowance(
    hostile: Hostile, found: dict[str, Any]
) -> None:
    assert found["state"] == "finished"
    sent, code = hostile.stopped_at
    assert sent < ALLOWANCE
    assert code == "network.too-much"


def test_a_reply_in_another_s_name_is_in_the_log(
    consortium: Federation, found: dict[str, Any]
) -> None:
    assert found["state"] == "finished"
    lines = [line for line in log_of(consortium).splitlines() if "identity.foreign-node" in line]
    assert lines
    assert all(f"refused site {HOSTILE} " in line for line in lines)


# --- beside the rounds ---------------------------------------------------------------------------


def head(hostile: Hostile, sequence: int, entry_hash: str, key: Any = None) -> dict[str, Any]:
    signature = (key or hostile.signer).sign(_signed_message(entry_hash)).hex()
    return {"sequence": sequence, "hash": entry_hash, "signature": signature}


def witnessed(hostile: Hostile, *heads: dict[str, Any]) -> str:
    try:
        hostile.caller.call(SITE_WITNESS, {"heads": list(heads)})
    except ConsiliumError as error:
        return error.code
    return ""


def test_forged_and_rewritten_ledger_heads_raise_an_alarm_about_their_site_alone(
    consortium: Federation, hostile: Hostile
) -> None:
    known = hostile.caller.call(SITE_WITNESS, {"heads": []})["known"]
    assert known >= 0
    other = "a" * 64
    assert witnessed(hostile, head(hostile, 0, other, new_signing_key())) == (
        "privacy.witness-signature"
    )
    assert witnessed(hostile, head(hostile, known + 5, other)) == "privacy.witness-gap"
    assert witnessed(hostile, {"sequence": -1, "hash": other, "signature": "b" * 128}) == (
        "privacy.witness-form"
    )
    assert consortium_alarms(consortium) == {}
    # Its own key, its own ledger, another history: rolled back and written anew.
    assert witnessed(hostile, head(hostile, known, other)) == "privacy.witness-conflict"
    alarms = consortium_alarms(consortium)
    assert set(alarms) == {HOSTILE}
    assert [alarm["code"] for alarm in alarms[HOSTILE]] == ["privacy.witness-conflict"]
    # And what was witnessed stays.
    assert hostile.caller.call(SITE_WITNESS, {"heads": []})["known"] == known


def consortium_alarms(consortium: Federation) -> dict[str, list[dict[str, str]]]:
    rows = consortium.server("sites").data["sites"]
    return {row["name"]: row["alarms"] for row in rows if row["alarms"]}


def test_it_can_push_no_code(hostile: Hostile) -> None:
    for name in ("StartRun", "PushFab", "ListNodes"):
        with pytest.raises(Refused, match="UNIMPLEMENTED"):
            hostile.call(name, b"")


def run_of(consortium: Federation, digest: str) -> int:
    """Return the running study's run as Flower names it; 0 before there is one."""
    with sqlite3.connect(f"file:{consortium.home / 'registry.db'}?mode=ro", uri=True) as database:
        (run,) = database.execute(
            "SELECT flower_run FROM studies WHERE digest = ?", (digest,)
        ).fetchone()
    return int(run or 0)


def trespass(consortium: Federation, hostile: Hostile, digest: str) -> None:
    """Try what a member might of a study that was proposed to another alone, its run known."""
    run = {"node": {"node_id": hostile.node}, "run_id": run_of(consortium, digest)}
    assert run["run_id"]
    assert digest not in json.dumps(hostile.caller.call(SITE_STUDIES, {}))
    for call, values in (
        ("GetRun", {}),
        ("GetFab", {"hash_str": bundle_hash()}),
        ("PullObject", {"object_id": "f" * 64}),
        ("ConfirmMessageReceived", {"message_object_id": "f" * 64}),
    ):
        with pytest.raises(Refused, match=r"^run\.not-expected$"):
            hostile.fleet(call, **run, **values)
    content = b"x" * 1000
    for reach in (
        lambda: hostile.fetch(digest, reference(content)),
        lambda: hostile.deliver(digest, content),
    ):
        with pytest.raises(Refused, match=r"^study\.not-approved$"):
            reach()
    assert consortium.show(digest)["state"] == "running"


def test_the_honest_site_goes_on_alone_and_nobody_else_is_in_its_study(
    consortium: Federation, hostile: Hostile, found: dict[str, Any], tmp_path: Path
) -> None:
    assert found["state"] == "finished"
    path = tmp_path / "study.yaml"
    federation = {"rounds": 12, "quorum": 1}
    path.write_text(yaml.safe_dump(small_study("afterwards", federation=federation)))
    digest = consortium.study("propose", path, "--site", HONEST).data["digest"]
    consortium.approve(digest, HONEST)
    consortium.study("run", digest).data  # noqa: B018
    # Before its rounds begin, Flower answers nobody about a run.
    consortium.wait_until(digest, lambda data: bool(data["rounds"]), "the first round")
    trespass(consortium, hostile, digest)
    after = consortium.study("watch", digest).data
    assert [row["sites"] for row in after["rounds"]] == [[HONEST]] * 12
    assert all(row["dropped"] == {} for row in after["rounds"])
    assert consortium.running is not None
    assert not consortium.running.ended()
