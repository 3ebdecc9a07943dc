"""A doctor's probe measures the line: it has a bound both ways, and nothing of it stays."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import pytest

from consilium_common.diagnosis.exchange import _PAYLOAD
from consilium_common.errors import ConsiliumError
from consilium_common.wire.methods import MAX_MESSAGE_BYTES
from consilium_server.services.of_members import MAX_PROBE, MemberServices


def probe(**request: Any) -> Any:
    """Ask as a member does; whatever the handler would keep or look up fails: nothing is there."""
    nothing: Any = None
    return asyncio.run(MemberServices(nothing, nothing).probe(nothing, request))


def test_a_probe_is_bounded_both_ways_and_keeps_nothing() -> None:
    content = "x" * MAX_PROBE
    answer = probe(content=content, want=MAX_PROBE)
    assert answer["sha256"] == hashlib.sha256(content.encode()).hexdigest()
    assert len(answer["content"]) == MAX_PROBE
    assert set(answer) == {"bytes", "sha256", "content", "time", "version", "protocol"}
    # What comes back is not what went there.
    assert "xxxx" not in probe(content=content, want=100)["content"]
    assert _PAYLOAD <= MAX_PROBE == 4 * 1024 * 1024 < MAX_MESSAGE_BYTES
    for wrong in (
        {"content": content + "x"},
        {"content": "", "want": MAX_PROBE + 1},
        {"content": "", "want": -1},
        {"content": "", "want": True},
        {"content": ["x"]},
        {},
    ):
        with pytest.raises(ConsiliumError) as caught:
            probe(**wrong)
        assert caught.value.code == "network.garbage"
