"""A study's worker that hangs, or holds what another needs, is ended: studies take turns."""

from __future__ import annotations

import fcntl
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from site_samples import joined_site, plain_study

from consilium_client import workers
from consilium_client.store import StudyStore
from consilium_client.worker import _named, receive, send
from consilium_client.workers import WorkerPool
from consilium_common.errors import ConsiliumError
from consilium_common.study import Study
from consilium_common.wire.messages import Instructions

COHORT_SIZE = 5


def stand_in(connection: Connection, home: str, log: str) -> None:
    """Answer the first round at once; take a few steps of every other one, and hang."""
    while receive(connection)["instructions"]["round_index"] == 0:
        send(connection, {"figures": {}})
    for step in range(4):
        time.sleep(0.5)
        send(connection, {"progress": {"step": step, "steps": 5}})
    time.sleep(3600)


def with_one_gpu(connection: Connection, home: str, log: str) -> None:
    """Hold from the first round on what there is but once."""
    with (Path(home) / "gpu").open("w") as gpu:
        while receive(connection):
            try:
                fcntl.flock(gpu, fcntl.LOCK_EX | fcntl.LOCK_NB)
                send(connection, {"figures": {}})
            except BlockingIOError:
                send(connection, {"error": _named(torch.OutOfMemoryError()).to_dict()})


def test_a_study_that_lacks_gpu_memory_gets_that_of_workers_that_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = plain_study()
    studies = [one, Study.model_validate({**one.to_canonical(), "name": "another"})]
    site = joined_site(tmp_path / "site")
    for study in studies:
        StudyStore(site.home).decide(study, "approved", COHORT_SIZE, "")
    monkeypatch.setattr(workers, "_WARM_MODULES", [])
    monkeypatch.setattr(workers, "work", with_one_gpu)
    monkeypatch.setattr(workers, "_STOP_SECONDS", 0.5)
    pool = WorkerPool(site.home)

    def do(study: Study) -> object:
        told = Instructions(study.digest, 0, COHORT_SIZE)
        return pool.do("train", told, None, lambda *_: None)

    try:
        for study in (*studies, *studies):
            assert do(study) == {"figures": {}}
            assert set(pool._workers) == {study.digest}
        pool.end_all_but(set())
        # Where nobody of ours holds it, it is said.
        with (site.home.path / "gpu").open("w") as gpu:
            fcntl.flock(gpu, fcntl.LOCK_EX)
            with pytest.raises(ConsiliumError) as caught:
                do(studies[0])
        assert caught.value.code == "run.out-of-memory"
    finally:
        pool.end_all_but(set())


def test_a_worker_that_is_silent_for_longer_than_a_round_is_ended_and_the_next_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = plain_study()
    site = joined_site(tmp_path / "site")
    StudyStore(site.home).decide(study, "approved", COHORT_SIZE, "")
    monkeypatch.setattr(workers, "_WARM_MODULES", [])
    monkeypatch.setattr(workers, "work", stand_in)
    monkeypatch.setattr(workers, "_STOP_SECONDS", 0.5)
    pool = WorkerPool(site.home)
    steps: list[int] = []

    def do(number: int) -> object:
        told = Instructions(study.digest, number, COHORT_SIZE)
        return pool.do("train", told, None, lambda step, _: steps.append(step))

    try:
        assert do(0) == {"figures": {}}
        (worker,) = pool._workers.values()
        assert worker.silence == study.federation.longest_seconds
        worker.silence = 1.5  # shorter than the four steps together
        began = time.monotonic()
        with pytest.raises(ConsiliumError) as caught:
            do(1)
        assert caught.value.code == "run.worker-hung"
        assert time.monotonic() - began < 60
        assert steps == [0, 1, 2, 3], "as long as it takes steps nothing ends it"
        assert (pool._workers, worker.process.is_alive()) == ({}, False)
        assert do(0) == {"figures": {}}
    finally:
        pool.end_all_but(set())
