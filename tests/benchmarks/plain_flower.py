"""Plain Flower's side of the aggregation benchmark: a round of ``FedAvg.start`` over its own grid.

The grid is Flower's ``HttpGrid`` with all of its own pushing, pulling and inflating. In the place
of the client that speaks HTTP with the SuperLink stands one that answers from files, whose bytes
are those of the SuperLink's answers: no socket, no TLS, no authentication, no waiting. Each reply
is pulled object by object, parsed, and inflated, as in any run of Flower.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import (
    GetNodesRequest,
    GetNodesResponse,
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PushAppMessagesRequest,
    PushAppMessagesResponse,
)
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from consilium_common.models.tensor_files import TensorFile

_RUN = 1


def _be_a_task() -> None:
    """Be what Flower makes messages in."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = _RUN


def _arrays(path: Path) -> ArrayRecord:
    file = TensorFile(path)
    return ArrayRecord({spec.name: Array(file.tensor(spec.name)) for spec in file.specs})


def prepare(folder: Path, updates: list[Path]) -> None:
    """Write what the SuperLink would answer when the updates have come as Flower's replies."""
    _be_a_task()
    answers = folder / "flower"
    answers.mkdir()
    for index, update in enumerate(updates):
        asked = Message(RecordDict(), dst_node_id=index + 1, message_type="train")
        metrics = MetricRecord({"num-examples": 1.0 + index})
        reply = Message(RecordDict({"arrays": _arrays(update), "metrics": metrics}), reply_to=asked)
        for name, part in get_all_nested_objects(reply).items():
            answer = PullObjectResponse(
                object_found=True, object_available=True, object_content=part.deflate()
            )
            (answers / name).write_bytes(answer.SerializeToString())
        tree = get_object_tree(reply)
        reply.metadata.__dict__["_message_id"] = tree.object_id
        head = message_to_proto(reply)
        head.ClearField("content")
        answer = PullAppMessagesResponse(messages_list=[head], message_object_trees=[tree])
        (answers / f"reply-{index:03d}").write_bytes(answer.SerializeToString())


class _Answers:
    """Answers as the SuperLink does, from files; the way there and back costs nothing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._replies = sorted(folder.glob("reply-*"))

    def GetNodes(self, request: GetNodesRequest) -> GetNodesResponse:
        nodes = range(1, len(self._replies) + 1)
        return GetNodesResponse(nodes=[NodeInfo(node_id=number) for number in nodes])

    def PushMessages(self, request: PushAppMessagesRequest) -> PushAppMessagesResponse:
        trees = request.message_object_trees
        return PushAppMessagesResponse(
            message_ids=[tree.object_id for tree in trees],
            objects_to_push={one.object_id for tree in trees for one in iterate_object_tree(tree)},
        )

    def PushObject(self, request: PushObjectRequest) -> PushObjectResponse:
        return PushObjectResponse(stored=True)

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:
        found = PullAppMessagesResponse()
        for path in self._replies:
            found.MergeFromString(path.read_bytes())
        return found

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:
        return PullObjectResponse.FromString((self._folder / request.object_id).read_bytes())

    def ConfirmMessageReceived(
        self, request: ConfirmMessageReceivedRequest
    ) -> ConfirmMessageReceivedResponse:
        return ConfirmMessageReceivedResponse()

    def close(self) -> None:
        """Nothing is open."""


class _Grid(HttpGrid):
    """Flower's grid over such answers; it notes how long it pushed and pulled."""

    def __init__(self, folder: Path) -> None:
        super().__init__(token="none")
        self._client = _Answers(folder)
        self.set_run(Run.create_empty(_RUN))
        self.push_seconds = self.pull_seconds = 0.0

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, and pull at once: all replies are there, and reply to whatever was pushed."""
        began = time.perf_counter()
        pushed = self.push_messages(messages)
        del messages
        self.push_seconds += time.perf_counter() - began
        if not pushed:
            return []
        began = time.perf_counter()
        found = self.pull_messages(pushed)
        self.pull_seconds += time.perf_counter() - began
        return found


def start(folder: Path) -> dict[str, Any]:
    """Run one round of ``FedAvg.start``; no evaluation."""
    _be_a_task()
    initial = _arrays(folder / "model")
    grid = _Grid(folder / "flower")
    strategy = FedAvg(fraction_evaluate=0.0)
    used, began = time.process_time(), time.perf_counter()
    result = strategy.start(grid, initial, num_rounds=1)
    seconds, used = time.perf_counter() - began, time.process_time() - used
    assert result.arrays.keys() == initial.keys()
    return {
        "seconds": seconds,
        "cpu_seconds": used,
        "push_seconds": grid.push_seconds,
        "pull_seconds": grid.pull_seconds,
        "sum": _checksum(result.arrays),
    }


def aggregate_train(updates: list[Path]) -> dict[str, Any]:
    """Have ``FedAvg.aggregate_train`` alone aggregate replies that are in memory."""
    _be_a_task()
    replies = []
    for index, update in enumerate(updates):
        asked = Message(RecordDict(), dst_node_id=index + 1, message_type="train")
        metrics = MetricRecord({"num-examples": 1.0 + index})
        content = RecordDict({"arrays": _arrays(update), "metrics": metrics})
        replies.append(Message(content, reply_to=asked))
    used, began = time.process_time(), time.perf_counter()
    found, _ = FedAvg().aggregate_train(1, replies)
    seconds, used = time.perf_counter() - began, time.process_time() - used
    assert found is not None
    return {"seconds": seconds, "cpu_seconds": used, "sum": _checksum(found)}


def _checksum(arrays: ArrayRecord) -> float:
    """Return the sum of the squares of a model: that both sides found the same one."""
    found = 0.0
    for array in arrays.values():
        values = array.numpy().astype("float64")
        found += float((values * values).sum())
    return found
