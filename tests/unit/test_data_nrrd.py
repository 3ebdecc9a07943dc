"""NRRD images and masks lie where SimpleITK reads them; what lies about itself is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_fixtures import home_in, rotation, write_list, write_nifti
from hypothesis import given, settings
from hypothesis import strategies as st
from label_fixtures import TO_LPS, VALUES, refusal, write_nrrd_file

from consilium_client.data.importing import ImportOptions, import_folder
from consilium_client.data.ingest.sources import Sources, read_image, read_label
from consilium_common.errors import ConsiliumError


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["<i2", ">i2", "u1", "<f4", "<f8", "<u2"]),
    encoding=st.sampled_from(["raw", "gzip"]),
    space=st.sampled_from(
        ["left-posterior-superior", "right-anterior-superior", "left-anterior-superior"]
    ),
    detached=st.booleans(),
)
def test_an_nrrd_lies_where_simpleitk_reads_it(
    tmp_path_factory: pytest.TempPathFactory,
    *,
    seed: int,
    kind: str,
    encoding: str,
    space: str,
    detached: bool,
) -> None:
    import SimpleITK as itk

    folder = tmp_path_factory.mktemp("nrrd")
    generator = np.random.default_rng(seed)
    shape = tuple(int(n) for n in generator.integers(2, 7, 3))
    values = generator.integers(0, 200, shape).astype(np.dtype(kind))
    directions = (rotation(generator) * generator.uniform(0.4, 3.0, 3)).T
    origin = generator.uniform(-200, 200, 3)
    path = folder / ("image.nhdr" if detached else "image.nrrd")
    write_nrrd_file(path, values, directions, origin, space=space, encoding=encoding)
    source = Sources(folder).find(path.name)
    assert len(source.files) == 1 + detached
    ours, _ = read_image(source)
    theirs = itk.ReadImage(str(path))
    assert np.array_equal(ours.values, itk.GetArrayFromImage(theirs).T)
    for index in ((0, 0, 0), tuple(n - 1 for n in shape), (1, 0, shape[2] - 1)):
        place = theirs.TransformIndexToPhysicalPoint([int(n) for n in index])
        assert np.abs((ours.affine @ [*index, 1])[:3] - TO_LPS @ place).max() < 1e-3


def test_nrrd_images_and_masks_make_a_cohort(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    generator = np.random.default_rng(0)
    directions, origin = np.diag([1.0, 1.5, 2.0]), np.array([-10.0, 5.0, 3.0])
    label = generator.integers(0, 2, (8, 7, 6)).astype(np.uint8)
    image = generator.normal(size=(8, 7, 6)).astype(np.float32)
    write_nrrd_file(root / "image.nrrd", image, directions, origin)
    write_nrrd_file(root / "mask.nrrd", label, directions, origin)
    affine = np.diag([-1.0, -1.5, 2.0, 1.0])
    affine[:3, 3] = TO_LPS @ origin
    write_nifti(root / "image.nii.gz", image, affine, np.float32)
    write_list(
        root,
        [
            ("a", "p1", "image.nrrd", "mask.nrrd"),
            ("b", "p2", "image.nii.gz", "mask.nrrd"),
        ],
    )
    options = ImportOptions(inputs=("ct",), labels={"background": 0, "liver": 1})
    entries = import_folder(home_in(tmp_path), root, options).entries
    first, second = entries["a"], entries["b"]
    assert np.array_equal(first.label(), second.label())
    assert np.allclose(first.affine, second.affine)
    assert np.array_equal(first.image("ct"), second.image("ct"))


def test_a_slicer_segmentation_reads_by_name_wherever_it_was_cropped(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    affine = np.eye(4)
    affine[:3, :3] = rotation(generator) * (0.8, 0.9, 2.0)
    affine[:3, 3] = (10.0, -20.0, 30.0)
    write_nifti(tmp_path / "ct.nii.gz", generator.normal(size=(10, 9, 8)), affine)
    sources = Sources(tmp_path)
    image, slices = read_image(sources.find("ct.nii.gz"))
    label = np.zeros((10, 9, 8), np.uint8)
    label[3:6, 2:5, 4:7] = 1
    label[6:8, 2:5, 4:6] = 2
    directions = (TO_LPS @ image.affine[:3, :3]).T
    box = (slice(3, 9), slice(2, 6), slice(4, 8))
    origin = TO_LPS @ (image.affine @ [3, 2, 4, 1])[:3]
    segments = {
        **{"Segment0_ID": "S1", "Segment0_Name": "Liver", "Segment0_LabelValue": "1"},
        **{"Segment1_ID": "S2", "Segment1_Name": "Tumour", "Segment1_LabelValue": "2"},
    }
    write_nrrd_file(tmp_path / "one.seg.nrrd", label[box], directions, origin, **segments)
    found = read_label(sources.find("one.seg.nrrd"), image, slices, VALUES, "ct")
    assert np.array_equal(found.values, np.array([0, 7, 3])[label])
    named = read_label(sources.find("one.seg.nrrd#Tumour"), image, slices, VALUES, "ct")
    assert np.array_equal(named.values, 3 * (label == 2))

    # Overlapping segments lie in layers: the first axis, which is none of space's.
    layers = np.stack([label[box] > 0, label[box] == 2]).astype(np.uint8)
    layered = {
        **segments,
        "Segment0_Layer": "0",
        "Segment1_Layer": "1",
        "Segment1_LabelValue": "1",
        "kinds": ["list", "domain", "domain", "domain"],
    }
    rows = np.vstack([np.full(3, np.nan), directions])
    write_nrrd_file(tmp_path / "two.seg.nrrd", layers, rows, origin, **layered)
    assert refusal(sources, "two.seg.nrrd", image, slices).code == "data.overlap"
    found = read_label(sources.find("two.seg.nrrd#Liver|Tumour"), image, slices, VALUES, "ct")
    assert np.array_equal(found.values, np.array([0, 7, 3])[label])

    beside = origin + 20 * directions[0]
    write_nrrd_file(tmp_path / "off.seg.nrrd", label[box], directions, beside, **segments)
    assert refusal(sources, "off.seg.nrrd", image, slices).code == "data.geometry"
    half = origin + directions[0] / 2
    write_nrrd_file(tmp_path / "half.seg.nrrd", label[box], directions, half, **segments)
    assert refusal(sources, "half.seg.nrrd", image, slices).code == "data.geometry"
    segments["Segment1_LabelValue"] = "5"
    write_nrrd_file(tmp_path / "odd.seg.nrrd", label[box], directions, origin, **segments)
    assert refusal(sources, "odd.seg.nrrd", image, slices).code == "data.label-values"


def test_one_volume_of_several_is_named_by_its_number(tmp_path: Path) -> None:
    values = np.arange(2 * 4 * 3 * 5, dtype=np.int16).reshape(2, 4, 3, 5)
    rows = np.vstack([np.full(3, np.nan), np.eye(3)])
    write_nrrd_file(tmp_path / "four.nrrd", values, rows, np.zeros(3))
    sources = Sources(tmp_path)
    assert np.array_equal(read_image(sources.find("four.nrrd#1"))[0].values, values[1])
    for reference in ("four.nrrd", "four.nrrd#2"):
        with pytest.raises(ConsiliumError) as caught:
            read_image(sources.find(reference))
        assert caught.value.code == "data.dimensions"
    with pytest.raises(ConsiliumError) as caught:
        sources.find("four.nrrd#Liver")
    assert caught.value.code == "data.format"


def test_an_nrrd_that_lies_about_itself_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    values = np.zeros((4, 4, 4), np.int16)
    sources = Sources(tmp_path)

    def code(change: tuple[bytes, bytes], name: str = "image.nrrd", **fields: object) -> str:
        path = write_nrrd_file(tmp_path / name, values, np.eye(3), np.zeros(3), **fields)
        content = path.read_bytes()
        assert change[0] in content
        path.write_bytes(content.replace(*change, 1))
        with pytest.raises(ConsiliumError) as caught:
            read_image(sources.find(name))
        assert "/etc" not in caught.value.message
        return caught.value.code

    sizes = b"sizes: 4 4 4"
    assert code((sizes, b"sizes: 4 4 5")) == "data.truncated"
    assert code((sizes, b"sizes: 4 4 3")) == "data.truncated"
    assert code((sizes, b"sizes: 4 4 4 4")) == "data.dimensions"
    assert code((sizes, b"sizes: 4 4 -4")) == "data.dimensions"
    assert code((sizes, b"sizes: 99999 99999 99999")) == "data.too-large"
    assert code((sizes, b"sizes: 999 999 999")) == "data.truncated"  # 2 GB claimed in 200 bytes
    assert code((sizes, b"sizes: 4 4 5"), encoding="raw") == "data.truncated"
    assert code((b"space: left-posterior-superior\n", b"space dimension: 3\n")) == "data.geometry"
    assert code((b"encoding: gzip", b"encoding: hex")) == "data.format"
    assert code((b"type: int16", b"type: block")) == "data.format"
    assert code((b"\n\n", b"\n")) == "data.truncated"
    assert code((b"NRRD000", b"NRRX000")) == "data.truncated"
    data = b"data file: image.raw.gz"
    assert code((data, b"data file: ../image.raw.gz"), "image.nhdr") == "data.format"
    assert code((data, b"data file: /etc/hostname"), "image.nhdr") == "data.format"
    assert code((data, b"data file: LIST"), "image.nhdr") == "data.format"
    assert code((data, b"data file: absent.raw"), "image.nhdr") == "data.missing"
