"""One function over many files in several processes, results in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Final, TypeVar

from consilium_common.processes import die_with_parent

T = TypeVar("T")
R = TypeVar("R")

_CHUNK: Final = 16
#: Fewer items than this are done sooner in this process than another one starts.
_MANY: Final = 200


def spread(
    function: Callable[[T], R], items: Sequence[T], *, workers: int | None = None
) -> Iterator[R]:
    """Yield ``function(item)`` for every item, in order.

    Parameters
    ----------
    function : callable
        Of a module's top level, so that another process finds it; raises nothing.
    workers : int, optional
        Processes (default: one per core for many items, none for a few).
    """
    chunks = [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if len(items) >= _MANY else 1
    # Daemonic processes may have no children.
    if min(workers, len(chunks)) < 2 or multiprocessing.current_process().daemon:
        yield from map(function, items)
        return
    each = partial(_chunk, function)
    # Spawned, not forked: the caller may run threads, whose locks a fork would copy.
    pool = ProcessPoolExecutor(
        min(workers, len(chunks)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
    )
    done = 0
    try:
        for results in pool.map(each, chunks):
            yield from results
            done += 1
    except BrokenProcessPool:
        # No children can run here, or one was killed: the rest is done in this process.
        yield from map(function, items[done * _CHUNK :])
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _chunk(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    return [function(item) for item in items]


def _start_worker() -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C, and ends the pool
