"""What the aggregator needs of a study's network, from a process that ends: torch stays out of it.

torch and MONAI take 350 MB that a process never gives back, more than the aggregation of most
models. The process that runs the rounds needs of the network only the shapes and, once, the
weights to begin with: a child builds it, answers, and is gone. What it said is kept beside the
study, so that a run that goes on after a death waits for no child.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from consilium_common import __version__
from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.models.exchange import sent_specs, shared_specs, statistics_names
from consilium_common.models.weights import TensorSpec, pack
from consilium_common.study import Study

_SECONDS: Final = 600


@dataclass(frozen=True)
class Exchanged:
    """What an update is made of, and which of it is aggregated; both sorted by name."""

    sent: tuple[TensorSpec, ...]
    shared: tuple[TensorSpec, ...]
    #: Names of the running statistics among the shared.
    statistics: frozenset[str] = frozenset()


_known: dict[str, Exchanged] = {}


def exchanged(study: Study) -> Exchanged:
    """Return what sites send; the network is built once per study, not once per update.

    Raises
    ------
    ConsiliumError
        ``study.network`` and the like: the study's network cannot be built.
    """
    if study.digest not in _known:
        _learn(study, _build(study) if _torch_is_loaded() else _ask(study))
    return _known[study.digest]


def write_start(study: Study, out: Path, public: Path | None = None) -> None:
    """Write the weights that a study begins with, durably.

    Parameters
    ----------
    out : Path
        The whole model, safetensors.
    public : Path, optional
        The public start where the study names one (``model.start``).

    Raises
    ------
    ConsiliumError
        ``study.start``: the file is not the one that the study names; ``state.disk``: no room.
    """
    if _torch_is_loaded():
        _write_start(study, out, public)
    else:
        _learn(study, _ask(study, str(out), *([] if public is None else [str(public)])))


def remember(study: Study, file: Path) -> None:
    """Write what is known of the study's network, for a later run of this release."""
    write_atomic(file, canonical_json({**_to_json(exchanged(study)), "release": __version__}))


def recall(study: Study, file: Path) -> bool:
    """Learn what :func:`remember` wrote, and return whether it was of use.

    A file of another release, or none, teaches nothing.
    """
    try:
        known = json.loads(file.read_bytes())
        if known["release"] != __version__:
            return False
        _learn(study, _from_json(known))
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return True


def _torch_is_loaded() -> bool:
    # Then it is paid for (simulation, tests), and a child would only cost seconds.
    return "torch" in sys.modules


def _learn(study: Study, found: Exchanged) -> None:
    _known.clear()  # a process runs one study, or simulates one after the other
    _known[study.digest] = found


def _build(study: Study) -> Exchanged:
    return Exchanged(sent_specs(study), shared_specs(study), statistics_names(study))


def _write_start(study: Study, out: Path, public: Path | None) -> None:
    from consilium_common.models.registry import initial_weights, start_weights

    if public is None:
        weights = initial_weights(study)
    else:
        try:
            weights = start_weights(study, public.read_bytes())
        except OSError as error:
            raise ConsiliumError(
                "study.start",
                f"The study's public start cannot be read: {error.strerror or error}.",
                where=str(public),
                hint="Hand the file over again with `consilium study propose --start`.",
            ) from error
    write_atomic(out, pack(weights))


def _to_json(found: Exchanged) -> dict[str, Any]:
    return {
        "sent": [[spec.name, list(spec.shape)] for spec in found.sent],
        "shared": [[spec.name, list(spec.shape)] for spec in found.shared],
        "statistics": sorted(found.statistics),
    }


def _from_json(said: dict[str, Any]) -> Exchanged:
    sent, shared = (
        tuple(TensorSpec(name, tuple(shape)) for name, shape in said[key])
        for key in ("sent", "shared")
    )
    return Exchanged(sent, shared, frozenset(said["statistics"]))


# --- the child -----------------------------------------------------------------------------------


def _ask(study: Study, *start: str) -> Exchanged:
    """Run this module as a process of its own; return what it answers.

    Parameters
    ----------
    start : str
        Where it is to write the starting weights, and the public start; nothing: it writes none.
    """
    done = subprocess.run(
        [sys.executable, "-m", "consilium_server.networks", *start],
        input=canonical_json(study.to_canonical()),
        stdout=subprocess.PIPE,
        timeout=_SECONDS,
        check=False,
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError as error:
        raise ConsiliumError(
            "internal.network",
            f"The process that builds the study's network ended with status {done.returncode}.",
            hint="Its last words are in the log of the aggregator; memory may have run out.",
        ) from error
    if "error" in answer:
        raise ConsiliumError.from_dict(answer["error"])
    return _from_json(answer)


def main() -> None:
    """Answer about the study on the standard input, as JSON."""
    answer: dict[str, Any]
    try:
        study = Study.model_validate(json.load(sys.stdin))
        if paths := [Path(argument) for argument in sys.argv[1:]]:
            _write_start(study, paths[0], paths[1] if len(paths) > 1 else None)
        answer = _to_json(_build(study))
    except ConsiliumError as error:
        answer = {"error": error.to_dict()}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
