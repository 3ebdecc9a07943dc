"""A site and its gate, for the tests of what leaves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from site_samples import JoinedSite

    from consilium_client.egress import EgressGate


@pytest.fixture
def site(tmp_path: Path) -> JoinedSite:
    from site_samples import joined_site

    return joined_site(tmp_path / "site")


@pytest.fixture
def gate(site: JoinedSite) -> EgressGate:
    from egress_samples import gate_of

    return gate_of(site)
