"""Patches: drawn by class, aligned with their labels, padded, changed at random; data refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_samples import (
    MemoryCase,
    MemoryPatient,
    classification_cohort,
    classification_study,
    segmentation_patient,
    segmentation_study,
)

from consilium_client.training.augment import augment
from consilium_client.training.patches import PatchSource
from consilium_common.errors import ConsiliumError
from consilium_common.study import Study
from consilium_common.study.schema import Augmentation


def coded_patient(shape: tuple[int, ...], number: int = 0) -> MemoryPatient:
    """Return a case whose label is 1 where its image is above one half: they can be compared."""
    image = np.random.default_rng(number).random((1, *shape), dtype=np.float32)
    return MemoryPatient((MemoryCase("coded", image, (image[0] > 0.5).astype(np.uint8)),))


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*[st.integers(5, 20)] * 3),
    patch=st.tuples(*[st.sampled_from([8, 12, 16])] * 3),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_label_and_image_move_together_whatever_the_sizes(
    shape: tuple[int, ...], patch: tuple[int, ...], share: float, seed: int
) -> None:
    study = segmentation_study(
        patch=list(patch), foreground_share=share, augmentation={"flip": 0.5, "rotate90": 0.5}
    )
    source = PatchSource(study, [coded_patient(shape)])
    images, targets = source.batch(source.cases * 2, np.random.default_rng(seed))
    assert images.shape == (2, 1, *patch)
    assert images.dtype == np.float32
    assert np.array_equal(targets, (images[:, 0] > 0.5).astype(np.uint8))


def rare_case() -> MemoryPatient:
    label = np.zeros((40, 40, 40), dtype=np.uint8)
    label[30, 5, 20] = 1
    label[3:8, 30:36, 3:9] = 2
    image = np.zeros((1, 40, 40, 40), dtype=np.float32)
    return MemoryPatient((MemoryCase("rare", image, label),))


def three_classes(**training: Any) -> Study:
    study = segmentation_study(**training).model_dump(by_alias=True)
    study["task"]["classes"] = ["background", "rare", "common"]
    return Study.model_validate(study)


def test_classes_are_drawn_alike_however_rare_their_voxels() -> None:
    study = three_classes(patch=[8, 8, 8], foreground_share=1.0)
    source = PatchSource(study, [rare_case()])
    _, targets = source.batch(source.cases * 300, np.random.default_rng(0))
    rare = np.mean([(target == 1).any() for target in targets])
    common = np.mean([(target == 2).any() for target in targets])
    assert rare + common == pytest.approx(1.0)
    assert 0.4 < rare < 0.6


def test_without_a_share_of_foreground_patches_lie_anywhere() -> None:
    source = PatchSource(three_classes(patch=[8, 8, 8], foreground_share=0.0), [rare_case()])
    _, targets = source.batch(source.cases * 300, np.random.default_rng(0))
    assert np.mean([(target == 1).any() for target in targets]) < 0.1


def test_a_case_without_foreground_gives_patches_too() -> None:
    image = np.ones((1, 20, 20, 20), dtype=np.float32)
    empty = MemoryPatient((MemoryCase("empty", image, np.zeros((20, 20, 20), dtype=np.uint8)),))
    source = PatchSource(segmentation_study(foreground_share=1.0), [empty])
    images, _ = source.batch(source.cases, np.random.default_rng(0))
    assert images.shape == (1, 1, 16, 16, 16)


def test_drawing_never_writes_to_the_sites_arrays() -> None:
    patient = segmentation_patient(0)
    case = patient.cases[0]
    case.pixels.flags.writeable = case.classes.flags.writeable = False
    before = case.pixels.copy()
    study = segmentation_study(
        augmentation={"flip": 1, "rotate90": 1, "gain": 0.3, "shift": 0.3, "noise": 0.1}
    )
    source = PatchSource(study, [patient], memory_limit=0)
    assert source.cases[0].image is case.pixels
    images, _ = source.batch(source.cases, np.random.default_rng(0))
    assert not np.array_equal(images[0], before)
    assert np.array_equal(case.pixels, before)


def test_a_patients_patches_are_spread_over_all_its_scans() -> None:
    scans = []
    for value in range(3):
        image = np.full((1, 16, 16, 16), value, dtype=np.float32)
        scans.append(MemoryCase(f"scan-{value}", image, np.zeros((16, 16, 16), dtype=np.uint8)))
    source = PatchSource(segmentation_study(), [MemoryPatient(tuple(scans))])
    for seed in range(10):
        images, _ = source.patient_batch(0, 3, np.random.default_rng(seed))
        assert {float(image.mean()) for image in images} == {0.0, 1.0, 2.0}
        images, _ = source.patient_batch(0, 5, np.random.default_rng(seed))
        counts = np.bincount([int(image.mean()) for image in images], minlength=3)
        assert counts.min() >= 1
        assert counts.max() <= 2


def test_every_change_off_leaves_the_image_alone() -> None:
    image = np.random.default_rng(0).random((1, 8, 8), dtype=np.float32)
    changed, label = augment(image, None, Augmentation(), np.random.default_rng(0))
    assert changed is image
    assert label is None


def test_gain_shift_and_noise_keep_to_their_stated_range() -> None:
    image = np.ones((2, 64, 64), dtype=np.float32)
    settings_ = Augmentation(gain=0.2, shift=0.3)
    for seed in range(20):
        changed, _ = augment(image, None, settings_, np.random.default_rng(seed))
        assert 0.5 <= changed.min() <= changed.max() <= 1.5
        assert changed[0, 0, 0] != changed[1, 0, 0]  # channels are changed apart
    noisy, _ = augment(image, None, Augmentation(noise=0.1), np.random.default_rng(0))
    assert (noisy - image).std() == pytest.approx(0.1, rel=0.1)
    assert noisy.dtype == np.float32


def test_a_patch_that_is_not_square_keeps_its_shape_when_rotated() -> None:
    image = np.random.default_rng(0).random((1, 8, 12), dtype=np.float32)
    for seed in range(5):
        changed, _ = augment(image, None, Augmentation(rotate90=1), np.random.default_rng(seed))
        assert np.array_equal(changed, image[:, ::-1, ::-1])


def broken(case: MemoryCase, **changes: Any) -> list[MemoryPatient]:
    values = {"case_id": case.case_id, "pixels": case.pixels, "classes": case.classes} | changes
    return [MemoryPatient((MemoryCase(**values),))]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"pixels": np.zeros((2, 16, 16, 16), dtype="f4")}, "data.channels"),
        ({"pixels": np.zeros((1, 16, 16), dtype="f4")}, "data.channels"),
        ({"classes": np.zeros((16, 16, 15), dtype="u1")}, "data.geometry"),
        ({"classes": np.full((16, 16, 16), 2, dtype="u1")}, "data.label"),
    ],
)
def test_data_that_does_not_fit_is_refused_without_naming_a_patient(
    changes: dict[str, Any], code: str
) -> None:
    case = segmentation_patient(0).cases[0]
    with pytest.raises(ConsiliumError) as caught:
        PatchSource(segmentation_study(), broken(case, case_id="secret-name", **changes))
    assert caught.value.code == code
    assert caught.value.hint
    assert "secret-name" not in str(caught.value)


@pytest.mark.parametrize("label", [3, -1])
def test_a_class_that_the_study_does_not_have_is_refused(label: int) -> None:
    case = classification_cohort(1).splits["train"][0].cases[0]
    with pytest.raises(ConsiliumError, match=r"data\.label"):
        PatchSource(classification_study(), broken(case, classes=np.array(label)))


def test_a_training_split_without_a_case_is_refused() -> None:
    with pytest.raises(ConsiliumError, match=r"data\.no-patients"):
        PatchSource(segmentation_study(), [])


def test_whole_images_of_different_sizes_are_refused() -> None:
    patients = [segmentation_patient(0), segmentation_patient(1, shape=(16, 16, 20))]
    with pytest.raises(ConsiliumError, match=r"data\.size"):
        PatchSource(segmentation_study(patch=None), patients)
