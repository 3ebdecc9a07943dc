"""Made-up patients seen through the study's own network, loss and gradient engine."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from consilium_client.auditing.exact import Check
from consilium_client.auditing.sensitivity import (
    distinguishing,
    influence,
    influence_verdict,
)
from consilium_client.auditing.subject import Subject
from consilium_common.study import Study
from consilium_common.study.covariates import input_channels

if TYPE_CHECKING:
    from consilium_client.training.compute import Compute
    from consilium_client.training.engines.base import GradientEngine
    from consilium_client.training.engines.choice import Choice

#: Fewer releases could not refute a noise multiplier of a half, whatever they showed.
_FEWEST_RELEASES: Final = 200
_MOST_RELEASES: Final = 1000
#: Patients beside the one who comes and goes.
_OTHERS: Final = 2
#: Intensities of that patient's images, as multiples of ordinary ones.
_IMAGES: Final = {"ordinary": 1.0, "empty": 0.0, "enormous": 1e30, "not a number": np.nan}


@dataclass(frozen=True, eq=False)
class _Case:
    """A random image with a random label."""

    case_id: str
    pixels: NDArray[np.float32]
    truth: NDArray[Any]

    def image(self) -> NDArray[np.float32]:
        return self.pixels

    def label(self) -> NDArray[Any]:
        return self.truth


@dataclass(frozen=True)
class _Patient:
    cases: tuple[_Case, ...]


@dataclass(frozen=True)
class NetworkPatients:
    """A study's network, and what random patients' images do to its gradient.

    Every patient has as many cases as the study takes images of a patient, so that each image is
    seen at every step and a patient's gradient is the same each time.
    """

    study: Study

    def engine(self, brightness: Sequence[float]) -> GradientEngine:
        """Return the engine that training would use for patients of these brightnesses."""
        from consilium_client.training.engines.choice import build_engine
        from consilium_client.training.learner import Learner
        from consilium_client.training.losses import build_loss
        from consilium_client.training.patches import PatchSource

        study, rng = self._still, np.random.default_rng()
        learner = Learner(
            study=study,
            network=self._network,
            compute=self._compute,
            loss=build_loss(study),
            source=PatchSource(study, [self._patient(rng, b) for b in brightness]),
        )
        return build_engine(self.choice.name, learner.patient_task, expected=len(brightness))

    @functools.cached_property
    def choice(self) -> Choice:
        """The engine that training would choose for this study on a CPU, and why."""
        from consilium_client.training.engines.choice import choose_engine

        return choose_engine(self._still, self._network, precision=self._compute.precision)

    @functools.cached_property
    def _still(self) -> Study:
        """The study without random changes of its images; its network has no dropout either."""
        from consilium_common.study.schema import Augmentation

        training = self.study.training.model_copy(update={"augmentation": Augmentation()})
        return self.study.model_copy(update={"training": training})

    @functools.cached_property
    def _compute(self) -> Compute:
        from consilium_client.training.compute import choose_compute

        return choose_compute(self._still, "cpu", "float32")

    @functools.cached_property
    def _network(self) -> Any:
        import torch

        from consilium_common.models.registry import build_network

        network = self._compute.place(build_network(self._still))
        network.train()
        for layer in network.modules():
            # The same gradient each time: what changes between two releases is the patient alone.
            if isinstance(layer, torch.nn.modules.dropout._DropoutNd):
                layer.p = 0.0
        return network

    def _patient(self, rng: np.random.Generator, brightness: float) -> _Patient:
        task, training = self.study.task, self.study.training
        size = tuple(training.patch or self.study.preprocessing.size or ())
        classes = len(task.classes)
        # A look and an order of classes of one's own: patients as alike as noise would hide in
        # each other, and an attack on them would show little.
        frequencies = rng.uniform(-1, 1, (input_channels(task), len(size)))
        style = frequencies, rng.dirichlet([0.3] * classes)
        cases = []
        for number in range(training.patches_per_patient):
            pixels = _waves(rng, style[0], size)
            with np.errstate(invalid="ignore"):
                pixels = pixels * np.float32(brightness)
            truth: NDArray[Any]
            if task.kind == "segmentation":
                truth = rng.choice(classes, size=size, p=style[1]).astype(np.uint8)
            elif task.multi_label:
                truth = rng.integers(2, size=classes).astype(np.float32)
            else:
                truth = np.asarray(rng.choice(classes, p=style[1]))
            cases.append(_Case(f"{number}", pixels, truth))
        return _Patient(tuple(cases))


def _waves(
    rng: np.random.Generator, frequencies: NDArray[np.float64], size: tuple[int, ...]
) -> NDArray[np.float32]:
    """Return an image (channels, \\*size): one wave a channel, in radians a voxel, and noise."""
    grid = np.indices(size).reshape(len(size), -1)
    waves = 2 * np.sin(3 * frequencies @ grid + rng.uniform(0, 6, (len(frequencies), 1)))
    noise = 0.3 * rng.standard_normal(waves.shape)
    return np.asarray(waves + noise, dtype=np.float32).reshape(-1, *size)


def network_influence_check(
    subject: Subject, patients: NetworkPatients, false_alarm: float
) -> Check:
    """Test, through the study's network, that one patient moves a release by the clip norm at most.

    The others are there so that a network or engine that couples patients is seen.
    """
    found = {}
    for name, brightness in _IMAGES.items():
        engine = patients.engine([1.0] * _OTHERS + [brightness])
        found[name] = influence(subject, engine, _OTHERS + 1)
    return influence_verdict(
        (
            "network-influence",
            "Does one patient, seen through the study's network, move a release by the clip norm "
            "at most?",
            "distance of two releases, with and without one patient, in clip norms",
        ),
        {f"{name} images'": value for name, value in found.items()},
        subject.size,
        false_alarm,
    )


def network_distinguishing_check(
    subject: Subject, patients: NetworkPatients, *, seconds: float, false_alarm: float
) -> Check | None:
    """Tell releases with one patient, seen through the network, from releases without.

    The noise multiplier is at most a half: the same code, but against much noise so few releases
    would show nothing.

    Parameters
    ----------
    seconds : float
        About how long to go on.

    Returns
    -------
    Check or None
        None where so little time allows too few releases to refute anything.
    """
    engine = patients.engine([1.0])
    noise = min(subject.parameters.noise_multiplier, 0.5)
    weaker = replace(subject, parameters=replace(subject.parameters, noise_multiplier=noise))
    began = time.monotonic()
    weaker.release(engine, 1, 1, sampling_rate=1.0)
    weaker.release(engine, 0, 1, sampling_rate=1.0)
    releases = min(_MOST_RELEASES, int(seconds / (time.monotonic() - began)))
    if releases < _FEWEST_RELEASES:
        return None
    return distinguishing(
        (
            "network-distinguishing",
            "Can an attacker tell a release with a patient, seen through the study's network, from "
            "one without better than claimed?",
        ),
        weaker,
        engine,
        releases=releases,
        false_alarm=false_alarm,
    )
