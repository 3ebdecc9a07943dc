"""The guides say what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import strategy_table

from consilium_common.study.federation import Federation
from consilium_server.limits import Limits
from consilium_server.states import State

SERVER = (Path(__file__).parents[2] / "server" / "README.md").read_text(encoding="utf-8")
#: Names at the beginning of a table's row.
ROWS = {
    name
    for cell in re.findall(r"^\| (`[^|]+?) *\|", SERVER, re.MULTILINE)
    for name in re.findall(r"`([^`]+)`", cell)
}


def test_the_guides_strategies_are_those_that_a_study_may_name() -> None:
    assert strategy_table.is_current(), "run: python tests/unit/strategy_table.py"


def test_the_guide_names_every_limit_and_every_state() -> None:
    assert set(Limits.model_fields) <= ROWS
    assert set(State) <= ROWS


def test_the_guide_names_every_key_of_the_federation() -> None:
    for key in Federation.model_fields:
        assert f"`{key}`" in SERVER or f"federation.{key}" in SERVER, key
