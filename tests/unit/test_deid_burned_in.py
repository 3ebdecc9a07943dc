"""Images that may carry text in their pixels are shown; clean anatomy is not."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from burned_in_samples import clean_planes, with_text
from data_fixtures import write_slices
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.data import get_testdata_file

from consilium_client.data.deid.burned_in import burned_in_findings, burned_in_suspects
from consilium_client.data.deid.text_regions import text_regions
from consilium_client.data.ingest.dicom_headers import Header, index_files, read_header


def headers_of(paths: list[Path]) -> list[Header]:
    return [header for path in paths if (header := read_header(path))]


def smooth(seed: int, size: int = 128) -> np.ndarray:
    """Return something like anatomy: blurred noise."""
    from scipy import ndimage

    noise = np.random.default_rng(seed).normal(size=(size, size))
    return np.asarray(ndimage.gaussian_filter(noise, 4) * 1000)


def written(tmp_path: Path, plane: np.ndarray, name: str = "a", **changes: Any) -> list[Path]:
    return write_slices(tmp_path / name, plane.T[:, :, None], changes=changes)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 99), size=st.sampled_from([11, 13, 16]), power=st.integers(-6, 10))
def test_text_on_dark_ground_is_seen_whatever_the_units(seed: int, size: int, power: int) -> None:
    random = np.random.default_rng(seed)
    # A bright body in the middle, and a border of noise, as scanners leave it.
    plane = random.normal(size=(128, 128)) * 5
    plane[40:90, 40:90] += np.abs(smooth(seed)[40:90, 40:90]) + 200
    assert text_regions(plane * 2.0**power) == ()
    assert text_regions(with_text(plane, random, size) * 2.0**power - 1024)


def test_flat_tiny_and_empty_planes_show_nothing() -> None:
    assert text_regions(np.zeros((64, 64))) == ()
    assert text_regions(np.ones((8, 300))) == ()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"BurnedInAnnotation": "YES"}, "say that text is burned in"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "are secondary captures"),
        ({"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, "are screen captures"),
        ({"Modality": "US"}, "come from devices that write the patient into the picture"),
        ({"Modality": "US", "BurnedInAnnotation": "NO"}, ""),
        ({"Modality": "CT"}, ""),
    ],
)
def test_kinds_of_image_are_ruled(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    headers = headers_of(written(tmp_path, smooth(1), **changes))
    suspects = burned_in_suspects(headers)
    assert [suspect.reason for suspect in suspects] == ([reason] if reason else [])


def test_a_finding_has_a_picture_of_the_region_to_look_at(tmp_path: Path) -> None:
    plane = with_text(smooth(2), np.random.default_rng(5), 14)
    paths = written(tmp_path, plane, Modality="DX")
    (finding,) = burned_in_findings(headers_of(paths), names=dict.fromkeys(paths, "case"))
    assert (finding.case, finding.code, finding.severity) == ("case", "deid.burned-in", "warning")
    assert "looks like text" in finding.message and str(paths[0]) in finding.where
    (picture,) = finding.pictures
    shown = Image.open(io.BytesIO(picture))
    assert shown.format == "PNG" and shown.size[0] > shown.size[1]


def test_silence_about_text_is_one_word_about_the_cohort(tmp_path: Path) -> None:
    paths = written(tmp_path, smooth(3), "a", Modality="DX")
    paths += written(tmp_path, smooth(4), "b", Modality="CR")
    paths += written(tmp_path, smooth(5), "c", Modality="CT")
    paths += written(tmp_path, smooth(6), "d", Modality="MG", BurnedInAnnotation="NO")
    (finding,) = burned_in_findings(headers_of(paths), names={})
    assert (finding.case, finding.code) == ("", "data.burned-in-unknown")
    assert "2 images (CR, DX)" in finding.message


def test_a_stack_is_judged_as_one(tmp_path: Path) -> None:
    random = np.random.default_rng(7)
    planes = [smooth(seed) for seed in range(6)]
    planes[0] = with_text(planes[0], random, 14)
    paths = write_slices(tmp_path / "once", np.stack(planes, axis=-1).transpose(1, 0, 2))
    assert burned_in_suspects(headers_of(paths)) == ()
    planes = [with_text(plane, random, 14) for plane in planes]
    paths = write_slices(tmp_path / "all", np.stack(planes, axis=-1).transpose(1, 0, 2))
    (suspect,) = burned_in_suspects(headers_of(paths))
    assert len(suspect.headers) == 6 and suspect.pictures


def test_colour_pictures_are_looked_at_and_broken_ones_do_not_end_the_search(
    tmp_path: Path,
) -> None:
    (path,) = written(tmp_path, smooth(8), Modality="XC", BurnedInAnnotation="NO")
    dataset = pydicom.dcmread(path)
    grey = np.interp(with_text(smooth(8), np.random.default_rng(1), 14), (-300, 300), (0, 255))
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 3, "RGB"
    dataset.PlanarConfiguration = dataset.PixelRepresentation = 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    dataset.PixelData = np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1).tobytes()
    dataset.save_as(path)
    (suspect,) = burned_in_suspects(headers_of([path]))
    assert suspect.reason == "show what looks like text near the border"
    dataset.PixelData = b"\0" * 10
    dataset.save_as(path)
    assert burned_in_suspects(headers_of([path])) == ()


@pytest.mark.data
def test_rates_on_real_images() -> None:
    """Thresholds below what `python tests/benchmarks/burned_in.py` prints for all images."""
    random = np.random.default_rng(0)
    for group, planes in clean_planes(stride=12).items():
        alarms = sum(bool(text_regions(plane)) for plane in planes)
        assert alarms <= 0.02 * len(planes), group
        if group == "mednist 64":
            continue  # Two or three letters fit: measured, and not promised.
        seen = sum(bool(text_regions(with_text(plane, random, 14))) for plane in planes)
        assert seen >= 0.85 * len(planes), group


def test_a_decoder_that_ends_its_process_does_not_end_the_search(tmp_path: Path) -> None:
    clean = Path(get_testdata_file("SC_rgb_jpeg.dcm")).read_bytes()
    (tmp_path / "bad.dcm").write_bytes(clean[:1065] + bytes(85) + clean[1150:])
    (tmp_path / "good.dcm").write_bytes(clean)
    headers, findings = index_files([tmp_path / "bad.dcm", tmp_path / "good.dcm"])
    assert not findings
    found = burned_in_findings(headers, names={})
    # Both are secondary captures; of the damaged one there is nothing to show.
    assert [finding.code for finding in found] == ["deid.burned-in"]
    assert len(found[0].pictures) == 1
