"""The strategies that a study may name: the table in server/README.md.

``python tests/unit/strategy_table.py`` writes it there.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Final

from consilium_common.study.strategies import ALL

PAGE: Final = Path(__file__).parents[2] / "server" / "README.md"
BEGIN: Final = "<!-- strategies -->"
END: Final = "<!-- /strategies -->"


def table() -> str:
    """Return the table as it follows from the code, in Markdown."""
    lines = [
        "| strategy | what it does | its keys | from | with privacy |",
        "|---|---|---|---|---|",
    ]
    for strategy in ALL:
        fields = strategy.model_fields
        (name,) = fields["name"].annotation.__args__  # type: ignore[union-attr]
        keys = ", ".join(
            f"`{key}` {_value(field.default)}" for key, field in fields.items() if key != "name"
        )
        refused = strategy.not_private
        cells = (
            f"`{name}`",
            inspect.cleandoc(strategy.__doc__ or ""),
            keys,
            strategy.paper,
            f"no: {refused}" if refused else "yes",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def is_current() -> bool:
    """Whether the page's table is the one that follows from the code."""
    page = PAGE.read_text(encoding="utf-8")
    return page[page.index(BEGIN) + len(BEGIN) : page.index(END)].strip() == table()


def _value(default: Any) -> str:
    if default is None:
        return "unset"
    return f"{default:g}" if isinstance(default, float) else str(default)


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    before, after = page[: page.index(BEGIN)], page[page.index(END) :]
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{after}", encoding="utf-8")
