"""Figures of a model on a site's cases: Dice per class, accuracy, AUC; as sums and counts.

Sums and counts, because averages of averages mislead and because a class that a case does not hold
must be neither a 0 nor a 1: such cases are left out of the class's mean and counted apart. An empty
prediction of a class that is there is a Dice of 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilium_client.training.cases import Array, PatientRecord, Split
from consilium_common.errors import ConsiliumError


@dataclass(frozen=True)
class CaseRow:
    """One case's figures. Local: it names a case."""

    case_id: str
    #: Segmentation: Dice per foreground class, None where the reference lacks the class.
    #: Classification: probability per class.
    values: Mapping[str, float | None]
    #: Classification: decisions that are right, of how many (1, or one per class).
    correct: int = 0
    decisions: int = 0


@dataclass(frozen=True)
class ClassDice:
    """Dice of one foreground class over the cases whose reference holds it."""

    name: str
    total: float
    count: int
    #: Cases whose reference lacks the class: not part of the mean.
    absent: int
    #: Of these, cases where the model saw the class all the same.
    false_alarms: int

    @property
    def mean(self) -> float | None:
        """Mean Dice, 0 to 1; None when no case holds the class."""
        return self.total / self.count if self.count else None


@dataclass(frozen=True)
class ClassAuc:
    """Area under the ROC curve of one class against the rest."""

    name: str
    #: 0 to 1; None unless both positive and negative cases are there.
    auc: float | None
    positives: int
    negatives: int


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model on one split at one site."""

    split: Split
    rows: tuple[CaseRow, ...]
    dice: tuple[ClassDice, ...] = ()
    auc: tuple[ClassAuc, ...] = ()

    @property
    def mean_dice(self) -> float | None:
        """Mean over the foreground classes that occur of their mean Dice."""
        means = [figure.mean for figure in self.dice if figure.mean is not None]
        return sum(means) / len(means) if means else None

    @property
    def accuracy(self) -> float | None:
        """Share of right decisions: of cases, or, multi-label, of cases times classes."""
        decisions = sum(row.decisions for row in self.rows)
        return sum(row.correct for row in self.rows) / decisions if decisions else None

    def to_dict(self, *, rows: bool = False) -> dict[str, Any]:
        """Return plain values. Figures per case are added only when ``rows`` is asked for."""
        value: dict[str, Any] = {"split": self.split, "cases": len(self.rows)}
        if self.dice:
            value["mean_dice"] = self.mean_dice
            value["dice"] = {
                figure.name: {
                    "mean": figure.mean,
                    "total": figure.total,
                    "count": figure.count,
                    "absent": figure.absent,
                    "false_alarms": figure.false_alarms,
                }
                for figure in self.dice
            }
        if self.auc:
            value["accuracy"] = self.accuracy
            value["correct"] = sum(row.correct for row in self.rows)
            value["decisions"] = sum(row.decisions for row in self.rows)
            value["auc"] = {
                figure.name: {
                    "auc": figure.auc,
                    "positives": figure.positives,
                    "negatives": figure.negatives,
                }
                for figure in self.auc
            }
        if rows:
            value["rows"] = [{"case_id": r.case_id, "values": dict(r.values)} for r in self.rows]
        return value


def evaluate_segmentation(
    split: Split, classes: Sequence[str], cases: Iterable[tuple[str, Array, Array]]
) -> Evaluation:
    """Compare predicted with reference label maps.

    Parameters
    ----------
    classes : sequence of str
        Class names by label value; the first is the background, which is not scored.
    cases : iterable of (case_id, prediction, reference)
        Label maps of equal shape.
    """
    names = classes[1:]
    rows = []
    totals, counts = np.zeros(len(names)), np.zeros(len(names), dtype=int)
    absent, alarms = np.zeros(len(names), dtype=int), np.zeros(len(names), dtype=int)
    for case_id, prediction, reference in cases:
        overlap, predicted, present = _volumes(prediction, reference, len(classes))
        values: dict[str, float | None] = {}
        for index, name in enumerate(names):
            if present[index] == 0:
                absent[index] += 1
                alarms[index] += predicted[index] > 0
                values[name] = None
                continue
            dice = 2.0 * float(overlap[index]) / float(predicted[index] + present[index])
            totals[index] += dice
            counts[index] += 1
            values[name] = dice
        rows.append(CaseRow(case_id, values))
    figures = zip(names, totals, counts, absent, alarms, strict=True)
    return Evaluation(
        split,
        tuple(rows),
        dice=tuple(ClassDice(n, float(t), int(c), int(a), int(f)) for n, t, c, a, f in figures),
    )


def evaluate_classification(
    split: Split,
    classes: Sequence[str],
    case_ids: Sequence[str],
    probabilities: NDArray[np.float64],
    truth: NDArray[np.bool_],
    *,
    multi_label: bool,
) -> Evaluation:
    """Score class probabilities.

    Parameters
    ----------
    probabilities, truth : (cases, classes)
        Predicted probabilities, and whether the case has the class.
    multi_label : bool
        Each class is a decision of its own, taken at a probability of one half.
    """
    rows = []
    for case_id, predicted, true in zip(case_ids, probabilities, truth, strict=True):
        if multi_label:
            correct, decisions = int(((predicted > 0.5) == true).sum()), len(classes)
        else:
            correct, decisions = int(true[int(predicted.argmax())]), 1
        values = {name: float(p) for name, p in zip(classes, predicted, strict=True)}
        rows.append(CaseRow(case_id, values, correct, decisions))
    figures = tuple(
        ClassAuc(
            name,
            area_under_curve(probabilities[:, index], truth[:, index]),
            int(truth[:, index].sum()),
            int((~truth[:, index]).sum()),
        )
        for index, name in enumerate(classes)
    )
    return Evaluation(split, tuple(rows), auc=figures)


def exact_figures(evaluation: Evaluation) -> dict[str, float]:
    """Return sums and counts per class: what aggregates rightly over sites, unlike means."""
    figures: dict[str, float] = {"cases": float(len(evaluation.rows))}
    for dice in evaluation.dice:
        figures[f"dice.{dice.name}.total"] = float(dice.total)
        figures[f"dice.{dice.name}.count"] = float(dice.count)
    if evaluation.auc:
        figures["correct"] = float(sum(row.correct for row in evaluation.rows))
        figures["decisions"] = float(sum(row.decisions for row in evaluation.rows))
    return figures


def patient_scores(evaluation: Evaluation, patients: Sequence[PatientRecord]) -> list[float]:
    """Return one score for each patient, from 0 (worst) to 1, over all of that patient's cases.

    Segmentation: the mean Dice over the patient's cases and foreground classes. As in the figures
    above, a class that a case's reference lacks is left out. Classification: the share of right
    decisions. A patient with nothing to score gets 1/2, the value that adds nothing to the sum of
    :mod:`consilium_client.score_query`. A score depends on that patient's own cases alone.

    Parameters
    ----------
    patients : sequence of PatientRecord
        The patients that were evaluated, in the order of the evaluation's rows.

    Raises
    ------
    ConsiliumError
        ``privacy.truth`` when the rows are not those of exactly these patients.
    """
    rows = iter(evaluation.rows)
    scores = []
    for patient in patients:
        own = [next(rows, None) for _ in patient.cases]
        if [row and row.case_id for row in own] != [case.case_id for case in patient.cases]:
            raise _other_patients()
        scores.append(_score([row for row in own if row is not None]))
    if next(rows, None) is not None:
        raise _other_patients()
    return scores


def _score(rows: Sequence[CaseRow]) -> float:
    decisions = sum(row.decisions for row in rows)
    if decisions:
        return sum(row.correct for row in rows) / decisions
    dice = [value for row in rows for value in row.values.values() if value is not None]
    return sum(dice) / len(dice) if dice else 0.5


def _other_patients() -> ConsiliumError:
    return ConsiliumError(
        "privacy.truth",
        "Other patients were evaluated than were charged; the figures are withheld.",
        hint="The charge stands, nothing has left. Report this as a fault of the program.",
    )


def area_under_curve(scores: NDArray[np.float64], truth: NDArray[np.bool_]) -> float | None:
    """Return the area under the ROC curve; None unless both kinds of cases are there.

    The Mann-Whitney statistic with mid-ranks for ties (Hanley and McNeil 1982): MONAI's value,
    without a loop over cases in Python.
    """
    from scipy.stats import rankdata

    positives = int(truth.sum())
    negatives = len(truth) - positives
    if not positives or not negatives:
        return None
    ranks = float(rankdata(scores)[truth].sum())
    return (ranks - positives * (positives + 1) / 2) / (positives * negatives)


def _volumes(
    prediction: Array, reference: Array, classes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return voxels shared, predicted and in the reference, per foreground class."""
    pairs = np.bincount(
        np.asarray(reference).reshape(-1).astype(np.int64) * classes + prediction.reshape(-1),
        minlength=classes * classes,
    ).reshape(classes, classes)
    return pairs.diagonal()[1:], pairs.sum(axis=0)[1:], pairs.sum(axis=1)[1:]
