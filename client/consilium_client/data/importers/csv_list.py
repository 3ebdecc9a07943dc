"""A case list in CSV, with the columns of cases.csv and paths from the file's own folder."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from consilium_client.data.case_list import columns_of, parse_cases, read_table
from consilium_client.data.importers.base import Found
from consilium_client.data.ingest.picture import SUFFIXES
from consilium_client.data.schema import UNNAMED_INPUT
from consilium_common.errors import ConsiliumError

_NEEDED: Final = frozenset({"case_id", "image"})


class CsvImporter:
    """Reads ``case_id, patient_id, image[, image_<channel>…], label[, split]``."""

    name = "csv"

    def detect(self, folder: Path) -> str | None:
        """See :class:`~consilium_client.data.importers.base.Importer`."""
        lists = _lists(folder)
        if len(lists) > 1:
            raise ConsiliumError(
                "data.several-lists",
                f"The folder holds {len(lists)} case lists.",
                where=", ".join(str(path) for path in lists[:4]),
                hint="Name the one to import.",
            )
        return f"the case list {lists[0].name}" if lists else None

    def cases(self, folder: Path) -> Found:
        """List the rows; ``folder`` may be the CSV file itself.

        Raises
        ------
        ConsiliumError
            ``data.no-list``, ``data.cases``, ``data.no-patient`` or ``data.duplicate-case``.
        """
        lists = [folder] if folder.is_file() else _lists(folder)
        if len(lists) != 1:
            raise ConsiliumError(
                "data.no-list",
                "There is no CSV file with the columns case_id and image.",
                where=str(folder),
                hint="The columns are case_id, patient_id, image, label and, if wanted, split.",
            )
        path = lists[0]
        text = _text(path)
        header, _ = read_table(text, where=str(path))
        further = [name.removeprefix("image_") for name in header if name.startswith("image_")]
        inputs = (UNNAMED_INPUT, *further)
        cases = parse_cases(text, inputs, where=str(path))
        if not cases:
            raise ConsiliumError("data.cases", "The case list has no cases.", where=str(path))
        labels = [case.label for case in cases if case.label]
        masks = [label for label in labels if (path.parent / label.rpartition("#")[0]).is_file()]
        masks += [label for label in labels if (path.parent / label).exists()]
        looks_like_files = any(_looks_like_file(label) for label in labels)
        return Found(
            root=path.parent,
            cases=cases,
            label_kind="mask" if masks or looks_like_files else "class",
            inputs=inputs,
            labels={} if masks or looks_like_files else None,
            notes=()
            if len(columns_of(inputs)) == 1
            else (f"Input channels: {', '.join(inputs)}; rename the first with --input.",),
        )


def _looks_like_file(label: str) -> bool:
    name = label.rpartition("#")[0] or label
    return name.lower().endswith((".nii", ".nii.gz", ".dcm", *SUFFIXES))


def _lists(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder] if folder.suffix.lower() == ".csv" else []
    named = folder / "cases.csv"
    if named.is_file():
        return [named]
    found = []
    for path in sorted(folder.glob("*.csv")):
        try:
            header, _ = read_table(_text(path).split("\n", 1)[0], where=str(path))
        except ConsiliumError:
            continue
        if set(header) >= _NEEDED:
            found.append(path)
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConsiliumError(
            "data.cases",
            "The case list cannot be read as UTF-8 text.",
            where=str(path),
            hint="Save it as CSV in UTF-8.",
        ) from error
