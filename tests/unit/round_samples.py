"""A joined site with a tiny private study, real from the ledger to the network; data in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from site_samples import NAME, JoinedSite, joined_site
from training_samples import MemoryCase, MemoryCohort, MemoryPatient

from consilium_client.local_evaluation import evaluate
from consilium_client.local_round import LocalRounds
from consilium_client.store import StoredUpdate, StudyStore
from consilium_client.training.evaluation import Evaluation
from consilium_client.training.session import TrainingSession
from consilium_common.models.registry import initial_weights
from consilium_common.models.weights import pack
from consilium_common.study import Study
from consilium_common.wire.messages import Instructions

COHORT_SIZE = 5
ROUNDS = 2
POLICY = """\
schema: consilium/policy/v1
budget: {epsilon: 10.0, delta: 0.001}
minimal_cohort: 2
"""


@dataclass(frozen=True)
class KeyedPatient(MemoryPatient):
    key: str


def keyed_patient(number: int) -> KeyedPatient:
    """Return a patient with one 16 × 16 image, whose bright half is class 1."""
    rng = np.random.default_rng(number)
    label = np.zeros((16, 16), dtype=np.uint8)
    label[: 6 + number % 5] = 1
    pixels = (label[None] * 2 + rng.standard_normal((1, 16, 16)) * 0.3).astype("f4")
    key = hashlib.sha256(b"patient %d" % number).hexdigest()[:32]
    return KeyedPatient((MemoryCase(f"case-{number}", pixels, label),), key)


def keyed_cohort() -> MemoryCohort:
    return MemoryCohort(
        {
            "train": [keyed_patient(n) for n in range(6)],
            "test": [keyed_patient(100 + n) for n in range(3)],
        }
    )


def tiny_study(*, release: str = "private", private: bool = True, **privacy: Any) -> Study:
    """Return a study of two rounds of two steps on 16 × 16 images."""
    evaluation: dict[str, Any] = {"release": release}
    if release == "private":
        evaluation["epsilon"] = 0.5
    settings = {
        "mode": "patient",
        "sampling_rate": 0.5,
        "clip_norm": 1.0,
        "noise_multiplier": 2.0,
        "delta": 1e-3,
        **privacy,
    }
    return Study.model_validate(
        {
            "schema": "consilium/study/v1",
            "name": "tiny",
            "task": {
                "kind": "segmentation",
                "dimensions": 2,
                "inputs": ["ct"],
                "classes": ["background", "organ"],
            },
            "model": {"network": "unet", "arguments": {"channels": [4, 8], "strides": [2]}},
            "training": {"steps_per_round": 2, "batch_size": 2, "patch": [16, 16]},
            "privacy": settings if private else {"mode": "none"},
            "federation": {"rounds": ROUNDS},
            "evaluation": evaluation,
        }
    )


def deciding_site(folder: Path, study: Study) -> JoinedSite:
    """Return a site that has approved the study."""
    site = joined_site(folder)
    site.home.policy.write_text(POLICY)
    StudyStore(site.home).decide(study, "approved", COHORT_SIZE, "", evaluation_size=3)
    return site


class RoundsAtSite:
    """What a worker holds of one study, and the aggregator's part: asking.

    Parameters
    ----------
    cohort : MemoryCohort
        The site's patients, without files.
    """

    def __init__(self, site: JoinedSite, study: Study, cohort: MemoryCohort) -> None:
        self.site = site
        self.study = study
        self.cohort = cohort
        self.weights = pack(initial_weights(study))
        self.session = TrainingSession(study, cohort, device="cpu")
        self.rounds = LocalRounds(
            site.home,
            site.identity,
            StudyStore(site.home).approved(study.digest),
            self.session,
            [patient.key for patient in cohort.splits["train"]],
            evaluated=cohort.splits["test"],
        )

    def train(self, number: int) -> StoredUpdate:
        told = Instructions(self.study.digest, number, COHORT_SIZE)
        return self.rounds.train(told, self.weights, lambda _, __: None)

    def evaluate(self, rounds_done: int) -> dict[str, float]:
        last = rounds_done == ROUNDS
        told = Instructions(self.study.digest, rounds_done, COHORT_SIZE, last=last)

        def evaluation() -> Evaluation:
            return evaluate(
                self.site.home,
                self.session,
                self.cohort,
                self.weights,
                site=NAME,
                rounds_done=rounds_done,
                last=last,
            )

        return self.rounds.evaluate(told, evaluation)
