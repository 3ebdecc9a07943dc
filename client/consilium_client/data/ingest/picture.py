"""PNG, JPEG, TIFF and BMP pictures to planes (Pillow)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Final

import numpy as np

from consilium_client.data.findings import reading
from consilium_client.data.ingest.volume import Volume, require_finite
from consilium_common.errors import ConsiliumError

SUFFIXES: Final = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"})
#: Nothing else, whatever the content is: some of Pillow's formats start other programs.
_FORMATS: Final = ("PNG", "JPEG", "TIFF", "BMP")
#: Pillow's modes that hold one value per pixel as it was measured.
_PLAIN: Final = frozenset({"L", "I", "F", "I;16", "I;16B", "I;16L"})


def read_picture(path: Path, *, mask: bool = False) -> Volume:
    """Read a picture as (rows, columns), turned upright by its EXIF tag.

    Colours become luminance (ITU-R 601-2, Pillow's ``L``). A mask is taken as its stored values:
    palette indices, never colours. Pictures carry no physical size we could trust.

    Raises
    ------
    ConsiliumError
        ``data.truncated``, ``data.missing``, ``data.format`` or ``data.too-large``.
    """
    from PIL import Image, ImageOps

    with reading(path, "picture"), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path, formats=_FORMATS) as opened:
                frames = int(getattr(opened, "n_frames", 1))
                if frames != 1:
                    raise ConsiliumError(
                        "data.format",
                        f"The picture holds {frames} frames.",
                        where=str(path),
                        hint="Export one picture per frame.",
                    )
                opened.load()
                image: Any = ImageOps.exif_transpose(opened) or opened
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ConsiliumError(
                "data.too-large", "The picture is absurdly large.", where=str(path)
            ) from error
        if mask and image.mode not in (*_PLAIN, "P", "1"):
            raise ConsiliumError(
                "data.label-values",
                "The mask is a colour picture.",
                where=str(path),
                hint="Export masks with one whole number per pixel (greyscale or palette).",
            )
        if image.mode not in _PLAIN and not (mask and image.mode in ("P", "1")):
            image = image.convert("L")
        values = np.array(image)
    if values.dtype == np.bool_:
        values = values.astype(np.uint8)
    affine = np.eye(4)
    require_finite(values, affine, str(path))
    return Volume(np.ascontiguousarray(values), affine, spacing_known=False)
