"""The site's cache of ingested cases: memory-mappable arrays, one folder per case, written whole.

``cache/ingested/<stamp>/`` holds ``image_<channel>.npy``, ``label.npy`` for masks, and
``case.json``. The stamp is a digest of what the case's files are (path, size, time of change), so
a changed file leads to another folder and an unchanged one is never read again. Folders appear by
one rename: an interrupted import leaves whole cases and goes on from them.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from consilium_client.data.ingest.facts import ChannelFacts
from consilium_client.data.ingest.volume import Affine, Array
from consilium_common.canonical import digest
from consilium_common.errors import ConsiliumError
from consilium_common.files import private_folder, sync_folder

if TYPE_CHECKING:  # a reader imports what it reads with, and no more
    from consilium_client.data.ingest.sources import Source
    from consilium_client.data.schema import Case
    from consilium_client.home import SiteHome

#: Raised whenever the same source would now be ingested differently.
FORMAT: Final = 2
_TEMPORARY: Final = ".part-"
_BATCH_CASES: Final = 512
_BATCH_BYTES: Final = 512 * 2**20
_BATCH_SECONDS: Final = 10.0


@dataclass(frozen=True, eq=False)
class Ingested:
    """One case in the cache.

    Parameters
    ----------
    folder : Path
        Where its arrays lie.
    shape, affine : tuple, array
        Of the cached arrays: 3D in the nearest RAS+ order, planes as (rows, columns).
    original_shape, original_affine : tuple, array
        Of the image file or series itself, RAS+ millimetres.
    spacing_known : bool
        Whether the source says how large its pixels are.
    channels : tuple of str
        Input channels present.
    label_values : tuple of int, optional
        Values that occur in the mask; None where the label is no mask.
    sources : mapping
        SHA-256 of the bytes behind each channel and the label.
    facts : mapping
        By channel.
    label_counts : mapping
        Mask value to voxels; empty where the label is no mask.
    scanner, modality : str
        As DICOM headers say; empty where unknown, joined by `` + `` where channels differ.
    axes : str
        Orientation of the original image's axes, for example ``LPS``; empty for pictures.
    """

    folder: Path
    shape: tuple[int, ...]
    affine: Affine
    original_shape: tuple[int, ...]
    original_affine: Affine
    spacing_known: bool
    channels: tuple[str, ...]
    label_values: tuple[int, ...] | None
    sources: Mapping[str, str]
    #: Digest of everything the cached arrays depend on but the files' place and time.
    content: str
    facts: Mapping[str, ChannelFacts]
    label_counts: Mapping[int, int]
    scanner: str
    modality: str
    axes: str

    def image(self, channel: str) -> Array:
        """Return one channel, memory-mapped, in the image's own units."""
        return np.asarray(np.load(self.folder / f"image_{channel}.npy", mmap_mode="r"))

    def label(self) -> Array:
        """Return the mask, memory-mapped, with the site's own values."""
        return np.asarray(np.load(self.folder / "label.npy", mmap_mode="r"))


def cache_folder(home: SiteHome) -> Path:
    """Return the folder of all cached pixels (mode 0700)."""
    return private_folder(home.data / "cache")


def ingested_folder(home: SiteHome) -> Path:
    """Return the folder of ingested cases (mode 0700)."""
    return private_folder(cache_folder(home) / "ingested")


def stamp_of(
    case: Case,
    images: Mapping[str, Source],
    label: Source | None,
    segments: Mapping[str, int] | None,
) -> str:
    """Return the digest of what the case's files are, 64 hexadecimal digits.

    ``segments`` are the values that DICOM SEG labels get; None for other labels.
    """

    def files(source: Source) -> list[Any]:
        found = []
        for path in source.files:
            status = path.stat()
            found.append([str(path), status.st_size, status.st_mtime_ns])
        return [found, source.channel, source.segment]

    return digest(
        {
            "format": FORMAT,
            "case": case.case_id,
            "images": {name: files(source) for name, source in images.items()},
            "label": files(label) if label else None,
            "segments": dict(segments) if segments is not None else None,
        }
    )


def load_entry(folder: Path) -> Ingested | None:
    """Return the cached case in ``folder``, or None where there is none."""
    try:
        content = json.loads((folder / "case.json").read_bytes())
        return entry_of(folder, content)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None  # absent or damaged: it is read again


def entry_of(folder: Path, content: Mapping[str, Any]) -> Ingested:
    """Return the case that ``case.json`` in ``folder`` describes."""
    values = content["label_values"]
    return Ingested(
        folder=folder,
        shape=tuple(content["shape"]),
        affine=np.array(content["affine"]),
        original_shape=tuple(content["original_shape"]),
        original_affine=np.array(content["original_affine"]),
        spacing_known=content["spacing_known"],
        channels=tuple(content["channels"]),
        label_values=None if values is None else tuple(values),
        sources=content["sources"],
        content=content["content"],
        facts={name: ChannelFacts.from_dict(one) for name, one in content["facts"].items()},
        label_counts={int(value): count for value, count in content["label_counts"].items()},
        scanner=content["scanner"],
        modality=content["modality"],
        axes=content["axes"],
    )


def write_case(folder: Path, arrays: Mapping[str, Array], content: Mapping[str, Any]) -> int:
    """Write ``<array>.npy`` and ``case.json`` into a folder and return the arrays' bytes."""
    for key, array in arrays.items():
        np.save(folder / f"{key}.npy", array, allow_pickle=False)
    (folder / "case.json").write_text(json.dumps(content))
    return sum(array.nbytes for array in arrays.values())


class FolderWriter:
    """Writes case folders that appear whole and durable: all arrays and ``case.json``, or nothing.

    Cases wait in a batch, because waiting for the disk once for many files is far cheaper than
    once for each. Leaving the ``with`` block, also by an interruption, finishes the batch; a
    killed process loses the cases of the last batch at most. What was begun and is not adopted
    is removed.

    Parameters
    ----------
    parent : Path
        Folder to write in. Where two processes write the same case, the second finds the first's
        folder and drops its own.
    """

    def __init__(self, parent: Path) -> None:
        self._parent = parent
        self._waiting: list[tuple[Path, str]] = []
        self._begun: set[Path] = set()
        self._bytes = 0
        self._since = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not issubclass(kind, ConsiliumError):
            self.flush()
        for folder in self._begun:
            shutil.rmtree(folder, ignore_errors=True)

    def write(self, arrays: Mapping[str, Array], content: Mapping[str, Any]) -> tuple[Path, int]:
        """Write a case into a new folder for :meth:`adopt`, and return it with its bytes.

        Several threads may do so at once.

        Raises
        ------
        ConsiliumError
            ``state.disk``.
        """
        folder = self.folder()
        with self._disk():
            try:
                return folder, write_case(folder, arrays, content)
            except OSError:
                shutil.rmtree(folder, ignore_errors=True)
                raise

    def folder(self) -> Path:
        """Return a new empty folder for :func:`write_case`, here or in another process.

        Raises
        ------
        ConsiliumError
            ``state.disk``.
        """
        with self._disk():
            folder = Path(tempfile.mkdtemp(dir=self._parent, prefix=_TEMPORARY))
        self._begun.add(folder)
        return folder

    def adopt(self, folder: Path, name: str, size: int) -> None:
        """Take a folder of :meth:`folder` that :func:`write_case` has filled with ``size`` bytes.

        Raises
        ------
        ConsiliumError
            ``state.disk``.
        """
        self._begun.discard(folder)
        self._waiting.append((folder, name))
        self._bytes += size
        late = time.monotonic() - self._since > _BATCH_SECONDS
        if late or self._bytes > _BATCH_BYTES or len(self._waiting) >= _BATCH_CASES:
            self.flush()

    def flush(self) -> None:
        """Make the batch durable and let its folders appear.

        Raises
        ------
        ConsiliumError
            ``state.disk``.
        """
        waiting, self._waiting = self._waiting, []
        self._bytes, self._since = 0, time.monotonic()
        if not waiting:
            return
        with self._disk():
            files = [path for temporary, _ in waiting for path in temporary.iterdir()]
            from concurrent.futures import ThreadPoolExecutor

            # Threads only wait here; together their files go into few commits of the journal.
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(_sync_file, files))
            for temporary, name in waiting:
                _appear(temporary, self._parent / name)
            sync_folder(self._parent)

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            for temporary, _ in self._waiting:
                shutil.rmtree(temporary, ignore_errors=True)
            self._waiting = []
            raise ConsiliumError(
                "state.disk",
                f"Cannot write to the cache of images: {error.strerror or error}.",
                where=str(self._parent),
                hint="Free space on the disk and run the command again; it goes on where it "
                "stopped.",
            ) from error


def _appear(temporary: Path, folder: Path) -> None:
    """Rename a whole case into place; another process may have been faster."""
    try:
        temporary.rename(folder)
    except OSError:
        try:
            json.loads((folder / "case.json").read_bytes())
        except (FileNotFoundError, ValueError):  # damaged: ours takes its place
            shutil.rmtree(folder)
            temporary.rename(folder)
        else:
            shutil.rmtree(temporary)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(parent: Path, keep: Iterable[str]) -> None:
    """Remove all folders of ``parent`` not named in ``keep``, and what interrupted runs left."""
    kept = set(keep)
    for folder in parent.iterdir():
        if folder.is_dir() and folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def size_of(folder: Path) -> int:
    """Return the bytes that the files below ``folder`` take."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
