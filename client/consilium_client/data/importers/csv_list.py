"""A case list in CSV, with the columns of cases.csv and paths from the file's own folder."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from consilium_client.data.case_list import COVARIATE, parse_cases, read_list, read_table
from consilium_client.data.importers.base import PICTURES, Choices, Found, is_volume
from consilium_client.data.importers.named_masks import segment_names
from consilium_client.data.schema import UNNAMED_INPUT
from consilium_common.errors import ConsiliumError

_NEEDED: Final = frozenset({"case_id", "image"})


class CsvImporter:
    """Reads ``case_id, patient_id, image[, image_<channel>…], label[, split]`` and columns
    ``covariate_<name>``.

    Parameters
    ----------
    choices : Choices
        ``label_from`` and ``covariates`` name columns of the list.
    """

    name = "csv"
    understands = frozenset({"--label-from", "--covariate"})

    def __init__(self, choices: Choices | None = None) -> None:
        self._choices = choices or Choices()

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
            ``data.no-list``, ``data.cases``, ``data.no-patient``, ``data.duplicate-case`` or
            ``usage.column``.
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
        text = read_list(path, "case list")
        header, _ = read_table(text, where=str(path))
        renamed = self._renamed(header, path)
        columns = [renamed.get(name, name) for name in header]
        further = [name.removeprefix("image_") for name in columns if name.startswith("image_")]
        beside = [name.removeprefix(COVARIATE) for name in columns if name.startswith(COVARIATE)]
        covariates = tuple(dict.fromkeys(beside))
        inputs = (UNNAMED_INPUT, *further)
        cases = parse_cases(text, inputs, where=str(path), covariates=covariates, renamed=renamed)
        if not cases:
            raise ConsiliumError(
                "data.cases",
                "The case list has no cases.",
                where=str(path),
                hint="Write a line for each case below the names of the columns.",
            )
        files = _label_files([case.label for case in cases if case.label], path.parent)
        names = None if files is None else segment_names(files)
        return Found(
            root=path.parent,
            cases=cases,
            label_kind="class" if files is None else "mask",
            inputs=inputs,
            labels=names,
            labels_by_name=bool(names),
            notes=()
            if len(inputs) == 1
            else (f"Input channels: {', '.join(inputs)}; rename the first with --input.",),
            covariates=covariates,
        )

    def _renamed(self, header: list[str], path: Path) -> dict[str, str]:
        """Return the columns that a person has chosen to what they stand for."""
        chosen = {column: f"{COVARIATE}{n}" for n, column in self._choices.covariates.items()}
        if self._choices.label_from:
            chosen[self._choices.label_from] = "label"
        unknown = [column for column in chosen if column not in header]
        if unknown:
            raise ConsiliumError(
                "usage.column",
                f"The case list has no column {unknown[0]}.",
                where=str(path),
                hint=f"Its columns are {', '.join(header)}.",
            )
        return chosen


def _label_files(labels: list[str], root: Path) -> list[Path] | None:
    """Return the files that the labels name; None where they are classes."""
    files = [root / (label.partition("#")[0]) for label in labels]
    exist = [path for path in files if path.is_file()]
    if exist or any(path.is_dir() for path in files if path != root):
        return exist
    return [] if any(_looks_like_file(label) for label in labels) else None


def _looks_like_file(label: str) -> bool:
    name = label.partition("#")[0]
    return name.lower().endswith((".dcm", *PICTURES)) or is_volume(Path(name))


def _lists(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder] if folder.suffix.lower() == ".csv" else []
    named = folder / "cases.csv"
    if named.is_file():
        return [named]
    found = []
    for path in sorted(folder.glob("*.csv")):
        try:
            header, _ = read_table(read_list(path, "case list").split("\n", 1)[0], where=str(path))
        except ConsiliumError:
            continue
        if set(header) >= _NEEDED:
            found.append(path)
    return found
