"""Where a site keeps its state: one private folder, every path named here."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

from consilium_common.errors import ConsiliumError
from consilium_common.files import private_folder

#: Names the site's state folder: for commands without --home, and for our own children.
HOME_VARIABLE = "CONSILIUM_SITE_HOME"


@dataclass(frozen=True)
class SiteHome:
    """The state folder of one site (mode 0700)."""

    path: Path

    @classmethod
    def create(cls, path: Path) -> SiteHome:
        """Create the folder where it is missing.

        Raises
        ------
        ConsiliumError
            ``state.not-a-site`` for a folder of something else that others use: a site's folder
            is closed to them.
        """
        path = path.expanduser().resolve()
        if _holds_something_else(path):
            raise ConsiliumError(
                "state.not-a-site",
                "The folder holds something else, and would be closed to other users.",
                where=str(path),
                hint="Give a new folder with --home; the site's state needs one of its own.",
            )
        return cls(private_folder(path))

    @classmethod
    def existing(cls, path: Path) -> SiteHome:
        """Open a folder that `site join` or `site data import` has made."""
        path = path.expanduser().resolve()
        if not path.is_dir() or _holds_something_else(path):
            raise ConsiliumError(
                "state.no-site",
                "There is no site here.",
                where=str(path),
                hint="Give the site's folder with --home, or make one with `consilium site join`.",
            )
        return cls(path)

    @property
    def config(self) -> Path:
        """``site.json``: name of the site, address of the aggregator, device, precision."""
        return self.path / "site.json"

    @property
    def policy(self) -> Path:
        """``policy.yaml``: budget per patient and what this site permits."""
        return self.path / "policy.yaml"

    @property
    def ledger(self) -> Path:
        """``ledger.db``: the privacy ledger (SQLite)."""
        return self.path / "ledger.db"

    @property
    def studies(self) -> Path:
        """``studies.db``: proposals seen, approvals given, updates stored (SQLite)."""
        return self.path / "studies.db"

    @property
    def receipts(self) -> Path:
        """``receipts.db``: signed receipts of all that left (SQLite); the link writes it."""
        return self.path / "receipts.db"

    @property
    def refused(self) -> Path:
        """How often the link refused to let something out, and what last."""
        return self.run / "refused.json"

    @property
    def identity(self) -> Path:
        """Keys and certificates."""
        return private_folder(self.path / "identity")

    @property
    def witness_certificate(self) -> Path:
        """The aggregator's witness certificate, as it was first shown; missing until then."""
        return self.identity / "witness.pem"

    @property
    def data(self) -> Path:
        """``site.yaml``, ``cases.csv`` and the cache of pixels."""
        return private_folder(self.path / "data")

    @property
    def releases(self) -> Path:
        """Updates stored before they leave."""
        return private_folder(self.path / "releases")

    @property
    def models(self) -> Path:
        """Models of running studies, a folder for each, named by their SHA-256."""
        return private_folder(self.path / "models")

    @property
    def kept(self) -> Path:
        """What studies keep here from round to round, as personal layers; it never leaves."""
        return private_folder(self.path / "kept")

    @property
    def reports(self) -> Path:
        """Evaluation figures and pictures; they stay at the site."""
        return private_folder(self.path / "reports")

    @property
    def run(self) -> Path:
        """Sockets, loopback certificates and status of running processes."""
        return private_folder(self.path / "run")

    @property
    def running(self) -> Path:
        """Digests of the studies that run now, as the aggregator last said."""
        return self.run / "running.json"

    @property
    def logs(self) -> Path:
        """Logs of the site's processes."""
        return private_folder(self.path / "logs")

    @property
    def replied(self) -> Path:
        """Touched when a task has replied, so that the link lets the SuperNode send it at once."""
        return self.run / "replied"

    @property
    def wake_socket(self) -> Path:
        """Socket on which the executor hears that a message has arrived.

        A socket's path may have at most 107 bytes, so it does not lie in the state folder.
        """
        name = hashlib.sha256(str(self.path).encode()).hexdigest()[:16]
        return private_folder(Path(tempfile.gettempdir()) / f"consilium-{name}") / "wake"


def _holds_something_else(path: Path) -> bool:
    """Whether a folder has content, is open to others and has none of a site's own files."""
    shared = path.is_dir() and bool(path.stat().st_mode & 0o077) and any(path.iterdir())
    return shared and not any((path / name).exists() for name in ("site.json", "identity"))
