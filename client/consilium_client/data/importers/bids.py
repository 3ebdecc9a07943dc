"""BIDS: ``sub-*/[ses-*/]anat`` images, with masks under derivatives or classes from a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from consilium_client.data.case_list import covariates_of
from consilium_client.data.findings import Finding
from consilium_client.data.importers.base import Choices, Found, input_name, new_case, unique_inputs
from consilium_client.data.importers.bids_files import (
    BidsFile,
    Session,
    facts_of,
    label_files,
    mask_names,
    sessions_of,
)
from consilium_client.data.importers.channels import matching, unfit_channel
from consilium_common.errors import ConsiliumError
from consilium_common.report.wording import plural

#: Voxel edges and positions of two modalities may differ by this much, millimetres.
_SAME: Final = 1e-2


class BidsImporter:
    """Every session of a participant is a case. Its modalities are channels where every case has
    them on one grid; otherwise one is taken, and said.

    Parameters
    ----------
    choices : Choices
        ``channels`` (or ``inputs``) choose modalities, ``derivative`` the masks, ``label_from`` and
        ``covariates`` name columns of ``participants.tsv`` or of a session's table.
    """

    name = "bids"
    understands = frozenset({"--channel", "--derivative", "--label-from", "--covariate"})

    def __init__(self, choices: Choices | None = None) -> None:
        self._choices = choices or Choices()

    def detect(self, folder: Path) -> str | None:
        """See :class:`~consilium_client.data.importers.base.Importer`."""
        if not folder.is_dir():
            return None
        people = [path for path in folder.glob("sub-*") if path.is_dir()]
        if people and ((folder / "dataset_description.json").is_file() or _has_anat(people[0])):
            return f"{plural(len(people), 'participant')} (sub-*)"
        return None

    def cases(self, folder: Path) -> Found:
        """List the sessions.

        Raises
        ------
        ConsiliumError
            ``data.no-list`` without images, ``data.no-label`` without labels, ``data.two-labels``
            where several kinds of masks wait for a choice, ``usage.column``, ``data.cases``.
        """
        choices = self._choices
        sessions = sessions_of(folder)
        if not sessions:
            raise ConsiliumError(
                "data.no-list",
                "There are no images sub-*/anat/*.nii.gz.",
                where=str(folder),
                hint="Leave --format out: the layout is then detected.",
            )
        asked = [choices.label_from] if choices.label_from else []
        table = facts_of(folder, sessions, (*asked, *choices.covariates.values()))
        masks: Mapping[str, BidsFile] = {}
        labels: Mapping[str, int | str] | None = None
        if not choices.label_from:
            masks = label_files(folder, sessions, choices.derivative)
            labels = mask_names(folder, next(iter(masks.values())))
        findings: list[Finding] = []
        chosen, notes = self._channels(sessions, masks, findings)
        inputs = unique_inputs(list(next(iter(chosen.values())))) if chosen else ("image",)
        taken = [session for session in sessions if session.name in chosen]
        facts = covariates_of(
            [
                {
                    name: table.get(session.name, {}).get(column, "")
                    for name, column in choices.covariates.items()
                }
                for session in taken
            ]
        )
        cases = []
        for session, known in zip(taken, facts, strict=True):
            files = chosen[session.name].values()
            row = table.get(session.name, {})
            mask = masks.get(session.name)
            label = mask.reference(folder) if mask else ""
            cases.append(
                new_case(
                    session.images[0].path.parent,
                    case_id=session.name,
                    patient_id=session.participant,
                    images={n: f.reference(folder) for n, f in zip(inputs, files, strict=True)},
                    label=_cell(row.get(choices.label_from, "")) if choices.label_from else label,
                    covariates=known,
                )
            )
        return Found(
            root=folder,
            cases=tuple(cases),
            label_kind="class" if choices.label_from else "mask",
            inputs=inputs,
            labels=labels,
            findings=tuple(findings),
            notes=notes,
            covariates=tuple(choices.covariates),
        )

    def _channels(
        self,
        sessions: Sequence[Session],
        masks: Mapping[str, BidsFile],
        findings: list[Finding],
    ) -> tuple[dict[str, dict[str, BidsFile]], tuple[str, ...]]:
        """Return each case's files by channel; cases where a channel is amiss become findings."""
        patterns = dict(self._choices.channels)
        known = {name for session in sessions for file in session.images for name in file.names}
        if not patterns and self._choices.inputs:
            folded = {name.casefold() for name in known}
            if all(name.casefold() in folded for name in self._choices.inputs):
                patterns = {name: name for name in self._choices.inputs}
        if not patterns:
            return _usual_channels(sessions, masks)
        chosen: dict[str, dict[str, BidsFile]] = {}
        for session in sessions:
            files: dict[str, BidsFile] = {}
            for channel, pattern in patterns.items():
                fitting = matching(session.images, pattern, lambda file: file.names)
                if len(fitting) == 1:
                    files[channel] = fitting[0]
                else:
                    where = str(session.images[0].path.parent)
                    findings.append(unfit_channel(session.name, channel, len(fitting), where))
            if len(files) == len(patterns):
                chosen[session.name] = files
        return chosen, ()


def _usual_channels(
    sessions: Sequence[Session], masks: Mapping[str, BidsFile]
) -> tuple[dict[str, dict[str, BidsFile]], tuple[str, ...]]:
    """Take the modality that most cases have (and whose grid is the masks'), and with it every
    other that lies on its grid in every case."""
    by_case = {s.name: {file.key: file for file in s.images} for s in sessions}
    counts = Counter(key for files in by_case.values() for key in files)
    fits = Counter(
        key
        for name, files in by_case.items()
        if name in masks
        for key, file in files.items()
        if len(counts) > 1 and file.grid_like(masks[name], _SAME)
    )
    first = max(counts, key=lambda key: (fits[key], counts[key], key.endswith("T1w"), key))
    having = {name: files for name, files in by_case.items() if first in files}
    channels = [first] + [
        key
        for key in sorted(counts)
        if key != first
        and all(
            key in files and files[key].grid_like(files[first], _SAME) for files in having.values()
        )
    ]
    notes = []
    left = [f"{key} ({counts[key]} cases)" for key in sorted(counts) if key not in channels]
    if left:
        notes.append(
            f"Images: {', '.join(channels)}. Left aside, because not every case has it on the same "
            f"grid: {', '.join(left)}; choose with --channel NAME=PATTERN."
        )
    elif len(channels) > 1:
        notes.append(f"Every case has {', '.join(channels)} on one grid: they are the channels.")
    if len(having) < len(by_case):
        notes.append(f"{len(by_case) - len(having)} sessions have no {first} and are left aside.")
    named = {key: _channel_name(key, channels) for key in channels}
    return {
        case: {named[key]: files[key] for key in channels} for case, files in having.items()
    }, tuple(notes)


def _channel_name(key: str, channels: Sequence[str]) -> str:
    """Return the modality alone where it says enough: ``acq-3d_T1w`` becomes ``t1w``."""
    suffix = key.rpartition("_")[2]
    alone = sum(other.rpartition("_")[2] == suffix for other in channels) == 1
    return input_name(suffix if alone else key)


def _cell(text: str) -> str:
    return "" if text.casefold() == "n/a" else text


def _has_anat(person: Path) -> bool:
    return (person / "anat").is_dir() or any(person.glob("ses-*/anat"))
