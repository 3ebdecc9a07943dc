"""What all tests share: gRPC restricted first, skips by marker, one federation for many tests."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# First of all: whoever imports gRPC before this module would bring it without the restriction.
import consilium_common.wire.tls13  # noqa: F401
from consilium_common.console import MODE
from consilium_common.models.kept import CACHE_VARIABLE, _Keeping

if TYPE_CHECKING:
    from federation import Federation

_TESTS = Path(__file__).parent
_REAL_IMAGES = _TESTS.parent.parent / "shared" / "data"
#: Folders whose tests run real processes; they come last, so that a cheap failure is seen first.
_PROCESSES = ("faults", "integration")
#: Files that share the running federation, by the one test process that starts it for them: two
#: such processes, for their tests wait more than they work.
_SHARING = {
    "test_lifecycle.py": "federation-1",
    "test_membership.py": "federation-1",
    "test_studies.py": "federation-2",
    "test_wrong_inputs.py": "federation-2",
    "test_port.py": "federation-2",
    "test_compromised_site.py": "federation-2",
    "test_simulation.py": "federation-2",
    "test_round_modes.py": "federation-2",
}
#: What takes minutes begins first, so that at the end no process waits for another.
_LONGEST = (
    "test_real_images.py",
    "test_kill_matrix.py",
    "test_crash_federation.py",
    *_SHARING,
    "test_privacy_officer.py",
    "test_hostile_site.py",
    "test_identity_leaks.py",
    "test_fusion.py",
    "test_hostile_aggregator.py",
    "test_fuzzed_images.py",
    "test_proxy.py",
)

sys.path.append(str(_TESTS / "integration"))
sys.path.append(str(_TESTS / "unit"))  # generators of images, for the tests of real processes too


def pytest_configure() -> None:
    """Let a killed test run clean up: fixtures end their processes on SIGTERM as on Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # before and after xdist looks for the groups
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None]:
    """Skip what this machine cannot run, put the slow folders last, give them time.

    With ``--dist loadgroup`` the tests of a file stay together, and files that share a federation.
    """
    for item in items:
        if item.get_closest_marker("data") and not _REAL_IMAGES.is_dir():
            item.add_marker(pytest.mark.skip(reason="the real images ../shared/data are not here"))
        if item.get_closest_marker("gpu") and not _cuda():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if _runs_processes(item) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(300))
        if not item.get_closest_marker("xdist_group"):
            name = item.path.name
            item.add_marker(pytest.mark.xdist_group(_SHARING.get(name, name)))
    items.sort(key=lambda item: (_runs_processes(item), _begins(item)))  # stable within a file
    yield
    if getattr(config.option, "loadgroup", False) and any("@" not in item.nodeid for item in items):
        # Every process would start every federation, and the tests take twice their time.
        raise pytest.UsageError("xdist has not grouped the tests: see the pin of pytest.")


def _begins(item: pytest.Item) -> int:
    name = item.path.name
    return _LONGEST.index(name) if name in _LONGEST else len(_LONGEST)


def _runs_processes(item: pytest.Item) -> bool:
    return item.path.relative_to(_TESTS).parts[0] in _PROCESSES


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands called in the tests' own process print for people, whatever a test before asked,
    and what a test before has kept of a network is not known.
    """
    MODE.json = MODE.debug = False
    monkeypatch.setattr(_Keeping, "folder", None)


@pytest.fixture(autouse=True, scope="session")
def _kept_networks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Commands of all tests that run together load torch once for each kind of network."""
    folder = tmp_path_factory.getbasetemp()
    together = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(together / "networks"))
        yield


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
