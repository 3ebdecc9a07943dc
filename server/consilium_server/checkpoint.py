"""The state after a round: a folder that is there whole or not at all, and the one before it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from consilium_common.canonical import canonical_json, digest
from consilium_common.errors import ConsiliumError
from consilium_common.files import disk_error, private_folder, sync_folder
from consilium_common.models.tensor_files import TensorFile, writing
from consilium_common.models.weights import TensorSpec

#: Checkpoints that are kept: the last, and the one before it in case the last is damaged.
_KEPT: Final = 2
_SCHEMA: Final = "consilium/checkpoint/v1"
_PARTS: Final = ("model", "state", "average")
_NAME: Final = re.compile(r"round-\d{6}")
_ASIDE: Final = ".aside-"
#: Names in the single file that older releases wrote.
_OLD_ROUND: Final = "consilium.rounds_done"
_OLD_AVERAGE: Final = "consilium.average."


@dataclass(frozen=True)
class Checkpoint:
    """All that a study needs to go on after a round; files, not arrays.

    Attributes
    ----------
    model : Path
        The whole global model, frozen tensors included: training goes on from it.
    state : Path or None
        What the strategy keeps (``Combined.state``).
    average : Path or None
        Running average of the global models, a whole model too.
    random : mapping
        State of what draws the sites of a round, in JSON values; empty: none yet.
    history : str
        Digest of what was recorded of the rounds so far, as the caller defines it; empty: not
        known.
    digests : mapping of str to str
        SHA-256 of each file, by ``model``, ``state``, ``average``; filled when saved or loaded.
    """

    rounds_done: int
    model: Path
    state: Path | None = None
    average: Path | None = None
    random: Mapping[str, Any] = field(default_factory=dict)
    history: str = ""
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def result(self) -> Path:
        """The model that is evaluated and kept: the average where there is one."""
        return self.average or self.model

    def sha256_of(self, file: Path) -> str | None:
        """Return the digest of a file of this checkpoint; None for any other file."""
        parts = {getattr(self, part): found for part, found in self.digests.items()}
        return parts.get(file)


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Checkpoint:
    """Keep a checkpoint durably; return it as it lies in ``folder``.

    The files are linked where the disk can, so that nothing is copied: whoever made them replaces
    them and never changes them. Written aside, then renamed; of older ones the last stays.

    Raises
    ------
    ConsiliumError
        ``state.disk``: no room. The checkpoints that were there stay.
    """
    rounds = private_folder(folder / "checkpoints")
    place = rounds / _name(checkpoint.rounds_done)
    aside = rounds / f"{_ASIDE}{place.name}"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(mode=0o700)
        digests = {}
        for part in _PARTS:
            source = getattr(checkpoint, part)
            if source is not None:
                digests[part] = _keep(source, _file(aside, part))
        saved = replace(checkpoint, digests=digests)
        _write_durably(aside / "checkpoint.json", _document(saved))
        sync_folder(aside)
        _put_in_place(aside, place)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise disk_error(place, error) from error
    for old in _folders(rounds)[_KEPT:]:
        _remove(old)
    for stray in rounds.glob(f"{_ASIDE}*"):  # what was being removed when a process was killed
        shutil.rmtree(stray, ignore_errors=True)
    return _at(place, saved)


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the last checkpoint, every byte of it verified; None before the first round.

    A checkpoint of an older release is brought into the present form first.

    Raises
    ------
    ConsiliumError
        ``state.checkpoint``: the last one is damaged; the error names the one before where that
        is whole. A study never begins anew, and never goes back, by itself.
    """
    found = _folders(folder / "checkpoints")
    if not found:
        old = folder / "checkpoint.safetensors"
        return _converted(folder, old) if old.exists() else None
    try:
        return _read(found[0])
    except (OSError, ValueError, KeyError, TypeError, ConsiliumError) as error:
        raise _damaged(found[0], _whole(found[1:]), error) from error


def _read(place: Path) -> Checkpoint:
    """Read one checkpoint; raises whatever is wrong with it."""
    document = json.loads((place / "checkpoint.json").read_bytes())
    if document["schema"] != _SCHEMA:
        raise ValueError("it is of another release of consilium")
    if document.pop("digest") != digest(document):
        raise ValueError("checkpoint.json is not what was written")
    digests = {str(part): str(found) for part, found in document["sha256"].items()}
    for part, expected in digests.items():
        if _sha256(_file(place, part)) != expected:
            raise ValueError(f"{part}.safetensors is not what was written")
    rounds_done, random = document["rounds_done"], document["random"]
    if place.name != _name(rounds_done) or "model" not in digests or not isinstance(random, dict):
        raise ValueError("checkpoint.json is not what was written")
    return _at(
        place, Checkpoint(rounds_done, place, None, None, random, document["history"], digests)
    )


def _at(place: Path, checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with the paths of its files in ``place``."""
    paths = {part: _file(place, part) if part in checkpoint.digests else None for part in _PARTS}
    return replace(checkpoint, **paths)  # type: ignore[arg-type]


def _document(checkpoint: Checkpoint) -> bytes:
    content = {
        "schema": _SCHEMA,
        "rounds_done": checkpoint.rounds_done,
        "sha256": dict(checkpoint.digests),
        "random": dict(checkpoint.random),
        "history": checkpoint.history,
    }
    return canonical_json({**content, "digest": digest(content)})


def _keep(source: Path, target: Path) -> str:
    """Have ``source`` durably at ``target`` too; return its SHA-256."""
    try:
        os.link(source, target)
    except OSError as error:
        # Another disk, or one that knows no links.
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        shutil.copyfile(source, target)
        target.chmod(0o600)
    # One thread waits for the disk while this one computes.
    with target.open("rb") as stream, ThreadPoolExecutor(1) as beside:
        synced = beside.submit(os.fsync, stream.fileno())
        found = hashlib.file_digest(stream, "sha256").hexdigest()
        synced.result()
    return found


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("xb") as stream:
        os.fchmod(stream.fileno(), 0o600)
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _put_in_place(aside: Path, place: Path) -> None:
    if place.exists():
        # The same round once more: whoever is killed here has the round before it.
        _remove(place)
    aside.rename(place)
    sync_folder(place.parent)


def _remove(place: Path) -> None:
    """Remove a checkpoint: out of the way first, so that none is ever there in part."""
    gone = place.with_name(f"{_ASIDE}gone-{place.name}")
    shutil.rmtree(gone, ignore_errors=True)
    place.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _folders(rounds: Path) -> list[Path]:
    """Return the checkpoints, the newest first."""
    if not rounds.is_dir():
        return []
    # Not what someone set aside beside them, under a name of theirs.
    return sorted((p for p in rounds.iterdir() if _NAME.fullmatch(p.name)), reverse=True)


def _whole(places: list[Path]) -> Path | None:
    """Return the newest of ``places`` that can be read."""
    for place in places:
        try:
            _read(place)
        except (OSError, ValueError, KeyError, TypeError, ConsiliumError):
            continue
        return place
    return None


def _damaged(place: Path, older: Path | None, error: Exception) -> ConsiliumError:
    why = str(error) if type(error) is ValueError else "a file of it is missing or unreadable"
    if older is None:
        hint = "Restore it from your backup; a study is never begun anew by itself."
    else:
        hint = (
            f"Restore it from your backup. Or move this folder away: {older.name} beside it is"
            " whole, and the study goes on from there; sites answer repeated rounds from their"
            " store, so no budget is spent twice."
        )
    return ConsiliumError(
        "state.checkpoint",
        f"The study's last checkpoint is damaged: {why}.",
        where=str(place),
        hint=hint,
    )


def _converted(folder: Path, old: Path) -> Checkpoint:
    """Bring the single file of an older release into the present form."""
    try:
        tensors = TensorFile(old)
        rounds_done = int(tensors.tensor(_OLD_ROUND)[0])
        model = folder / ".old-model.safetensors"
        average = folder / ".old-average.safetensors"
        averaged = [spec for spec in tensors.specs if spec.name.startswith(_OLD_AVERAGE)]
        weights = [
            spec for spec in tensors.specs if spec.name != _OLD_ROUND and spec not in averaged
        ]
        _extract(tensors, {spec.name: spec for spec in weights}, model)
        under = {spec.name.removeprefix(_OLD_AVERAGE): spec for spec in averaged}
        if under:
            # The average was of the trained tensors alone.
            _extract(tensors, {spec.name: spec for spec in weights} | under, average)
    except (ConsiliumError, KeyError, IndexError, ValueError) as error:
        if isinstance(error, ConsiliumError) and error.code == "state.disk":
            raise
        raise _damaged(old, None, error) from error
    try:
        return save_checkpoint(
            folder, Checkpoint(rounds_done, model, average=average if under else None)
        )
    finally:
        model.unlink(missing_ok=True)
        average.unlink(missing_ok=True)


def _extract(tensors: TensorFile, named: Mapping[str, TensorSpec], out: Path) -> None:
    """Write tensors of a file into another, under other names."""
    with writing(out, (TensorSpec(new, s.shape) for new, s in named.items())) as writer:
        for new, spec in named.items():
            for _, values in tensors.pieces(spec):
                writer.put(new, values)


def _name(rounds_done: int) -> str:
    return f"round-{rounds_done:06d}"


def _file(place: Path, part: str) -> Path:
    return place / f"{part}.safetensors"


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
