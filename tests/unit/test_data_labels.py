"""Labels in every form that hospitals have: exact where they lie, refused where they do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from data_fixtures import home_in, real, rotation, write_list, write_slices
from label_fixtures import (
    TO_LPS,
    VALUES,
    refusal,
    series,
    write_nrrd_file,
    write_rtstruct,
    write_segmentation,
)

from consilium_client.data.importing import ImportOptions, import_folder
from consilium_client.data.ingest.sources import Sources, content_digest, read_image, read_label
from consilium_client.data.ingest.volume import Volume
from consilium_common.errors import ConsiliumError


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return float(2 * np.sum(one & other) / (one.sum() + other.sum()))


# --- DICOM SEG ---------------------------------------------------------------------------------


def test_a_label_map_reads_as_its_values(tmp_path: Path) -> None:
    sources, image, slices, paths = series(tmp_path)
    label = np.random.default_rng(0).integers(0, 4, image.values.shape).astype(np.uint8)
    write_segmentation(tmp_path / "seg.dcm", paths, label, [*VALUES, "Cyst"], "LABELMAP")
    assert refusal(sources, "seg.dcm", image, slices).code == "data.label-unknown"
    found = read_label(sources.find("seg.dcm#Tumour|Liver"), image, slices, VALUES, "ct")
    assert np.array_equal(found.values, np.array([0, 7, 3, 0])[label])
    named = {**VALUES, "Cyst": 1}
    found = read_label(sources.find("seg.dcm"), image, slices, named, "ct")
    assert np.array_equal(found.values, np.array([0, 7, 3, 1])[label])
    found = read_label(sources.find("seg.dcm#Tumour"), image, slices, VALUES, "ct")
    assert np.array_equal(found.values, 3 * (label == 2))
    for value in (4, 129):  # what no segment describes is no background
        broken = pydicom.dcmread(tmp_path / "seg.dcm")
        broken.PixelData = bytes([value]) + broken.PixelData[1:]
        broken.save_as(tmp_path / "broken.dcm")
        with pytest.raises(ConsiliumError) as caught:
            read_label(sources.find("broken.dcm"), image, slices, named, "ct")
        assert caught.value.code == "data.label-values"


@pytest.mark.parametrize("tilted", [False, True])
def test_a_fractional_segmentation_holds_what_is_at_least_half(
    tmp_path: Path, tilted: bool
) -> None:
    step = np.array([0.0, 0.9, 2.5]) if tilted else None
    values = np.zeros((8, 7, 6))
    paths = write_slices(tmp_path / "ct", values, step=step)
    sources = Sources(tmp_path)
    image, slices = read_image(sources.find("ct"))
    shares = np.zeros((*values.shape, 2), np.float32)
    shares[2:5, 1:4, 1:3, 0] = 0.5
    shares[2:5, 1:4, 3, 0] = 0.49
    shares[5:7, 4:6, 4, 1] = 1.0
    shares[2:5, 1:4, 1, 1] = 0.3
    write_segmentation(tmp_path / "seg.dcm", paths, shares, list(VALUES), "FRACTIONAL")
    found = read_label(sources.find("seg.dcm"), image, slices, VALUES, "ct")
    expected = np.zeros(values.shape)
    expected[2:5, 1:4, 1:3] = 7
    expected[5:7, 4:6, 4] = 3
    assert np.array_equal(found.values, expected)


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL"])
def test_where_segments_overlap_a_person_says_which_counts(tmp_path: Path, kind: str) -> None:
    sources, image, slices, paths = series(tmp_path)
    stack = np.zeros((*image.values.shape, 2), np.uint8 if kind == "BINARY" else np.float32)
    stack[1:6, 1:6, 1:5, 0] = 1
    stack[3:7, 3:6, 2:4, 1] = 1
    write_segmentation(tmp_path / "seg.dcm", paths, stack, list(VALUES), kind)
    liver, tumour = stack[..., 0] > 0, stack[..., 1] > 0
    error = refusal(sources, "seg.dcm", image, slices)
    assert error.code == "data.overlap" and "FILE#ORGAN|LESION" in error.hint

    def read(reference: str) -> np.ndarray:
        return read_label(sources.find(reference), image, slices, VALUES, "ct").values

    assert np.array_equal(read("seg.dcm#Liver"), 7 * liver)
    assert np.array_equal(read("seg.dcm#Tumour"), 3 * tumour)
    assert np.array_equal(read("seg.dcm#Liver|Tumour"), np.where(tumour, 3, np.where(liver, 7, 0)))
    assert np.array_equal(read("seg.dcm#Tumour|Liver"), np.where(liver, 7, np.where(tumour, 3, 0)))
    digests = {content_digest(sources.find(f"seg.dcm{part}")) for part in ("", "#Liver", "#Tumour")}
    assert len(digests) == 3  # a cached case of one is never taken for another


def test_a_segments_name_stands_in_the_place_and_never_in_the_message(tmp_path: Path) -> None:
    sources, image, slices, paths = series(tmp_path)
    label = np.ones(image.values.shape, np.uint8)
    write_segmentation(tmp_path / "seg.dcm", paths, label[..., None], ["Doe Jane"], "BINARY")
    for reference in ("seg.dcm", "seg.dcm#Doe Jane"):
        error = refusal(sources, reference, image, slices)
        assert error.code == "data.label-unknown" and error.where.endswith("seg.dcm#Doe Jane")
        assert "Doe" not in error.message + error.hint
    assert refusal(sources, "seg.dcm#Spleen", image, slices).code == "data.label-unknown"
    write_segmentation(
        tmp_path / "twice.dcm", paths, np.stack([label, 0 * label], -1), ["Liver"] * 2, "BINARY"
    )
    assert refusal(sources, "twice.dcm", image, slices).code == "data.label-values"


@pytest.mark.data
def test_the_real_liver_is_bit_exact_against_its_nrrd_mask() -> None:
    import SimpleITK as itk

    folder = real("dicom-seg")
    sources = Sources(folder)
    image, slices = read_image(sources.find("ct-3slice"))
    drawn = read_label(sources.find("liver.dcm"), image, slices, {"Liver": 1}, "ct").values
    mask = read_label(sources.find("liver_seg.nrrd"), image, slices, {}, "ct").values
    assert drawn.sum() == 107098
    assert np.array_equal(drawn, mask)
    theirs = itk.GetArrayFromImage(itk.ReadImage(str(folder / "liver_seg.nrrd"))).T
    assert np.array_equal(mask, theirs)


@pytest.mark.data
def test_the_real_overlapping_segments_read_one_by_one() -> None:
    import highdicom

    folder = real("dicom-seg")
    sources = Sources(folder)
    image, slices = read_image(sources.find("ct-3slice"))
    raw = highdicom.seg.segread(folder / "partial_overlaps.dcm")
    names = [str(item.SegmentLabel) for item in raw.SegmentSequence]
    values = {name: number for number, name in enumerate(names, start=1)}
    with pytest.raises(ConsiliumError) as caught:
        read_label(sources.find("partial_overlaps.dcm"), image, slices, values, "ct")
    assert caught.value.code == "data.overlap"
    masks = {}
    for name in names:
        found = read_label(
            sources.find(f"partial_overlaps.dcm#{name}"), image, slices, values, "ct"
        ).values
        masks[name] = found == values[name]
        # Against the stored frames themselves: every voxel drawn is there, and no other.
        frames = [
            number
            for number, group in enumerate(raw.PerFrameFunctionalGroupsSequence)
            if group.SegmentIdentificationSequence[0].ReferencedSegmentNumber == values[name]
        ]
        assert masks[name].sum() == raw.pixel_array[frames].sum() > 0
    together = "|".join(names)
    laid = read_label(
        sources.find(f"partial_overlaps.dcm#{together}"), image, slices, values, "ct"
    ).values
    expected = np.zeros(laid.shape)
    for name in names:
        expected[masks[name]] = values[name]
    assert np.array_equal(laid, expected)
    assert sum(mask.sum() for mask in masks.values()) > (laid > 0).sum()  # they do overlap


# --- RTSTRUCT ----------------------------------------------------------------------------------


def in_patient(image: Volume, index: np.ndarray) -> np.ndarray:
    """Return where fractional indices lie, LPS millimetres."""
    return (index @ image.affine[:3, :3].T + image.affine[:3, 3]) @ TO_LPS


def ellipse(
    centre: tuple[float, float], radii: tuple[float, float], number: float, *, points: int = 400
) -> np.ndarray:
    """Return an ellipse in indices of slice ``number``."""
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    flat = np.stack([np.cos(angle), np.sin(angle)], -1) * radii + centre
    return np.column_stack([flat, np.full(points, number)])


def inside(
    shape: tuple[int, ...], centre: tuple[float, float], radii: tuple[float, float]
) -> np.ndarray:
    i, j = np.ogrid[: shape[0], : shape[1]]
    return np.asarray(((i - centre[0]) / radii[0]) ** 2 + ((j - centre[1]) / radii[1]) ** 2 <= 1)


@pytest.mark.parametrize("tilted", [False, True])
def test_contours_fill_what_they_enclose_on_an_oblique_series(tmp_path: Path, tilted: bool) -> None:
    axes = rotation(np.random.default_rng(2))
    step = axes[:, 2] * 2.5 + (axes[:, 1] * 0.7 if tilted else 0)
    values = np.random.default_rng(0).integers(-900, 900, (90, 80, 4)).astype(float)
    paths = write_slices(tmp_path / "ct", values, directions=axes, step=step)
    sources = Sources(tmp_path)
    image, slices = read_image(sources.find("ct"))
    outer, hole, spot = (
        ((44.3, 40.2), (35.1, 30.4)),
        ((50.0, 42.0), (11.2, 9.7)),
        ((20.3, 60.2), (6.3, 6.3)),
    )
    contours = [
        in_patient(image, ellipse(*shape, number)) for number in (1, 2) for shape in (outer, hole)
    ]
    liver = np.zeros(values.shape, bool)
    liver[..., 1:3] = (inside(values.shape, *outer) & ~inside(values.shape, *hole))[..., None]
    tumour = np.zeros(values.shape, bool)
    tumour[..., 3] = inside(values.shape, *spot)
    marker = np.zeros((1, 3))
    regions = {
        "Liver": [*contours, contours[0]],  # written twice, drawn once
        "Tumour": [in_patient(image, ellipse(*spot, 3))],
        "Isocentre": [marker],
    }
    write_rtstruct(tmp_path / "rt.dcm", paths, regions)
    found = read_label(sources.find("rt.dcm"), image, slices, VALUES, "ct").values
    assert dice(found == 7, liver) >= 0.999
    assert dice(found == 3, tumour) >= 0.999
    alone = read_label(sources.find("rt.dcm#Tumour"), image, slices, VALUES, "ct").values
    assert np.array_equal(alone, np.where(found == 3, 3, 0))


def test_a_keyhole_is_a_hole(tmp_path: Path) -> None:
    sources, image, slices, paths = series(tmp_path, (60, 60, 3))
    ring = ellipse((30.2, 30.1), (25.3, 25.3), 1)
    hole = ellipse((30.2, 30.1), (10.4, 10.4), 1)
    keyhole = np.vstack([ring, ring[:1], hole[:1], hole[::-1]])
    regions = {"Liver": [in_patient(image, keyhole)]}
    write_rtstruct(tmp_path / "rt.dcm", paths, regions)
    found = read_label(sources.find("rt.dcm"), image, slices, VALUES, "ct").values[..., 1] == 7
    shape = image.values.shape
    expected = inside(shape, (30.2, 30.1), (25.3, 25.3)) & ~inside(
        shape, (30.2, 30.1), (10.4, 10.4)
    )
    assert dice(found, expected) >= 0.999


def test_contours_of_one_image_fill_a_plane(tmp_path: Path) -> None:
    sources, image, slices, paths = series(tmp_path, (40, 30, 1))
    assert image.values.shape == (30, 40)
    drawn = ellipse((12.3, 20.2), (8.1, 11.7), 0)
    write_rtstruct(tmp_path / "rt.dcm", paths, {"Liver": [in_patient(image, drawn)]})
    found = read_label(sources.find("rt.dcm"), image, slices, VALUES, "ct").values
    assert dice(found == 7, inside(image.values.shape, (12.3, 20.2), (8.1, 11.7))) >= 0.999


def test_contours_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    sources, image, slices, paths = series(tmp_path, (30, 30, 4))
    circle = ((15.2, 15.1), (8.0, 8.0))

    def drawn(number: float, **options: object) -> ConsiliumError:
        regions = {"Liver": [in_patient(image, ellipse(*circle, number))]}
        write_rtstruct(tmp_path / "rt.dcm", paths, regions, **options)
        return refusal(sources, "rt.dcm", image, slices)

    between = drawn(1.4)
    assert between.code == "data.geometry" and "1 mm off" in between.message
    assert "2.5 mm apart" in between.message
    assert drawn(4.0).code == "data.geometry"
    assert drawn(1.0, kind="OPEN_PLANAR").code == "data.format"
    overlapping = {name: [in_patient(image, ellipse(*circle, 1))] for name in ("Liver", "Tumour")}
    write_rtstruct(tmp_path / "rt.dcm", paths, overlapping)
    assert refusal(sources, "rt.dcm", image, slices).code == "data.overlap"
    both = read_label(sources.find("rt.dcm#Liver|Tumour"), image, slices, VALUES, "ct").values
    assert set(np.unique(both)) == {0, 3}
    write_rtstruct(tmp_path / "rt.dcm", paths, {"Spleen": overlapping["Liver"]})
    assert refusal(sources, "rt.dcm", image, slices).code == "data.label-unknown"
    other, *_ = series(tmp_path / "other", (30, 30, 4))
    found, headers = read_image(other.find("ct"))
    assert refusal(sources, "rt.dcm", found, headers).code == "data.geometry"
    whole = (tmp_path / "rt.dcm").read_bytes()
    (tmp_path / "cut.dcm").write_bytes(whole[: len(whole) // 2])
    assert refusal(sources, "cut.dcm", image, slices).code in {
        "data.truncated",
        "data.label-unknown",
    }


def test_a_case_list_names_the_regions_that_are_meant(tmp_path: Path) -> None:
    root = tmp_path / "data"
    _, image, _, paths = series(root, (30, 28, 3))
    large = [in_patient(image, ellipse((15.2, 14.1), (10.3, 9.2), 1))]
    small = [in_patient(image, ellipse((16.2, 14.3), (4.3, 3.2), 1))]
    regions = {"Liver": large, "Tumour #1 left/right": small, "Couch": [large[0] + 1.0]}
    write_rtstruct(root / "rt.dcm", paths, regions)
    tumour = "Tumour #1 left/right"
    options = ImportOptions(inputs=("ct",), labels={"background": 0, "Liver": 1, tumour: 2})

    def counts(reference: str, number: int) -> dict[int, int]:
        write_list(root, [("one", "p", "ct", reference)])
        outcome = import_folder(home_in(tmp_path), root, options)
        assert outcome.read == 1, number  # another part of a file is another label
        label = outcome.entries["one"].label()
        return {int(value): int((label == value).sum()) for value in np.unique(label)}

    alone = counts("rt.dcm#Liver", 1)
    both = counts(f"rt.dcm#Liver|{tumour}", 2)
    drawn = counts(f"rt.dcm#{tumour}", 3)
    assert set(alone) == {0, 1} and set(both) == {0, 1, 2} and set(drawn) == {0, 2}
    assert both[2] == drawn[2] and both[1] + both[2] == alone[1]
    with pytest.raises(ConsiliumError) as caught:
        Sources(root).find("rt.dcm#" + "|".join(["a long name"] * 40) + "#/absent")
        Sources(root).find("no such file " * 100)
    assert caught.value.code == "data.missing"


# --- broken files ------------------------------------------------------------------------------


def mutated(content: bytes, generator: np.random.Generator) -> bytes:
    """Return the content with a few bytes changed, taken out or put in, or cut short."""
    changed = bytearray(content)
    for _ in range(generator.integers(1, 5)):
        reach = min(len(changed), 800) if generator.random() < 0.7 else len(changed)
        place = int(generator.integers(0, max(reach, 1)))
        what = generator.random()
        if what < 0.6 and place < len(changed):
            changed[place] = int(generator.integers(0, 256))
        elif what < 0.8:
            del changed[place : place + 3]
        elif what < 0.9:
            changed[place:place] = b"99"
        else:
            del changed[place:]
    return bytes(changed)


def test_a_damaged_label_is_read_or_refused_and_never_a_crash(tmp_path: Path) -> None:
    sources, image, slices, paths = series(tmp_path)
    label = np.random.default_rng(0).integers(0, 3, image.values.shape).astype(np.uint8)
    both = np.stack([label == 1, label == 2], -1)
    write_segmentation(tmp_path / "map.dcm", paths, label, list(VALUES), "LABELMAP")
    write_segmentation(tmp_path / "binary.dcm", paths, both.astype("u1"), list(VALUES), "BINARY")
    write_segmentation(tmp_path / "part.dcm", paths, both.astype("f4"), list(VALUES), "FRACTIONAL")
    ring = in_patient(image, ellipse((4.2, 3.1), (2.0, 2.0), 1, points=20))
    write_rtstruct(tmp_path / "rt.dcm", paths, {"Liver": [ring]})
    directions = (TO_LPS @ image.affine[:3, :3]).T
    origin = TO_LPS @ image.affine[:3, 3]
    write_nrrd_file(tmp_path / "raw.nrrd", label, directions, origin, encoding="raw")
    fields = {"Segment0_Name": "Liver", "Segment1_Name": "Tumour", "Segment1_LabelValue": "2"}
    write_nrrd_file(tmp_path / "slicer.seg.nrrd", label, directions, origin, **fields)
    generator = np.random.default_rng(5)
    outcomes: set[str] = set()
    for path in [*tmp_path.glob("*.dcm"), *tmp_path.glob("*.nrrd")]:
        read_label(sources.find(path.name), image, slices, VALUES, "ct")  # sound as written
        whole = path.read_bytes()
        for _ in range(25):
            path.write_bytes(mutated(whole, generator))
            try:
                read_label(sources.find(path.name), image, slices, VALUES, "ct")
                outcomes.add("read")
            except ConsiliumError as error:
                outcomes.add(error.code)
    assert {"read", "data.truncated", "data.geometry"} <= outcomes
    assert all(code == "read" or code.startswith("data.") for code in outcomes)
