"""The demo: a real aggregator and three real sites, from empty folders to a verified report."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import Any, Final

from consilium_common.console import err, note
from consilium_common.demo.commands import Processes
from consilium_common.demo.hospitals import Hospital, write_hospitals
from consilium_common.demo.split import split_dataset
from consilium_common.errors import ConsiliumError
from consilium_common.files import private_folder
from consilium_common.processes import free_port
from consilium_common.study import Study
from consilium_common.study.load import load_study

#: Marks a folder that a demo made and the next one may replace.
MARKER: Final = ".consilium-demo"
STUDY: Final = Path(__file__).parent / "study.yaml"
#: Few enough to write in seconds, enough that learning survives the noise.
_PATIENTS: Final = (56, 42, 42)
_ONLINE_SECONDS: Final = 120.0


def run_demo(
    folder: Path,
    *,
    study_file: Path | None = None,
    data: Path | None = None,
    patients: tuple[int, int, int] = _PATIENTS,
) -> Demo:
    """Run the whole demo in ``folder``; when it returns, every process is shut down.

    Parameters
    ----------
    study_file, data : Path, optional
        A study and a folder of images of one's own, split over the sites by patient; the demo's
        own where they are not given. A study without data trains on the demo's images.
    patients : three integers
        Patients per synthetic hospital.

    Raises
    ------
    ConsiliumError
        Whatever a command of the demo reports; everything is shut down by then.
    """
    started = time.monotonic()
    study = load_study(study_file or STUDY)
    _clear(folder)
    logs = private_folder(folder / "logs")
    with Processes(logs) as processes:
        demo = Demo(folder, study, study_file or STUDY, processes, started)
        demo.hospitals = demo.write_images(data, patients)
        demo.start_aggregator()
        demo.enrol_sites()
        demo.import_data()
        demo.start_sites()
        demo.approve()
        demo.train()
        demo.collect()
        demo.say("shutting everything down")
    return demo


class Demo:
    """One demo while it runs: each step is commands that the README shows by hand."""

    def __init__(
        self, folder: Path, study: Study, study_file: Path, processes: Processes, started: float
    ) -> None:
        self.folder = folder
        self.study = study
        self.hospitals: list[Hospital] = []
        self.shown: dict[str, Any] = {}
        self.results: dict[str, dict[str, Any]] = {}
        self.audits: dict[str, dict[str, Any]] = {}
        self.prices: dict[str, dict[str, Any]] = {}
        self.egress: dict[str, list[dict[str, Any]]] = {}
        self._study_file = study_file
        self._processes = processes
        self.started = started
        self._aggregator = str(folder / "aggregator")

    def say(self, what: str) -> None:
        """Print one step with the time since the demo began."""
        note(f"[{time.monotonic() - self.started:5.1f} s] {what}")

    def home(self, site: str) -> str:
        """Return the state folder of a site."""
        return str(self.folder / f"site-{site}")

    def write_images(self, data: Path | None, patients: tuple[int, int, int]) -> list[Hospital]:
        """Write or split the hospitals' images."""
        target = self.folder / "hospitals"
        if data is not None:
            self.say(f"splitting {data} over three hospitals, by patient")
            return split_dataset(data, target)
        self.say("writing three hospitals' images (DICOM with SEG, NIfTI as MSD, NIfTI by CSV)")
        from rich.progress import Progress

        with Progress(console=err(), transient=True) as bar:
            task = bar.add_task("scans", total=None)
            return write_hospitals(
                target,
                patients=patients,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )

    def start_aggregator(self) -> None:
        """Make the consortium and start its aggregator."""
        self.say("starting the aggregator")
        address = f"127.0.0.1:{free_port()}"
        home = ("--home", self._aggregator)
        self._processes.call("server", "init", "--address", address, "--name", "demo", *home)
        self._processes.start("aggregator", "server", "start", "--host", "127.0.0.1", *home)

    def enrol_sites(self) -> None:
        """Invite each hospital, and let it join with its invitation file."""
        invitations = private_folder(self.folder / "invitations")
        files = {h.name: str(invitations / f"{h.name}.json") for h in self.hospitals}
        self._processes.call_all(
            [
                ("server", "invite", name, "--out", file, "--home", self._aggregator)
                for name, file in files.items()
            ]
        )
        self._processes.wait_for("aggregator", "listens on", 90)
        self.say("enrolling three sites with invitation files")
        self._processes.call_all(
            [("site", "join", file, "--home", self.home(name)) for name, file in files.items()]
        )
        for hospital in self.hospitals:
            self._adapt_policy(Path(self.home(hospital.name)) / "policy.yaml")

    def import_data(self) -> None:
        """Import each hospital's images through its one ingest step."""
        self.say("importing each hospital's images")
        imported = self._processes.call_all([self._import_command(h) for h in self.hospitals])
        for hospital, counts in zip(self.hospitals, imported, strict=True):
            note(
                f"          {hospital.name}: {counts['cases']} cases of"
                f" {counts['patients']} patients ({hospital.format})"
            )

    def start_sites(self) -> None:
        """Start the three sites' processes."""
        self.say("starting the sites")
        for hospital in self.hospitals:
            home = self.home(hospital.name)
            self._processes.start(hospital.name, "site", "start", "--home", home)
        for hospital in self.hospitals:
            self._processes.wait_for(hospital.name, "connected to", _ONLINE_SECONDS)

    def approve(self) -> None:
        """Propose the study, and let each site approve it at its price."""
        proposed = self._processes.call(
            "study", "propose", str(self._study_file), "--home", self._aggregator
        )
        self.say(f"proposed {self.study.name}, digest {proposed['digest'][:12]}; sites approve")
        approvals = self._processes.call_all(
            [
                ("site", "approve", proposed["digest"], "--yes", "--home", self.home(h.name))
                for h in self.hospitals
            ]
        )
        for hospital, approval in zip(self.hospitals, approvals, strict=True):
            price = self.prices[hospital.name] = approval["price"]
            cost = (
                f"ε {price['study_epsilon']:.2f} of {price['budget']:g}"
                if price["private"]
                else "no differential privacy"
            )
            declared = approval["cohort_size"]
            note(f"          {hospital.name}: approved, {cost}, {declared} patients declared")

    def train(self) -> None:
        """Run the study and show it live."""
        self.say(f"training: {self.study.federation.rounds} rounds")
        self._wait_until_online()
        status = self._processes.show(
            "study", "run", self.study.digest, "--watch", "--home", self._aggregator
        )
        if status != 0:
            raise ConsiliumError(
                "run.demo", "The study did not finish.", where=str(self.folder / "logs")
            )

    def collect(self) -> None:
        """Read what the aggregator knows, each site's own evaluation, and verify each ledger."""
        self.say("reading the sites' evaluations and verifying their ledgers")
        self.shown = self._processes.call(
            "study", "show", self.study.digest, "--home", self._aggregator
        )
        names = [h.name for h in self.hospitals]
        results = self._processes.call_all(
            [("site", "results", self.study.digest, "--home", self.home(name)) for name in names]
        )
        self.results = dict(zip(names, results, strict=True))
        left = self._processes.call_all(
            [("site", "egress", self.study.digest, "--home", self.home(name)) for name in names]
        )
        self.egress = {name: sent["updates"] for name, sent in zip(names, left, strict=True)}
        if self.study.privacy.mode == "patient":
            audits = self._processes.call_all(
                [
                    (
                        *("audit", "verify", str(Path(self.home(name)) / "ledger.db"), "--key"),
                        str(Path(self.home(name)) / "identity" / "ledger-public.pem"),
                    )
                    for name in names
                ]
            )
            self.audits = dict(zip(names, audits, strict=True))

    def _wait_until_online(self) -> None:
        end = time.monotonic() + _ONLINE_SECONDS
        while True:
            rows = self._processes.call("server", "sites", "--home", self._aggregator)["sites"]
            if all(row["online"] for row in rows):
                return
            if time.monotonic() > end:
                raise ConsiliumError("run.demo", "The sites did not come online.")
            time.sleep(0.5)

    def _import_command(self, hospital: Hospital) -> tuple[str, ...]:
        command = ["site", "data", "import", str(hospital.folder)]
        command += ["--home", self.home(hospital.name)]
        for channel in self.study.task.inputs:
            command += ["--input", channel]
        names = hospital.labels
        if not names and hospital.format == "csv" and self.study.task.kind == "segmentation":
            # A CSV of one's own: its masks hold the study's class values.
            names = tuple(self.study.task.classes)
        for value, name in enumerate(names):
            command += ["--label", f"{name}={value}"]
        return tuple(command)

    def _adapt_policy(self, path: Path) -> None:
        """Permit what the demo's study asks; a real site operator edits the file by hand."""
        text = path.read_text(encoding="utf-8")
        wanted = {"minimal_cohort": "2"}
        if self.study.privacy.mode == "none":
            wanted["permit_non_private"] = "true"
        if self.study.evaluation.release == "exact":
            wanted["release_exact_metrics"] = "true"
        if self.study.evaluation.release == "private":
            wanted["private_metrics_epsilon"] = "100.0"  # the budget still bounds it
        if self.study.federation.quorum < 2:
            wanted["minimal_sites"] = "1"
        for key, value in wanted.items():
            text = re.sub(rf"(?m)^{key}: .*$", f"{key}: {value}", text)
        path.write_text(text, encoding="utf-8")


def _clear(folder: Path) -> None:
    """Empty a folder that an earlier demo made; anything else is left alone."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise ConsiliumError(
                "state.not-empty",
                "The folder holds something that no demo made.",
                where=str(folder),
                hint="Choose another one with --out.",
            )
        shutil.rmtree(folder)
    private_folder(folder)
    (folder / MARKER).touch()
