"""The systemd units give each service the rights that it needs, and no other."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from consilium_client.home import HOME_VARIABLE as SITE_HOME
from consilium_common.cli import app
from consilium_server.home import HOME_VARIABLE as SERVER_HOME

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
HOMES = {"server": SERVER_HOME, "site": SITE_HOME}
PROGRAM = "/opt/consilium/bin/consilium"
#: What both units say.
SAID = {
    "User": "consilium",
    "Group": "consilium",
    "NoNewPrivileges": "yes",
    "UMask": "0077",
    "StateDirectoryMode": "0700",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "ProtectKernelTunables": "yes",
    "ProtectKernelModules": "yes",
    "ProtectControlGroups": "yes",
    "RestrictNamespaces": "yes",
    "RestrictSUIDSGID": "yes",
    "SystemCallFilter": "@system-service",
    "Type": "notify",
    "NotifyAccess": "main",
    "Restart": "always",
    "TimeoutStopSec": "10",
    "KillMode": "mixed",
}
#: The aggregator alone may take a port below 1024; a site opens none.
CAPABILITIES = {"server": "CAP_NET_BIND_SERVICE", "site": ""}
#: systemd's measure of a unit, in tenths: 100 shuts out nothing.
EXPOSURE = 25


def unit(service: str) -> dict[str, list[str]]:
    """Return the settings of a unit's service, each with all values that it has."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in (UNITS / f"consilium-{service}.service").read_text().splitlines():
        if line.startswith("["):
            section = line
        elif section == "[Service]" and line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("service", HOMES)
def test_a_service_has_a_user_of_its_own_and_the_least_rights(service: str) -> None:
    found = unit(service)
    for name, value in SAID.items():
        assert found[name] == [value], name
    assert found["CapabilityBoundingSet"] == [CAPABILITIES[service]]
    assert found.get("AmbientCapabilities", [""]) == [CAPABILITIES[service]]
    # It writes to its own state folder alone.
    assert found["StateDirectory"] == [f"consilium-{service}"]
    assert not {"ReadWritePaths", "BindPaths", "PermissionsStartOnly"} & set(found)
    assert f"{HOMES[service]}=/var/lib/consilium-{service}" in found["Environment"]


@pytest.mark.parametrize("service", HOMES)
def test_a_unit_starts_a_command_that_there_is(service: str) -> None:
    ((program, *words),) = (line.split() for line in unit(service)["ExecStart"])
    assert program == PROGRAM
    assert CliRunner().invoke(app, [*words, "--help"]).exit_code == 0
    # It says that it is alive twice in the time after which it counts as hung.
    assert float(unit(service)["WatchdogSec"][0]) >= 60


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.parametrize("service", HOMES)
def test_systemd_understands_every_line_and_finds_little_exposed(
    service: str, tmp_path: Path
) -> None:
    name = f"consilium-{service}.service"
    program = str(Path(sys.executable).with_name("consilium"))
    file = tmp_path / name
    file.write_text((UNITS / name).read_text().replace(PROGRAM, program))

    def analyze(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["systemd-analyze", *words, str(file)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    verified = analyze("verify", "--man=no")
    # Of other units of this machine it may complain too.
    assert [line for line in verified.stderr.splitlines() if name in line] == []
    looked = analyze("security", "--offline=true", f"--threshold={EXPOSURE}")
    if "unrecognized option" not in looked.stderr:  # before systemd 250
        assert looked.returncode == 0, looked.stdout
