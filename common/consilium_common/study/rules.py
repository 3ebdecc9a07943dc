"""What a study as a whole must keep to, beyond its schema: checked before any site is asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from consilium_common.errors import ConsiliumError
from consilium_common.study.problems import Problem
from consilium_common.study.schema import AdaptiveClipping, Study

if TYPE_CHECKING:
    from torch import nn

    from consilium_common.privacy.events import PrivacyParameters


def study_problems(study: Study) -> list[Problem]:
    """Return everything that does not fit within the study, its network included. No torch."""
    from consilium_common.models.registry import network_problems

    return [*_image_problems(study), *network_problems(study)]


def _image_problems(study: Study) -> Iterator[Problem]:
    task, training, size = study.task, study.training, study.preprocessing.size
    if task.dimensions == 2 and study.preprocessing.orientation == "LPS":
        text = "`preprocessing.orientation` is for volumes; leave it out of a 2D study"
        yield Problem(("preprocessing", "orientation"), text)
    if training.patch is not None and size is not None:
        beyond = [n for n, m in zip(training.patch, size, strict=True) if n > m]
        if beyond:
            fitting = [min(n, m) for n, m in zip(training.patch, size, strict=True)]
            text = f"`training.patch` {training.patch} is larger than `preprocessing.size` {size}"
            yield Problem(("training", "patch"), f"{text}; take at most {fitting}")
    changes = training.augmentation.model_dump()
    if changes.pop("copies") > 1 and not any(changes.values()):
        text = "`training.augmentation.copies` of an unchanged image are one image"
        yield Problem(
            ("training", "augmentation", "copies"), f"{text}; turn on a change, such as `flip: 0.5`"
        )
    yield from patch_problems(study)


def patch_problems(study: Study) -> Iterator[Problem]:
    """Yield what patients' patches lack in a private study; sites ask this too before training."""
    training = study.training
    if (
        study.privacy.mode == "patient"
        and study.task.dimensions == 3
        and training.patch is not None
        and training.patches_per_patient < 2
    ):
        text = "a private study in 3D needs at least two patches per patient: one is as dear as"
        yield Problem(
            ("training", "patches_per_patient"),
            f"{text} two, and a worse gradient; set `training.patches_per_patient` to 2 or more "
            "(clipping is per patient, so it costs no privacy)",
            "study.patches",
        )


def check_mechanism(study: Study, parameters: PrivacyParameters) -> None:
    """Refuse adaptive clipping whose count leaves no budget for the gradient.

    The count (each sampled patient as a half or its negative) has the noise multiplier
    2 · count_noise. Count and gradient together cost as much as the study's σ, so the count alone
    must cost less: its multiplier must be larger.

    Raises
    ------
    ConsiliumError
        ``privacy.clipping``: σ, given or calibrated, is not below 2 · count_noise.
    """
    clipping = getattr(study.privacy, "clipping", None)
    sigma = parameters.noise_multiplier
    if isinstance(clipping, AdaptiveClipping) and sigma >= 2 * clipping.count_noise:
        raise ConsiliumError(
            "privacy.clipping",
            f"Adaptive clipping counts with noise {clipping.count_noise:g}, which alone costs as "
            f"much as the study's σ of {sigma:g} allows.",
            where="privacy.clipping.count_noise",
            hint=f"Set count_noise above {sigma / 2:g}; about {2 * sigma:.3g} leaves the gradient "
            "nearly all.",
        )


def check_network(study: Study, network: nn.Module) -> None:
    """Refuse a private study whose network or engine cannot keep the promise. An outline will do.

    Raises
    ------
    ConsiliumError
        ``privacy.network``, as :func:`consilium_common.models.private.check_private`;
        ``privacy.engine``: the engine that the study names cannot take the network.
    """
    if study.privacy.mode != "patient":
        return
    from consilium_common.models.private import check_private, engine_problem

    check_private(network)
    problem = engine_problem(network, study.privacy.engine)
    if problem:
        raise ConsiliumError(
            "privacy.engine",
            f"The engine {study.privacy.engine} cannot take this network: {problem}.",
            where="privacy.engine",
            hint="Leave privacy.engine out, or set it to loop, which takes every network.",
        )
