"""The published JSON Schema of an export says what the program accepts, and nothing looser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ledger_samples import EVENT, charge, witnessed_ledger

from consilium_common.canonical import canonical_json
from consilium_common.ledger.entries import BODIES, TIME_PATTERN, Entry, MalformedEntryError
from consilium_common.ledger.witness import MalformedRecordError, WitnessRecord, is_witness_line

SCHEMA = json.loads(
    (Path(__file__).parents[2] / "common" / "ledger.schema.json").read_text(encoding="utf-8")
)
TYPES: dict[str, Any] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
}
#: Each keyword of draft 2020-12 that the schema uses, except those about other schemas.
PLAIN: dict[str, Any] = {
    "type": lambda v, s: TYPES[s](v),
    "const": lambda v, s: v == s and type(v) is type(s),
    "enum": lambda v, s: v in s,
    "pattern": lambda v, s: not isinstance(v, str) or re.search(s, v) is not None,
    "minLength": lambda v, s: not isinstance(v, str) or len(v) >= s,
    "maxLength": lambda v, s: not isinstance(v, str) or len(v) <= s,
    "minimum": lambda v, s: not TYPES["number"](v) or v >= s,
    "maximum": lambda v, s: not TYPES["number"](v) or v <= s,
    "exclusiveMinimum": lambda v, s: not TYPES["number"](v) or v > s,
    "exclusiveMaximum": lambda v, s: not TYPES["number"](v) or v < s,
    "minItems": lambda v, s: not isinstance(v, list) or len(v) >= s,
    "uniqueItems": lambda v, s: (
        not (s and isinstance(v, list)) or len({canonical_json(item) for item in v}) == len(v)
    ),
    "required": lambda v, s: not isinstance(v, dict) or set(s) <= set(v),
}
SAYS_NOTHING = {"$schema", "$id", "$defs", "title", "description"}


def valid(value: Any, schema: dict[str, Any] = SCHEMA) -> bool:
    """Return whether ``value`` fits; a keyword unknown here is an error, never passed over."""
    unknown = set(schema) - set(PLAIN) - SAYS_NOTHING
    unknown -= {"$ref", "oneOf", "properties", "additionalProperties", "items"}
    assert not unknown, unknown
    if not all(test(value, schema[key]) for key, test in PLAIN.items() if key in schema):
        return False
    if "$ref" in schema and not valid(value, SCHEMA["$defs"][schema["$ref"].split("/")[-1]]):
        return False
    if "oneOf" in schema and sum(valid(value, part) for part in schema["oneOf"]) != 1:
        return False
    if isinstance(value, list):
        return all(valid(item, schema.get("items", {})) for item in value)
    if not isinstance(value, dict):
        return True
    properties = schema.get("properties", {})
    if schema.get("additionalProperties", True) is False and not set(value) <= set(properties):
        return False
    return all(valid(value[key], part) for key, part in properties.items() if key in value)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("schema")
    with witnessed_ledger(folder / "ledger.db", 3) as ledger:
        charge(ledger, 0, purpose="evaluation")
        charge(ledger, 0, purpose="statistics")
        ledger.export_jsonl(folder / "ledger.jsonl")
    return (folder / "ledger.jsonl").read_bytes().split(b"\n")[:-1]


def accepted(value: Any) -> bool:
    """Return whether the program finds the form of a line right; chain and rules aside."""
    try:
        line = canonical_json(value)
        _ = WitnessRecord.parse(line) if is_witness_line(line) else Entry.parse(line)
    except (MalformedEntryError, MalformedRecordError):
        return False
    return True


def changed(value: Any) -> Iterator[Any]:
    """Yield ``value`` with one thing in it changed, everywhere but inside a policy."""
    if isinstance(value, dict):
        yield {**value, "more": 1}
        for key, inner in value.items():
            yield {k: v for k, v in value.items() if k != key}
            if key == "policy" and isinstance(inner, dict):
                for other in (None, [], "text"):
                    yield {**value, key: other}
            else:
                for other in changed(inner):
                    yield {**value, key: other}
        return
    if isinstance(value, list):
        yield []
        yield [*value, value[0]]
        for index, inner in enumerate(value):
            for other in changed(inner):
                yield [*value[:index], other, *value[index + 1 :]]
    yield None
    yield {}
    yield True
    if isinstance(value, str):
        yield ""
        yield 7
        if len(value) >= 64:
            yield value.upper().replace("0", "A")
            yield value[:-1]
            yield value + "0" * 64
    elif isinstance(value, int | float):
        yield str(value)
        yield -1


def test_every_line_of_a_real_export_fits(lines: list[bytes]) -> None:
    values = [json.loads(line) for line in lines]
    kinds = {value["content"]["kind"] for value in values if "content" in value}
    assert kinds == set(BODIES)
    assert sum("witness" in value for value in values) == 3
    for value in values:
        assert valid(value)


def test_a_changed_line_fits_neither_schema_nor_program(lines: list[bytes]) -> None:
    tried = 0
    for line in lines:
        for value in changed(json.loads(line)):
            assert not valid(value), value
            assert not accepted(value), value
            tried += 1
    assert tried > 1000


@pytest.mark.parametrize(
    "change",
    [
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.5},
        {"noise_multiplier": 1e-7},
        {"noise_multiplier": 1e10},
        {"steps": 0},
        {"steps": 2.5},
        {"unit": "image"},
        {"adjacency": "replace-one"},
        {"mechanism": "laplace"},
    ],
)
def test_an_event_out_of_range_fits_neither(lines: list[bytes], change: dict[str, Any]) -> None:
    value = next(json.loads(line) for line in lines if b'"kind":"charge"' in line)
    assert value["content"]["body"]["event"] == EVENT.to_dict()
    value["content"]["body"]["event"] |= change
    assert not valid(value)
    assert not accepted(value)


def test_an_entry_of_one_kind_with_the_body_of_another_fits_neither(lines: list[bytes]) -> None:
    by_kind = {}
    for line in lines:
        value = json.loads(line)
        if "content" in value:
            by_kind[value["content"]["kind"]] = value["content"]
    for kind, content in by_kind.items():
        for other, foreign in by_kind.items():
            value = {
                "content": {**content, "body": foreign["body"]},
                "hash": "0" * 64,
                "signature": "0" * 128,
            }
            assert valid(value) == accepted(value) == (kind == other)


def test_the_schema_has_the_keys_of_every_body_and_the_form_of_every_time() -> None:
    for kind, body in BODIES.items():
        assert set(SCHEMA["$defs"][kind]["properties"]) == set(body.model_fields), kind
        assert set(SCHEMA["$defs"][kind]["required"]) == set(body.model_fields), kind
    assert SCHEMA["$defs"]["time"]["pattern"] == f"^{TIME_PATTERN}$"
