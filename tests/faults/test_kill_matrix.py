"""Each process of a federation is killed at three moments of a round: the study goes on by itself.

``make test`` kills each once, while sites train. CONSILIUM_LONG_FAULTS=1 takes all moments, and
CONSILIUM_KILL_TABLE names a file for the table of outcomes that server/README.md shows.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))

from exactness import require_exact
from federation import PRIVATE, Federation, Running, add_hospitals, small_study, wait_for

from consilium_client.home import SiteHome
from consilium_client.store import StudyStore
from consilium_common.demo.hospitals import NAMES
from consilium_server.tables import now

FULL = os.environ.get("CONSILIUM_LONG_FAULTS") == "1"
VICTIM, OTHER = NAMES[:2]
PATIENCE = 180.0

AGGREGATOR = ("gateway and supervisor", "SuperLink", "server executor", "ServerApp", "its host")
SITE = ("link and supervisor", "SuperNode", "site executor", "training process", "its host")
#: What :func:`processes` calls them, in the same order; the host is all of them.
KINDS = ("main", "flower", "executor", "forked")
ROLES = dict(zip(AGGREGATOR, KINDS, strict=False)) | dict(zip(SITE, KINDS, strict=False))
#: What the study's log says of a death that interrupted it.
WHYS = {
    "gateway and supervisor": "the aggregator was started anew",
    "ServerApp": "the process of its rounds died",
    "server executor": "the executor of its rounds was started anew",
    "SuperLink": "the SuperLink was started anew",
}
#: What the victim's hospital is at, at each moment. A model is on its way for some hundredths of a
#: second: one that went unseen is waited for in the next round.
PHASES = {"models leave": "downloading", "sites train": "training", "updates arrive": "sending"}
MOMENTS = tuple(PHASES)
#: What the supervisor calls its children.
CHILDREN = {"SuperLink": "superlink", "server executor": "executor"}

pytestmark = [pytest.mark.long, pytest.mark.timeout(5400 if FULL else 900)]


@dataclass(frozen=True)
class Done:
    """A finished round."""

    number: int
    sites: list[str]
    dropped: dict[str, str]


@dataclass
class Scene:
    """A private study that runs on and on, and what is seen of it."""

    federation: Federation
    digest: str = ""
    rows: list[str] = field(default_factory=list)

    def rounds(self) -> list[Done]:
        """Return the finished rounds, read from the registry itself."""
        path = self.federation.home / "registry.db"
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=20) as database:
            found = database.execute(
                "SELECT number, sites, dropped FROM rounds WHERE digest = ? ORDER BY number",
                (self.digest,),
            ).fetchall()
        return [Done(number, json.loads(sites), json.loads(out)) for number, sites, out in found]

    def journal(self, since: str) -> list[str]:
        """Return what the aggregator's supervisor has noted since a time."""
        kept = json.loads((self.federation.home / "run" / "supervisor.json").read_bytes())
        return [row["what"] for row in kept if row["at"] >= since]

    def await_moment(self, moment: str) -> None:
        """Wait until the victim's hospital is at this moment of a round that is not finished."""
        site = self.federation.sites[VICTIM]

        def there() -> bool:
            said = site.progress(self.digest)
            # After a round it goes on saying what it was at last.
            return said.get("phase") == PHASES[moment] and said["round"] >= len(self.rounds())

        wait_for(there, moment, timeout=PATIENCE, pause=0.002)

    def whole_round_after(self, number: int) -> bool:
        """Whether a round from ``number`` on has been made by both hospitals."""
        return any(set(done.sites) >= {VICTIM, OTHER} for done in self.rounds()[number:])


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with Federation(tmp_path_factory.mktemp("kills")) as federation:
        add_hospitals(federation, (VICTIM, OTHER), (VICTIM, OTHER))
        study = small_study(
            "killed-everywhere",
            privacy={**PRIVATE["privacy"], "noise_multiplier": 256.0},
            evaluation=PRIVATE["evaluation"],
            training={"steps_per_round": 20},
            federation={"rounds": 5000, "quorum": 1, "deadline_seconds": 120.0},
        )
        scene = Scene(federation, federation.propose(study))
        federation.approve(scene.digest, VICTIM, OTHER)
        federation.study("run", scene.digest).data  # noqa: B018
        yield scene


def processes(running: Running) -> dict[str, int]:
    """Return the processes of the aggregator or of a site by what they are."""
    commands = running.processes()
    found = {"main": running.pid}
    for pid, command in commands.items():
        if "flower-super" in command:
            found["flower"] = pid
        elif "_server.executor" in command or "_client.executor" in command:
            found["executor"] = pid
        elif "forkserver" in command and "forkserver" in commands.get(_parent(pid), ""):
            found["forked"] = pid  # from the warm process, which says the same of itself
    return found


def _parent(pid: int) -> int:
    try:
        status = (Path("/proc") / str(pid) / "stat").read_text()
    except OSError:
        return 0
    return int(status.rpartition(")")[2].split()[1])


def kill(scene: Scene, side: str, what: str) -> Callable[[], None]:
    """Kill a process, or a side's whole host; return what starts again what nobody else does."""
    federation = scene.federation
    holder = federation if side == "aggregator" else federation.sites[VICTIM]
    assert holder.running is not None
    if what == "its host":
        holder.kill()
        return holder.start
    found = processes(holder.running)
    assert set(found) == set(KINDS)
    pid = found[ROLES[what]]
    if pid == holder.running.pid:
        holder.running.kill_main()  # nothing of it may outlive it
        holder.running = None
        return holder.start  # as systemd does
    os.kill(pid, signal.SIGKILL)
    return lambda: None


CASES = [
    (side, what, moment)
    for side, kinds in (("aggregator", AGGREGATOR), ("site", SITE))
    for what in kinds
    for moment in (MOMENTS if FULL else MOMENTS[1:2])
]


@pytest.mark.parametrize(("side", "what", "moment"), CASES)
def test_a_study_goes_on_by_itself_after(scene: Scene, side: str, what: str, moment: str) -> None:
    scene.await_moment(moment)
    earlier = scene.rounds()
    before = len(earlier)
    since, began = now(), time.monotonic()
    restart = kill(scene, side, what)
    restart()
    wait_for(lambda: scene.whole_round_after(before), "a round of both hospitals", timeout=PATIENCE)
    ended = time.monotonic()
    found = scene.rounds()
    # No round is lost, none is done twice: their numbers go on without a gap.
    assert [done.number for done in found] == list(range(len(found)))
    assert found[:before] == earlier
    alone = [done for done in found[before:] if VICTIM not in done.sites]
    if what == "training process":
        assert alone == []  # it is replaced within its round
        assert all(VICTIM not in done.dropped for done in found[before:])
    elif side == "site" and moment == "sites train" and alone:
        # Its death costs the round nothing but its weight, and the round says whose that was.
        assert any(VICTIM in done.dropped for done in alone)
    if what in WHYS:
        history = scene.federation.study("log", scene.digest).data["history"]
        assert any(WHYS[what] in row["why"] for row in history), history
    if what in CHILDREN:
        died = f"{CHILDREN[what]} ended with status {-signal.SIGKILL}"
        assert any(said.startswith(died) for said in scene.journal(since))
    shown = scene.federation.show(scene.digest)
    assert shown["state"] == "running", shown["reason"]
    assert shown["alarms"] == []
    took = ended - began
    scene.rows.append(f"| {side} | {what} | {moment} | {took:.0f} | {len(alone)} |")
    keep_table(scene.rows)


def test_every_update_was_charged_released_and_counted_once(scene: Scene) -> None:
    federation = scene.federation
    federation.study("pause", scene.digest, "--now").data  # noqa: B018
    rounds = [asdict(done) for done in scene.rounds()]
    with sqlite3.connect(f"file:{federation.home / 'registry.db'}?mode=ro", uri=True) as database:
        received = database.execute(
            "SELECT site, round, sha256 FROM received WHERE study = ? AND purpose = 'training'",
            (scene.digest,),
        ).fetchall()
    assert len({(site, number) for site, number, _ in received}) == len(received)
    used = {(site, done["number"]) for done in rounds for site in done["sites"]}
    assert len(used) == sum(len(done["sites"]) for done in rounds)
    for name in (VICTIM, OTHER):
        site = federation.sites[name]
        site.stop()
        require_exact(site, scene.digest, rounds)
        kept = {
            (name, row["round"]): row["sha256"]
            for row in StudyStore(SiteHome.existing(site.home)).updates(scene.digest)
            if row["purpose"] == "training"
        }
        # What came is what was charged and stored, though it was asked for more than once.
        noted = {(of, number): sha256 for of, number, sha256 in received if of == name}
        assert {one for one in used if one[0] == name} <= set(noted)
        assert noted.items() <= kept.items()


def keep_table(rows: list[str]) -> None:
    """Write the outcomes so far in Markdown, where they are wanted."""
    path = os.environ.get("CONSILIUM_KILL_TABLE")
    if path:
        head = "| side | killed | when | seconds until a round of all sites | rounds without it |"
        Path(path).write_text("\n".join([head, "|---|---|---|---|---|", *rows, ""]))
