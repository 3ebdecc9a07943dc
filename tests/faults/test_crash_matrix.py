"""Killed between any two durable operations, again and again, a site charges right and sends once.

Never under-counts, never charges twice for one released update, never releases two different
updates for one round: for training and for released evaluations alike.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from round_samples import NAME

from consilium_client.faults import EXECUTOR_POINTS, WORKER_POINTS
from consilium_client.home import SiteHome
from consilium_client.receipts import kept_receipts
from consilium_client.store import StudyStore
from consilium_common.identity.keys import load_signing_key
from consilium_common.ledger.state import LedgerState
from consilium_common.ledger.verify import verify_file

_HERE = Path(__file__).parent
#: Everything that the tiny study of two rounds may ever cost: its rounds, and two evaluations.
RELEASES = {("training", 0), ("training", 1), ("evaluation", 0), ("evaluation", 2)}
#: Points that only a life after a killed one passes.
_VOIDING = [point for point in WORKER_POINTS if "void" in point]
_SENDING = (*EXECUTOR_POINTS[:2], "link.receipt")
_POINTS = [point for point in (*WORKER_POINTS, *_SENDING) if point not in _VOIDING]

Live = Callable[[Path, str], str]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A function that has a site live once and says how that life ended."""
    searched = [str(_HERE), str(_HERE.parent / "unit"), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, str(_HERE / "crashing_site.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, searched)),
        },
    )
    assert process.stdin is not None
    assert process.stdout is not None
    asked, said = process.stdin, process.stdout

    def once(folder: Path, fault: str) -> str:
        asked.write(json.dumps({"folder": str(folder), "fault": fault}) + "\n")
        asked.flush()
        answer: str = json.loads(said.readline())
        return answer

    yield once
    asked.close()
    assert process.wait(30) == 0
    said.close()


def state_of(site: SiteHome) -> LedgerState:
    """Return what the ledger says as it lies there, checked as an auditor does."""
    found = verify_file(site.ledger, public_key(site))
    assert found.problem is None, found.problem
    return found.state


def public_key(site: SiteHome) -> Ed25519PublicKey:
    return load_signing_key(site.identity / "ledger-key.pem").public_key()


def require_faith(folder: Path) -> None:
    """Assert what holds after every life, however it ended."""
    site = SiteHome.existing(folder / "site")
    if not site.ledger.exists():
        assert not (folder / "sent").exists()
        return
    state = state_of(site)
    standing = {(c.purpose, c.round_index): c for c in state.standing()}
    assert len(standing) == len(state.standing())  # no round is charged twice at one time
    kept = {(row["purpose"], row["round"]): row["sha256"] for row in StudyStore(site).updates("")}
    # Whatever is kept is paid for, and what is called released is what was kept.
    assert set(kept) <= set(standing)
    for release, charge in standing.items():
        assert charge.state in ("open", "released")
        if charge.state == "released":
            assert charge.update == kept[release]
    # What went out had been released, and went out in one form only.
    sent: dict[tuple[str, int], set[str]] = {}
    if (folder / "sent").exists():
        for line in (folder / "sent").read_text().splitlines():
            kind, number, content = line.split()
            purpose = {"train": "training", "evaluate": "evaluation"}[kind]
            sent.setdefault((purpose, int(number)), set()).add(content)
    # Each has one receipt, which was there before it.
    receipts = {
        (one.release.purpose, one.release.round): one.release.sha256
        for one in kept_receipts(site.receipts, public_key(site), NAME)
    }
    for release, contents in sent.items():
        assert len(contents) == 1, release
        assert standing[release].state == "released"
        assert receipts[release] == kept[release]
    assert set(receipts) <= set(kept)


def kill_and_finish(live: Live, folder: Path, fault: str, *, at_most: int) -> int:
    """Have a site live until it has done all that it is asked; return how often it was killed."""
    kept: dict[tuple[str, int], str] = {}
    killed = 0
    while True:
        end = live(folder, fault)
        require_faith(folder)
        site = SiteHome.existing(folder / "site")
        now = {(r["purpose"], r["round"]): r["sha256"] for r in StudyStore(site).updates("")}
        # What was stored once stays what it is.
        assert {release: now.get(release) for release in kept} == kept
        kept = now
        if end != "killed":
            assert end == "", end
            break
        killed += 1
        assert killed <= at_most
    state = state_of(site)
    assert {(c.purpose, c.round_index) for c in state.standing()} == RELEASES == set(kept)
    assert all(charge.state == "released" for charge in state.standing())
    # Every patient has paid for each release that saw them once, whatever was voided on the way.
    assert Counter(state.histories().values()) == Counter([6, 3])
    assert sorted(sum(e.steps for e in history) for history in state.histories()) == [2, 4]
    return killed


def test_a_site_that_is_never_killed_voids_nothing(live: Live, tmp_path: Path) -> None:
    assert kill_and_finish(live, tmp_path, "", at_most=0) == 0
    state = state_of(SiteHome.existing(tmp_path / "site"))
    assert [charge.state for charge in state.charges.values()] == ["released"] * 4


@pytest.mark.parametrize("point", _POINTS)
def test_killed_at_a_point_twice_in_a_row(live: Live, tmp_path: Path, point: str) -> None:
    assert kill_and_finish(live, tmp_path, f"{point}:1,{point}:2", at_most=2) == 2


@pytest.mark.parametrize("purpose", ["training", "evaluation"])
def test_killed_while_a_charge_is_voided(live: Live, tmp_path: Path, purpose: str) -> None:
    points = ("charged:1", "before-void:1", "voided:1", "charged:2", "file-written:1")
    fault = ",".join(f"{purpose}.{point}" for point in points)
    assert kill_and_finish(live, tmp_path, fault, at_most=5) == 5


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_three_points_by_chance(live: Live, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    points = [f"{point}:{chance.randint(1, 2)}" for point in chance.sample(_POINTS, 3)]
    assert kill_and_finish(live, tmp_path, ",".join(points), at_most=3) >= 1
