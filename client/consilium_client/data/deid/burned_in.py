"""Images that may carry a name in their pixels: rules, and a look at the border."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from consilium_client.data.deid.text_regions import Region, text_regions
from consilium_client.data.findings import Finding
from consilium_client.data.ingest.dicom_file import is_compressed
from consilium_client.data.ingest.dicom_headers import Header
from consilium_client.data.ingest.pixels import stored_frame
from consilium_client.data.parallel import spread
from consilium_common.errors import ConsiliumError

#: Devices that write the patient into the picture by habit.
_WRITERS: Final = frozenset({"US", "IVUS", "ES", "XC", "GM", "ECG", "OPT"})
#: Devices for which silence about burned-in text is worth a word: single pictures, not stacks.
_MATTERS: Final = _WRITERS | frozenset({"CR", "DX", "MG", "RF", "XA", "OT", "SC", "PX", "IO", "OP"})
_SECONDARY: Final = "1.2.840.10008.5.1.4.1.1.7"
_SCREEN: Final = frozenset({"SCREEN SAVE", "SCREENSHOT", "SCREEN CAPTURE", "DOSE_INFO"})
#: Slices of a stack that are looked at, and how many of them must show text: a name is burned into
#: all of them, a chance resemblance is not.
_LOOKS: Final = 3
_AGREE: Final = 2
#: Thumbnails kept for one case.
_PICTURES: Final = 4


@dataclass(frozen=True)
class Suspect:
    """Images of one series that a person should look at.

    Parameters
    ----------
    headers : tuple of Header
        The images.
    reason : str
        Why, as the end of a sentence.
    pictures : tuple of bytes
        PNG thumbnails of the region, or of the whole image where no text was seen.
    """

    headers: tuple[Header, ...]
    reason: str
    pictures: tuple[bytes, ...] = field(default=(), repr=False)


def burned_in_suspects(headers: Sequence[Header]) -> tuple[Suspect, ...]:
    """Return the images that may carry text in their pixels.

    Always: those that say so, screen captures and secondary captures, and ultrasound, endoscopy
    and photographs that do not say NO. Others where the border looks like text: single pictures
    each for itself, stacks of slices when most of the three slices looked at agree. Pixels that
    cannot be decoded are judged by the rules alone.
    """
    groups: dict[tuple[str, str], list[Header]] = {}
    singles: list[Header] = []
    for header in headers:
        if not header.is_image:
            continue
        if _is_stack(header):
            groups.setdefault((str(header.path.parent), header.series), []).append(header)
        else:
            singles.append(header)
    looks = [header for group in groups.values() for header in _some(group)]
    looked_at = (*singles, *looks)
    # Some decoders end their process on a damaged file; the reader of images will name it.
    risky = any(is_compressed(header.path) for header in looked_at)
    found = spread(_look, looked_at, otherwise=_unseen if risky else None)
    seen = dict(zip((header.path for header in looked_at), found, strict=True))
    suspects: list[Suspect] = []
    for header in singles:
        reason = _rule(header)
        regions, picture = seen[header.path]
        if regions:
            reason = f"{reason}, and show what looks like text" if reason else _SHOWN
        if reason:
            suspects.append(Suspect((header,), reason, (picture,) if picture else ()))
    for group in groups.values():
        looked = [seen[header.path] for header in _some(group)]
        if sum(bool(regions) for regions, _ in looked) >= min(_AGREE, len(looked)):
            pictures = tuple(picture for regions, picture in looked if regions and picture)
            suspects.append(Suspect(tuple(group), _SHOWN, pictures))
    return tuple(suspects)


_SHOWN: Final = "show what looks like text near the border"


def burned_in_findings(
    headers: Sequence[Header], *, names: Mapping[Path, str]
) -> tuple[Finding, ...]:
    """Say which images a person should look at, with thumbnails.

    Parameters
    ----------
    headers : sequence of Header
        All images of the site.
    names : mapping of Path to str
        The case that a file is reported under; otherwise its folder's name.

    Returns
    -------
    tuple of Finding
        ``deid.burned-in`` per case and reason, and one ``data.burned-in-unknown`` for the cohort.
    """
    suspects = burned_in_suspects(headers)
    gathered: dict[tuple[str, str], list[Suspect]] = {}
    for suspect in suspects:
        path = suspect.headers[0].path
        case = names.get(path, path.parent.name)
        gathered.setdefault((case, suspect.reason), []).append(suspect)
    findings = []
    for (case, reason), group in gathered.items():
        files = [header.path for suspect in group for header in suspect.headers]
        count = "1 image" if len(files) == 1 else f"{len(files)} images"
        findings.append(
            Finding(
                case,
                "deid.burned-in",
                f"Look at {count}: they {reason}.",
                f"{files[0]}" + (f" and {len(files) - 1} more" if len(files) > 1 else ""),
                "If a name or a number is in the pixels, blank it or leave the image out: cleaning "
                "the tags does not touch it.",
                pictures=tuple(p for suspect in group for p in suspect.pictures)[:_PICTURES],
            )
        )
    known = {header.path for suspect in suspects for header in suspect.headers}
    silent_ones = [
        header
        for header in headers
        if header.is_image
        and header.modality in _MATTERS
        and not header.burned_in
        and header.path not in known
    ]
    if silent_ones:
        kinds = ", ".join(sorted({header.modality for header in silent_ones}))
        findings.append(
            Finding(
                "",
                "data.burned-in-unknown",
                f"{len(silent_ones)} images ({kinds}) do not say whether text is burned in; none "
                "was seen near their borders.",
                str(silent_ones[0].path),
                "Look through them once before they are used or copied.",
            )
        )
    return tuple(findings)


def _is_stack(header: Header) -> bool:
    """Whether the image is a slice among slices, about which the rules say nothing."""
    return header.position is not None and not _rule(header) and header.modality not in _MATTERS


def _rule(header: Header) -> str:
    """Return why an image of this kind is to be looked at whatever it shows; empty if not."""
    kinds = {word.strip().upper() for word in header.image_type}
    if header.burned_in == "YES":
        return "say that text is burned in"
    if kinds & _SCREEN:
        return "are screen captures"
    if header.sop_class.startswith(_SECONDARY) and header.burned_in != "NO":
        return "are secondary captures"
    if header.modality in _WRITERS and header.burned_in != "NO":
        return "come from devices that write the patient into the picture"
    return ""


def _some(group: Sequence[Header]) -> list[Header]:
    """Return first, middle and last of a stack, by position in the file order."""
    ordered = sorted(group, key=lambda header: (header.position or (), str(header.path)))
    places = sorted({0, len(ordered) // 2, len(ordered) - 1})[:_LOOKS]
    return [ordered[place] for place in places]


def _look(header: Header) -> tuple[tuple[Region, ...], bytes]:
    """Return the lines of text in an image, and a thumbnail to judge them by."""
    plane = _plane(header)
    if plane is None:
        return (), b""
    regions = text_regions(plane)
    if not regions and not _rule(header):
        return (), b""
    from consilium_client.data.thumbnail import picture_png

    return regions, picture_png(_around(plane, regions), 256)


def _unseen(_: Header) -> tuple[tuple[Region, ...], bytes]:
    return (), b""


def _plane(header: Header) -> npt.NDArray[Any] | None:
    """Read one frame as grey values; None where it cannot be decoded."""
    try:
        values = stored_frame(header.path, header.frames // 2)
    except ConsiliumError:
        # No decoder, or damaged pixels: the reader of images says so, and names the rule.
        return None
    plane = np.asarray(values, dtype=np.float32)
    if plane.ndim == 3:
        plane = plane[..., 0] if header.photometric.startswith("YBR") else plane.mean(axis=-1)
    return plane if plane.ndim == 2 else None


def _around(plane: npt.NDArray[Any], regions: Sequence[Region]) -> npt.NDArray[Any]:
    """Cut out the first region with a margin; the whole plane where there is none."""
    if not regions:
        return plane
    region = regions[0]
    margin = 2 * region.height
    return plane[
        max(0, region.top - margin) : region.bottom + margin,
        max(0, region.left - margin) : region.right + margin,
    ]
