"""TRUST.md says which test shows what it claims: each of them is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from consilium_common.wire import methods

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "common" / "TRUST.md").read_text()
#: The link: whatever these call is made there. The doctor's call is made in `common`.
LINK = {"link.py", "transfers.py", "connection.py", "flower_private_fleet.py"}
BESIDE = (ROOT / "common" / "consilium_common" / "diagnosis" / "exchange.py",)


def rows(part: str) -> list[list[str]]:
    """Return the cells of the table between two marks of the page, without its head."""
    table = PAGE.split(f"<!-- {part} -->")[1].split(f"<!-- /{part} -->")[0].strip()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()][
        2:
    ]


def called_in(path: Path) -> set[str]:
    """Return the methods of the port that a module names."""
    named = {
        one.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "consilium_common.wire.methods"
        for one in node.names
    }
    values = [getattr(methods, name) for name in named]
    return {one for one in values if isinstance(one, str) and one.startswith("/consilium.")}


def test_every_test_that_the_trust_document_names_is_there() -> None:
    named = set(re.findall(r"`(test_\w+\*?)`", PAGE))
    files = sorted((ROOT / "tests").glob("*/test_*.py"))
    there = {path.stem for path in files}
    for path in files:
        there.update(re.findall(r"^(?:async )?def (test_\w+)\(", path.read_text(), re.MULTILINE))
    missing = [
        name
        for name in sorted(named)
        if not any(one == name or one.startswith(name[:-1]) * name.endswith("*") for one in there)
    ]
    assert len(named) > 20
    assert missing == []


def test_each_row_of_what_a_party_sees_names_a_test() -> None:
    found = rows("sees")
    assert len(found) > 5
    assert [cells[0] for cells in found if "`test_" not in cells[-1]] == []


def test_the_calls_that_go_past_the_link_are_those_of_the_page() -> None:
    client = ROOT / "client" / "consilium_client"
    modules = [path for path in client.rglob("*.py") if path.name not in LINK]
    called = set[str]().union(*map(called_in, (*modules, *BESIDE)))
    said = {cells[0].strip("`") for cells in rows("past")}
    assert {method.rpartition("/")[2] for method in called} == said
    # Of the link's own calls none is made elsewhere.
    link = called_in(client / "link.py") | called_in(client / "transfers.py")
    assert link and not link & called
    # Nobody else opens a channel, or imports what could.
    for path in modules:
        text = path.read_text()
        assert "aio_channel" not in text and "import grpc" not in text, path
