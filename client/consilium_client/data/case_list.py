"""Case lists in CSV as text: parsed with the line of every error, and written."""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from consilium_client.data.ranges import parse_number
from consilium_client.data.schema import Case
from consilium_common.errors import ConsiliumError

COVARIATE: Final = "covariate_"
#: What stands for a missing value of a covariate, whatever its case.
_MISSING: Final = frozenset({"", "n/a", "na", "nan"})
_SHOWN: Final = 12
_HINTS: Final = {
    "data.no-patient": "patient_id is mandatory: without it leakage between splits and privacy per "
    "patient cannot be checked.",
    "data.duplicate-case": "Give each case a case_id of its own.",
    "data.cases": "Correct these lines of the list.",
}


def columns_of(inputs: Sequence[str]) -> list[str]:
    """Return the column of each channel: ``image`` for the first, ``image_<channel>`` after."""
    return ["image", *(f"image_{name}" for name in inputs[1:])]


def covariates_of(written: Sequence[Mapping[str, str]]) -> list[dict[str, float | str | None]]:
    """Return covariates as they are written, one mapping per case, as numbers, words and None.

    A covariate is a number where every value is one, and a word otherwise: grades 1, 2 and 3A are
    words.
    """
    names = dict.fromkeys(name for row in written for name in row)
    present = {
        name: [value for row in written if (value := row.get(name, "")).casefold() not in _MISSING]
        for name in names
    }
    numeric = {
        name for name, values in present.items() if all(parse_number(v) is not None for v in values)
    }

    def value_of(name: str, text: str) -> float | str | None:
        if text.casefold() in _MISSING:
            return None
        return parse_number(text) if name in numeric else text

    return [{name: value_of(name, row.get(name, "")) for name in names} for row in written]


def parse_cases(
    text: str,
    inputs: Sequence[str],
    *,
    where: str,
    covariates: Sequence[str] = (),
    renamed: Mapping[str, str] | None = None,
) -> tuple[Case, ...]:
    """Parse a case list; all errors are named at once, each with its line.

    Parameters
    ----------
    inputs : sequence of str
        Channel names; the first has the column ``image``.
    covariates : sequence of str
        Names whose columns ``covariate_<name>`` the list has.
    renamed : mapping, optional
        A column's name in the list to the one that is meant.

    Raises
    ------
    ConsiliumError
        ``data.cases``, ``data.no-patient`` or ``data.duplicate-case``. The message names lines
        and columns, never a patient.
    """
    header, rows = read_table(text, where=where)
    for old, new in (renamed or {}).items():
        header = [new if name == old else name for name in header if name != new or new == old]
        rows = [(line, {**row, new: row[old]}) for line, row in rows]
    channels = dict(zip(columns_of(inputs), inputs, strict=True))
    _check_columns(header, channels, covariates, where)
    beside = covariates_of([{n: row[f"{COVARIATE}{n}"] for n in covariates} for _, row in rows])
    problems: list[tuple[str, str]] = []
    cases: list[Case] = []
    seen: dict[str, int] = {}
    for (line, row), known in zip(rows, beside, strict=True):
        images = {name: row[column] for column, name in channels.items()}
        empty = [column for column in ("case_id", *channels) if not row[column]]
        split = row.get("split", "")
        if not row["patient_id"]:
            problems.append(("data.no-patient", f"line {line}: patient_id is empty"))
        elif empty:
            problems.append(("data.cases", f"line {line}: {', '.join(empty)} is empty"))
        elif split not in ("", "train", "validation", "test"):
            problems.append(
                ("data.cases", f"line {line}: split must be train, validation, test or empty")
            )
        elif row["case_id"] in seen:
            problems.append(
                (
                    "data.duplicate-case",
                    f"line {line}: the case_id of line {seen[row['case_id']]} again",
                )
            )
        elif any(_is_no_path(cell) for cell in (*images.values(), row.get("label", ""))):
            problems.append(
                ("data.cases", f"line {line}: an image or a label is longer than a path may be")
            )
        elif max(len(row["case_id"]), len(row["patient_id"])) > 200:
            problems.append(("data.cases", f"line {line}: an identifier is longer than 200"))
        else:
            seen[row["case_id"]] = line
            cases.append(
                Case.model_validate(
                    {
                        "case_id": row["case_id"],
                        "patient_id": row["patient_id"],
                        "images": images,
                        "label": row.get("label", ""),
                        "split": split or None,
                        "covariates": known,
                    }
                )
            )
    if problems:
        more = f"\nand {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ConsiliumError(
            problems[0][0],
            "\n".join(text for _, text in problems[:_SHOWN]) + more,
            where=where,
            hint=_HINTS[problems[0][0]],
        )
    return tuple(cases)


def read_list(path: Path, what: str) -> str:
    """Read a table that a person has written, as text.

    Raises
    ------
    ConsiliumError
        ``data.missing`` where there is no such file, ``data.cases`` where it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")  # Excel writes a byte order mark
    except FileNotFoundError as error:
        raise ConsiliumError(
            "data.missing", f"The {what} does not exist.", where=str(path), hint="Check its path."
        ) from error
    except UnicodeDecodeError as error:
        raise ConsiliumError(
            "data.cases",
            f"The {what} is not UTF-8 text.",
            where=str(path),
            hint="Save it again as UTF-8; spreadsheets call it CSV UTF-8.",
        ) from error
    except OSError as error:
        raise ConsiliumError(
            "data.cases",
            f"The {what} cannot be read: {error.strerror or type(error).__name__}.",
            where=str(path),
            hint="Name a file that this user may read.",
        ) from error


def _is_no_path(cell: str) -> bool:
    # The system refuses such names with an error of its own, wherever they are looked for.
    return len(cell.encode()) > 4000 or any(len(part.encode()) > 255 for part in cell.split("/"))


def read_table(text: str, *, where: str) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Read a CSV text: its header and its rows with their line numbers, cells stripped.

    A semicolon or a tab separates where the header has no comma: spreadsheets in much of Europe
    write the one, and text exports the other.

    Raises
    ------
    ConsiliumError
        ``data.cases`` when it has no header, a column twice, or a row of another length.
    """
    first = text.split("\n", 1)[0]
    delimiter = "," if "," in first else next((sign for sign in ";\t" if sign in first), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[int, dict[str, str]]] = []
    header: list[str] = []
    try:
        for cells in reader:
            values = [cell.strip() for cell in cells]
            if not any(values):
                continue
            if not header:
                header = values
                continue
            if len(values) != len(header):
                raise ConsiliumError(
                    "data.cases",
                    f"The row has {len(values)} cells, the header {len(header)}.",
                    where=f"{where}:{reader.line_num}",
                    hint="Put cells that hold a separator in quotes, and fill rows up to the end.",
                )
            rows.append((reader.line_num, dict(zip(header, values, strict=True))))
    except csv.Error as error:
        raise ConsiliumError(
            "data.cases",
            f"This is not CSV: {error}.",
            where=f"{where}:{reader.line_num}",
            hint="Look for a quote that is not closed.",
        ) from error
    if not header:
        raise ConsiliumError(
            "data.cases",
            "The list is empty.",
            where=where,
            hint="Its first line names the columns, every further line is a case.",
        )
    if len(set(header)) != len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise ConsiliumError(
            "data.cases",
            f"The header has the column {twice!r} twice.",
            where=f"{where}:1",
            hint="Rename one of them, or take it out.",
        )
    return header, rows


def _check_columns(
    header: Sequence[str], channels: Iterable[str], covariates: Iterable[str], where: str
) -> None:
    needed = ["case_id", "patient_id", *channels, *(f"{COVARIATE}{name}" for name in covariates)]
    known = [*needed, "label", "split"]
    missing = [name for name in needed if name not in header]
    unknown = [name for name in header if name not in known]
    if missing or unknown:
        parts = [f"the column {name} is missing" for name in missing]
        for name in unknown:
            near = difflib.get_close_matches(name, known, 1, cutoff=0.8)
            parts.append(f"unknown column {name!r}" + (f", near {near[0]}" if near else ""))
        message = "; ".join(parts)
        raise ConsiliumError(
            "data.no-patient" if "patient_id" in missing else "data.cases",
            f"{message[0].upper()}{message[1:]}.",
            where=f"{where}:1",
            hint=f"The columns are {', '.join(known)}; label and split may be left out. "
            "Further channels have columns image_<name> and stand in `inputs`; covariates have "
            "columns covariate_<name> and stand in `covariates`. An import takes any other column "
            "with --covariate NAME=COLUMN or --label-from COLUMN; remove the others.",
        )


def render_cases(
    cases: Iterable[Case], inputs: Sequence[str], covariates: Sequence[str] = ()
) -> str:
    """Write cases.csv; the column ``split`` only where a case has one."""
    rows = list(cases)
    columns = columns_of(inputs)
    with_split = any(case.split for case in rows)
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    beside = [f"{COVARIATE}{name}" for name in covariates]
    last = ["split"] if with_split else []
    writer.writerow(["case_id", "patient_id", *columns, *beside, "label", *last])
    for case in rows:
        cells = [case.case_id, case.patient_id, *(case.images[name] for name in inputs)]
        cells += [_written(case.covariates.get(name)) for name in covariates]
        writer.writerow([*cells, case.label, *([case.split or ""] if with_split else [])])
    return stream.getvalue()


def _written(value: float | str | None) -> str:
    if value is None:
        return ""
    # The shortest text that reads back as the same number; whole numbers without a point.
    return value if isinstance(value, str) else repr(value).removesuffix(".0")
