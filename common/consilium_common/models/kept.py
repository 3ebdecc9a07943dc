"""What was found out about a network, kept between commands: torch and MONAI take seconds to load.

Commands alone read it. The process that tells a site's link what may leave, the one that trains and
the aggregator's rounds build the network themselves, so that a changed file here can mislead what
a screen says and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

T = TypeVar("T")

#: Names the folder to keep it in, in place of the one that the system has for such things.
CACHE_VARIABLE: Final = "CONSILIUM_CACHE"
#: Networks kept, the last ones; each has some kilobytes.
_MOST: Final = 200
#: Their releases decide what a network is made of, and whether privacy can be proven for it.
_LIBRARIES: Final = ("torch", "monai", "opacus")


class _Keeping:
    """Where this process keeps networks; nowhere until :func:`keep_networks` is called."""

    folder: Path | None = None


def keep_networks(folder: Path | None = None) -> None:
    """Have this process keep networks: in ``folder``, or where the user's caches are."""
    if folder is None:
        named = os.environ.get(CACHE_VARIABLE)
        caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = Path(named) if named else Path(caches).expanduser() / "consilium"
    _Keeping.folder = folder


def kept(parts: Mapping[str, Any], kind: type[T], compute: Callable[[], T]) -> T:
    """Return what ``compute`` returns, without calling it where an earlier command has.

    Parameters
    ----------
    parts : mapping of str to JSON values
        All of the study that the answer depends on. It also depends on our own code and on the
        libraries' releases, which need not be named.
    kind : type
        A frozen dataclass of plain values.
    compute : callable
        Returns a ``kind``. What it raises is not kept.
    """
    folder = _Keeping.folder
    if folder is None:
        return compute()
    from pydantic import TypeAdapter

    from consilium_common.canonical import digest

    form = TypeAdapter(kind)
    path = folder / f"network-{digest({'parts': dict(parts), 'made_by': _made_by()})}.json"
    with suppress(OSError, ValueError):
        return form.validate_json(path.read_bytes())
    answer = compute()
    _write(path, form.dump_json(answer))
    return answer


def _write(path: Path, content: bytes) -> None:
    """Keep an answer; a disk that refuses costs time alone."""
    from consilium_common.errors import ConsiliumError
    from consilium_common.files import private_folder, write_atomic

    with suppress(ConsiliumError, OSError):
        private_folder(path.parent)
        write_atomic(path, content, durable=False)
        files = sorted(path.parent.glob("network-*.json"), key=lambda one: one.stat().st_mtime)
        for old in files[:-_MOST]:
            old.unlink(missing_ok=True)


def _made_by() -> list[str]:
    """Return digests of our own code that builds and judges networks, and libraries' releases."""
    from hashlib import sha256
    from importlib.metadata import version

    here = Path(__file__).parent
    sources = (*sorted(here.glob("*.py")), *sorted((here.parent / "study").glob("*.py")))
    code = sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return [code, *(f"{library} {version(library)}" for library in _LIBRARIES)]
