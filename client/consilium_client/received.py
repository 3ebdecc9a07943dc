"""The models that a site is sent: where they lie, how long they stay, and why one did not come."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Collection
from pathlib import Path
from typing import Final

from consilium_client.home import SiteHome
from consilium_common.errors import ConsiliumError
from consilium_common.files import private_folder, write_atomic
from consilium_common.wire.messages import Reference

#: Models kept of a study: one trained from, one evaluated, and one on its way.
_KEPT: Final = 3
_NAME_LENGTH: Final = 64
_LOOK_SECONDS: Final = 0.005
#: A study that the aggregator has not named as running for so long was stopped.
_ENDED_SECONDS: Final = 20.0
#: Models go of a study that does not run and was not asked for in so long: whoever waited for one
#: has given up by then.
_UNUSED_SECONDS: Final = 60.0


class Received:
    """The models that are here or on their way, as the link keeps them; for its event loop alone.

    Parameters
    ----------
    home : SiteHome
        Whose disk holds them.
    """

    def __init__(self, home: SiteHome) -> None:
        self._home = home
        #: By folder, the one asked for last at the end. Not by the files' times: those follow the
        #: clock, and one that is set back would make the newest model the oldest.
        self._order: dict[str, list[str]] = {}
        self._asked_at: dict[str, float] = {}
        self._began = time.monotonic()

    def ask(self, study: str, model: Reference) -> Path:
        """Note that a task needs a model; return where it is once it has come.

        Of the study's other models the two asked for last stay, here or on their way.
        """
        path = model_file(self._home, study, model)
        folder = path.parent
        order = self._order.setdefault(folder.name, _by_age(folder))
        if model.sha256 in order:
            order.remove(model.sha256)
        order.append(model.sha256)
        del order[:-_KEPT]
        self._asked_at[folder.name] = time.monotonic()
        with contextlib.suppress(OSError):
            for other in folder.iterdir():
                if other.name[:_NAME_LENGTH] not in order:
                    other.unlink(missing_ok=True)
            _refusal(path).unlink(missing_ok=True)
        return path

    def tidy(self, running: Collection[str]) -> None:
        """Remove the models of studies that do not run, once nobody can be waiting for one."""
        staying = {_folder(study) for study in running}
        now = time.monotonic()
        for folder in self._home.models.iterdir():
            unused = now - self._asked_at.get(folder.name, self._began)
            if folder.name not in staying and unused > _UNUSED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
                self._order.pop(folder.name, None)


def model_file(home: SiteHome, study: str, model: Reference) -> Path:
    """Return where a study's model is once it has come.

    Raises
    ------
    ConsiliumError
        ``state.folder``.
    """
    return private_folder(home.models / _folder(study)) / model.sha256


def drop_models(home: SiteHome, study: str) -> None:
    """Remove a study's models, also where the aggregator has it running still: at other sites."""
    shutil.rmtree(home.models / _folder(study), ignore_errors=True)


def note_refusal(path: Path, error: ConsiliumError) -> None:
    """Tell who waits for a model why it does not come; a full disk leaves them waiting."""
    with contextlib.suppress(ConsiliumError):
        write_atomic(_refusal(path), json.dumps(error.to_dict()).encode(), durable=False)


def wait_for_model(home: SiteHome, study: str, model: Reference, seconds: float) -> Path:
    """Return the model's file once the link has fetched it; for the process that runs tasks.

    Raises
    ------
    ConsiliumError
        Why the link could not fetch it; ``run.no-model`` when it does not come in ``seconds``, or
        the study was stopped meanwhile.
    """
    path = model_file(home, study, model)
    refused = _refusal(path)
    end = time.monotonic() + seconds
    ended: float | None = None
    while not path.exists():
        if refused.exists():
            raise ConsiliumError.from_dict(json.loads(refused.read_bytes()))
        now = time.monotonic()
        ended = None if _runs(home, study) else (ended or now)
        if now > end or (ended is not None and now - ended > _ENDED_SECONDS):
            raise ConsiliumError(
                "run.no-model",
                "The round's model did not come.",
                hint="See whether the line to the aggregator stands: `consilium site doctor`.",
            )
        time.sleep(_LOOK_SECONDS)
    return path


def _runs(home: SiteHome, study: str) -> bool:
    try:
        return study in json.loads(home.running.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True  # not said yet


def _folder(study: str) -> str:
    return study[:16]


def _refusal(path: Path) -> Path:
    return path.with_name(f"{path.name}.refused")


def _by_age(folder: Path) -> list[str]:
    """Return the models that a link before this one left, the oldest first."""
    left = sorted(folder.iterdir(), key=lambda one: one.stat().st_mtime_ns)
    return list(dict.fromkeys(one.name[:_NAME_LENGTH] for one in left))
