"""What travels between a site and the aggregator, and what a failed call says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium_common.errors import ConsiliumError
from consilium_common.identity.certificates import Role
from consilium_common.wire.messages import (
    FIGURES,
    INSTRUCTIONS,
    MODEL,
    WEIGHTS,
    Instructions,
    figures_of,
    from_server,
    instructions_of,
    to_server,
    to_site,
    weights_of,
)
from consilium_common.wire.methods import (
    FLEET_CALL_BY_PATH,
    FLEET_PATHS,
    SERVICE_ROLES,
    fleet_method,
)

ASKED = Instructions("d" * 64, 3, 20, last=True)


# --- messages ----------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.binary(max_size=3000), st.integers(0, 10_000), st.integers(1, 10**9), st.booleans())
def test_a_message_to_a_site_reads_back(
    weights: bytes, round_index: int, cohort: int, last: bool
) -> None:
    asked = Instructions("d" * 64, round_index, cohort, last)
    assert from_server(to_site(asked, weights)) == (asked, weights)


def test_a_model_of_many_chunks_reads_back() -> None:
    weights = bytes(range(256)) * (12 * 1024 * 4)  # 12 MiB: three of Flower's chunks
    assert weights_of(to_site(ASKED, weights)) == weights


def test_a_reply_carries_the_model_and_the_figures_that_may_leave() -> None:
    content = to_server(b"weights", {"loss": 0.5})
    assert (weights_of(content), figures_of(content)) == (b"weights", {"loss": 0.5})
    assert figures_of(to_server(b"weights", None)) == {}
    assert figures_of(to_server(b"weights", {})) == {}
    assert list(to_server(None, None)) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content.pop(INSTRUCTIONS),
        lambda content: content[INSTRUCTIONS].pop("round"),
        lambda content: content[INSTRUCTIONS].update({"round": 1.0}),
        lambda content: content[INSTRUCTIONS].update({"round": "1"}),
        lambda content: content[INSTRUCTIONS].update({"study": b"d"}),
        lambda content: content[INSTRUCTIONS].update({"last": 1}),
        lambda content: content[INSTRUCTIONS].update({"cohort_size": True}),
    ],
)
def test_instructions_of_another_form_are_refused(spoil: Callable[[Any], Any]) -> None:
    content = to_site(ASKED, b"weights")
    spoil(content)
    with pytest.raises(ConsiliumError) as caught:
        instructions_of(content)
    assert caught.value.code == "run.bad-message"


def test_a_message_without_a_model_or_with_another_form_of_it_is_refused() -> None:
    from flwr.app import Array, ArrayRecord, RecordDict

    pickled = ArrayRecord({WEIGHTS: Array("float32", (1,), "numpy.ndarray", b"x")})
    for content in (RecordDict(), RecordDict({MODEL: pickled}), to_server(None, {"loss": 1.0})):
        with pytest.raises(ConsiliumError) as caught:
            weights_of(content)
        assert caught.value.code == "run.bad-message"


def test_figures_that_are_no_numbers_are_left_out() -> None:
    content = to_server(b"w", {"loss": 1.0})
    content[FIGURES]["list"] = [1.0, 2.0]
    assert figures_of(content) == {"loss": 1.0}


def test_the_table_of_methods_is_one_to_one() -> None:
    assert {FLEET_CALL_BY_PATH[path] for path in FLEET_PATHS.values()} == set(FLEET_PATHS)
    assert len(set(FLEET_PATHS.values())) == 12
    assert not set(map(fleet_method, FLEET_PATHS)) & set(SERVICE_ROLES)
    # No method is for everybody, and an invitation opens one door.
    assert all(roles for roles in SERVICE_ROLES.values())
    assert [m for m, roles in SERVICE_ROLES.items() if Role.INVITATION in roles] == [
        "/consilium.v1.Enrolment/Enrol"
    ]


# --- gRPC --------------------------------------------------------------------------------------


def test_grpc_imported_before_the_restriction_is_an_error() -> None:
    program = "import grpc\nimport consilium_common.wire.tls13\n"
    untouched = {k: v for k, v in os.environ.items() if k != "GRPC_SSL_CIPHER_SUITES"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env=untouched,
        check=False,
    )
    assert done.returncode != 0
    assert "before consilium restricted it to TLS 1.3" in done.stderr


def test_an_error_travels_whole_and_one_of_an_unknown_kind_becomes_internal() -> None:
    error = ConsiliumError("data.truncated", "message", where="here", hint="do this")
    assert vars(ConsiliumError.from_dict(error.to_dict())) == vars(error)
    assert ConsiliumError.from_dict({"code": "evil.code"}).code == "internal.unknown"
    assert ConsiliumError.from_dict({}).code == "internal.unknown"
    assert replace(ASKED, last=False).last is False
