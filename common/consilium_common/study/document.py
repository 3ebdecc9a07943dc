"""A study file as plain values, with the line on which every key stands.

The reader is stricter than YAML: one document, no tags, no anchors, no aliases, no duplicate keys,
bounded size and depth. Scalars follow the core schema of YAML 1.2, so that ``1e-3`` is a number
and ``no`` is a word (YAML 1.1, PyYAML's default, has both the other way round).
"""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from consilium_common.errors import ConsiliumError

#: Largest study file in bytes; a real one has two or three thousand.
MAX_BYTES: Final = 256 * 1024
#: Deepest nesting of mappings and lists; the schema needs five.
MAX_DEPTH: Final = 16

#: Keys and list indices from the top of the file.
KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """Plain values of one file.

    Attributes
    ----------
    value : dict
        Mappings, lists, str, int, float (finite), bool and None only.
    where : str
        Name of the file, for messages.
    lines : mapping
        Line (from 1) of every key path.
    """

    value: dict[str, Any]
    where: str
    lines: Mapping[KeyPath, int]

    def line(self, path: KeyPath) -> int:
        """Return the line of ``path``, or of its nearest ancestor that the file has."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def read_text(path: Path) -> str:
    """Return the text of a study file.

    Raises
    ------
    ConsiliumError
        ``study.no-file``, ``study.not-a-file``, ``study.unreadable``, ``study.too-large`` or
        ``study.not-text``.
    """
    where = str(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConsiliumError(
                "study.not-a-file",
                "This is a folder or a device, not a study file.",
                where=where,
                hint="Give the path of one YAML file.",
            )
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise ConsiliumError(
            "study.no-file",
            "There is no such study file.",
            where=where,
            hint="Check the path; it is relative to the folder you are in.",
        ) from error
    except (OSError, ValueError) as error:
        # ValueError: a path with a null character.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConsiliumError(
            "study.unreadable",
            f"The study file cannot be read: {reason}.",
            where=where,
            hint="Check the path and your permission to read it.",
        ) from error
    check_size(len(content), where)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConsiliumError(
            "study.not-text",
            f"The study file is not UTF-8 text: byte {error.start} cannot be read.",
            where=f"{where}:{line}",
            hint="Save it as UTF-8; if it is not a text file, give another path.",
        ) from error


def check_size(size: int, where: str) -> None:
    """Refuse a file of more than :data:`MAX_BYTES` bytes (``study.too-large``)."""
    if size > MAX_BYTES:
        raise ConsiliumError(
            "study.too-large",
            f"A study file has at most {MAX_BYTES // 1024} KiB; this one has more.",
            where=where,
            hint="Give a study file. Images and weights do not belong in it.",
        )


def parse(text: str, where: str) -> Document:
    """Read one YAML document whose top is a mapping.

    Raises
    ------
    ConsiliumError
        ``study.too-large``, ``study.empty``, ``study.not-yaml``, ``study.alias``,
        ``study.not-literal`` (a tag), ``study.duplicate-key`` or ``study.invalid`` (the top is
        not a mapping); each names the line.
    """
    check_size(len(text.encode("utf-8", errors="replace")), where)
    try:
        root = yaml.compose(text, Loader=_StrictLoader)
    except _RefusedError as error:
        raise ConsiliumError(
            error.code, error.message, where=f"{where}:{error.line}", hint=error.hint
        ) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConsiliumError(
            "study.not-yaml",
            f"The file has a character that no text has (code {error.character}).",
            where=f"{where}:{line}",
            hint="Give a text file; remove the character on this line.",
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context or "the text cannot be read"
        hint = "Check indentation, colons, quotes and brackets on this line and the one above."
        if "'\\t'" in problem:
            hint = "YAML indents with spaces; replace the tab."
        begun = error.context_mark
        if begun and mark and begun.line < mark.line:
            problem += f" (in what begins on line {begun.line + 1})"
        raise ConsiliumError(
            "study.not-yaml",
            f"This is not YAML: {problem}.",
            where=f"{where}:{mark.line + 1 if mark else 1}",
            hint=hint,
        ) from error
    if root is None:
        raise ConsiliumError(
            "study.empty",
            "The study file is empty.",
            where=where,
            hint="Copy an example and change it: `consilium study examples --out FOLDER`.",
        )
    if not isinstance(root, yaml.MappingNode):
        raise ConsiliumError(
            "study.invalid",
            "A study is a mapping, lines of the form `key: value`.",
            where=f"{where}:{_line(root)}",
            hint="Begin with `schema: consilium/study/v1`.",
        )
    lines: dict[KeyPath, int] = {(): 1}
    faults: list[tuple[int, str, str]] = []
    value = _plain(root, (), lines, faults)
    if faults:
        faults.sort()
        code = faults[0][1]
        if len(faults) == 1:
            message, place = f"{printable(faults[0][2])}.", f"{where}:{faults[0][0]}"
        else:
            listed = "\n".join(f"  line {line}: {printable(text)}" for line, _, text in faults)
            message, place = f"{len(faults)} things are wrong:\n{listed}", where
        raise ConsiliumError(code, message, where=place, hint="Correct the lines named.")
    assert isinstance(value, dict)
    return Document(value, where, lines)


class _RefusedError(Exception):
    """Something YAML allows and a study does not."""

    def __init__(self, code: str, message: str, hint: str, line: int) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.line = line


class _StrictLoader(yaml.SafeLoader):
    """Composes nodes only; refuses what could refer, expand, construct or nest without end."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML reads this class attribute

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        line = _line(event)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _RefusedError(
                "study.alias",
                "Anchors (&name) and aliases (*name) are not for studies.",
                "Write the value out; put it in quotes if it begins with & or *.",
                line,
            )
        if getattr(event, "tag", None) is not None:
            raise _RefusedError(
                "study.not-literal",
                "Tags (!name) are not for studies: a study is data, never code.",
                "Write the plain value; put it in quotes if it begins with !.",
                line,
            )
        if self._depth >= MAX_DEPTH:
            raise _RefusedError(
                "study.not-yaml",
                f"The file nests more than {MAX_DEPTH} levels.",
                "Give a study file; no study needs so many.",
                line,
            )
        self._depth += 1
        try:
            node: yaml.Node | None = super().compose_node(parent, index)
        finally:
            self._depth -= 1
        return node


# The core schema of YAML 1.2.2, section 10.3.2, without octal, hexadecimal, .inf and .nan.
for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    (
        "float",
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$",
        list("-+.0123456789"),
    ),
):
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _line(thing: yaml.Event | yaml.Node) -> int:
    mark = thing.start_mark
    return mark.line + 1 if mark else 1


def _plain(
    node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], faults: list[tuple[int, str, str]]
) -> Any:
    """Turn a node into plain values, noting lines and what is wrong."""
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, path, faults)
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            lines[(*path, index)] = _line(item)
            items.append(_plain(item, (*path, index), lines, faults))
        return items
    result: dict[str, Any] = {}
    for key, line, item in _pairs(node, path, faults):
        here = (*path, key)
        if key in result:
            first = lines[here]
            text = f"{dotted(here)} stands here and on line {first}; keep one of them"
            faults.append((line, "study.duplicate-key", text))
            continue
        lines[here] = line
        result[key] = _plain(item, here, lines, faults)
    return result


def _pairs(
    node: yaml.Node, path: KeyPath, faults: list[tuple[int, str, str]]
) -> Iterator[tuple[str, int, yaml.Node]]:
    for key, item in node.value:
        line = _line(key)
        if isinstance(key, yaml.ScalarNode):
            yield key.value, line, item
        else:
            inside = dotted(path) or "the study"
            faults.append((line, "study.invalid", f"a key in {inside} is not a word"))


def _scalar(node: yaml.ScalarNode, path: KeyPath, faults: list[tuple[int, str, str]]) -> Any:
    kind = node.tag.rpartition(":")[2]
    text: str = node.value
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind in ("int", "float"):
        # Python's own limit on digits would end in a traceback.
        number = float(text) if kind == "float" or len(text) > 40 else int(text)
        if math.isfinite(number):
            return number
        line = _line(node)
        faults.append((line, "study.invalid", f"{dotted(path)} is too large a number"))
        return 0
    return text


def printable(text: str, limit: int = 300) -> str:
    """Return text from outside in a form that cannot forge lines or steer a terminal.

    Control characters, line breaks and marks of writing direction become U+FFFD.
    """
    clean = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)
    return clean if len(clean) <= limit else f"{clean[: limit - 1]}…"


def dotted(path: KeyPath) -> str:
    """Write a key path as people do: ``model.arguments.channels[2]``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
