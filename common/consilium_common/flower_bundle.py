"""The Flower App Bundle: it names code of the installed release and carries none.

Built reproducibly on both sides from the installed version, so a site can compare the hash that a
server sends with its own and refuse everything else. The only use of Flower's private `flwr.cli`.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version

from consilium_common import __version__

PUBLISHER = "consilium"
NAME = "consilium"

_PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "{version}"
description = "Names the apps of the installed consilium release"
license = {{ file = "LICENSE" }}
dependencies = ["flwr>={flwr}"]

[tool.flwr.app]
publisher = "{publisher}"
fab-format-version = 1
flwr-version-target = "{flwr}"

[tool.flwr.app.components]
serverapp = "consilium_server.app:app"
clientapp = "consilium_client.app:app"

[tool.flwr.app.config]
study = ""
"""
_LICENSE = "Apache-2.0. The text is part of the installed consilium distribution.\n"


@cache
def bundle() -> bytes:
    """Return the bundle of the installed release (a deterministic zip, under 2 kB)."""
    from flwr.cli.build import build_fab_from_files

    pyproject = _PYPROJECT.format(
        name=NAME, version=__version__, publisher=PUBLISHER, flwr=version("flwr")
    )
    content: bytes = build_fab_from_files(
        {"pyproject.toml": pyproject.encode(), "LICENSE": _LICENSE.encode()}
    )[0]
    return content


@cache
def bundle_hash() -> str:
    """Return the bundle's SHA-256 as Flower names it, 64 hexadecimal digits."""
    return hashlib.sha256(bundle()).hexdigest()
