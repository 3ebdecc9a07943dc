"""Names of files in a clean copy: known words of layouts stay, all else gives way to a hash."""

from __future__ import annotations

import hashlib
import hmac
import re
from pathlib import PurePosixPath
from typing import Final

from consilium_client.data.split import PatientKey

_NAME: Final = b"consilium/deid-name/v1\0"
_SUFFIX: Final = re.compile(r"(\.nii\.gz|\.nii)$", re.IGNORECASE)
_WORD: Final = re.compile(r"[^\W_]+")
_STRANGE: Final = re.compile(r"[^\w.-]")
#: Words by which datasets are laid out (MSD, nnU-Net, BIDS) and what an image is; nobody's name.
_LAYOUT: Final = frozenset(
    word
    for line in (
        "adc anat bold ce contrast ct derivatives dir dwi echo fdg flair func gt image images",
        "imagestr imagests img inputs label labels labelstr labelsts manual mask masks mp2rage mr",
        "mri nifti pd pet post pre rec res roi run scan seg segmentation segmentations ses space",
        "spect stir sub swi t1 t1c t1ce t1gd t1w t2 t2f t2w test tr train tumor us val volume xr",
    )
    for word in line.split()
)
#: Numbers of channels, as nnU-Net writes them.
_CHANNEL: Final = re.compile(r"000\d")
#: File systems take 255 bytes.
_LONGEST: Final = 200


def clean_name(relative: PurePosixPath, key: PatientKey) -> PurePosixPath:
    """Return the relative path with every word replaced that is not known to be harmless.

    A surname looks like any other word, so only the words of common layouts stay. The same word
    becomes the same keyed hash everywhere: images and masks that are paired by their names stay
    paired.
    """
    *folders, last = relative.parts
    suffix = found.group(1).lower() if (found := _SUFFIX.search(last)) else ""
    parts = [*folders, last[: len(last) - len(suffix)]]
    clean = [_clean(part, key) for part in parts]
    clean[-1] += suffix
    return PurePosixPath(*clean)


def _clean(part: str, key: PatientKey) -> str:
    def replaced(found: re.Match[str]) -> str:
        word = found.group()
        kept = word.lower() in _LAYOUT or _CHANNEL.fullmatch(word)
        return word if kept else _hash(word, key)

    name = _STRANGE.sub("_", _WORD.sub(replaced, part))
    return name if len(name) <= _LONGEST else _hash(part, key)


def _hash(text: str, key: PatientKey) -> str:
    return hmac.new(key.secret, _NAME + text.encode(), hashlib.sha256).hexdigest()[:32]
