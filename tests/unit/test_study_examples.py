"""Every shipped example is a valid study whose network runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from consilium_common.errors import ConsiliumError
from consilium_common.models.private import check_private
from consilium_common.models.registry import build_network, validate_network
from consilium_common.study.check import check
from consilium_common.study.covariates import input_channels
from consilium_common.study.examples import example_files, example_study
from consilium_common.study.load import load_study, study_from_canonical


def test_the_examples_are_found_by_name() -> None:
    found = {path.stem: path for path in example_files()}
    assert {"liver-ct", "chest-xray", "brain-mri"} <= set(found)
    assert example_study("liver-ct") == found["liver-ct"]
    with pytest.raises(ConsiliumError, match="There is no example") as caught:
        example_study("../schema")
    assert "liver-ct" in caught.value.hint


@pytest.mark.parametrize("path", example_files(), ids=lambda path: path.stem)
def test_every_example_is_valid_and_its_network_runs(path: Path) -> None:
    study = load_study(path)
    assert study.name == path.stem
    assert study.title
    assert path.read_text().startswith("#"), "an example explains itself"
    assert study_from_canonical(study.to_canonical()).digest == study.digest
    validate_network(study)
    network = build_network(study).eval()
    check_private(network)
    # Small, and a multiple of every network's stride.
    size = [64] * 2 if study.task.dimensions == 2 else [32] * 3
    with torch.no_grad():
        logits = network(torch.randn(1, input_channels(study.task), *size))
    assert logits.shape[:2] == (1, len(study.task.classes))
    assert logits.isfinite().all()
    assert list(logits.shape[2:]) == (size if study.task.kind == "segmentation" else [])


def test_the_example_with_facts_beside_the_image_says_all_of_them_and_the_price() -> None:
    found = check(example_study("brain-mri"))
    said = " ".join(found.lines)
    assert "2 input channels (t1, flair)" in said
    assert "age (a number; less 60, divided by 15)" in said
    assert "sex (f or m)" in said
    assert "images that have the class" in said
    price = found.cost
    assert price.epsilon is not None
    assert price.patient_epsilon is not None
    assert price.statistics_epsilon == pytest.approx(0.5, abs=0.01)
    # Composed over both, which is less than their sum.
    assert price.epsilon < price.patient_epsilon < price.epsilon + 0.1
