"""The rules of the house hold: who imports whom, what is private of Flower, how large files are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from flower_imports import ROOT, flower_imports, source_files

#: The only files that may know Flower's private interface.
PRIVATE_ROOMS = {
    Path("client/consilium_client/flower_private.py"),
    Path("client/consilium_client/flower_private_fleet.py"),
    Path("server/consilium_server/flower_private.py"),
    Path("common/consilium_common/flower_bundle.py"),
}
LONGEST_FILE = 450


def test_the_import_contracts_are_kept() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_what_is_private_of_flower_is_touched_in_its_own_rooms_alone() -> None:
    elsewhere = [str(i) for i in flower_imports() if i.private and i.file not in PRIVATE_ROOMS]
    assert elsewhere == []
    # The finder finds: each of the rooms is there for something.
    assert {i.file for i in flower_imports() if i.private} == PRIVATE_ROOMS


def test_flower_grpc_is_imported_by_none() -> None:
    # gRPC comes through the TLS 1.3 restriction; flwr's gRPC modules would bring it unrestricted.
    assert [str(i) for i in flower_imports() if "grpc" in i.module.lower()] == []


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_says_its_one_idea_first_and_is_not_too_long(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines, "an empty file"
    assert lines[0].startswith(('"""', 'r"""')), "its first line says what it is for"
    assert len(lines) <= LONGEST_FILE, f"{len(lines)} lines: split it by idea"


def test_the_command_imports_nothing_heavy_to_show_its_help() -> None:
    heavy = ("torch", "monai", "flwr", "grpc", "dp_accounting", "pydicom", "numpy", "sqlalchemy")
    program = (
        "import sys\n"
        "from consilium_common.cli import main\n"
        "sys.argv = ['consilium', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"print('HEAVY', [name for name in {heavy!r} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stdout, done.stdout
    for group in ("site", "server", "study", "audit", "demo"):
        assert group in done.stdout
