"""A large field is cut out of a message as the protobuf library reads it, and never otherwise."""

from __future__ import annotations

import pytest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium_client.flower_private_fleet import push_object, read_object
from consilium_common.errors import ConsiliumError
from consilium_common.wire.large_field import before, cut

CONTENT = 4
ids = st.text(max_size=70)


@settings(max_examples=40, deadline=None)
@given(node=st.integers(0, 2**63), run=st.integers(0, 2**63), name=ids, content=st.binary())
def test_what_is_cut_out_and_what_remains_are_the_message(
    node: int, run: int, name: str, content: bytes
) -> None:
    whole = PushObjectRequest(
        node=Node(node_id=node), run_id=run, object_id=name, object_content=content, session_id="s"
    )
    rest, found = cut(whole.SerializeToString(), CONTENT)
    assert bytes(found) == content
    whole.ClearField("object_content")
    assert PushObjectRequest.FromString(rest) == whole


PIECES = [
    b"\x0a\x02\x08\x07",  # the node
    b"\x10\x09",  # the run
    b"\x1a\x01n",  # the object's name
    b"\x22\x03abc",  # content
    b"\x22\x04\x22\x02xy",  # content that looks like content
    b"\x20\x05",  # content's number with another type
    b"\x2a\x02\x22\x01",  # a session that looks like content
    b"\x39abcdefgh",
    b"\x3dabcd",
    b"\x98\x06\xff\xff\x01",
]


@settings(max_examples=80, deadline=None)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=8))
def test_in_any_order_of_fields_it_reads_what_the_protobuf_library_reads(
    pieces: list[bytes],
) -> None:
    body = b"".join(pieces)
    rest, content = cut(body, CONTENT)
    expected, read = PushObjectRequest.FromString(body), PushObjectRequest.FromString(rest)
    if not read.object_content:  # the last of several wins there
        read.object_content = bytes(content)
    expected.DiscardUnknownFields()
    read.DiscardUnknownFields()
    assert read == expected


@pytest.mark.parametrize(
    "body", [b"\x22", b"\x22\x05abc", b"\xff" * 11, b"\x0b\x0c", b"\x02\x00", b"\x09abc"]
)
def test_what_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"field|number|group"):
        cut(body, CONTENT)


@pytest.mark.parametrize("size", [1, 127, 128, 5_000_000])
def test_an_object_in_flowers_own_form_is_read_in_place(size: int) -> None:
    body = push_object(7, 9, "session", "a" * 64, b"\x01" * size)
    request, content = read_object(body)
    assert (request.node.node_id, request.run_id, request.session_id) == (7, 9, "session")
    assert request.object_id == "a" * 64
    assert content.obj is body
    assert len(content) == size
    assert before(CONTENT, size) in body


HONEST = push_object(7, 9, "session", "a" * 64, b"content")
FIELD = b"\x22\x07content"


@pytest.mark.parametrize(
    "body",
    [
        HONEST + b"\x7a\x01x",  # a field that nobody knows
        HONEST + FIELD,  # the content twice
        FIELD + HONEST.replace(FIELD, b""),  # in another order
        HONEST.replace(FIELD, b"\x22\x87\x00content"),  # a length with a byte too many
        HONEST.replace(FIELD, b"\xa2\x00\x07content"),  # a number with a byte too many
        HONEST.replace(FIELD, b"\x22\x00"),
        HONEST.replace(FIELD, b""),
        HONEST[:-1],
        b"",
    ],
)
def test_an_object_in_any_other_form_is_refused(body: bytes) -> None:
    with pytest.raises(ConsiliumError) as refused:
        read_object(body)
    assert refused.value.code == "privacy.egress"
