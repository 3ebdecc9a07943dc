"""Who may call what: the table in common/TRUST.md.

``python tests/unit/role_table.py`` writes it there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from consilium_common.identity.certificates import Role
from consilium_common.wire.methods import (
    FLEET_PATHS,
    FLEET_ROLES,
    PRIVILEGED,
    SERVICE_ROLES,
    STREAM_ROLES,
    fleet_method,
)

PAGE: Final = Path(__file__).parents[2] / "common" / "TRUST.md"
#: Columns of the table. Every other certificate, and none at all, opens nothing.
COLUMNS: Final = (Role.INVITATION, Role.SITE, Role.OPERATOR, Role.AUDITOR)
BEGIN: Final = "<!-- roles -->"
END: Final = "<!-- /roles -->"
HEADING: Final = "# Who trusts whom with what"

_ROW: Final = re.compile(r"^\| `(?P<method>/[^`]+)` *\|(?P<cells>.*)\|$", re.MULTILINE)


def table() -> str:
    """Return the table as it follows from the code, in Markdown."""
    roles = {
        **SERVICE_ROLES,
        **STREAM_ROLES,
        **dict.fromkeys(map(fleet_method, FLEET_PATHS), FLEET_ROLES),
    }
    names = [f"`{method}`" for method in roles]
    width = max(map(len, names))
    lines = [
        f"| {'method':<{width}} | {' | '.join(COLUMNS)} | in the audit log |",
        f"|{'-' * (width + 2)}|{'|'.join('-' * (len(role) + 2) for role in COLUMNS)}|---|",
    ]
    for name, (method, allowed) in zip(names, roles.items(), strict=True):
        cells = " | ".join(("yes" if role in allowed else "").ljust(len(role)) for role in COLUMNS)
        noted = "yes" if method in PRIVILEGED else ""
        lines.append(f"| {name:<{width}} | {cells} | {noted:<3} |")
    return "\n".join(lines)


def written() -> dict[str, frozenset[Role]]:
    """Return the roles of each method as the page says them, read from the page alone."""
    part = _part(PAGE.read_text(encoding="utf-8"))
    found = {}
    for row in _ROW.finditer(part):
        cells = [cell.strip() for cell in row["cells"].split("|")]
        found[row["method"]] = frozenset(
            role for role, cell in zip(COLUMNS, cells, strict=False) if cell == "yes"
        )
    return found


def is_current() -> bool:
    """Whether the page's table is the one that follows from the code."""
    return _part(PAGE.read_text(encoding="utf-8")).strip() == table()


def _part(page: str) -> str:
    return page[page.index(BEGIN) + len(BEGIN) : page.index(END)]


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else f"{HEADING}\n"
    if BEGIN not in page:
        page = f"{page.rstrip()}\n\n## Who may call what\n\n{BEGIN}\n{END}\n"
    before, after = page[: page.index(BEGIN)], page[page.index(END) :]
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{after}", encoding="utf-8")
