"""A site's process for the crash matrix: killed where it is told, asked again, run to its end.

A program of its own that imports everything once and forks a child for each life of each site, so
that a case costs what its work costs. It reads one JSON object a line,

    {"folder": …, "fault": …}

and answers each with how that life ended: "killed", what went wrong, or nothing. Ledger, store,
network, gate and messages are the real ones; only the images are made up, and what is sent is
written to a file instead.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path

from egress_samples import NODE, Question, gate_of, reference
from egress_samples import Reply as Announcing
from round_samples import (
    ROUNDS,
    RoundsAtSite,
    deciding_site,
    keyed_cohort,
    tiny_study,
)
from site_samples import JoinedSite

from consilium_client import faults
from consilium_client.home import SiteHome
from consilium_client.identity import SiteIdentity
from consilium_common.study import Study
from consilium_common.wire.messages import to_server


class Reply:
    """Sends as executor and link do: announced, judged by the gate, then gone for good.

    Parameters
    ----------
    sent : Path
        Takes a line for each reply, durably, before the reply counts as sent.
    """

    def __init__(self, site: JoinedSite, study: Study, sent: Path) -> None:
        self._gate = gate_of(site)
        self._study = study
        self._sent = sent

    def send(self, kind: str, number: int, blob: bytes | None, figures: dict[str, float]) -> None:
        question = Question(self._study, kind, number)
        reply = Announcing(question, to_server(None if blob is None else reference(blob), figures))
        faults.fault_point("reply.made")
        passed = self._gate.judge(question.asked(), reply.announced(), NODE)
        faults.fault_point("link.receipt")
        with self._sent.open("a") as stream:
            stream.write(f"{kind} {number} {passed.reply.message_id}\n")
            stream.flush()
            os.fsync(stream.fileno())
        faults.fault_point("reply.pushed")


def live(folder: Path, study: Study) -> None:
    """Be asked everything from the start, as by an aggregator that has forgotten all replies."""
    home = SiteHome.existing(folder / "site")
    identity = SiteIdentity.load(home)
    site = JoinedSite(home, identity, None, None, identity.signer())  # type: ignore[arg-type]
    rounds = RoundsAtSite(site, study, keyed_cohort())
    reply = Reply(site, study, folder / "sent")
    for number in range(ROUNDS + 1):
        if number in study.evaluations:
            reply.send("evaluate", number, None, rounds.evaluate(number))
        if number < ROUNDS:
            update = rounds.train(number)
            reply.send("train", number, update.blob, update.figures)


def child(folder: Path, study: Study, fault: str) -> str:
    """Live once in a forked child; return "killed", or what it had to say."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.environ[faults.FAULT_VARIABLE] = fault
            os.environ[faults.COUNT_VARIABLE] = str(folder / "passed")
            live(folder, study)
        except BaseException:
            os.write(write, traceback.format_exc().encode())
        os._exit(0)
    os.close(write)
    _, status = os.waitpid(process, 0)
    with os.fdopen(read, "rb") as stream:
        said = stream.read().decode()
    if os.WIFSIGNALED(status):
        return "killed" if os.WTERMSIG(status) == signal.SIGKILL else f"signal {status}"
    return said


def main() -> None:
    """Serve requests until the pipe closes."""
    study = tiny_study()
    # One life here first: what it imports and calibrates, no child has to do again.
    with tempfile.TemporaryDirectory() as folder:
        deciding_site(Path(folder) / "site", study)
        live(Path(folder), study)
    gc.collect()  # closes the ledger: a connection must not cross a fork
    for line in sys.stdin:
        request = json.loads(line)
        folder = Path(request["folder"])
        if not (folder / "site").exists():
            deciding_site(folder / "site", study)
        print(json.dumps(child(folder, study, request["fault"])), flush=True)


if __name__ == "__main__":
    main()
