"""A study file is read strictly, and everything wrong with it is said by line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from study_samples import TEXT

from consilium_common.errors import ConsiliumError
from consilium_common.study.document import MAX_BYTES, parse
from consilium_common.study.load import load_study, parse_study, study_from_canonical


def error_of(text: str) -> ConsiliumError:
    with pytest.raises(ConsiliumError) as caught:
        parse_study(text, "s.yaml")
    return caught.value


def line_of(text: str, part: str) -> int:
    return next(i for i, line in enumerate(text.splitlines(), 1) if part in line)


def test_a_valid_file_becomes_a_study(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(TEXT)
    study = load_study(path)
    assert study.model.arguments == {"channels": [8, 16, 32]}
    assert study.training.optimiser.learning_rate == 0.001
    assert study.total_steps == 20


def test_order_comments_and_style_do_not_change_the_digest() -> None:
    flow = TEXT.replace("federation:\n  rounds: 4\n", "")
    flow = "federation: {rounds: 4}  # moved\n" + flow.replace("1e-3", "0.001")
    assert parse_study(flow, "a").digest == parse_study(TEXT, "b").digest


def test_scalars_follow_yaml_1_2_so_words_stay_words() -> None:
    text = "a: no\nb: 1e-3\nc: 010\nd: 12:30:00\ne: 2026-01-01\nf: true\ng:\nh: .5\ni: 1_0"
    assert parse(text, "x").value == {
        "a": "no",
        "b": 0.001,
        "c": 10,
        "d": "12:30:00",
        "e": "2026-01-01",
        "f": True,
        "g": None,
        "h": 0.5,
        "i": "1_0",
    }


@pytest.mark.parametrize(
    ("old", "new", "code", "part"),
    [
        ("  rounds: 4", "  runds: 4", "study.unknown-key", "did you mean `rounds`?"),
        ("task:", "tusk:\n  a: 1\ntask:", "study.unknown-key", "did you mean `task`?"),
        ("  rounds: 4", "  rounds: 4\n  epsilon: 3", "study.unknown-key", "`privacy.epsilon`"),
        (
            "  delta: 1e-3",
            "  delta: 1e-3\n  sigma: 3",
            "study.unknown-key",
            "valid here: clip_norm",
        ),
        ("  kind: segmentation", "  kind: segmentaton", "study.invalid", "did you mean segment"),
        ("  mode: patient", "  mode: patients", "study.invalid", "it can be none or patient"),
        ("  delta: 1e-3", "  delta: 0", "study.invalid", "greater than 0"),
        ("  delta: 1e-3", "  delta: yes", "study.invalid", "it should be a number"),
        ("  delta: 1e-3", "  delta: 1e999", "study.invalid", "too large a number"),
        ("  rounds: 4", "  rounds: '4'", "study.invalid", "it should be a whole number"),
        ("  rounds: 4", "  rounds: 4.5", "study.invalid", "it should be a whole number"),
        ("  rounds: 4", "  rounds: true", "study.invalid", "it should be a whole number"),
        ("  inputs: [mri]", "  inputs: [MRI]", "study.invalid", "`task.inputs[0]`"),
        ("  inputs: [mri]", "  inputs: [1]", "study.invalid", "put it in quotes"),
        ("  inputs: [mri]", "  inputs: [a, a]", "study.invalid", "has a name twice"),
        ("  inputs: [mri]", "  inputs: mri", "study.invalid", "it should be a list"),
        ("  patch: [16, 16, 16]", "  patch: [16, 16]", "study.invalid", "needs 3 numbers"),
        ("    learning_rate: 1e-3", "", "study.invalid", "`training.optimiser` is empty"),
        ("  rounds: 4", "  rounds: 4\n  rounds: 5", "study.duplicate-key", "and on line 25"),
        ("title: A tiny study", "title: *x", "study.alias", "aliases"),
        ("title: A tiny study", "title: &x y", "study.alias", "Anchors"),
        ("title: A tiny study", "title: !!python/name:os.system", "study.not-literal", "Tags"),
        ("title: A tiny study", "title: !!str y", "study.not-literal", "Tags"),
        ("title: A tiny study", "title: a: b", "study.not-yaml", "not YAML"),
        ("title: A tiny study", "\ttitle: x", "study.not-yaml", "cannot start any token"),
        ("title: A tiny study", "title: \x07", "study.not-yaml", "a character that no text has"),
        ("title: A tiny study", "? [a]\n: x", "study.invalid", "is not a word"),
        ("title: A tiny study", "<<: {name: x}", "study.unknown-key", "`<<` is not a key"),
        ("schema: consilium/study/v1", "schema: v9", "study.invalid", "consilium/study/v1"),
        ("  network: unet", "  network: torch.nn.Linear", "study.not-literal", "dotted name"),
        ("    channels:", "    pretrained: true\n    channels:", "study.not-literal", "pretrained"),
        ("    channels:", "    _target_: x\n    channels:", "study.not-literal", "begins with `_`"),
        (
            "    channels:",
            "    a: $import os\n    channels:",
            "study.not-literal",
            "never evaluated",
        ),
        ("    channels:", "    a: '@net'\n    channels:", "study.not-literal", "begins with `@`"),
        ("    channels:", "    a: '%x'\n    channels:", "study.not-literal", "begins with `%`"),
        ("    channels:", "    a: [{b: /etc/x}]\n    channels:", "study.not-literal", "a path"),
        (
            "    channels:",
            "    a: two words\n    channels:",
            "study.not-literal",
            "letters, digits",
        ),
    ],
)
def test_every_mistake_is_one_clear_error_with_its_line(
    old: str, new: str, code: str, part: str
) -> None:
    assert old in TEXT
    text = TEXT.replace(old, new, 1)
    error = error_of(text)
    assert error.code == code
    assert part in error.message
    line = int(error.where.removeprefix("s.yaml:"))
    first = line_of(TEXT, old)
    assert first - (not new) <= line <= first + new.count("\n")
    assert error.hint


def test_a_missing_key_is_named_with_the_line_of_its_section() -> None:
    error = error_of(TEXT.replace("  classes: [background, organ]\n", ""))
    assert (error.code, error.where) == ("study.invalid", "s.yaml:4")
    assert "`task.classes` is missing" in error.message
    error = error_of(TEXT.replace("  mode: patient\n", ""))
    assert "`privacy.mode` is missing" in error.message


def test_all_mistakes_are_listed_at_once_in_the_order_of_the_file() -> None:
    text = TEXT.replace("  rounds: 4", "  runds: 4").replace("clip_norm: 1", "clip_norm: -1")
    text = text.replace("dimensions: 3", "dimensions: 4")
    error = error_of(text)
    lines = error.message.splitlines()
    assert lines[0] == "3 things are wrong:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["line 6", "line 21", "line 25"]
    assert error.where == "s.yaml"


def test_what_would_be_code_comes_first_and_gives_the_code() -> None:
    text = TEXT.replace("dimensions: 3", "dimensions: 4")
    text = text.replace("    channels:", "    act: $exit()\n    channels:")
    error = error_of(text)
    assert error.code == "study.not-literal"
    assert "never evaluated" in error.message.splitlines()[1]


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n"])
def test_an_empty_file_is_refused(text: str) -> None:
    assert error_of(text).code == ("study.invalid" if text == "---\n" else "study.empty")


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", "4\n"])
def test_a_file_that_is_not_a_mapping_is_refused(text: str) -> None:
    error = error_of(text)
    assert (error.code, error.where) == ("study.invalid", "s.yaml:1")
    assert "mapping" in error.message


def test_an_open_bracket_is_traced_to_where_it_begins() -> None:
    error = error_of(TEXT.replace("title: A tiny study", "title: [a"))
    assert "begins on line 3" in error.message


def test_an_error_cannot_be_made_to_forge_lines() -> None:
    key = '"a\\nb\\e[2J": 1\n'
    for text in (TEXT + key, TEXT + key + key):
        message = error_of(text).message
        assert "a�b�[2J" in message
        assert "\n" not in message
    long = error_of(TEXT + f'"{"k" * 900}": 1\n')
    assert len(long.message) < 400


def test_two_documents_in_one_file_are_refused() -> None:
    assert error_of(TEXT + "---\n" + TEXT).code == "study.not-yaml"


def test_endless_nesting_and_expansion_are_refused() -> None:
    assert error_of("a: " + "[" * 100_000).code == "study.not-yaml"
    bomb = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"
    assert error_of(bomb).code == "study.alias"


def test_files_that_cannot_be_a_study_are_refused_by_name(tmp_path: Path) -> None:
    def code(path: Path) -> str:
        with pytest.raises(ConsiliumError) as caught:
            load_study(path)
        assert str(path)[:20] in caught.value.where
        assert caught.value.hint
        return caught.value.code

    assert code(tmp_path / "none.yaml") == "study.no-file"
    assert code(tmp_path) == "study.not-a-file"
    os.mkfifo(tmp_path / "pipe")
    assert code(tmp_path / "pipe") == "study.not-a-file"
    assert code(tmp_path / "s.yaml" / "x") in ("study.no-file", "study.unreadable")
    assert code(Path(f"{tmp_path}/a\0b")) == "study.unreadable"
    (tmp_path / "latin.yaml").write_bytes("title: Größe\n".encode("latin-1"))
    assert code(tmp_path / "latin.yaml") == "study.not-text"
    (tmp_path / "large.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    assert code(tmp_path / "large.yaml") == "study.too-large"
    (tmp_path / "image.yaml").write_bytes(b"\x5c\x01\x00\x00" + bytes(344))
    assert code(tmp_path / "image.yaml") == "study.not-yaml"


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_damaged_file_is_a_study_or_one_error(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(TEXT)))
    end = data.draw(st.integers(start, min(len(TEXT), start + 30)))
    insert = data.draw(st.one_of(st.sampled_from(list("\t:[]{}&*!|>'\"%@`#-?,\0\x85")), st.text()))
    text = TEXT[:start] + insert + TEXT[end:]
    try:
        parse_study(text, "s.yaml")
    except ConsiliumError as error:
        assert error.code.startswith("study.")
        assert error.message


def wire(**changes: Any) -> dict[str, Any]:
    value = json.loads(json.dumps(parse_study(TEXT, "x").to_canonical()))
    return {**value, **changes}


def test_the_canonical_form_comes_back_as_the_same_study() -> None:
    study = parse_study(TEXT, "x")
    again = study_from_canonical(wire())
    assert again == study
    assert again.digest == study.digest


def test_what_is_not_a_canonical_study_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    less = wire()
    del less["federation"]  # a default left out: valid, but signed as something else
    whole = wire()
    whole["privacy"]["clip_norm"] = 1  # 1 is written 1.0
    bad: list[Any] = [
        None,
        [],
        "x",
        {1: 2},
        {},
        less,
        whole,
        wire(extra=1),
        wire(name=None),
        wire(model={"network": "unet", "arguments": {"a": "$b"}}),
        wire(model={"network": "unet", "arguments": {"a": float("nan")}}),
        wire(model={"network": "unet", "arguments": {"a": deep}}),
        wire(model={"network": "unet", "arguments": {"a": b"bytes"}}),
    ]
    for value in bad:
        with pytest.raises(ConsiliumError) as caught:
            study_from_canonical(value)
        assert caught.value.code == "study.invalid"
