"""One function over many items in several processes or threads, results in order."""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeVar

from consilium_common.processes import die_with_parent

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

T = TypeVar("T")
R = TypeVar("R")

_CHUNK: Final = 32
#: Fewer items than this are done sooner in this process than another one starts.
_MANY: Final = 300
_MOST_THREADS: Final = 4


def spread(
    function: Callable[[T], R],
    items: Sequence[T],
    *,
    workers: int | None = None,
    otherwise: Callable[[T], R] | None = None,
) -> Iterator[R]:
    """Yield ``function(item)`` for every item, in order.

    Parameters
    ----------
    function : callable
        Of a module's top level, so that another process finds it; raises nothing.
    workers : int, optional
        Processes (default: one per core for many items, none for a few).
    otherwise : callable, optional
        Where the function may end its process, as some decoders do on a damaged file: what such
        an item gives. No item is then worked on in the command's own process.
    """
    import multiprocessing
    from concurrent.futures.process import BrokenProcessPool

    chunks = [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]
    if workers is None:
        workers = cores() if len(items) >= _MANY else 1
    workers = min(workers, len(chunks))
    # In a child of ours a crash is known to the parent, and one process apart is enough; daemonic
    # processes may have no children at all.
    apart = otherwise is not None and multiprocessing.parent_process() is None
    if (workers < 2 and not apart) or multiprocessing.current_process().daemon:
        yield from map(function, items)
        return
    done = 0
    try:
        with _pool(workers) as pool:
            for results in pool.map(partial(_chunk, function), chunks):
                yield from results
                done += len(results)
    except BrokenProcessPool:
        # No children can run here, or one has died.
        if otherwise is None:
            yield from map(function, items[done:])
        else:
            yield from _one_by_one(function, items[done:], otherwise)


def side_by_side(
    function: Callable[[T], R], items: Iterable[T], *, threads: int | None = None
) -> Generator[R]:
    """Yield ``function(item)`` for every item, in order, from several threads.

    For work that numpy, zlib and the like do outside the interpreter: threads need no start. As
    many items are in memory as there are threads, and one more.

    Parameters
    ----------
    function : callable
        Safe to run beside itself; what it raises is raised here.
    threads : int, optional
        How many (default: one per core, four at most).
    """
    count = threads or min(cores(), _MOST_THREADS)
    rest = iter(items)
    with ThreadPoolExecutor(count) as pool:
        waiting = deque(pool.submit(function, item) for item in islice(rest, count))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in islice(rest, 1))
                yield result
        finally:
            for future in waiting:
                future.cancel()


def _one_by_one(
    function: Callable[[T], R], items: Sequence[T], otherwise: Callable[[T], R]
) -> Iterator[R]:
    """Give each item to a child by itself, so that it is known which one ends it."""
    from concurrent.futures.process import BrokenProcessPool

    left = list(items)
    while left:
        with _pool(1) as pool:
            while left:
                item = left.pop(0)
                try:
                    result = pool.submit(function, item).result()
                except BrokenProcessPool:
                    yield otherwise(item)
                    break
                yield result


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    pool = ProcessPoolExecutor(
        max(1, workers),
        # Spawned, not forked: the caller may run threads, whose locks a fork would copy.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
    )
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def cores() -> int:
    """Return how many processors this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _chunk(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    return [function(item) for item in items]


def _start_worker() -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C, and ends the pool
