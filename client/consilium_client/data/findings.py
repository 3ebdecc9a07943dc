"""What is wrong with a site's data: collected over all cases, shown together, then one error."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from consilium_client.data.rules import Severity, rule_of
from consilium_common.errors import ConsiliumError, printable
from consilium_common.files import write_atomic
from consilium_common.report.wording import plural

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one case, or with the cohort.

    Parameters
    ----------
    case : str
        The case's name in cases.csv, or the folder; shown at the site only. Empty for the cohort.
    code, message, where, hint : str
        As in :class:`~consilium_common.errors.ConsiliumError`; ``where`` names files. How grave it
        is and why it matters follow from the code: see :mod:`consilium_client.data.rules`.
    pictures : tuple of bytes
        PNG thumbnails to look at; for the page at the site alone.
    """

    case: str
    code: str
    message: str
    where: str
    hint: str
    pictures: tuple[bytes, ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("case", "where"):
            object.__setattr__(self, name, printable(getattr(self, name)))

    @property
    def severity(self) -> Severity:
        """``error`` keeps the case out; ``warning`` wants a look."""
        return rule_of(self.code).severity

    @property
    def why(self) -> str:
        """Why the rule matters, in one sentence."""
        return rule_of(self.code).why

    def to_dict(self) -> dict[str, str]:
        """Return the finding for a JSON report at the site; pictures left out."""
        return {
            "case": self.case,
            "severity": self.severity,
            "code": self.code,
            "message": self.message,
            "where": self.where,
            "why": self.why,
            "hint": self.hint,
        }

    @classmethod
    def of(cls, case: str, error: ConsiliumError) -> Finding:
        """Turn an error about one case into a finding."""
        return cls(case, error.code, error.message, error.where, error.hint)


def findings_table(findings: Sequence[Finding], *, limit: int = 3) -> Group:
    """Return the findings for the person at the site: a table per rule, with why and what to do.

    Parameters
    ----------
    limit : int
        Findings of one rule to show; the others are counted (default: 3).
    """
    from rich.console import Group
    from rich.text import Text

    by_code: dict[str, list[Finding]] = {}
    for finding in findings:
        by_code.setdefault(finding.code, []).append(finding)
    tables = [_table_of(together, limit) for together in by_code.values()]
    return Group(Text(plural(len(findings), "finding")), *tables)


def _table_of(findings: Sequence[Finding], limit: int) -> Table:
    """Return the table of one rule's findings."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    first, shown = findings[0], findings[:limit]
    style = "bold red" if first.severity == "error" else "bold yellow"
    table = Table(
        title=Text.assemble((f"{first.severity} {first.code}", style), f"  {first.why}"),
        title_justify="left",
        title_style="",
        caption_justify="left",
        caption_style="",
        box=SIMPLE_HEAD,
        expand=True,
    )
    table.add_column("case", ratio=1, overflow="fold")
    table.add_column("what and where", ratio=2, overflow="fold")
    # What to do stands once below, where it is the same for all.
    hints = {finding.hint for finding in shown}
    if len(hints) > 1:
        table.add_column("to do", ratio=2, overflow="fold")
    for finding in shown:
        what = f"{finding.message}\n{finding.where}" if finding.where else finding.message
        # Text, not markup: file names may hold brackets.
        cells = [finding.case or "cohort", what, *([finding.hint] if len(hints) > 1 else [])]
        table.add_row(*map(Text, cells))
    more = len(findings) - len(shown)
    last = [f"and {more} more in the report"] if more else []
    last += [f"To do: {first.hint}"] if len(hints) == 1 and first.hint else []
    table.caption = Text("\n".join(last))
    return table


def write_report(path: Path, findings: Sequence[Finding], *, cases: int) -> None:
    """Write every finding as JSON; the report stays at the site."""
    content = {
        "schema": "consilium/data-report/v1",
        "cases": cases,
        "findings": [finding.to_dict() for finding in findings],
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_atomic(path, text.encode())


def error_of(
    findings: Sequence[Finding], *, cases: int, report: Path, name_files: bool
) -> ConsiliumError:
    """Return the one error that ends a command with these findings, all of them errors.

    Its code is the findings' own where they agree, else ``data.invalid``. With ``name_files`` a
    single finding's files are named; without, only the report is, so that the error may travel.
    """
    counts = Counter(finding.code for finding in findings)
    code = next(iter(counts)) if len(counts) == 1 else "data.invalid"
    if len(findings) == 1:
        only = findings[0]
        return ConsiliumError(
            code,
            only.message,
            where=only.where if name_files else str(report),
            hint=only.hint,
        )
    listed = ", ".join(f"{number} × {name}" for name, number in sorted(counts.items()))
    bad = {finding.case for finding in findings}
    said = (
        f"{len(findings)} of {cases} cases cannot be used"
        if len(bad) == len(findings) and "" not in bad
        else f"{len(findings)} errors in {cases} cases"
    )
    return ConsiliumError(
        code,
        f"{said}: {listed}.",
        where=str(report),
        hint="The report names every file and what to do about it.",
    )


@contextmanager
def reading(path: Path | str, what: str) -> Iterator[None]:
    """Turn whatever a library raises on a broken file into one clear error.

    The library's own words are left out: they may quote the file's content.

    Raises
    ------
    ConsiliumError
        ``data.truncated`` for any failure other than one of our own errors, or ``data.missing``.
    """
    try:
        yield
    except ConsiliumError:
        raise
    except FileNotFoundError as error:
        raise ConsiliumError(
            "data.missing",
            f"The {what} does not exist.",
            where=str(path),
            hint="Correct the path in the case list, or restore the file.",
        ) from error
    except PermissionError as error:
        raise ConsiliumError(
            "data.missing",
            f"The {what} may not be read by this user.",
            where=str(path),
            hint="Give this user the right to read it.",
        ) from error
    except MemoryError as error:
        raise ConsiliumError(
            "data.too-large",
            f"The {what} does not fit into memory.",
            where=str(path),
            hint="Look whether its header is right; if so, import on a machine with more memory.",
        ) from error
    except Exception as error:
        raise ConsiliumError(
            "data.truncated",
            f"The {what} is truncated or damaged ({type(error).__name__}).",
            where=str(path),
            hint="Copy or export it again from its source.",
        ) from error
