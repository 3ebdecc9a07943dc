"""What is wrong with a study, in words: pydantic's errors with key paths and nearest names."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from consilium_common.errors import ConsiliumError
from consilium_common.study.document import KeyPath, dotted, printable

_NAME_RULE = (
    "a name has 1 to 63 lower-case letters, digits, `_`, `-` or `.`, and begins with a letter or "
    "a digit"
)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where in the study, in words, and the code of the error."""

    path: KeyPath
    text: str
    code: str = "study.invalid"


def raise_problems(
    problems: Sequence[Problem],
    where: str,
    *,
    line_of: Callable[[KeyPath], int] | None = None,
    hint: str = "",
) -> None:
    """Raise one :class:`ConsiliumError` that lists every problem; do nothing when there is none.

    The code is that of the first problem. With ``line_of`` every problem carries its line and
    they are listed in the order of the file, those that try to be code first.
    """
    if not problems:
        return
    lines = [line_of(problem.path) if line_of else 0 for problem in problems]
    order = sorted(
        range(len(problems)),
        key=lambda i: (problems[i].code != "study.not-literal", lines[i], i),
    )
    first = problems[order[0]]
    if len(problems) == 1:
        place = f"{where}:{lines[0]}" if line_of else where
        text = printable(first.text)
        stop = "" if text.endswith(("?", ".")) else "."
        raise ConsiliumError(first.code, text + stop, where=place, hint=hint)
    listed = [
        f"  line {lines[i]}: {printable(problems[i].text)}"
        if line_of
        else f"  {printable(problems[i].text)}"
        for i in order
    ]
    message = "\n".join([f"{len(problems)} things are wrong:", *listed])
    raise ConsiliumError(first.code, message, where=where, hint=hint)


def problems_of(
    error: ValidationError, model: type[BaseModel], prefix: KeyPath = ()
) -> list[Problem]:
    """Translate every error of a failed validation of ``model``.

    Parameters
    ----------
    error : ValidationError
        As ``model.model_validate`` raised it.
    model : type of BaseModel
        The model; its fields give the valid names.
    prefix : tuple of str or int
        Key path at which the validated value stands in the study.
    """
    found = []
    for item in error.errors(include_url=False):
        if _beside(item):
            continue
        path, level = _walk(model, item["loc"])
        found.append(_problem(item, (*prefix, *path), level, model))
    return found


def _beside(item: Any) -> bool:
    """Say whether an error is of the half of "a word or a list" that was not meant."""
    branch = next((str(part) for part in item["loc"] if _is_branch(part)), "")
    if branch.startswith("literal["):
        return isinstance(item["input"], list)
    return branch.startswith("list[") and item["type"] == "list_type"


def _is_branch(part: str | int) -> bool:
    """Say whether a part of a location is pydantic's name for one half of a union without tags."""
    return isinstance(part, str) and part.startswith(("literal[", "list["))


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return a phrase that names the nearest valid word, or all of them when none is near."""
    names = sorted(valid)
    close = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.5)
    if close:
        return f"did you mean `{close[0]}`?"
    return f"valid here: {', '.join(names)}" if names else "no key is valid here"


def shown(value: Any) -> str:
    """Return a short form of a value for a message."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}…"


def _problem(item: Any, path: KeyPath, level: set[str], root: type[BaseModel]) -> Problem:
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    key = dotted(path)
    if kind == "extra_forbidden":
        word = str(path[-1])
        inside = dotted(path[:-1]) or "a study"
        text = f"`{word}` is not a key of {inside}; "
        elsewhere = _homes(root, word)
        if elsewhere and not difflib.get_close_matches(word, level, n=1, cutoff=0.8):
            text += f"it belongs at {' or '.join(f'`{place}`' for place in elsewhere)}"
        else:
            text += nearest(word, level)
        return Problem(path, text, "study.unknown-key")
    if kind in ("missing", "union_tag_not_found"):
        if kind != "missing":
            key = f"{key}.{_tag(context)}"
        return Problem(path, f"`{key}` is missing")
    if kind == "literal_error":
        options = [word.strip("' ") for word in context["expected"].replace(" or ", ",").split(",")]
        text = f"`{key}` is {shown(value)}; it can be {_either(options)}"
        close = difflib.get_close_matches(str(value), options, n=1, cutoff=0.6)
        close = close if len(options) > 1 else []
        return Problem(path, text + (f" (did you mean {close[0]}?)" if close else ""))
    if kind == "union_tag_invalid":
        options = [word.strip("' ") for word in context["expected_tags"].split(",")]
        tag = _tag(context)
        text = f"`{key}.{tag}` is {shown(context['tag'])}; it can be {_either(options)}"
        return Problem((*path, tag), text)
    if kind == "value_error":
        text = str(context.get("error", item["msg"]))
        # A rule over several keys begins with the one it is about: point there. Where it begins
        # with another word, no line is known for it and that of the section stands.
        named = text.partition(" ")[0].split(".")
        return Problem((*path, *named), f"`{key}`: {text}" if key else text)
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        is_now = "empty" if value is None else f"{shown(value)}"
        return Problem(path, f"`{key}` is {is_now}; it should be a mapping of keys to values")
    if kind == "string_pattern_mismatch":
        return Problem(path, f"`{key}` is {shown(value)}; {_NAME_RULE}")
    if kind == "bool_type":
        return Problem(path, f"`{key}` is {shown(value)}; write true or false")
    if kind in ("string_type", "int_type", "float_type", "list_type", "int_from_float"):
        wanted = {
            "string_type": "text (put it in quotes if it looks like a number)",
            "int_type": "a whole number",
            "int_from_float": "a whole number",
            "float_type": "a number",
            "list_type": "a list, as in [a, b]",
        }[kind]
        is_now = "empty" if value is None else shown(value)
        return Problem(path, f"`{key}` is {is_now}; it should be {wanted}")
    # "Input should be greater than 0", "List should have at least 1 item after validation, …".
    rule = re.sub(r"^\w+ should", "it should", item["msg"]).replace(" after validation", "")
    return Problem(path, f"`{key}` is {shown(value)}; {rule}")


def _tag(context: Any) -> str:
    """Return the key whose value selects one model of a union."""
    return str(context["discriminator"]).strip("'")


def _either(options: Sequence[str]) -> str:
    if len(options) == 1:
        return options[0]
    return f"{', '.join(options[:-1])} or {options[-1]}"


def _walk(model: type[BaseModel], loc: tuple[str | int, ...]) -> tuple[KeyPath, set[str]]:
    """Follow pydantic's location, leaving out the tags of unions that the file does not have.

    Returns the key path in the file and the valid names at the level of its last key.
    """
    level: tuple[type[BaseModel], ...] = (model,)
    path: list[str | int] = []
    last: tuple[type[BaseModel], ...] = level
    for part in loc:
        if _is_branch(part):
            continue
        tagged = [one for one in level if len(level) > 1 and part in _tags(one)]
        if tagged:
            level = last = tuple(tagged)
            continue
        path.append(part)
        last = level
        if isinstance(part, str):
            level = tuple(found for one in level for found in _models(_annotation(one, part)))
    return tuple(path), {name for one in last for name in _names(one)}


def _names(model: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


def _annotation(model: type[BaseModel], key: str) -> Any:
    for name, field in model.model_fields.items():
        if key == (field.alias or name):
            return field.annotation
    return None


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the models that a field's type names, whatever list or union they stand in."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    parts = get_args(annotation)
    if get_origin(annotation) is Annotated:
        parts = parts[:1]
    return [found for part in parts for found in _models(part)]


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    """Return the values of ``mode`` or ``kind`` that select ``model`` in a union."""
    annotations = [_annotation(model, key) for key in ("mode", "kind")]
    return tuple(tag for one in annotations if get_origin(one) is Literal for tag in get_args(one))


def _homes(model: type[BaseModel], word: str, prefix: str = "") -> list[str]:
    """Return the key paths at which ``word`` is a valid key."""
    homes = [f"{prefix}{word}"] if word in _names(model) else []
    for name in _names(model):
        for inner in _models(_annotation(model, name)):
            homes += [home for home in _homes(inner, word, f"{prefix}{name}.") if home not in homes]
    return homes
