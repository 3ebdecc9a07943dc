"""TRUST.md says which test shows what it claims: each of them is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_trust_document_names_is_there() -> None:
    named = set(re.findall(r"`(test_\w+\*?)`", (ROOT / "common" / "TRUST.md").read_text()))
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
