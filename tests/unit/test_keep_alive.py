"""Keep-alives keep an idle connection known on its way, and tell when it is known no more."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from channel_samples import ConnectProxy
from office_samples import Office

from consilium_common.errors import ConsiliumError
from consilium_common.wire import channel
from consilium_common.wire.channel import CHANNEL_OPTIONS, Caller
from consilium_common.wire.methods import MEMBER_TRUST, SITE_STUDIES
from consilium_common.wire.proxy import choose_proxy


class HoldingOffice(Office):
    """An aggregator that holds a call open, as it holds the polls of idle sites."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.holding = threading.Event()

    def _table(self) -> dict[str, Any]:
        async def hold(*_: object) -> None:
            self.holding.set()
            await asyncio.Event().wait()

        return {**super()._table(), SITE_STUDIES: hold}


def test_a_tunnel_that_was_forgotten_on_the_way_is_noticed_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = {
        "grpc.keepalive_time_ms": 1_500,
        "grpc.keepalive_timeout_ms": 1_000,
        "grpc.http2.ping_timeout_ms": 1_000,
    }
    assert quick.keys() <= dict(CHANNEL_OPTIONS).keys()
    monkeypatch.setattr(channel, "CHANNEL_OPTIONS", [*(dict(CHANNEL_OPTIONS) | quick).items()])
    office = HoldingOffice(tmp_path / "aggregator")
    site = office.site(tmp_path / "site")
    way = ConnectProxy(office.address)
    with (
        office.open(),
        way.serving() as url,
        ThreadPoolExecutor() as pool,
        Caller(
            office.address, site.identity.credentials(), choose_proxy(url, office.address)
        ) as caller,
    ):
        held = pool.submit(caller.call, SITE_STUDIES, {}, timeout=60)
        assert office.holding.wait(10)
        assert len(way.asked) == 1
        # No FIN and no RST: what is sent from here on is taken and goes nowhere.
        way.forget()
        began = time.monotonic()
        error = held.exception(30)
        assert isinstance(error, ConsiliumError) and error.code.startswith("network."), error
        assert "authority_pem" in caller.call(MEMBER_TRUST, {}, timeout=5)
        # Ping and answer take 2.5 s here, and 30 s by the options in force.
        assert time.monotonic() - began < 15
    assert len(way.asked) >= 2


def test_keep_alives_come_more_often_than_firewalls_forget_and_the_port_permits_them() -> None:
    from consilium_server.limits import Limits

    options = dict(CHANNEL_OPTIONS)
    server = dict(Limits().for_grpc())
    # NAT and firewalls commonly forget idle connections after 60 s or more.
    assert options["grpc.keepalive_time_ms"] < 60_000
    # A tunnel that was forgotten is noticed, and the site is back, within 35 s.
    for answer in ("grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms"):
        assert options["grpc.keepalive_time_ms"] + options[answer] <= 30_000
    assert options["grpc.max_reconnect_backoff_ms"] <= 5_000
    assert options["grpc.keepalive_permit_without_calls"] == 1
    assert options["grpc.http2.max_pings_without_data"] == 0
    least = server["grpc.http2.min_recv_ping_interval_without_data_ms"]
    assert least < options["grpc.keepalive_time_ms"]
