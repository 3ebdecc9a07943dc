"""What becomes of every DICOM file inside pydicom and of the shared images: the table in the docs.

``python tests/unit/conformance_table.py`` writes client/CONFORMANCE.md.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pydicom
from data_fixtures import REAL

from consilium_client.data.ingest.dicom_file import open_dicom
from consilium_client.data.ingest.dicom_headers import Header, files_below, index_files, is_dicom
from consilium_client.data.ingest.dicom_series import read_series
from consilium_client.data.ingest.multi_frame import is_multi_frame
from consilium_client.data.ingest.volume import LPS_TO_RAS, Volume
from consilium_common.errors import ConsiliumError

PAGE: Final = Path(__file__).parents[2] / "client" / "CONFORMANCE.md"
PYDICOM: Final = Path(pydicom.__file__).parent / "data" / "test_files"
SHARED: Final = ("dicom-mr", "dicom-seg", "dicom-ct-tilted")
EQUAL: Final = "SimpleITK: equal"
UNREADABLE: Final = "SimpleITK cannot read it"
DIFFERENT: Final = "SimpleITK: DIFFERENT"
#: GDCM mixes up the bytes of samples of more than 8 bits; the picture is nine known bars.
BARS: Final = frozenset({"SC_rgb_rle_16bit.dcm", "SC_rgb_rle_32bit.dcm"})
BARS_EQUAL: Final = "its known bars: equal (SimpleITK mixes the samples' bytes)"

_HEAD: Final = """# What becomes of DICOM files

Every file is either read rightly or refused with a reason. This table is the evidence: each DICOM
file that pydicom ships for its own tests, and the public series of the shared images, read by
Consilium's ingest. Where SimpleITK can read a file too, values and places in the patient are
compared: values exactly, places to 0.001 mm. Colours are compared as luminance. Declared padding
is left out of the comparison, for ingest gives it the smallest measured value.

`python tests/unit/conformance_table.py` writes this page; a test checks that it is current. The
highdicom package ships no test files; the tests make enhanced images with it and compare them
voxel by voxel.
"""


@dataclass(frozen=True)
class Row:
    """One file or series: what it is, what became of it, and what that was compared with."""

    name: str
    what: str
    outcome: str
    compared: str

    def __str__(self) -> str:
        return f"| `{self.name}` | {self.what} | {self.outcome} | {self.compared} |"


def pydicom_rows() -> list[Row]:
    """Return the rows of the files inside pydicom: single ones, then the series of its media."""
    rows = []
    for path in sorted(path for path in PYDICOM.iterdir() if path.is_file()):
        rows += _rows([path], PYDICOM) if is_dicom(path) or path.suffix == ".dcm" else []
    return rows + _rows(files_below(PYDICOM / "dicomdirtests"), PYDICOM)


def shared_rows() -> list[Row]:
    """Return the rows of the shared DICOM images."""
    return _rows([path for name in SHARED for path in files_below(REAL / name)], REAL)


def section(title: str, rows: Sequence[Row]) -> str:
    """Return one part of the page."""
    counts = {
        "read": sum(row.outcome.startswith("read") for row in rows),
        "refused": sum(row.outcome.startswith("refused") for row in rows),
        "no image": sum(row.outcome.startswith("no image") for row in rows),
    }
    said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    table = "\n".join(str(row) for row in rows)
    head = "| file or series | what it is | outcome | compared with |\n|---|---|---|---|"
    return f"\n## {title}\n\n{len(rows)} files or series: {said}.\n\n{head}\n{table}\n"


def pydicom_section() -> str:
    """Return the page's part on the files inside pydicom."""
    return section("pydicom's test files", pydicom_rows())


def shared_section() -> str:
    """Return the page's part on the shared images."""
    return section("The shared images", shared_rows())


def _rows(paths: Iterable[Path], root: Path) -> list[Row]:
    headers, findings = index_files(paths, workers=1)
    broken: dict[tuple[str, str], list[str]] = {}
    for finding in findings:
        path = Path(finding.where).relative_to(root)
        # A medium's files share their fate; the single files of pydicom are told apart.
        name = path.parent if len(path.parts) > 1 else path
        outcome = _refused(finding.code, finding.message)
        broken.setdefault((name.as_posix(), outcome), []).append(path.name)
    rows = [
        Row(name + (f" ({len(files)} files)" if len(files) > 1 else ""), "—", outcome, "—")
        for (name, outcome), files in broken.items()
    ]
    series: dict[tuple[str, bool], list[Header]] = {}
    for header in headers:
        series.setdefault((header.series, header.is_image), []).append(header)
    return sorted([*rows, *(_row(group, root) for group in series.values())], key=lambda r: r.name)


def _row(headers: list[Header], root: Path) -> Row:
    first = headers[0]
    single = len(headers) == 1
    name = (first.path if single else first.path.parent).relative_to(root).as_posix()
    if not single:
        name += f" ({len(headers)} files)"
    syntax = open_dicom(first.path, last_group=2).file_meta.get("TransferSyntaxUID")
    frames = f", {first.frames} frames" if first.frames > 1 else ""
    what = f"{first.modality or 'unknown'}, {syntax.name if syntax else 'no meta'}{frames}"
    if not first.is_image:
        return Row(name, what, f"no image ({first.modality}): passed over", "—")
    try:
        volume, ordered = read_series(headers, name)
    except ConsiliumError as error:
        return Row(name, what, _refused(error.code, error.message), "—")
    size = " × ".join(str(n) for n in volume.values.shape)
    if first.path.name in BARS:
        return Row(name, what, f"read, {size}", BARS_EQUAL if _bars(volume) else DIFFERENT)
    return Row(name, what, f"read, {size}", _compared(volume, ordered))


def _refused(code: str, message: str) -> str:
    return f"refused, `{code}`: {message}"


def _compared(volume: Volume, ordered: Sequence[Header]) -> str:
    """Compare values and corner places with what SimpleITK reads from the same files."""
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = SimpleITK.ReadImage([str(header.path) for header in ordered])
    except RuntimeError:
        return UNREADABLE
    values = SimpleITK.GetArrayFromImage(image).astype(np.float64)
    if image.GetNumberOfComponentsPerPixel() == 3:
        values = np.rint(values @ np.array([0.299, 0.587, 0.114]))
    ours = volume.values if volume.values.ndim == 2 else volume.values.transpose(2, 1, 0)
    if values.size != ours.size:
        return DIFFERENT
    differs = values.reshape(ours.shape) != ours
    padding = pydicom.dcmread(ordered[0].path).get("PixelPaddingValue")
    padded = bool(differs.any()) and padding is not None
    if padded:
        differs &= ~_padding(ordered, ours.shape)
    if differs.any() or not _same_places(volume, image, ordered[0]):
        return DIFFERENT
    return f"{EQUAL}, but for padding" if padded else EQUAL


def _padding(ordered: Sequence[Header], shape: tuple[int, ...]) -> np.ndarray:
    planes = []
    for header in ordered:
        dataset = pydicom.dcmread(header.path)
        planes.append(dataset.pixel_array == dataset.PixelPaddingValue)
    return np.stack(planes).reshape(shape)


def _same_places(volume: Volume, image: object, first: Header) -> bool:
    if first.position is None or is_multi_frame(first):
        return True
    size = image.GetSize()  # type: ignore[attr-defined]
    plane = volume.values.ndim == 2
    for i in (0, size[0] - 1):
        for j in (0, size[1] - 1):
            for k in (0,) if plane else (0, size[2] - 1):
                place = (i, j, k)[: len(size)]
                theirs = image.TransformIndexToPhysicalPoint(place)  # type: ignore[attr-defined]
                index = [j, i, 0, 1] if plane else [i, j, k, 1]
                ours = (LPS_TO_RAS @ volume.affine @ index)[:3]
                if np.abs(ours - np.resize(theirs, 3)).max() > 1e-3:
                    return False
    return True


def _bars(volume: Volume) -> bool:
    """Whether the picture is red, pink, green, … as pydicom's documentation of the file says."""
    white = 2**16 - 1 if volume.values.max() < 2**16 else 2**32 - 1
    half, dark, bright = (round(white * share / 255) for share in (128, 64, 192))
    red, green, blue = np.array([0.299, 0.587, 0.114])
    bars = [
        *(white * red, white * red + half * (green + blue)),
        *(white * green, white * green + half * (red + blue)),
        *(white * blue, white * blue + half * (red + green)),
        *(0, dark, bright, white),
    ]
    return np.allclose(volume.values[5::10, 50], bars, atol=1)


def main() -> None:
    """Write the page."""
    PAGE.write_text(_HEAD + pydicom_section() + shared_section(), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")


if __name__ == "__main__":
    main()
