"""Pictures of slices: real images, telling slices, contours that show what differs."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from training_samples import segmentation_patient

from consilium_client.training.pictures import slice_picture, telling_slices
from consilium_common.errors import ConsiliumError

CLASSES = ["background", "organ"]


def opened(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def test_a_picture_is_a_small_png_with_one_panel_a_slice() -> None:
    case = segmentation_patient(0, shape=(40, 50, 30)).cases[0]
    sizes = []
    for slices in (1, 3):
        png = slice_picture(case.pixels, case.classes, case.classes, CLASSES, slices=slices)
        assert png.startswith(b"\x89PNG")
        assert len(png) < 150_000
        sizes.append(opened(png).shape)
    assert sizes[1][1] == pytest.approx(3 * sizes[0][1], rel=0.02)


def test_another_prediction_gives_another_picture_and_the_same_one_the_same() -> None:
    case = segmentation_patient(0).cases[0]
    shifted = np.roll(case.classes, 3, axis=0)
    same = slice_picture(case.pixels, case.classes, case.classes, CLASSES, slices=1)
    again = slice_picture(case.pixels, case.classes, case.classes, CLASSES, slices=1)
    other = slice_picture(case.pixels, case.classes, shifted, CLASSES, slices=1)
    assert same == again
    assert (opened(same) != opened(other)).any()


def test_contours_are_drawn_in_colour() -> None:
    case = segmentation_patient(0).cases[0]
    empty = np.zeros_like(case.classes)

    def coloured(label: np.ndarray) -> int:
        pixels = opened(slice_picture(case.pixels, label, empty, CLASSES, slices=1))
        return int((pixels.max(axis=2) - pixels.min(axis=2) > 60).sum())

    # Without a contour the legend alone is in colour.
    assert coloured(case.classes) > coloured(empty) + 100


def test_two_dimensional_images_and_flat_ones_can_be_drawn() -> None:
    image = np.zeros((2, 20, 30), dtype=np.float32)
    label = np.zeros((20, 30), dtype=np.uint8)
    label[5:9, 5:9] = 1
    assert slice_picture(image, label, label, CLASSES, channel=1, spacing=(1.0, 2.0))


def test_arrays_that_do_not_fit_are_refused() -> None:
    case = segmentation_patient(0).cases[0]
    with pytest.raises(ConsiliumError, match=r"data\.geometry"):
        slice_picture(case.pixels, case.classes[1:], case.classes, CLASSES)


@settings(max_examples=60, deadline=None)
@given(
    label=arrays(np.uint8, (3, 3, 9), elements=st.integers(0, 1)),
    count=st.integers(1, 12),
)
def test_slices_are_distinct_ordered_and_of_the_image(label: np.ndarray, count: int) -> None:
    chosen = telling_slices(label, label, count)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(count, 9)
    assert all(0 <= index < 9 for index in chosen)


def test_slices_with_foreground_and_disagreement_come_first() -> None:
    label, prediction = np.zeros((4, 4, 20), dtype=np.uint8), np.zeros((4, 4, 20), dtype=np.uint8)
    label[..., 6:15] = 1
    prediction[..., 6:15] = 1
    prediction[:2, :, 13] = 0
    chosen = telling_slices(label, prediction, 3)
    assert 13 in chosen
    assert all(6 <= index < 15 for index in chosen)
    label[:], prediction[:] = 0, 0
    label[0, 0, 17] = 1
    assert 17 in telling_slices(label, prediction, 3)


@pytest.mark.data
def test_a_real_case_is_drawn() -> None:
    from pathlib import Path

    import nibabel

    folder = Path(__file__).parents[3] / "shared" / "data" / "hippocampus"
    file = sorted((folder / "imagesTr").glob("hippocampus_*.nii*"))[0]
    image = np.asarray(nibabel.load(file).dataobj, dtype=np.float32)[None]
    label = np.asarray(nibabel.load(folder / "labelsTr" / file.name).dataobj).astype(np.uint8)
    names = ["background", "anterior", "posterior"]
    png = slice_picture(image, label, np.roll(label, 1, axis=1), names)
    assert 10_000 < len(png) < 200_000
