"""Where the aggregator keeps its state: one private folder, every path named here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from consilium_common.errors import ConsiliumError
from consilium_common.files import private_folder, write_atomic

#: Names the aggregator's state folder: for commands without --home, and for our own children.
HOME_VARIABLE = "CONSILIUM_SERVER_HOME"


@dataclass(frozen=True)
class ServerConfig:
    """What `server init` decided."""

    consortium: str  #: its name, for people
    address: str  #: ``host:port`` that sites connect to; it stands in invitations
    #: What one caller may use; `consilium_server.limits` says which there are and their defaults.
    limits: Mapping[str, object] = field(default_factory=dict)
    #: URL of a PostgreSQL database in place of ``registry.db``; empty: none.
    database: str = ""

    @property
    def port(self) -> int:
        """Port of the address."""
        return int(self.address.rpartition(":")[2])

    @property
    def host(self) -> str:
        """Host of the address."""
        return self.address.rpartition(":")[0].strip("[]")


@dataclass(frozen=True)
class ServerHome:
    """The state folder of the aggregator (mode 0700)."""

    path: Path

    @classmethod
    def create(cls, path: Path) -> ServerHome:
        """Create the folder where it is missing."""
        return cls(private_folder(path.expanduser().resolve()))

    @classmethod
    def existing(cls, path: Path) -> ServerHome:
        """Open a folder that `server init` made."""
        home = cls(path.expanduser().resolve())
        if not home.config_file.is_file():
            raise ConsiliumError(
                "state.no-server",
                "There is no aggregator here.",
                where=str(home.path),
                hint="Give its folder with --home, or make one with `consilium server init`.",
            )
        return home

    @property
    def config_file(self) -> Path:
        """``server.json``."""
        return self.path / "server.json"

    def load_config(self) -> ServerConfig:
        """Read ``server.json``."""
        return ServerConfig(**json.loads(self.config_file.read_text(encoding="utf-8")))

    def save_config(self, config: ServerConfig) -> None:
        """Write ``server.json``."""
        write_atomic(self.config_file, json.dumps(asdict(config), indent=2).encode() + b"\n")

    @property
    def identity(self) -> Path:
        """Authority, server and operator keys and certificates."""
        return private_folder(self.path / "identity")

    @property
    def database(self) -> Path:
        """``registry.db``: members, studies, approvals, rounds, what was witnessed and received."""
        return self.path / "registry.db"

    @property
    def flower(self) -> Path:
        """Flower's own folder; nothing in it has to survive."""
        return private_folder(self.path / "flower")

    @property
    def run(self) -> Path:
        """Loopback certificates, secrets and status of running processes."""
        return private_folder(self.path / "run")

    @property
    def kicks(self) -> Path:
        """A file per node, touched when messages wait for it, so that held polls ask again."""
        return private_folder(self.run / "kicks")

    @property
    def arrived(self) -> Path:
        """A file per node that counts the replies of it that have arrived whole."""
        return private_folder(self.run / "arrived")

    @property
    def logs(self) -> Path:
        """Logs of the aggregator's processes."""
        return private_folder(self.path / "logs")

    @property
    def starts(self) -> Path:
        """Public starting weights that were handed over with proposals."""
        return private_folder(self.path / "starts")

    def study_folder(self, digest: str) -> Path:
        """Checkpoint and model of one study."""
        return private_folder(self.path / "studies" / digest[:16])
