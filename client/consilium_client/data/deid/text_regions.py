"""Where an image looks as if text were burned into its border: found without reading the text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

#: Share of the height or width that counts as border on each side.
_BORDER: Final = 0.3
#: Letters are at least this high, and at most this share of the image.
_LOWEST: Final = 5
_HIGHEST: Final = 0.12
#: Contrast of a letter to its surroundings, as share of the image's range.
_CONTRAST: Final = 0.25
#: Letters that touch are wider than high, to this ratio.
_WIDEST: Final = 2.5
#: Spread of brightness in the stronger half of a letter, as share of the image's range.
_INK: Final = 0.4
#: Fewer letters in a line could be a side marker or a scale.
_LETTERS: Final = 4
#: Larger images are looked at in fewer pixels: letters stay legible.
_ENOUGH: Final = 1024


@dataclass(frozen=True)
class Region:
    """A box of pixels: rows ``top`` to ``bottom``, columns ``left`` to ``right``, ends excluded."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def height(self) -> int:
        """Rows."""
        return self.bottom - self.top

    @property
    def width(self) -> int:
        """Columns."""
        return self.right - self.left


def text_regions(plane: npt.NDArray[Any]) -> tuple[Region, ...]:
    """Return the lines near the border that look like text.

    Text is a row of small components of nearly one height on one line, close together, whose
    strokes are thin, of one brightness, and stand out sharply from what is around them. Anatomy
    has edges too, but they are seldom of one height, in line, and of one brightness all at once.

    Parameters
    ----------
    plane : array (rows, columns)
        Grey values in any unit.
    """
    from scipy import ndimage

    step = max(1, -(-max(plane.shape) // _ENOUGH))
    values = np.asarray(plane[::step, ::step], dtype=np.float32)
    if min(values.shape) < 4 * _LOWEST:
        return ()
    low, high = np.percentile(values, (0.5, 99.9))
    if not high > low:
        return ()
    values = np.clip((values - low) / (high - low), 0, 1)
    found: list[Region] = []
    # Bright letters on dark ground, then dark ones on bright ground.
    for image in (values, 1 - values):
        stroke = max(5, round(min(values.shape) * 0.02) | 1)
        raised = ndimage.white_tophat(image, size=(stroke, stroke))
        mask = raised > _CONTRAST
        numbers, _ = ndimage.label(mask, structure=np.ones((3, 3)))
        letters = list(_letters(numbers, image))
        found += _lines(letters, values.shape)
    return tuple(
        Region(r.top * step, r.bottom * step, r.left * step, r.right * step) for r in found
    )


def _letters(numbers: npt.NDArray[Any], image: npt.NDArray[Any]) -> Iterator[Region]:
    """Yield the components that could be letters."""
    from scipy import ndimage

    highest = max(2 * _LOWEST + 2, image.shape[0] * _HIGHEST)
    for number, box in enumerate(ndimage.find_objects(numbers), start=1):
        rows, columns = box
        region = Region(rows.start, rows.stop, columns.start, columns.stop)
        if not _LOWEST <= region.height <= highest or region.width > _WIDEST * region.height:
            continue
        if not _at_border(region, image.shape):
            continue
        part = numbers[box] == number
        fill = part.mean()
        if not 0.12 < fill < 0.85:
            continue
        inside = image[box][part]
        # One ink: the strongest half of the strokes has one brightness.
        strong = np.sort(inside)[inside.size // 2 :]
        if strong[-1] - strong[0] > _INK:
            continue
        yield region


def _at_border(region: Region, shape: Sequence[int]) -> bool:
    row = (region.top + region.bottom) / 2 / shape[0]
    column = (region.left + region.right) / 2 / shape[1]
    return min(row, 1 - row, column, 1 - column) < _BORDER


def _lines(letters: Sequence[Region], shape: Sequence[int]) -> Iterator[Region]:
    """Yield the boxes around letters that stand on one line, one after the other."""
    rest = sorted(letters, key=lambda region: region.left)
    used: set[Region] = set()
    for first in rest:
        if first in used:
            continue
        line = [first]
        for letter in rest:
            last = line[-1]
            if letter in used or letter.left < last.right - 1:
                continue
            height = max(last.height, letter.height)
            near = letter.left - last.right < 1.2 * height
            level = abs(letter.bottom - last.bottom) <= max(1, 0.2 * height)
            alike = min(last.height, letter.height) > 0.6 * height
            if near and level and alike:
                line.append(letter)
        if len(line) >= _LETTERS:
            used.update(line)
            yield Region(
                min(r.top for r in line),
                max(r.bottom for r in line),
                line[0].left,
                line[-1].right,
            )
