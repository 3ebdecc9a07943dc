"""What the aggregator's processes are started with, and what they write, holds no secret."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path

import pytest

from consilium_common.processes import free_port
from consilium_server import database
from consilium_server.home import HOME_VARIABLE, ServerHome
from consilium_server.issuing import passphrase_for
from consilium_server.members import initialise
from consilium_server.supervisor import serve

PASSPHRASE = b"five words drawn at random"
#: Nobody listens there: the executor says so in its log, and is started again.
URL = "postgresql+psycopg://consilium:verborgen@127.0.0.1:1/registry"


def processes(home: ServerHome) -> dict[str, bytes]:
    """Return arguments and environment of those that were started for this home."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal() or folder.name == str(os.getpid()):
            continue
        try:
            command = (folder / "cmdline").read_bytes()
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue  # it ended meanwhile, or is not ours
        if f"{HOME_VARIABLE}={home.path}".encode() in environment:
            for name in (b"flower-superlink", b"consilium_server.executor"):
                if name in command:
                    found[name.decode()] = command + b"\0" + environment
    return found


def test_no_secret_is_in_an_argument_an_environment_or_a_log_of_the_aggregator_s_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = ServerHome.create(tmp_path / "aggregator")
    file = tmp_path / "passphrase"
    file.write_bytes(PASSPHRASE + b"\n")
    file.chmod(0o600)
    port = free_port()
    initialise(home, "tests", f"127.0.0.1:{port}", passphrase=PASSPHRASE)
    config = json.loads(home.config_file.read_text())
    home.config_file.write_text(json.dumps({**config, "database": URL}))
    # This process keeps its registry in a file; those that it starts find the URL alone.
    monkeypatch.setattr(database, "_named_beside", lambda _: None)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://user:geheim@127.0.0.1:1")
    opened = passphrase_for(home.identity / "authority-key.pem", file)
    assert opened == PASSPHRASE
    said: list[str] = []
    found: dict[str, bytes] = {}
    log = home.logs / "executor.log"

    async def watch() -> None:
        serving = asyncio.create_task(
            serve(home, "127.0.0.1", port, said.append, passphrase=opened)
        )
        end = time.monotonic() + 60
        while len(found) < 2 or b"state.registry" not in log.read_bytes():
            assert time.monotonic() < end
            assert not serving.done()
            await asyncio.sleep(0.1)
            found.update(await asyncio.to_thread(processes, home))
            log.touch()
        os.kill(os.getpid(), signal.SIGTERM)
        await serving

    asyncio.run(watch())
    secrets = [b"geheim", b"verborgen", PASSPHRASE]
    for path in home.identity.glob("*-key.pem"):
        secrets += [line for line in path.read_bytes().splitlines() if b"-----" not in line]
    content = (home.run / "secret").read_bytes()  # drawn at random: any byte may be a line's end
    secrets += [content, content.hex().encode()]
    assert len(secrets) > 10
    logs = b"".join(path.read_bytes() for path in home.logs.iterdir())
    for text in (*found.values(), logs, "\n".join(said).encode()):
        for secret in secrets:
            assert secret not in text
