"""The ClientApp that the bundle names: it hands each message to the worker of its study."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from consilium_client.home import HOME_VARIABLE, SiteHome
from consilium_client.progress import ProgressFile
from consilium_client.received import wait_for_model
from consilium_client.store import StudyStore
from consilium_client.workers import WorkerPool
from consilium_common.canonical import canonical_json
from consilium_common.wire.messages import (
    Instructions,
    Reference,
    instructions_of,
    to_server,
)

app = ClientApp()


@cache
def pool() -> WorkerPool:
    """Return this process's workers."""
    return WorkerPool(SiteHome.existing(Path(os.environ[HOME_VARIABLE])))


@app.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """Train one round and reply with the update."""
    return _do("train", message)


@app.evaluate()  # type: ignore[untyped-decorator]
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the model here; the reply is empty unless exact or noised figures may leave."""
    return _do("evaluate", message)


@app.query()  # type: ignore[untyped-decorator]
def query(message: Message, context: Context) -> Message:
    """Release the statistics of the training patients: noised, charged, once a study."""
    return _do("query", message)


def _do(kind: str, message: Message) -> Message:
    instructions = instructions_of(message.content)
    home = SiteHome.existing(Path(os.environ[HOME_VARIABLE]))
    store = StudyStore(home)
    # Before anything is waited for: of a study that is not approved no model is fetched.
    study = store.approved(instructions.study).study
    with ProgressFile(home).during(kind, instructions) as progress:
        model = None
        if instructions.model is not None:
            seconds = study.federation.longest_seconds
            model = wait_for_model(home, instructions.study, instructions.model, seconds)
        progress.at_work()
        answer = pool().do(kind, instructions, model, progress.step)
    figures = answer["figures"]
    if kind == "evaluate" and figures:
        figures = _kept(store, instructions, figures)
    update = Reference(answer["sha256"], answer["bytes"]) if kind == "train" else None
    return Message(content=to_server(update, figures), reply_to=message)


def _kept(
    store: StudyStore, instructions: Instructions, figures: dict[str, float]
) -> dict[str, float]:
    """Return the figures of an evaluation as they are stored: the link lets out nothing else.

    Noised ones were stored before they were released. Exact ones are stored here; asked again, the
    site answers the same.
    """
    study, number = instructions.study, instructions.round_index
    stored = store.update(study, number, "evaluation")
    if stored is None:
        content = canonical_json(figures)
        stored = store.keep_update(study, number, content, figures, purpose="evaluation")
    return stored.figures
