"""The process that computes what studies declare: it ends when nobody asks, and starts again."""

from __future__ import annotations

import threading
import time

from egress_samples import plain_study

from consilium_client.declared import Apart, Declarations, declared
from consilium_common.errors import ConsiliumError


def test_left_alone_the_process_ends_and_gives_its_memory_back() -> None:
    study = plain_study()
    apart = Apart(idle_seconds=0.2)
    try:
        assert apart(study) == declared(study)
        end = time.monotonic() + 10
        while apart._process is not None:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert apart(study) == declared(study)
    finally:
        apart.end()


def test_a_site_that_stops_waits_for_no_answer() -> None:
    apart = Apart()
    declarations = Declarations(apart)
    refused: list[str] = []

    def ask() -> None:
        try:
            declarations.of(plain_study())
        except ConsiliumError as error:
            refused.append(error.code)

    asking = threading.Thread(target=ask)
    asking.start()
    end = time.monotonic() + 30
    while apart._process is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    declarations.stop()
    asking.join(10)
    assert refused == ["run.declared"]
    # Nor does it begin anything new.
    ask()
    assert refused == ["run.declared"] * 2
