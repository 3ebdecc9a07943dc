"""Work spread over processes: in order, the same with any number, and past an item that kills."""

from __future__ import annotations

import os

import pytest

from consilium_client.data.parallel import spread


def square(number: int) -> int:
    return number * number


def fatal_at_seven(number: int) -> int:
    if number % 40 == 7:
        os.abort()
    return number


def minus(number: int) -> int:
    return -number


def here(_: int) -> int:
    return os.getpid()


def nested(number: int) -> int:
    """Return how many processes an item's own work would be done in besides its own."""
    return len(set(spread(here, [number], otherwise=minus)) - {os.getpid()})


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_whatever_the_number_of_processes(workers: int) -> None:
    assert list(spread(square, range(100), workers=workers)) == [n * n for n in range(100)]


def test_few_items_need_no_other_process() -> None:
    assert set(spread(here, range(10))) == {os.getpid()}


def test_an_item_that_ends_its_process_costs_itself_alone() -> None:
    found = list(spread(fatal_at_seven, range(50), workers=2, otherwise=minus))
    assert found == [-n if n in (7, 47) else n for n in range(50)]


def test_one_process_apart_is_enough() -> None:
    assert list(spread(nested, [1, 2], otherwise=minus)) == [0, 0]
    assert nested(1) == 1
