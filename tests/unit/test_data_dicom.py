"""DICOM series and DICOM SEG through ingest: exact places, exact values, every defect named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from data_fixtures import home_in, real, rotation, study, write_nifti, write_seg, write_slices
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file

from consilium_client.data.cohort import open_cohort
from consilium_client.data.importing import DataProblemsError, ImportOptions, import_folder
from consilium_client.data.ingest.dicom_headers import files_below, index_files
from consilium_client.data.ingest.sources import Sources, read_image, read_label
from consilium_client.data.ingest.volume import Volume, canonical
from consilium_common.errors import ConsiliumError


def hounsfield(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1500, shape).astype(float)


def read(folder: Path) -> Volume:
    return read_image(Sources(folder.parent).find(folder.name))[0]


def code_of(folder: Path) -> ConsiliumError:
    with pytest.raises(ConsiliumError) as caught:
        read(folder)
    return caught.value


# --- what must come out right ------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    spacing=st.tuples(*[st.floats(0.3, 6.0)] * 3),
    tilt=st.floats(-25, 25),
    slope=st.sampled_from([1.0, 0.5, 2.0]),
    unsigned=st.booleans(),
    padded=st.booleans(),
    order=st.permutations("abcdef"),
)
def test_every_voxel_keeps_its_value_and_its_place_in_the_patient(
    tmp_path_factory: pytest.TempPathFactory,
    *,
    seed: int,
    spacing: tuple[float, float, float],
    tilt: float,
    slope: float,
    unsigned: bool,
    padded: bool,
    order: list[str],
) -> None:
    generator = np.random.default_rng(seed)
    axes = rotation(generator)
    step = axes[:, 2] * spacing[2] + axes[:, 1] * spacing[2] * np.tan(np.radians(tilt))
    origin = generator.uniform(-300, 300, 3)
    values = np.round(hounsfield(5, 4, 6, seed=seed) / 2) * 2
    values[0, 0] += 2 * np.arange(6)
    expected = values.copy()
    changes = {"PixelRepresentation": int(not unsigned)}
    if padded:
        # Stored as 0, below everything measured: it comes back as the smallest measured value.
        values[-1, -1] = -1024
        changes["PixelPaddingValue"] = 0
        expected[-1, -1] = values[values > -1024].min()
    folder = tmp_path_factory.mktemp("series") / "ct"
    write_slices(
        folder,
        values,
        origin=origin,
        directions=axes,
        spacing=spacing,
        step=step,
        slope=slope,
        changes=changes,
        names=[f"{name}.dcm" for name in order],
    )
    volume = canonical(read(folder))
    to_lps = np.diag([-1, -1, 1])
    # Every voxel's place, computed from DICOM's own definition (PS3.3 C.7.6.2.1.1).
    for i, j, k in np.ndindex(*values.shape):
        place = origin + i * spacing[0] * axes[:, 0] + j * spacing[1] * axes[:, 1] + k * step
        index = np.linalg.inv(volume.affine) @ [*(to_lps @ place), 1]
        nearest = np.rint(index[:3]).astype(int)
        back = volume.affine @ [*nearest, 1]
        assert np.abs(back[:3] - to_lps @ place).max() < 1e-3
        assert volume.values[tuple(nearest)] == expected[i, j, k]


def test_shuffled_instance_numbers_and_file_names_do_not_matter(tmp_path: Path) -> None:
    values = hounsfield(6, 5, 7)
    names = [f"{name}.dcm" for name in "gbdface"]
    write_slices(tmp_path / "ct", values, names=names)
    volume = read(tmp_path / "ct")
    assert np.array_equal(volume.values, values)
    assert np.allclose(volume.spacing, (0.8, 0.7, 2.5))


def test_low_values_that_show_bright_are_turned_over(tmp_path: Path) -> None:
    values = np.arange(12.0).reshape(4, 3, 1)
    write_slices(
        tmp_path / "x",
        values,
        intercept=0,
        changes={
            "PhotometricInterpretation": "MONOCHROME1",
            "PixelRepresentation": 0,
            "BitsStored": 12,
            "HighBit": 11,
        },
    )
    assert np.array_equal(read(tmp_path / "x").values, 4095 - values[:, :, 0].T)


@pytest.mark.parametrize("name", ["MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm"])
def test_compressed_images_read_as_their_plain_twins(name: str) -> None:
    def values(file: str) -> np.ndarray:
        path = Path(str(get_testdata_file(file)))
        return read_image(Sources(path.parent).find(path.name))[0].values

    assert np.array_equal(values(name), values("MR_small.dcm"))


def test_a_compression_that_nobody_reads_is_named() -> None:
    path = Path(str(get_testdata_file("JPEG-lossy.dcm")))  # 12 bits, JPEG Extended
    with pytest.raises(ConsiliumError) as caught:
        read_image(Sources(path.parent).find(path.name))
    assert caught.value.code == "data.codec"
    assert "JPEG Extended" in caught.value.message


def test_a_multi_frame_image_equals_its_single_frames(tmp_path: Path) -> None:
    import highdicom

    values = hounsfield(6, 5, 4)
    axes = rotation(np.random.default_rng(3))
    paths = write_slices(tmp_path / "ct", values, directions=axes)
    sources = [pydicom.dcmread(path) for path in paths]
    enhanced = highdicom.legacy.LegacyConvertedEnhancedCTImage(
        sources, pydicom.uid.generate_uid(), 3, pydicom.uid.generate_uid(), 1
    )
    (tmp_path / "enhanced").mkdir()
    enhanced.save_as(tmp_path / "enhanced" / "one.dcm")
    single, multi = canonical(read(tmp_path / "ct")), canonical(read(tmp_path / "enhanced"))
    assert np.array_equal(single.values, multi.values)
    assert np.abs(single.affine - multi.affine).max() < 1e-3


def test_a_dicom_seg_lies_where_it_was_drawn_whatever_its_frames(tmp_path: Path) -> None:
    values = hounsfield(8, 7, 9)
    label = np.zeros(values.shape, np.uint8)
    label[2:5, 1:4, 3:6] = 1  # most slices stay empty, and highdicom omits them
    label[5:7, 4:6, 4:5] = 2
    axes = rotation(np.random.default_rng(5))
    paths = write_slices(tmp_path / "ct", values, directions=axes)
    write_seg(tmp_path / "seg.dcm", paths, label, "Liver", "Tumour")
    sources = Sources(tmp_path)
    image, slices = read_image(sources.find("ct"))
    read_as = read_label(
        sources.find("seg.dcm"), image, slices, {"Liver": 7, "Tumour": 3, "Other": 1}, "ct"
    )
    assert np.array_equal(read_as.values, np.array([0, 7, 3])[label])


def test_a_dicom_seg_on_a_tilted_series_lies_on_its_slices(tmp_path: Path) -> None:
    values = hounsfield(8, 7, 6)
    label = np.zeros(values.shape, np.uint8)
    label[2:5, 1:4, 1:3] = 1
    paths = write_slices(tmp_path / "ct", values, step=np.array([0, 0.9, 2.5]))
    write_seg(tmp_path / "seg.dcm", paths, label, "Liver")
    sources = Sources(tmp_path)
    image, slices = read_image(sources.find("ct"))
    found = read_label(sources.find("seg.dcm"), image, slices, {"Liver": 1}, "ct")
    assert np.array_equal(found.values, label)


# --- what must be refused ----------------------------------------------------------------------


def test_missing_slices_are_counted(tmp_path: Path) -> None:
    paths = write_slices(tmp_path / "ct", hounsfield(4, 4, 12))
    for number in (4, 5, 9):
        paths[number].unlink()
    error = code_of(tmp_path / "ct")
    assert error.code == "data.missing-slices"
    assert error.message.startswith("3 slices are missing in 2 places")


def test_uneven_slices_are_refused(tmp_path: Path) -> None:
    uid = pydicom.uid.generate_uid()
    values = hounsfield(4, 4, 5)
    write_slices(tmp_path / "ct", values, series=uid, names=[f"a{n}.dcm" for n in range(5)])
    write_slices(
        tmp_path / "ct",
        values[:, :, :2],
        series=uid,
        origin=(-20, -30, 53.5),
        names=["b0.dcm", "b1.dcm"],
    )
    assert code_of(tmp_path / "ct").code == "data.uneven-slices"


def test_a_slice_shifted_sideways_is_refused(tmp_path: Path) -> None:
    paths = write_slices(tmp_path / "ct", hounsfield(4, 4, 5))
    dataset = pydicom.dcmread(paths[2])
    dataset.ImagePositionPatient[0] += 1.5
    dataset.save_as(paths[2])
    error = code_of(tmp_path / "ct")
    assert error.code == "data.uneven-slices" and error.where == str(paths[2])


def test_a_copied_file_and_a_repeated_position_are_duplicates(tmp_path: Path) -> None:
    uid = pydicom.uid.generate_uid()
    values = hounsfield(4, 4, 4)
    paths = write_slices(tmp_path / "ct", values, series=uid)
    copy = tmp_path / "ct" / "copy of a slice.dcm"
    copy.write_bytes(paths[1].read_bytes())
    error = code_of(tmp_path / "ct")
    assert error.code == "data.duplicate" and "copy of a slice.dcm" in error.where
    assert error.message == "1 files repeat an instance of the series."
    copy.unlink()
    write_slices(
        tmp_path / "ct", values, series=uid, names=[f"second phase {n}.dcm" for n in range(4)]
    )
    error = code_of(tmp_path / "ct")
    assert error.code == "data.duplicate" and "4 positions" in error.message


def test_a_localiser_in_the_series_is_refused(tmp_path: Path) -> None:
    uid = pydicom.uid.generate_uid()
    write_slices(tmp_path / "ct", hounsfield(4, 4, 4), series=uid)
    write_slices(tmp_path / "ct", hounsfield(9, 4, 1), series=uid, names=["scout.dcm"])
    assert code_of(tmp_path / "ct").code == "data.mixed-geometry"


@pytest.mark.parametrize("kept", [100, 133, 700, 1200, -1])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    paths = write_slices(tmp_path / "ct", hounsfield(8, 8, 5))
    paths[2].write_bytes(paths[2].read_bytes()[:kept])
    error = code_of(tmp_path / "ct")
    assert error.code == "data.truncated"
    assert error.where == str(paths[2])


@pytest.mark.parametrize("same_series", [True, False])
def test_two_patients_in_one_series_folder_are_refused(tmp_path: Path, same_series: bool) -> None:
    uid = pydicom.uid.generate_uid()
    root = tmp_path / "tree"
    first = write_slices(root / "ct", hounsfield(4, 4, 4), series=uid, patient="SECRET-1")
    write_slices(
        root / "ct",
        hounsfield(4, 4, 4),
        series=uid if same_series else None,
        patient="SECRET-2",
        names=[f"other{n}.dcm" for n in range(4)],
    )
    assert code_of(root / "ct").code == "data.two-patients"
    write_seg(root / "seg.dcm", first, np.ones((4, 4, 4), np.uint8), "Liver")
    with pytest.raises(DataProblemsError) as caught:
        import_folder(home_in(tmp_path), root, ImportOptions())
    assert caught.value.code == "data.two-patients"
    assert "SECRET" not in str(caught.value.to_dict())
    assert not (tmp_path / "home" / "data" / "site.yaml").exists()


def test_a_flat_export_of_several_patients_is_read_when_it_is_meant(tmp_path: Path) -> None:
    root = tmp_path / "export"
    for number in range(2):
        paths = write_slices(
            root,
            hounsfield(4, 4, 4, seed=number),
            patient=f"P{number}",
            names=[f"{number}-{n}.dcm" for n in range(4)],
        )
        write_seg(root / f"seg{number}.dcm", paths, np.ones((4, 4, 4), np.uint8), "Liver")
    home = home_in(tmp_path)
    with pytest.raises(DataProblemsError, match="more than one patient"):
        import_folder(home, root, ImportOptions())
    outcome = import_folder(home, root, ImportOptions(mixed=True))
    assert outcome.counts()["patients"] == 2
    assert import_folder(home, root, ImportOptions(mixed=True)).read == 0


def test_a_broken_file_keeps_its_folders_series_out(tmp_path: Path) -> None:
    # Which series the broken file belongs to cannot be known: neither may pass as whole.
    root = tmp_path / "export"
    for number in range(2):
        names = [f"{number}-{n}.dcm" for n in range(4)]
        paths = write_slices(root / "mixed", hounsfield(4, 4, 4, seed=number), names=names)
        write_seg(root / f"seg{number}.dcm", paths, np.ones((4, 4, 4), np.uint8), "Liver")
    whole = write_slices(root / "whole", hounsfield(4, 4, 4))
    write_seg(root / "seg2.dcm", whole, np.ones((4, 4, 4), np.uint8), "Liver")
    (root / "mixed" / "1-3.dcm").write_bytes((root / "mixed" / "1-3.dcm").read_bytes()[:300])
    outcome = import_folder(home_in(tmp_path), root, ImportOptions(skip_bad=True))
    assert [case.images["ct"] for case in outcome.manifest.cases] == ["whole"]
    assert [finding.code for finding in outcome.left_out] == ["data.truncated"]


def test_overlapping_segments_are_refused(tmp_path: Path) -> None:
    import highdicom

    values = hounsfield(6, 6, 3)
    paths = write_slices(tmp_path / "ct", values)
    write_seg(tmp_path / "plain.dcm", paths, np.ones(values.shape, np.uint8), "A")
    template = highdicom.seg.segread(tmp_path / "plain.dcm")
    both = np.zeros((3, 6, 6, 2), np.uint8)
    both[:, 1:4, 1:4, 0] = 1
    both[:, 2:5, 2:5, 1] = 1
    described = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=template.SegmentSequence[0].segmented_property_category,
            segmented_property_type=template.SegmentSequence[0].segmented_property_type,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        for number, name in ((1, "A"), (2, "B"))
    ]
    highdicom.seg.Segmentation(
        source_images=[pydicom.dcmread(path) for path in paths],
        pixel_array=both,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=described,
        series_instance_uid=pydicom.uid.generate_uid(),
        series_number=2,
        sop_instance_uid=pydicom.uid.generate_uid(),
        instance_number=1,
        manufacturer="nobody",
        manufacturer_model_name="none",
        software_versions="0",
        device_serial_number="0",
    ).save_as(tmp_path / "both.dcm")
    sources = Sources(tmp_path)
    image, slices = read_image(sources.find("ct"))
    with pytest.raises(ConsiliumError) as caught:
        read_label(sources.find("both.dcm"), image, slices, {"A": 1, "B": 2}, "ct")
    assert caught.value.code == "data.overlap"


def test_a_segmentation_of_another_series_or_unknown_segment_is_refused(tmp_path: Path) -> None:
    values = hounsfield(6, 6, 3)
    paths = write_slices(tmp_path / "ct", values)
    write_slices(tmp_path / "other", values)
    write_seg(tmp_path / "seg.dcm", paths, np.ones(values.shape, np.uint8), "Liver")
    sources = Sources(tmp_path)
    image, slices = read_image(sources.find("other"))
    with pytest.raises(ConsiliumError) as caught:
        read_label(sources.find("seg.dcm"), image, slices, {"Liver": 1}, "other")
    assert caught.value.code == "data.geometry"
    image, slices = read_image(sources.find("ct"))
    with pytest.raises(ConsiliumError) as caught:
        read_label(sources.find("seg.dcm"), image, slices, {"Spleen": 1}, "ct")
    assert caught.value.code == "data.label-unknown"


def test_a_tree_takes_masks_beside_series_and_classes_from_a_list(tmp_path: Path) -> None:
    values = hounsfield(6, 5, 4)
    root = tmp_path / "tree"
    write_slices(root / "a" / "deep" / "ct", values, patient="one")
    volume = read(root / "a" / "deep" / "ct")
    label = np.zeros(values.shape)
    label[1:3, 1:3, 1:3] = 2
    # The mask's axes run the other way: it must be turned, not taken as it lies.
    turned = canonical(Volume(label, volume.affine))
    write_nifti(root / "a" / "deep" / "ct_seg.nii.gz", turned.values, turned.affine)
    home = home_in(tmp_path)
    outcome = import_folder(home, root, ImportOptions(labels={"background": 0, "liver": 2}))
    entry = next(iter(outcome.entries.values()))
    assert np.array_equal(entry.label(), turned.values)
    (root / "a" / "deep" / "ct_seg.nii.gz").unlink()
    (root / "labels.csv").write_text("folder,label\na/deep/ct,ill\n")
    outcome = import_folder(home, root, ImportOptions())
    assert outcome.manifest.site.label_kind == "class"
    assert [case.label for case in outcome.manifest.cases] == ["ill"]


def test_no_identity_reaches_an_index_entry_or_a_finding(tmp_path: Path) -> None:
    paths = write_slices(tmp_path / "ct", hounsfield(4, 4, 3), patient="SECRET-77")
    paths[0].write_bytes(paths[0].read_bytes()[:400])
    headers, findings = index_files(files_below(tmp_path))
    assert len(headers) == 2 and len(findings) == 1
    assert "SECRET" not in repr(headers) + repr(findings)


# --- real images -------------------------------------------------------------------------------


@pytest.mark.data
def test_a_real_dicom_seg_is_bit_exact_against_its_nrrd_mask(tmp_path: Path) -> None:
    import gzip
    import shutil

    folder = real("dicom-seg")
    root = tmp_path / "tree"
    shutil.copytree(folder / "ct-3slice", root / "ct")
    shutil.copy(folder / "liver.dcm", root)
    outcome = import_folder(home_in(tmp_path), root, ImportOptions())
    assert outcome.manifest.site.labels == {"background": 0, "Liver": 1}
    head, packed = (folder / "liver_seg.nrrd").read_bytes().split(b"\n\n", 1)
    assert b"type: short" in head and b"sizes: 512 512 3" in head
    mask = np.frombuffer(gzip.decompress(packed), "<i2").reshape(3, 512, 512).transpose(2, 1, 0)
    lps = np.diag([0.810547, 0.810547, 1.0, 1.0])
    lps[:3, 3] = (-235.2, -226.8, -128.69)
    expected = canonical(Volume(mask, np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps))
    entry = next(iter(outcome.entries.values()))
    assert mask.sum() == 107098
    assert np.array_equal(entry.label(), expected.values)
    assert np.abs(entry.affine - expected.affine).max() < 1e-4


@pytest.mark.data
def test_the_real_overlapping_segments_are_refused(tmp_path: Path) -> None:
    import shutil

    folder = real("dicom-seg")
    root = tmp_path / "tree"
    shutil.copytree(folder / "ct-3slice", root / "ct")
    shutil.copy(folder / "partial_overlaps.dcm", root)
    with pytest.raises(DataProblemsError) as caught:
        import_folder(home_in(tmp_path), root, ImportOptions())
    assert caught.value.code == "data.overlap"
    shutil.copy(folder / "liver.dcm", root)
    with pytest.raises(DataProblemsError) as caught:
        import_folder(home_in(tmp_path), root, ImportOptions())
    assert caught.value.code == "data.two-labels"


@pytest.mark.data
def test_the_real_tilted_series_is_right_to_a_tenth_of_a_millimetre_or_refused(
    tmp_path: Path,
) -> None:
    import shutil

    folder = real("dicom-ct-tilted")
    with pytest.raises(ConsiliumError) as caught:
        read_image(Sources(folder.parent).find(folder.name))
    assert caught.value.code == "data.uneven-slices"
    assert "14.dcm and 15.dcm" in caught.value.where
    # Its first half is evenly spaced, and then the tilt alone remains.
    for number in range(1, 15):
        shutil.copy(folder / f"{number:02d}.dcm", tmp_path)
    volume, slices = read_image(Sources(tmp_path.parent).find(tmp_path.name))
    placed = canonical(volume)
    for k, header in enumerate(slices):
        assert header.position and header.orientation and header.pixel_spacing
        along, down = np.array(header.orientation).reshape(2, 3)
        for i in (0, 511):
            for j in (0, 511):
                place = (
                    np.array(header.position)
                    + i * header.pixel_spacing[1] * along
                    + j * header.pixel_spacing[0] * down
                ) * [-1, -1, 1]
                found = np.rint(np.linalg.inv(placed.affine) @ [*place, 1]).astype(int)
                assert np.linalg.norm((placed.affine @ found)[:3] - place) < 0.1
                assert placed.values[tuple(found[:3])] == volume.values[i, j, k]


@pytest.mark.data
def test_real_mr_series_make_a_two_channel_study(tmp_path: Path) -> None:
    folder = real("dicom-mr") / "Study3"
    t1, t2 = (next(folder.glob(f"{n}*T*")) for n in (11, 37830))
    root = tmp_path / "list"
    root.mkdir()
    (root / "cases.csv").write_text(
        f"case_id,patient_id,image,image_t2,label\nonly,p,{t1},{t2},labels.nii.gz\n"
    )
    volume = canonical(read_image(Sources(folder).find(t1.name))[0])
    label = (volume.values > np.percentile(volume.values, 99)).astype(np.uint8)
    write_nifti(root / "labels.nii.gz", label, volume.affine, np.uint8)
    home = home_in(tmp_path)
    import_folder(
        home, root, ImportOptions(inputs=("t1", "t2"), labels={"background": 0, "bright": 1})
    )
    task = {
        "kind": "segmentation",
        "dimensions": 3,
        "inputs": ["t2", "t1"],
        "classes": ["background", "bright"],
    }
    cohort = open_cohort(home, study(task=task, preprocessing={"intensity": {"kind": "none"}}))
    (case,) = (
        case
        for split in ("train", "validation", "test")
        for patient in cohort.patients(split)
        for case in patient.cases
    )
    assert case.image().shape == (2, *volume.values.shape)
    assert np.array_equal(case.image()[1], volume.values)
    assert np.array_equal(case.to_original(case.label()).shape, case.original_shape)
    # Nothing of the person in the headers reaches what ingest wrote, but for cases.csv.
    name = str(pydicom.dcmread(next(t1.iterdir())).PatientName).encode()
    assert len(name) > 3
    for path in (tmp_path / "home").rglob("*"):
        assert not path.is_file() or name not in path.read_bytes()
