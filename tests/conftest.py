"""What all tests share: gRPC restricted first, skips by marker, one federation for many tests."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# First of all: whoever imports gRPC before this module would bring it without the restriction.
import consilium_common.wire.tls13  # noqa: F401
from consilium_common.console import MODE

if TYPE_CHECKING:
    from federation import Federation

_TESTS = Path(__file__).parent
_REAL_IMAGES = _TESTS.parent.parent / "shared" / "data"
#: Folders whose tests run real processes; they come last, so that a cheap failure is seen first.
_PROCESSES = ("faults", "integration")

sys.path.append(str(_TESTS / "integration"))
sys.path.append(str(_TESTS / "unit"))  # generators of images, for the tests of real processes too


def pytest_configure() -> None:
    """Let a killed test run clean up: fixtures end their processes on SIGTERM as on Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, put the slow folders last, give them time."""
    for item in items:
        if item.get_closest_marker("data") and not _REAL_IMAGES.is_dir():
            item.add_marker(pytest.mark.skip(reason="the real images ../shared/data are not here"))
        if item.get_closest_marker("gpu") and not _cuda():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if _runs_processes(item) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(300))
    items.sort(key=_runs_processes)  # stable: the order within each is kept


def _runs_processes(item: pytest.Item) -> bool:
    return item.path.relative_to(_TESTS).parts[0] in _PROCESSES


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _for_people() -> None:
    """Commands called in the tests' own process print for people, whatever a test before asked."""
    MODE.json = MODE.debug = False


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A running aggregator with three running hospitals; every test finds it so."""
    from federation import Federation, add_hospitals

    with Federation(tmp_path_factory.mktemp("federation")) as running:
        add_hospitals(running)
        yield running


@pytest.fixture(autouse=True)
def _all_running(request: pytest.FixtureRequest) -> None:
    """Start again what an earlier test has killed or stopped."""
    if "federation" in request.fixturenames:
        request.getfixturevalue("federation").heal()
