"""Finds in the packages' source text what they import of Flower."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = (
    ROOT / "common" / "consilium_common",
    ROOT / "client" / "consilium_client",
    ROOT / "server" / "consilium_server",
)
#: Flower's public interface; everything else of Flower is private.
PUBLIC = ("flwr.app", "flwr.serverapp", "flwr.clientapp")


@dataclass(frozen=True)
class FlowerImport:
    """``from module import name`` in a file of ours."""

    file: Path
    line: int
    module: str
    name: str

    @property
    def private(self) -> bool:
        """Whether it is outside Flower's public interface."""
        return self.module not in PUBLIC

    def __str__(self) -> str:
        return f"{self.file.name}:{self.line}: from {self.module} import {self.name}"


def source_files() -> list[Path]:
    """Return every Python file of the three packages."""
    return sorted(path for package in PACKAGES for path in package.rglob("*.py"))


def flower_imports() -> list[FlowerImport]:
    """Return every import of Flower in the three packages, wherever it stands."""
    return [found for path in source_files() for found in _in_file(path)]


def _in_file(path: Path) -> Iterator[FlowerImport]:
    relative = path.relative_to(ROOT)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and _flower(node.module):
            for alias in node.names:
                yield FlowerImport(relative, node.lineno, node.module, alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if _flower(alias.name):
                    yield FlowerImport(relative, node.lineno, alias.name, "")


def _flower(module: str) -> bool:
    return module == "flwr" or module.startswith("flwr.")
