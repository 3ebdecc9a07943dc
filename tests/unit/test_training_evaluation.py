"""Evaluation: sums and counts, against MONAI where it is right, and without its traps."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium_client.training.evaluation import (
    area_under_curve,
    evaluate_classification,
    evaluate_segmentation,
    patient_scores,
)
from consilium_common.errors import ConsiliumError

CLASSES = ("background", "organ", "tumour")


def label(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint8)


def test_dice_equals_monais_where_the_reference_holds_the_class() -> None:
    from monai.metrics import DiceMetric

    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, 3, (6, 7, 8)), rng.integers(0, 3, (6, 7, 8))) for _ in range(4)]
    evaluation = evaluate_segmentation(
        "test",
        CLASSES,
        [(f"case-{i}", p.astype("u1"), r.astype("u1")) for i, (p, r) in enumerate(pairs)],
    )
    metric = DiceMetric(include_background=False)
    for prediction, reference in pairs:
        hot = [
            torch.nn.functional.one_hot(torch.from_numpy(a), 3).movedim(-1, 0)[None]
            for a in (prediction, reference)
        ]
        metric(*hot)
    theirs = metric.get_buffer().numpy()
    ours = np.array([[row.values["organ"], row.values["tumour"]] for row in evaluation.rows])
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert evaluation.mean_dice == pytest.approx(theirs.mean(), abs=1e-6)


def test_a_case_without_the_class_is_left_out_of_its_mean_and_counted() -> None:
    evaluation = evaluate_segmentation(
        "test",
        CLASSES,
        [
            ("both right", label(0, 1, 2, 2), label(0, 1, 2, 2)),
            ("no tumour, none seen", label(0, 1, 0, 0), label(0, 1, 0, 0)),
            ("no tumour, one seen", label(0, 1, 2, 0), label(0, 1, 0, 0)),
        ],
    )
    organ, tumour = evaluation.dice
    assert (organ.mean, organ.count, organ.absent) == (1.0, 3, 0)
    assert (tumour.mean, tumour.count, tumour.absent, tumour.false_alarms) == (1.0, 1, 2, 1)
    assert [row.values["tumour"] for row in evaluation.rows] == [1.0, None, None]


def test_an_empty_prediction_of_a_class_that_is_there_is_zero_and_not_perfect() -> None:
    evaluation = evaluate_segmentation(
        "test", CLASSES, [("missed", label(0, 0, 0), label(0, 1, 2))]
    )
    assert [figure.mean for figure in evaluation.dice] == [0.0, 0.0]
    assert evaluation.mean_dice == 0.0


def test_a_class_that_no_case_holds_has_no_mean() -> None:
    evaluation = evaluate_segmentation("test", CLASSES, [("one", label(0, 1), label(0, 1))])
    assert evaluation.dice[1].mean is None
    assert evaluation.mean_dice == 1.0
    assert evaluate_segmentation("test", CLASSES, []).mean_dice is None


def test_totals_and_counts_of_two_sites_pool_to_the_figures_of_all_cases() -> None:
    rng = np.random.default_rng(1)
    cases = [
        (str(i), rng.integers(0, 3, 20).astype("u1"), rng.integers(0, 2 + i % 2, 20).astype("u1"))
        for i in range(7)
    ]
    whole = evaluate_segmentation("test", CLASSES, cases)
    sites = [evaluate_segmentation("test", CLASSES, part) for part in (cases[:2], cases[2:])]
    for index, figure in enumerate(whole.dice):
        total = sum(site.dice[index].total for site in sites)
        assert total / sum(site.dice[index].count for site in sites) == pytest.approx(figure.mean)


@settings(max_examples=40, deadline=None)
@given(
    scores=st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=4, max_size=30),
    seed=st.integers(0, 100),
)
def test_the_area_under_the_curve_equals_monais_ties_included(
    scores: list[float], seed: int
) -> None:
    from monai.metrics import compute_roc_auc

    truth = np.random.default_rng(seed).random(len(scores)) < 0.5
    truth[:2] = True, False
    ours = area_under_curve(np.array(scores), truth)
    theirs = compute_roc_auc(torch.tensor(scores), torch.from_numpy(truth).long())
    assert ours == pytest.approx(theirs, abs=1e-6)


def test_without_both_kinds_of_cases_there_is_no_area_under_the_curve() -> None:
    assert area_under_curve(np.array([0.1, 0.9]), np.array([True, True])) is None
    assert area_under_curve(np.array([0.1, 0.9]), np.array([False, False])) is None


def test_one_class_a_case_counts_cases_and_several_count_decisions() -> None:
    probabilities = np.array([[0.7, 0.2, 0.1], [0.1, 0.5, 0.4], [0.3, 0.3, 0.4]])
    truth = np.eye(3, dtype=bool)[[0, 2, 2]]
    single = evaluate_classification(
        "test", CLASSES, ["a", "b", "c"], probabilities, truth, multi_label=False
    )
    assert single.accuracy == pytest.approx(2 / 3)
    multi = evaluate_classification(
        "test", CLASSES, ["a", "b", "c"], probabilities, truth, multi_label=True
    )
    # At one half: (1 0 0), (0 0 0), (0 0 0) against (1 0 0), (0 0 1), (0 0 1).
    assert multi.accuracy == pytest.approx(7 / 9)
    assert [(f.positives, f.negatives) for f in multi.auc] == [(1, 2), (0, 3), (2, 1)]
    assert multi.auc[1].auc is None


def test_plain_values_name_cases_only_when_asked() -> None:
    import json

    evaluation = evaluate_segmentation("test", CLASSES, [("case-7", label(0, 1), label(0, 1))])
    assert "case-7" not in json.dumps(evaluation.to_dict())
    assert "case-7" in json.dumps(evaluation.to_dict(rows=True))
    assert evaluation.to_dict()["dice"]["organ"]["mean"] == 1.0


# --- one score a patient -----------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """A patient by the names of their cases."""

    names: tuple[str, ...]

    @property
    def cases(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(case_id=name) for name in self.names]


def test_a_patients_score_is_the_mean_dice_of_all_their_cases_and_classes() -> None:
    evaluation = evaluate_segmentation(
        "test",
        CLASSES,
        [
            ("a1", label(0, 1, 2, 2), label(0, 1, 2, 2)),  # 1 and 1
            ("a2", label(0, 0, 0, 2), label(0, 1, 0, 2)),  # 0 and 1
            ("b1", label(0, 1, 2, 0), label(0, 1, 0, 0)),  # 1; no tumour there
            ("c1", label(0, 1, 0, 0), label(0, 0, 0, 0)),  # nothing there to score
        ],
    )
    patients = [Record(("a1", "a2")), Record(("b1",)), Record(("c1",))]
    assert patient_scores(evaluation, patients) == [0.75, 1.0, 0.5]


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_patients_score_is_the_share_of_right_decisions(multi_label: bool) -> None:
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
    truth = np.array([[True, False], [True, False], [False, True]])
    evaluation = evaluate_classification(
        "test", ("left", "right"), ["a1", "a2", "b1"], probabilities, truth, multi_label=multi_label
    )
    assert patient_scores(evaluation, [Record(("a1", "a2")), Record(("b1",))]) == [0.5, 0.0]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_scores_lie_between_0_and_1_and_one_patients_score_is_theirs_alone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cases = [
        (f"c{n}", rng.integers(0, 3, 12).astype("u1"), rng.integers(0, 3, 12).astype("u1"))
        for n in range(5)
    ]
    patients = [Record(("c0", "c1")), Record(("c2",)), Record(("c3", "c4"))]
    scores = patient_scores(evaluate_segmentation("test", CLASSES, cases), patients)
    assert all(0 <= score <= 1 for score in scores)
    alone = patient_scores(evaluate_segmentation("test", CLASSES, cases[2:3]), patients[1:2])
    assert alone == [scores[1]]


@pytest.mark.parametrize(
    "names", [[("a",)], [("a",), ("b",), ("c",)], [("b",), ("a",)], [("a", "b", "c")]]
)
def test_scores_of_other_patients_than_those_named_are_refused(
    names: list[tuple[str, ...]],
) -> None:
    same = label(0, 1, 2)
    evaluation = evaluate_segmentation("test", CLASSES, [("a", same, same), ("b", same, same)])
    with pytest.raises(ConsiliumError) as caught:
        patient_scores(evaluation, [Record(found) for found in names])
    assert caught.value.code == "privacy.truth"
