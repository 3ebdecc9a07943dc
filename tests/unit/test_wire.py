"""What travels between a site and the aggregator, and what a failed call says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium_common.errors import ConsiliumError
from consilium_common.identity.certificates import Role
from consilium_common.wire.messages import (
    FIGURES,
    INSTRUCTIONS,
    MAX_FILE_BYTES,
    UPDATE,
    Instructions,
    Reference,
    figures_of,
    instructions_of,
    to_server,
    to_site,
    update_of,
)
from consilium_common.wire.methods import (
    FLEET_CALL_BY_PATH,
    FLEET_PATHS,
    SERVICE_ROLES,
    STREAM_ROLES,
    fleet_method,
)

FILE = Reference("a" * 64, 1234)
ASKED = Instructions("d" * 64, 3, 20, last=True, model=FILE)


# --- messages ----------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    st.none() | st.builds(Reference, st.from_regex(r"[0-9a-f]{64}", fullmatch=True), st.just(7)),
    st.integers(0, 10_000),
    st.integers(1, 10**9),
    st.booleans(),
)
def test_a_message_to_a_site_reads_back(
    model: Reference | None, round_index: int, cohort: int, last: bool
) -> None:
    asked = Instructions("d" * 64, round_index, cohort, last, model)
    assert instructions_of(to_site(asked)) == asked


def test_a_file_is_named_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    # FIPS 180-4's own example.
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert Reference.of(path) == Reference(sha256, 3)


NO_NAMES: list[tuple[Any, Any]] = [
    ("", 5),
    ("a" * 63, 5),
    ("a" * 65, 5),
    ("A" * 64, 5),
    ("a" * 64 + "\n", 5),
    ("../" + "a" * 61, 5),
    (b"a" * 64, 5),
    ("a" * 64, 0),
    ("a" * 64, -1),
    ("a" * 64, MAX_FILE_BYTES + 1),
    ("a" * 64, 5.0),
    ("a" * 64, "5"),
    ("a" * 64, True),
    ("a" * 64, None),
]


@pytest.mark.parametrize(("sha256", "size"), NO_NAMES)
def test_what_names_no_file_is_refused_wherever_it_stands(sha256: Any, size: Any) -> None:
    from flwr.app import ConfigRecord

    with pytest.raises(ConsiliumError) as caught:
        Reference(sha256, size)
    assert caught.value.code == "run.bad-message"
    if size is None:
        return
    for read, content in (
        (instructions_of, to_site(ASKED)),
        (update_of, to_server(FILE, None)),
    ):
        if read is update_of:
            content[UPDATE] = ConfigRecord({"sha256": sha256, "bytes": size})
        else:
            content[INSTRUCTIONS].update({"model": sha256, "model_bytes": size})
        with pytest.raises(ConsiliumError) as caught:
            read(content)
        assert caught.value.code == "run.bad-message"


def test_a_reply_names_the_update_and_carries_the_figures_that_may_leave() -> None:
    content = to_server(FILE, {"loss": 0.5})
    assert (update_of(content), figures_of(content)) == (FILE, {"loss": 0.5})
    assert figures_of(to_server(FILE, None)) == {}
    assert figures_of(to_server(FILE, {})) == {}
    assert list(to_server(None, None)) == []


def test_no_message_carries_more_than_a_few_names_and_figures() -> None:
    largest = Reference("f" * 64, MAX_FILE_BYTES)
    for content in (to_site(replace(ASKED, model=largest)), to_server(largest, {"loss": 1.0})):
        assert all(len(record.deflate()) < 1000 for record in content.values())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content.pop(INSTRUCTIONS),
        lambda content: content[INSTRUCTIONS].pop("round"),
        lambda content: content[INSTRUCTIONS].pop("model"),
        lambda content: content[INSTRUCTIONS].pop("model_bytes"),
        lambda content: content[INSTRUCTIONS].update({"round": 1.0}),
        lambda content: content[INSTRUCTIONS].update({"round": "1"}),
        lambda content: content[INSTRUCTIONS].update({"study": b"d"}),
        lambda content: content[INSTRUCTIONS].update({"last": 1}),
        lambda content: content[INSTRUCTIONS].update({"cohort_size": True}),
        lambda content: content[INSTRUCTIONS].update({"model": ""}),
        lambda content: content[INSTRUCTIONS].update({"model_bytes": 0}),
    ],
)
def test_instructions_of_another_form_are_refused(spoil: Callable[[Any], Any]) -> None:
    content = to_site(ASKED)
    spoil(content)
    with pytest.raises(ConsiliumError) as caught:
        instructions_of(content)
    assert caught.value.code == "run.bad-message"


def test_a_reply_that_names_no_update_or_brings_one_along_is_refused() -> None:
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    tensors = ArrayRecord({"weights": Array("float32", (1,), "numpy.ndarray", b"x")})
    for content in (
        RecordDict(),
        RecordDict({UPDATE: tensors}),
        RecordDict({UPDATE: ConfigRecord({"sha256": "a" * 64})}),
        to_server(None, {"loss": 1.0}),
    ):
        with pytest.raises(ConsiliumError) as caught:
            update_of(content)
        assert caught.value.code == "run.bad-message"


def test_figures_that_are_no_numbers_are_left_out() -> None:
    content = to_server(FILE, {"loss": 1.0})
    content[FIGURES]["list"] = [1.0, 2.0]
    assert figures_of(content) == {"loss": 1.0}


def test_the_table_of_methods_is_one_to_one() -> None:
    assert {FLEET_CALL_BY_PATH[path] for path in FLEET_PATHS.values()} == set(FLEET_PATHS)
    assert len(set(FLEET_PATHS.values())) == 12
    tables = [set(map(fleet_method, FLEET_PATHS)), set(SERVICE_ROLES), set(STREAM_ROLES)]
    assert len(set.union(*tables)) == sum(map(len, tables))
    # No method is for everybody, and an invitation opens one door.
    ours = {**SERVICE_ROLES, **STREAM_ROLES}
    assert all(roles for roles in ours.values())
    assert [m for m, roles in ours.items() if Role.INVITATION in roles] == [
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
