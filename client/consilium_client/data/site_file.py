"""site.yaml as text: parsed with the line of every error, written with a line of explanation."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import yaml
from pydantic import ValidationError

from consilium_client.data.schema import SiteManifest
from consilium_common.errors import ConsiliumError

_MEND: Final = (
    "Correct it; the comments of a fresh import's site.yaml say what it may hold. Or take the file "
    "away and import again."
)


def parse_site(text: str, *, where: str) -> SiteManifest:
    """Parse site.yaml; every error names its line.

    Raises
    ------
    ConsiliumError
        ``data.manifest``.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConsiliumError(
            "data.manifest",
            f"This is not YAML: {getattr(error, 'problem', None) or 'cannot be parsed'}.",
            where=f"{where}{line}",
            hint=_MEND,
        ) from error
    _check_duplicates(node, where)
    if not isinstance(value, dict):
        raise ConsiliumError(
            "data.manifest",
            "The file holds no keys and values.",
            where=f"{where}:1",
            hint=_MEND,
        )
    try:
        return SiteManifest.model_validate(value)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        lines = [_line(node, problem["loc"]) for problem in problems]
        message = "\n".join(
            f"line {line}: {explain(problem)}"
            for line, problem in zip(lines, problems, strict=True)
        )
        raise ConsiliumError(
            "data.manifest",
            message,
            where=f"{where}:{lines[0]}",
            hint=_MEND,
        ) from error


def _check_duplicates(node: Any, where: str) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        if key.value in seen:
            line = key.start_mark.line + 1
            raise ConsiliumError(
                "data.manifest",
                f"The key {key.value} stands twice.",
                where=f"{where}:{line}",
                hint=_MEND,
            )
        seen.add(key.value)
        _check_duplicates(value, where)


def explain(problem: Any) -> str:
    """Say in words what pydantic found wrong with one place of site.yaml."""
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        names = [field.alias or name for name, field in SiteManifest.model_fields.items()]
        near = difflib.get_close_matches(str(problem["loc"][-1]), names, 1)
        return f"unknown key {path}" + (f"; did you mean {near[0]}?" if near else "")
    if problem["type"] == "string_pattern_mismatch":
        return f"{path} is not a name: lower case letters, digits and -_. make one"
    text = str(problem["msg"]).removeprefix("Value error, ")
    return f"{path}: {text}" if path else text


def _line(node: Any, loc: Sequence[int | str]) -> int:
    """Return the line (from 1) of the value at ``loc``, or of its nearest ancestor."""
    line = 1
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            found = [pair for pair in node.value if pair[0].value == str(part)]
            if not found:
                break
            line, node = found[0][0].start_mark.line + 1, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            if part >= len(node.value):
                break
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


def render_site(site: SiteManifest) -> str:
    """Write site.yaml with a line of explanation over each part."""

    def table(values: Mapping[str, object]) -> str:
        if not values:
            return " {}"
        return "".join(f"\n  {_scalar(k)}: {_scalar(v)}" for k, v in values.items())

    return f"""\
# What this site has. You may edit this file; `consilium site data check` verifies it.
schema: consilium/site/v1
site: {_scalar(site.site)}

# Folder that the paths in the case list start from. Images are only ever read.
root: {_scalar(site.root)}
cases: {_scalar(site.cases)}

# Input channels by name. The first is the column `image`, any other `image_<name>`.
inputs: {json.dumps(site.inputs)}

# Labels. mask: the column `label` names an image, and each local name has its value in it.
# class: the column `label` holds the class itself, or a number, and a name has its range: "<40",
# "40..65" (with 40, without 65), ">=65".
label_kind: {site.label_kind}
labels:{table(site.labels)}

# Local label names whose class a study calls by another name. Spelling (case, - and _) needs no
# entry. Several names may map to one class.
classes:{table(site.classes)}

# Facts beside the image (age, laboratory values), each in a column `covariate_<name>`: a number or
# a word; an empty cell is a missing value.
covariates: {json.dumps(site.covariates)}

# Shares of patients. A patient's place follows from a keyed hash and never moves when others are
# added; the column `split` in the case list overrides it.
split: {{train: {site.split.train}, validation: {site.split.validation}, test: {site.split.test}}}

# Most that the cache of pixels may take, in GiB; null for as much as the disk holds.
cache_quota_gib: {"null" if site.cache_quota_gib is None else site.cache_quota_gib}
"""


def _scalar(value: object) -> str:
    # A JSON string is a valid YAML scalar; plain words stay plain for the reader.
    text = str(value)
    if isinstance(value, str) and not re.fullmatch(
        r"[A-Za-z/][A-Za-z0-9_./ -]*[A-Za-z0-9_.]", text
    ):
        return json.dumps(text, ensure_ascii=False)
    if isinstance(value, str) and not isinstance(yaml.safe_load(text), str):
        return json.dumps(text)  # words such as yes or null
    return text
