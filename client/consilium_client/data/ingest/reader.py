"""The child that reads cases: a decoder that crashes takes this process along, and no other.

Started by :mod:`consilium_client.data.ingest.readers` as ``python -m`` with a socket's number.
Tasks come pickled from the parent; answers go back as JSON, so that a file that took over a
decoder has no pickle to send.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from consilium_client.data.ingest.cache import write_case
from consilium_client.data.ingest.case import Located, read_case
from consilium_common.errors import ConsiliumError
from consilium_common.processes import die_with_parent


def main() -> None:
    """Read what is asked for until the parent closes the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    die_with_parent()
    with suppress(OSError):  # where memory runs out, this process goes first
        Path("/proc/self/oom_score_adj").write_text("1000")
    with Connection(int(sys.argv[1])) as parent, suppress(EOFError, ConnectionError):
        parent.send_bytes(b"ready")
        while True:
            folder, located = parent.recv()
            parent.send_bytes(json.dumps(_answer(folder, located)).encode())


def _answer(folder: Path, located: Located) -> dict[str, Any]:
    try:
        arrays, content = read_case(located)
    except ConsiliumError as error:
        return {"error": error.to_dict()}
    except Exception as error:
        # The class name alone: a library's message may quote the file.
        unforeseen = f"Something unforeseen happened while reading: {type(error).__name__}."
        return {"error": ConsiliumError("internal.unexpected", unforeseen).to_dict()}
    try:
        return {"bytes": write_case(folder, arrays, content), "content": content}
    except OSError as error:
        return {"disk": os.strerror(error.errno) if error.errno else type(error).__name__}


if __name__ == "__main__":
    main()
