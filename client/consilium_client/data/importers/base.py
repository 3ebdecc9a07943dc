"""What an importer is: it recognises a folder and lists its cases, and reads no pixels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from consilium_client.data.findings import Finding
from consilium_client.data.ingest.dicom_headers import Header
from consilium_client.data.schema import UNNAMED_INPUT, Case


@dataclass(frozen=True)
class Found:
    """What an importer found in a folder.

    Parameters
    ----------
    root : Path
        Folder that the cases' references start from.
    cases : tuple of Case
    label_kind : str
        ``mask`` or ``class``.
    inputs : tuple of str
        Channel names; the first case's order.
    labels : mapping
        Label name to value; empty where the source names none.
    findings : tuple of Finding
        Cases that cannot be listed.
    notes : tuple of str
        What a person should know, without any patient's identity.
    headers : tuple of Header
        DICOM headers read on the way.
    """

    root: Path
    cases: tuple[Case, ...]
    label_kind: Literal["mask", "class"]
    inputs: tuple[str, ...] = (UNNAMED_INPUT,)
    labels: Mapping[str, int | str] | None = None
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    headers: tuple[Header, ...] = ()


class Importer(Protocol):
    """One layout of images and labels on disk."""

    @property
    def name(self) -> str:
        """What ``--format`` calls it."""
        ...

    def detect(self, folder: Path) -> str | None:
        """Say in a few words why ``folder`` has this layout, or None where it has not."""
        ...

    def cases(self, folder: Path) -> Found:
        """List the cases.

        Raises
        ------
        ConsiliumError
            ``data.*`` when the layout itself is broken; defects of single cases are findings.
        """
        ...


def input_name(text: str) -> str:
    """Turn a source's name of a channel into a valid one: ``T1 post`` becomes ``t1-post``."""
    plain = re.sub(r"[^a-z0-9_.]+", "-", text.strip().lower()).strip("-_.")
    return plain[:63] or UNNAMED_INPUT


def case_name(text: str) -> str:
    """Turn a file or folder name into a case name, without suffixes."""
    return text.removesuffix(".gz").removesuffix(".nii")[:200]


def unique_inputs(names: Sequence[str]) -> tuple[str, ...]:
    """Return valid channel names, numbered where two would be the same."""
    plain = [input_name(name) for name in names]
    return tuple(
        name if plain.count(name) == 1 else f"{name}-{number}" for number, name in enumerate(plain)
    )
