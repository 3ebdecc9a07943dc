"""Every element of a DICOM file at any depth, whatever a vendor wrote into it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from consilium_client.data.findings import reading
from consilium_client.data.ingest.dicom_file import DEFLATED, open_dicom, quietly
from consilium_common.errors import ConsiliumError

#: Values longer than this stay on the disk unless they are asked for: pixels, mostly.
_LONG: Final = 1 << 16
#: Sequences nested deeper than this are an attack, not an image.
_DEPTH: Final = 16
_PIXELS: Final = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})
_TEXT: Final = frozenset(
    {"AE", "AS", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT", "DS", "IS"}
)
_TIME: Final = frozenset({"DA", "DT", "TM"})
_BYTES: Final = frozenset({"OB", "UN"})


@dataclass(frozen=True)
class Found:
    """One element and the way to it.

    Parameters
    ----------
    path : tuple of str
        Keywords of the sequences around it, outermost first.
    owner : Dataset
        The dataset that holds it.
    tag : int
        Group and element.
    vr, keyword : str
        ``UN`` for an element whose value cannot be parsed; no keyword for unknown tags.
    value : object
        As pydicom converts it; raw bytes where it cannot.
    """

    path: tuple[str, ...]
    owner: Any
    tag: int
    vr: str
    keyword: str
    value: Any

    @property
    def is_private(self) -> bool:
        """Whether the group is odd."""
        return bool(self.tag >> 16 & 1)

    @property
    def label(self) -> str:
        """Keyword and number, with the way to it: ``RequestAttributesSequence > StudyDate …``."""
        number = f"({self.tag >> 16:04X},{self.tag & 0xFFFF:04X})"
        name = f"{self.keyword} {number}" if self.keyword else number
        return " > ".join((*self.path, name))

    def text(self) -> str:
        """Return everything in the value that a person could read; empty for numbers."""
        value = self.value
        if value is None or value == "":
            return ""
        if isinstance(value, bytes):
            return value.decode("latin-1").strip("\0 ") if self.vr in _BYTES else ""
        if self.vr not in _TEXT | _TIME | {"UI"}:
            return ""
        if isinstance(value, str) or not hasattr(value, "__iter__") or self.vr == "PN":
            return _joined(value)
        return "\\".join(str(part) for part in value)


def _joined(value: Any) -> str:
    # A person's name iterates over its letters; several names come as a list of names.
    several = type(value).__name__ in ("MultiValue", "list")
    return "\\".join(str(part) for part in value) if several else str(value)


def read_dataset(path: Path, *, pixels: bool) -> Any:
    """Read a DICOM file to its very end: what follows the pixels may name a patient too.

    Parameters
    ----------
    pixels : bool
        Load the pixels; otherwise long values are passed over without loading them.

    Raises
    ------
    ConsiliumError
        ``data.truncated``, ``data.missing`` or ``data.too-large``.
    """
    import pydicom

    open_dicom(path, tags=("SOPClassUID",), last_group=0x0008)  # keeps to the bounds, or says so
    with reading(path, "DICOM file"), quietly():
        # Old files without a prefix are DICOM too; the caller has made sure.
        dataset = pydicom.dcmread(path, defer_size=None if pixels else _LONG, force=True)
        _require_whole(dataset, path)
        return dataset


def _require_whole(dataset: Any, path: Path) -> None:
    """Refuse a file that ends inside a value: pydicom takes what is there without a word."""
    if str(getattr(dataset.file_meta, "TransferSyntaxUID", "")) == DEFLATED:
        return  # Places are counted in the inflated bytes, and zlib notices a missing end itself.
    size = path.stat().st_size
    for tag in dataset.keys():  # noqa: SIM118 - a Dataset iterates over its elements
        raw = dataset.get_item(tag)
        start, length = getattr(raw, "value_tell", None), getattr(raw, "length", None)
        if start is None or length is None or length == 0xFFFFFFFF:
            continue
        if start + length > size:
            raise ConsiliumError(
                "data.truncated",
                "The DICOM file ends inside one of its values.",
                where=str(path),
                hint="Copy or export it again from its source.",
            )


def walk(dataset: Any, path: tuple[str, ...] = ()) -> Iterator[Found]:
    """Yield every element but the pixels, sequences before their items.

    The caller may delete or replace the element just yielded.

    Raises
    ------
    ConsiliumError
        ``data.format`` for sequences nested absurdly deep.
    """
    from pydicom.datadict import keyword_for_tag

    if dataset is None:
        return
    if len(path) > _DEPTH:
        raise ConsiliumError(
            "data.format",
            f"The DICOM file nests sequences more than {_DEPTH} deep.",
            hint="Take the file out of the folder: no scanner writes this.",
        )
    for number in sorted(int(tag) for tag in dataset.keys()):  # noqa: SIM118
        if number in _PIXELS:
            continue
        keyword = keyword_for_tag(number)
        try:
            element = dataset[number]
            vr, value = str(element.VR), element.value
        except Exception:  # pydicom raises anything: what cannot be read counts as unknown text
            vr, value = "UN", getattr(dataset.get_item(number), "value", None) or b"?"
        yield Found(path, dataset, number, vr, keyword, value)
        if vr == "SQ" and number in dataset:
            inner = (*path, keyword or f"({number >> 16:04X},{number & 0xFFFF:04X})")
            for item in value or ():
                yield from walk(item, inner)
