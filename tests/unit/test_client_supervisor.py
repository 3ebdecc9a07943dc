"""What a site does all the time goes on, whatever it fails by."""

from __future__ import annotations

import asyncio

import pytest

from consilium_client import supervisor


def test_work_that_fails_unforeseen_is_begun_again_and_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "_PAUSE_SECONDS", 0.0)
    begun: list[int] = []
    said: list[str] = []

    async def work() -> None:
        begun.append(len(begun))
        if len(begun) < 3:
            raise RecursionError
        await asyncio.sleep(3600)

    async def scenario() -> None:
        task = asyncio.create_task(supervisor._kept_up(work, said.append))
        while len(begun) < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    assert begun == [0, 1, 2]
    assert said == 2 * ["an internal error (RecursionError) was survived; the log says where"]
