"""Runs a study on one machine: the same ServerApp and ClientApp, on Flower's simulation engine.

In place of port, link and gateway there are calls of one process and a folder. Messages are
Flower's own; models and updates lie as files where both sides find them. A site is started by the
name of its package, as Flower starts any ClientApp: this package imports nothing of it.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from consilium_common.console import note
from consilium_common.errors import ConsiliumError
from consilium_common.files import private_folder, write_atomic
from consilium_common.processes import flower_environment
from consilium_common.study import Study
from consilium_common.wire.messages import Reference, instructions_of, update_of
from consilium_server.arrivals import ArrivalLists
from consilium_server.home import HOME_VARIABLE, ServerConfig, ServerHome
from consilium_server.lifecycle import SIMULATION
from consilium_server.overview import study_overview
from consilium_server.registry import Registry
from consilium_server.spending import SpendMeter
from consilium_server.starts import PublicStarts
from consilium_server.states import State
from consilium_server.states import note as note_state
from consilium_server.study_files import StudyFiles
from consilium_server.tables import Approval, Member, StudyRow, now

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from flwr.serverapp import Grid, ServerApp

#: The module of the sites' side, as a bundle names a component.
_SITES: Final = "consilium_client.simulated"
_POLL_SECONDS: Final = 0.02
_PIECE: Final = 1024 * 1024
_MEGABYTE: Final = 1024 * 1024


class _Sites(Protocol):
    """What that module offers."""

    app: Any
    WIRE_VARIABLE: str

    def sites_in(self, folder: Path) -> dict[str, Path]:
        """Return the folders of sites below a folder, by name."""

    def prepare(self, study: Study, name: str, source: Path, target: Path) -> dict[str, int]:
        """Make a simulated site that has approved the study; return the sizes it declares."""


@dataclass(frozen=True)
class Simulated:
    """A study that was simulated to its end.

    Attributes
    ----------
    shown : dict
        What `study show` says of a study.
    """

    model: Path
    shown: dict[str, Any]


def simulate(
    study: Study, data: Path, out: Path, *, start: bytes | None = None, together: int = 0
) -> Simulated:
    """Run a study over the sites whose folders lie in ``data``.

    The model is that of the same study over the network, bit for bit, where no privacy noise is
    drawn, every site of the network has answered every round, and machines compute alike.

    Parameters
    ----------
    out : Path
        New folder: ``aggregator`` and ``sites`` lie in it; `site results` takes one of the latter
        with ``--home``.
    start : bytes, optional
        Public weights that the study begins with.
    together : int
        Sites that train at a time (default: as many as there are processors).

    Raises
    ------
    ConsiliumError
        ``usage.extra`` without the extra ``simulation``; ``state.not-empty``; ``data.*`` of a
        site's data; ``run.too-few-sites``; what a site or the study's run fails with.
    """
    _require_engine()
    _require_empty(out)
    # Before Flower is imported: it reads these then. Ray's workers inherit them.
    home = ServerHome.create(out / "aggregator")
    os.environ.update(flower_environment(home.flower))
    os.environ |= {
        HOME_VARIABLE: str(home.path),
        "RAY_USAGE_STATS_ENABLED": "0",  # it would report to its makers
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # as later releases do; else it warns
    }
    os.environ.pop("RAY_ADDRESS", None)  # another cluster is none of ours
    from consilium_common.wire.tls13 import grpc  # noqa: F401 - before Flower and Ray import it

    sites = cast(_Sites, importlib.import_module(_SITES))
    sources = sites.sites_in(data)
    if len(sources) < study.federation.quorum:
        raise ConsiliumError(
            "run.too-few-sites",
            f"The study needs {study.federation.quorum} sites, and there are {len(sources)}.",
            where=str(data),
            hint="Add sites' folders, or lower federation.quorum.",
        )
    homes = {name: out / "sites" / name for name in sources}
    declared = {}
    for name, source in sources.items():
        declared[name] = sites.prepare(study, name, source, homes[name])
        note(f"{name}: {declared[name]['cohort_size']} training patients declared")
    if start is not None and study.model.start is not None:
        write_atomic(PublicStarts(home.starts).path(study.model.start.sha256), start)
    registry = _register(home, study, declared)
    os.environ[sites.WIRE_VARIABLE] = str(out / "wire.json")
    wire = Wire(home, registry, study, homes, out)
    _run(wire, sites.app, len(homes), min(together or os.cpu_count() or 1, len(homes)))
    row = registry.study(study.digest)
    if row.state != State.FINISHED:
        raise ConsiliumError("run.simulation", f"The study is {row.state}: {row.reason}")
    return Simulated(
        home.study_folder(study.digest) / "model.safetensors",
        study_overview(registry, row, SpendMeter()),
    )


def _run(wire: Wire, client_app: Any, nodes: int, together: int) -> None:
    import torch

    from consilium_server.flower_private import simulate as run_on_engine

    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # what fails is said by us, once
    resources = {
        "init_args": {
            "num_cpus": together,
            "include_dashboard": False,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
            "object_store_memory": 100 * _MEGABYTE,  # messages alone: models are files
            "_node_ip_address": "127.0.0.1",
        },
        "client_resources": {"num_cpus": 1, "num_gpus": torch.cuda.device_count() / together},
    }
    try:
        run_on_engine(_server_app(wire), client_app, nodes, resources)
    except ConsiliumError:
        raise
    except Exception as error:
        raise ConsiliumError(
            "run.simulation",
            f"Flower's simulation engine failed: {type(error).__name__}: {error}",
            hint="Run it again with `consilium --debug`.",
        ) from error
    finally:
        wire.close()


def _server_app(wire: Wire) -> ServerApp:
    """Return the release's own ServerApp with its run configuration, on the wire's grid."""
    from flwr.app import UserConfig
    from flwr.serverapp import ServerApp

    from consilium_server.app import app as serverapp

    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        wire.connect(grid)
        configured = replace(context, run_config=UserConfig({"study": wire.study.digest}))
        serverapp(cast("Grid", wire), configured)

    return app


class Wire:
    """Flower's Grid as the round loop uses it: a message is on its way until its reply is here.

    Simulated time stands still for the sites: no deadline passes while they train, however many
    of them share a processor. What a site fails with ends the simulation, since nobody else could
    mend it.

    Parameters
    ----------
    homes : mapping of str to Path
        Folder of each simulated site.
    folder : Path
        Takes ``wire.json``, which tells the ClientApp which node is which site.
    """

    def __init__(
        self,
        home: ServerHome,
        registry: Registry,
        study: Study,
        homes: Mapping[str, Path],
        folder: Path,
    ) -> None:
        self.study = study
        self._home = home
        self._registry = registry
        self._homes = homes
        self._folder = folder
        self._updates = private_folder(folder / "updates")
        self._files = StudyFiles(home.study_folder(study.digest))
        self._arrivals = ArrivalLists(home.arrived)
        self._names: dict[int, str] = {}
        self._replies: dict[str, Message] = {}
        self._closed = Event()
        self._grid: Any = None

    def connect(self, grid: Grid) -> None:
        """Give each of Flower's nodes to a site."""
        self._grid = grid
        while len(nodes := sorted(grid.get_node_ids())) < len(self._homes):
            self._pause()
        self._names = dict(zip(nodes, sorted(self._homes), strict=True))
        for node, name in self._names.items():
            self._registry.set_node(name, node)
        models = self._home.study_folder(self.study.digest) / "out"
        content = {
            "sites": {str(node): str(self._homes[name]) for node, name in self._names.items()},
            "models": str(models),
            "updates": str(self._updates),
        }
        write_atomic(self._folder / "wire.json", json.dumps(content).encode())

    def close(self) -> None:
        """End what waits for replies."""
        self._closed.set()

    # --- the Grid --------------------------------------------------------------------------

    def get_node_ids(self) -> list[int]:
        """Return the nodes of all sites, which are online as long as the simulation runs."""
        for name in self._names.values():
            self._registry.note_seen(name, "127.0.0.1")
        return list(self._names)

    def push_messages(self, messages: Sequence[Message]) -> list[str]:
        """Send messages and wait for all replies.

        Raises
        ------
        ConsiliumError
            What a site failed with, or ``run.simulation`` when the engine ended.
        """
        note(self._said(messages))
        pushed = list(self._grid.push_messages(messages))
        waiting = set(pushed)
        while waiting:
            for reply in self._grid.pull_messages(waiting):
                identity = reply.metadata.reply_to_message_id
                waiting.remove(identity)
                self._take(reply)
                self._replies[identity] = reply
            self._pause()
        return pushed

    def pull_messages(self, message_ids: Sequence[str]) -> Iterator[Message]:
        """Yield the replies to these messages, each once."""
        for identity in message_ids:
            if identity in self._replies:
                yield self._replies.pop(identity)

    def _said(self, messages: Sequence[Message]) -> str:
        sites = ", ".join(self._names[one.metadata.dst_node_id] for one in messages)
        number = instructions_of(messages[0].content).round_index
        kind = messages[0].metadata.message_type
        if kind == "train":
            return f"round {number + 1} of {self.study.federation.rounds}: {sites} train"
        if kind == "evaluate":
            return f"after {number} rounds: {sites} evaluate"
        return f"{sites} count their training patients"

    def _take(self, reply: Message) -> None:
        """Do what the gateway does with a reply: have its file in its place, and count it."""
        site = self._names[reply.metadata.src_node_id]
        if reply.has_error():
            raise _failed(site, reply.error.reason)
        if reply.metadata.message_type == "train":
            self._deliver(site, update_of(reply.content))
        self._arrivals.add(str(reply.metadata.src_node_id), str(reply.metadata.reply_to_message_id))

    def _deliver(self, site: str, update: Reference) -> None:
        sent = self._updates / update.sha256
        if self._files.arrived(site, update) is None:
            if update.bytes > self._files.most(site):
                raise _failed(site, "The update is larger than the study's can be.")
            arriving = self._files.arriving(site, update)
            arriving.open()
            with sent.open("rb") as stream:
                stream.seek(arriving.held)
                while piece := stream.read(_PIECE):
                    arriving.write(piece)
            arriving.finish()
        sent.unlink(missing_ok=True)

    def _pause(self) -> None:
        if self._closed.is_set():
            raise ConsiliumError("run.simulation", "Flower's simulation engine has ended.")
        time.sleep(_POLL_SECONDS)


def _failed(site: str, reason: str | None) -> ConsiliumError:
    """Return what a site failed with; ours is JSON, Flower's is words."""
    try:
        error = ConsiliumError.from_dict(json.loads(reason or ""))
    except (ValueError, AttributeError):
        error = ConsiliumError("run.site-failed", reason or "The site's ClientApp failed.")
    return ConsiliumError(
        error.code, f"{site}: {error.message}", where=error.where, hint=error.hint
    )


def _register(
    home: ServerHome, study: Study, declared: Mapping[str, Mapping[str, int]]
) -> Registry:
    """Write down members, study and approvals as they are when a study begins."""
    home.save_config(ServerConfig("simulation", "127.0.0.1:1"))
    registry = Registry(home.database)
    with registry.transaction() as session:
        session.add(
            StudyRow(
                digest=study.digest,
                name=study.name,
                canonical=study.to_canonical(),
                proposed_by=SIMULATION,
                signature="",
                signer_pem="",
                proposed_at=now(),
                state=State.RUNNING,
                flower_run=SIMULATION,
                started_at=now(),
            )
        )
        note_state(session, study.digest, "", State.RUNNING, "simulated", who=SIMULATION)
        for name, sizes in declared.items():
            session.add(
                Member(
                    name=name,
                    role="site",
                    status="active",
                    serial="",
                    certificate_pem="",
                    signer_pem="",
                    node_id=None,
                    joined_at=now(),
                )
            )
            session.add(
                Approval(
                    digest=study.digest,
                    site=name,
                    decision="approved",
                    why=SIMULATION,
                    signature="",
                    decided_at=now(),
                    **sizes,
                )
            )
    return registry


def _require_engine() -> None:
    if importlib.util.find_spec("ray") is None:
        raise ConsiliumError(
            "usage.extra",
            "Flower's simulation engine is not installed.",
            hint="Install it: pip install 'consilium[simulation]'",
        )


def _require_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConsiliumError(
            "state.not-empty",
            "There is something in the folder already.",
            where=str(out),
            hint="Choose another folder with --out.",
        )
    private_folder(out)
