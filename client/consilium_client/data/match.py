"""Which of the site's channels and labels are the study's inputs and classes, and a case's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from consilium_client.data.ranges import parse_number
from consilium_client.data.schema import UNNAMED_INPUT, SiteManifest
from consilium_common.errors import ConsiliumError
from consilium_common.study.schema import Study

#: In the label column: a case with none of the classes (multi-label).
NO_CLASS: Final = "-"


@dataclass(frozen=True)
class Match:
    """How a site's names become the study's.

    Parameters
    ----------
    channels : tuple of str
        The site's channel for each of the study's inputs, in the study's order.
    classes : mapping
        Local label name to the index of the study's class; names the study has no class for are
        absent (in a mask they become background).
    values : mapping
        Mask value to class index; empty for class labels.
    """

    channels: tuple[str, ...]
    classes: Mapping[str, int]
    values: Mapping[int, int]


def match_study(site: SiteManifest, study: Study) -> Match:
    """Match names: by site.yaml's ``classes`` first, then by spelling without case, - _ . and
    spaces. A site's one unnamed channel matches a study's one input.

    Raises
    ------
    ConsiliumError
        ``data.label-kind``, ``data.channel-missing``, ``data.class-missing`` or
        ``data.class-ambiguous``.
    """
    needed = "mask" if study.task.kind == "segmentation" else "class"
    if site.label_kind != needed:
        raise ConsiliumError(
            "data.label-kind",
            f"The study is a {study.task.kind} and needs {needed} labels; this site's are "
            f"{site.label_kind} labels.",
            where="site.yaml: label_kind",
            hint="Import the labels that fit the study.",
        )
    classes = _classes(site, study)
    values = (
        {int(site.labels[name]): index for name, index in classes.items()}
        if needed == "mask"
        else {}
    )
    return Match(_channels(site, study), classes, values)


def written_classes(label: str) -> tuple[str, ...]:
    """Return what the label column says, as it is written; ``|`` or ``;`` separate classes."""
    if label == NO_CLASS:
        return ()
    return tuple(part.strip() for part in re.split(r"[|;]", label) if part.strip())


def class_names(label: str, site: SiteManifest) -> tuple[str, ...]:
    """Return the local label names behind a cell of the label column.

    A cell holds a label's name, its value, or a number that lies in a label's range; the name and
    the value go before the range.

    Raises
    ------
    ConsiliumError
        ``data.label-unknown`` for what site.yaml does not list.
    """
    known = {str(value): name for name, value in site.labels.items()}
    known |= {name: name for name in site.labels}
    ranges = site.ranges()
    found = []
    for written in written_classes(label):
        name = known.get(written)
        number = parse_number(written) if name is None and ranges else None
        if number is not None:
            name = next((local for local, span in ranges.items() if number in span), None)
        if name is None:
            raise ConsiliumError(
                "data.label-unknown",
                "The label column holds a class that site.yaml does not list.",
                where=f"cases.csv: {written[:60]}",
                hint="Add it under `labels` in site.yaml, or correct the label. A class may be a "
                'range of numbers: `old: ">=65"`.',
            )
        found.append(name)
    return tuple(dict.fromkeys(found))


def _plain(name: str) -> str:
    return re.sub(r"[\s_.-]+", "", name).casefold()


def _channels(site: SiteManifest, study: Study) -> tuple[str, ...]:
    inputs = study.task.inputs
    if len(inputs) == 1 and site.inputs == [UNNAMED_INPUT]:
        return (UNNAMED_INPUT,)
    known = {_plain(name): name for name in site.inputs}
    missing = [name for name in inputs if _plain(name) not in known]
    if missing:
        raise ConsiliumError(
            "data.channel-missing",
            f"The study needs the input {missing[0]}; this site has {_list(site.inputs)}.",
            where="site.yaml: inputs",
            hint="If it is the same under another name, rename it in site.yaml (and its column in "
            "cases.csv).",
        )
    return tuple(known[_plain(name)] for name in inputs)


def _classes(site: SiteManifest, study: Study) -> dict[str, int]:
    names = study.task.classes
    by_spelling: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        by_spelling.setdefault(_plain(name), []).append(index)
    found: dict[str, int] = {}
    for local in site.labels:
        if local in site.classes:
            if site.classes[local] in names:
                found[local] = names.index(site.classes[local])
            continue
        candidates = by_spelling.get(_plain(local), [])
        if len(candidates) > 1:
            listed = _list([names[index] for index in candidates])
            raise ConsiliumError(
                "data.class-ambiguous",
                f"This site's label {local} could be any of {listed}.",
                where="site.yaml: classes",
                hint="Say which: an entry under `classes` in site.yaml.",
            )
        if candidates:
            found[local] = candidates[0]
    background = 1 if study.task.kind == "segmentation" else 0
    missing = [
        name
        for index, name in enumerate(names)
        if index >= background and index not in found.values()
    ]
    if missing:
        raise ConsiliumError(
            "data.class-missing",
            f"The study names the class {missing[0]}; this site's labels are "
            f"{_list(list(site.labels))}.",
            where="site.yaml: labels",
            hint="If one of them is it, map it in site.yaml: "
            f"`classes: {{local-name: {missing[0]}}}`. If the site has no such cases, add the "
            "name under `labels` all the same.",
        )
    return found


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:12]) or "none"
    return shown + (f" and {len(names) - 12} more" if len(names) > 12 else "")
