"""Preprocessing: places in the patient stay, values are what the study says, and the way back."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from data_fixtures import rotation, study
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium_client.data.ingest.volume import Volume, canonical
from consilium_client.data.prepare import is_straight, normalise, prepare, restore_label
from consilium_common.study.schema import Intensity


def plain(**preprocessing: Any) -> Any:
    return study(preprocessing={"intensity": {"kind": "none"}, **preprocessing})


def places(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """Return the place of every voxel, (*shape, 3)."""
    index = np.moveaxis(np.indices(shape), 0, -1)
    return index @ affine[:3, :3].T + affine[:3, 3]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shear=st.sampled_from([0.0, 0.0, 0.3, -0.4]),
    spacing=st.none() | st.tuples(*[st.floats(0.7, 2.5)] * 3),
    orientation=st.sampled_from(["RAS", "LPS", "none"]),
    size=st.none() | st.tuples(*[st.integers(8, 24)] * 3),
)
def test_a_field_over_the_patient_stays_in_its_place(
    seed: int,
    shear: float,
    spacing: tuple[float, ...] | None,
    orientation: str,
    size: tuple[int, ...] | None,
) -> None:
    # An image whose value is a linear function of the place: whatever the grid becomes, the value
    # at each new voxel must be that function of the new voxel's place.
    generator = np.random.default_rng(seed)
    shape = tuple(int(n) for n in generator.integers(9, 16, 3))
    affine = np.eye(4)
    affine[:3, :3] = rotation(generator) * generator.uniform(0.8, 2.0, 3)
    affine[:3, 2] += shear * affine[:3, 1]
    affine[:3, 3] = generator.uniform(-100, 100, 3)
    slope = generator.normal(size=3)
    field = places(shape, affine) @ slope
    steps = plain(
        orientation=orientation,
        spacing=list(spacing) if spacing else None,
        size=list(size) if size else None,
    )
    image, _, new = prepare([field], None, affine, steps)
    assert is_straight(new)
    if size:
        assert image.shape[1:] == size
    there = places(image.shape[1:], new)
    inside = (there - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    # Away from the edges, where smoothing and extrapolation know no neighbours.
    deep = np.all((inside >= 2.5) & (inside <= np.array(shape) - 3.5), axis=-1)
    wrong = np.abs(image[0] - there @ slope)[deep]
    assert wrong.max(initial=0) < 5e-3 * max(1.0, np.abs(field).max() / 100)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    orientation=st.sampled_from(["RAS", "LPS", "none"]),
    size=st.none() | st.tuples(*[st.integers(14, 24)] * 3),
)
def test_without_interpolation_a_label_comes_back_exactly(
    seed: int, orientation: str, size: tuple[int, ...] | None
) -> None:
    generator = np.random.default_rng(seed)
    shape = tuple(int(n) for n in generator.integers(8, 14, 3))
    label = generator.integers(0, 4, shape).astype(np.uint8)
    affine = np.eye(4)
    affine[:3, :3] = rotation(generator) * generator.uniform(0.8, 2.0, 3)
    affine[:3, 3] = generator.uniform(-100, 100, 3)
    cached = canonical(Volume(label, affine))
    steps = plain(orientation=orientation, size=list(size) if size else None)
    _, prepared, new = prepare([cached.values], cached.values, cached.affine, steps)
    assert prepared is not None
    assert np.array_equal(restore_label(prepared, new, shape, affine), label)


def test_a_resampled_label_comes_back_nearly_whole() -> None:
    label = np.zeros((30, 30, 20), np.uint8)
    label[8:20, 6:22, 5:15] = 1
    label[12:16, 10:16, 8:12] = 2
    affine = np.diag([0.8, 0.8, 2.0, 1.0])
    _, prepared, new = prepare([label], label, affine, plain(spacing=[1.0, 1.0, 1.0]))
    assert prepared is not None and prepared.shape == (24, 24, 40)
    back = restore_label(prepared, new, label.shape, affine)
    for value in (1, 2):
        overlap = 2 * np.sum((back == value) & (label == value))
        assert overlap / (np.sum(back == value) + np.sum(label == value)) > 0.95


def test_padding_and_cropping_are_symmetric_and_pad_with_background() -> None:
    image = np.full((10, 8, 13), 7.0)
    label = np.ones((10, 8, 13), np.uint8)
    out, mask, affine = prepare([image], label, np.eye(4), plain(size=[8, 12, 13]))
    assert mask is not None
    assert out.shape == (1, 8, 12, 13) and mask.shape == (8, 12, 13)
    assert np.all(out[0, :, 2:10] == 7) and np.all(out[0, :, :2] == 0)
    assert np.all(out[0, :, 10:] == 0) and np.all(mask[:, :2] == 0) and mask.sum() == 8 * 8 * 13
    assert np.allclose(affine[:3, 3], (1, -2, 0))


def test_padding_is_zero_after_normalisation() -> None:
    image = np.random.default_rng(0).normal(1000, 5, (8, 8, 8))
    steps = study(preprocessing={"size": [12, 8, 8]})
    out, _, _ = prepare([image], None, np.eye(4), steps)
    assert np.all(out[0, :2] == 0) and abs(out[0, 2:10].mean()) < 1e-4


def test_intensities_are_what_the_study_says() -> None:
    values = np.arange(1000, dtype=np.int16).reshape(10, 10, 10)
    zscore = normalise(values, Intensity())
    assert abs(zscore.mean()) < 1e-6 and abs(zscore.std() - 1) < 1e-5
    window = normalise(values, Intensity(kind="window", low=200, high=300))
    assert window.min() == 0 and window.max() == 1
    assert window.ravel()[250] == 0.5
    percentile = normalise(values, Intensity(kind="percentile"))
    assert percentile.min() == 0 and percentile.max() == 1
    assert all(a <= b for a, b in pairwise(percentile.ravel()))
    for kind in ("zscore", "percentile"):
        assert np.all(normalise(np.full((4, 4), 9), Intensity(kind=kind)) == 0)


@pytest.mark.parametrize("shape", [(40, 30), (16, 16), (9, 64)])
def test_pictures_are_resized_over_their_whole_field(shape: tuple[int, int]) -> None:
    task = {"kind": "classification", "dimensions": 2, "inputs": ["x"], "classes": ["a", "b"]}
    steps = study(task=task, preprocessing={"size": [16, 16], "intensity": {"kind": "none"}})
    rows = np.linspace(0, 1, shape[0])[:, None] * np.ones(shape)
    out, _, affine = prepare([rows], None, np.eye(4), steps)
    assert out.shape == (1, 16, 16)
    # The edges of the field stay: half a pixel outside the first and the last.
    first = (affine @ [-0.5, -0.5, 0, 1])[:2]
    last = (affine @ [15.5, 15.5, 0, 1])[:2]
    assert np.allclose(first, -0.5) and np.allclose(last, np.array(shape) - 0.5)
    assert np.all(np.diff(out[0, :, 3]) > 0) and abs(out.mean() - 0.5) < 0.02


def test_a_coarser_grid_averages_what_it_cannot_show() -> None:
    noise = np.random.default_rng(0).normal(0, 1, (64, 64))
    task = {"kind": "classification", "dimensions": 2, "inputs": ["x"], "classes": ["a", "b"]}
    steps = study(task=task, preprocessing={"size": [8, 8], "intensity": {"kind": "none"}})
    out, _, _ = prepare([noise], None, np.eye(4), steps)
    # A mean of 64 pixels has a standard deviation of an eighth; picking pixels would keep one
    # half and more.
    assert out.std() < 0.2
