"""Real planes, and text rendered into their borders, to measure the detector with."""

from __future__ import annotations

import numpy as np
import pydicom
from data_fixtures import real
from PIL import Image, ImageDraw, ImageFont

TEXTS = ("DOE JANE", "12.03.1957 F", "SMITH^JOHN", "ID 4711-0815", "HOSPITAL A", "MR 20210304")


def with_text(plane: np.ndarray, random: np.random.Generator, size: int) -> np.ndarray:
    """Render one line of text, as bright as the brightest voxels, into a corner of the plane."""
    rows, columns = plane.shape
    low, high = np.percentile(plane, (1, 99.9))
    canvas = Image.new("L", (columns, rows), 0)
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size)
    text = str(random.choice(TEXTS))
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    x = random.choice([3, max(3, columns - (right - left) - 4)])
    y = random.choice([3, max(3, rows - (bottom - top) - 6)])
    pen.text((int(x), int(y)), text, fill=255, font=font)
    ink = np.asarray(canvas) / 255
    return np.asarray(plane * (1 - ink) + max(high, low + 1) * ink)


def clean_planes(*, stride: int = 1) -> dict[str, list[np.ndarray]]:
    """Return every ``stride``-th plane of the shared images, by group."""
    pictures = [
        Image.open(path).convert("L")
        for path in sorted(real("mednist").rglob("*.jp*g"))[:: stride * 4]
    ]
    larger = [np.asarray(one.resize((256, 256)), float) for one in pictures[::2]]
    slices = {
        "ct": sorted(real("dicom-ct-tilted").glob("*.dcm")),
        "mr": sorted((real("dicom-mr") / "Study3").glob("*T*/*.dcm")),
    }
    return {
        "mednist 64": [np.asarray(one, float) for one in pictures],
        "mednist 256": larger,
        **{
            name: [pydicom.dcmread(path).pixel_array.astype(float) for path in paths[::stride]]
            for name, paths in slices.items()
        },
    }
