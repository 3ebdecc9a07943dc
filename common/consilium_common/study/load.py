"""Reads a study: from a file that a person wrote, or from canonical JSON off the wire."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.study.document import MAX_DEPTH, Document, KeyPath, dotted, parse, read_text
from consilium_common.study.problems import Problem, problems_of, raise_problems, shown
from consilium_common.study.schema import Study

#: A word in a network's arguments: what a registry could know, and nothing that MONAI's parser,
#: an import or a file system would take for more.
_WORD = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HINT = "Correct the file and run `consilium study check` again."


def load_study(path: Path) -> Study:
    """Read and check a study file.

    Returns
    -------
    Study
        Valid by its schema. Whether the network fits it is
        :func:`consilium_common.models.registry.validate_network`'s question.

    Raises
    ------
    ConsiliumError
        For the file itself ``study.no-file``, ``study.not-a-file``, ``study.unreadable``,
        ``study.too-large``, ``study.not-text``, ``study.empty``, ``study.not-yaml``,
        ``study.alias``, ``study.duplicate-key``; for its content ``study.unknown-key``,
        ``study.not-literal`` and ``study.invalid``. Everything wrong with the content is listed at
        once, each with its line.
    """
    return load_document(path)[0]


def load_document(path: Path) -> tuple[Study, Document]:
    """Read a study file and keep its lines, for further messages about it."""
    document = parse(read_text(path), str(path))
    return _study(document), document


def parse_study(text: str, where: str) -> Study:
    """Read a study from text; ``where`` names its source in errors. As :func:`load_study`."""
    return _study(parse(text, where))


def study_from_canonical(value: Any) -> Study:
    """Rebuild a study from :meth:`Study.to_canonical`, as it comes over the wire.

    Raises
    ------
    ConsiliumError
        ``study.invalid``: not a study, or not the canonical form of one. A form that would change
        when written again has another digest than its signature is for, so it is refused.
    """
    where = "the study received"
    hint = "Both sides need the same release of consilium; ask the sender to propose it again."
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConsiliumError("study.invalid", "This is not a study.", where=where, hint=hint)
    if _depth(value) > MAX_DEPTH:
        raise ConsiliumError("study.invalid", "This is not a study.", where=where, hint=hint)
    problems, study = _validate(value)
    if study is None:
        raise_problems([Problem(one.path, one.text) for one in problems], where, hint=hint)
    assert study is not None
    if canonical_json(study.to_canonical()) != canonical_json(value):
        raise ConsiliumError(
            "study.invalid", "The study is not in canonical form.", where=where, hint=hint
        )
    return study


def _study(document: Document) -> Study:
    problems, study = _validate(document.value)
    if study is None:
        raise_problems(problems, document.where, line_of=document.line, hint=_HINT)
    assert study is not None
    return study


def _depth(value: Any) -> int:
    """Return how many levels ``value`` nests, without recursion: it comes from outside."""
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        inner = [tuple(one.values()) if isinstance(one, dict) else one for one in level]
        level = [item for one in inner if isinstance(one, list | tuple) for item in one]
        depth += 1
    return depth


def _validate(value: dict[str, Any]) -> tuple[list[Problem], Study | None]:
    """Return every problem, or the study."""
    model = value.get("model")
    if isinstance(model, dict):
        # Patterns and free text are no literals of the registry; the schema says what they are.
        model = {key: item for key, item in model.items() if key not in ("trainable", "start")}
    problems = literal_problems(model, ("model",))
    guarded = {problem.path for problem in problems}
    try:
        study = Study.model_validate(value, strict=True)
    except ValidationError as error:
        # One message a key: what is refused as code need not be refused as a wrong name too.
        problems += [one for one in problems_of(error, Study) if one.path not in guarded]
        return problems, None
    return problems, None if problems else study


def literal_problems(value: Any, path: KeyPath) -> list[Problem]:
    """Return what in a network's name or arguments is more than a literal.

    MONAI's own configurations execute ``$…`` and resolve ``@…``, ``%…`` and dotted names; a study
    is data and has none of these. Nothing here is ever given to such a parser: this is a second
    lock, and it tells the author why.
    """
    if isinstance(value, dict):
        found = []
        for key, item in value.items():
            here = (*path, str(key))
            if str(key).lower().startswith("pretrained"):
                text = "asks for weights from elsewhere; a study starts from its seed"
                found.append(_not_literal(here, text))
            elif not isinstance(key, str) or not _WORD.fullmatch(key) or key.startswith("_"):
                found.append(_not_literal(here, _why(str(key))))
            else:
                found += literal_problems(item, here)
        return found
    if isinstance(value, list):
        return [
            problem
            for index, item in enumerate(value)
            for problem in literal_problems(item, (*path, index))
        ]
    if isinstance(value, str):
        if value.lower().startswith("pretrained"):
            return [_not_literal(path, "asks for weights from elsewhere")]
        return [] if _WORD.fullmatch(value) else [_not_literal(path, _why(value))]
    if value is None or isinstance(value, bool | int):
        return []
    if isinstance(value, float) and math.isfinite(value):
        return []
    return [_not_literal(path, f"is {shown(value)}, which is no literal")]


def _not_literal(path: KeyPath, text: str) -> Problem:
    return Problem(path, f"`{dotted(path)}` {text}", "study.not-literal")


def _why(text: str) -> str:
    if text[:1] in ("$", "@", "%"):
        return f"begins with `{text[0]}`; a study is data and is never evaluated"
    if any(sign in text for sign in "./\\:"):
        return "is a dotted name or a path; give a name from the registry"
    if text.startswith("_"):
        return "begins with `_`; a study names no Python objects"
    return f"is {shown(text)}; a word here has letters, digits, `_` and `-` only"
