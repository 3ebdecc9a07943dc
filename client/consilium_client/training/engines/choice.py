"""Which gradient engine a study gets at a site, and why: one measured rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from consilium_client.training.engines.base import LocalEngine, PatientTask
from consilium_common.errors import ConsiliumError
from consilium_common.study import Study

Name = Literal["loop", "vmap", "opacus"]


@dataclass(frozen=True)
class Choice:
    """An engine's name and, in one sentence, why it is this one."""

    name: Name
    why: str


def choose_engine(study: Study, network: Any, *, precision: str = "float32") -> Choice:
    """Choose the engine of a private study. Every fact that decides is public.

    ``auto`` is the loop, except where a patient gives a single 3D image. Processor time of vmap in
    units of the loop's, measured on one CPU thread (torch 2.13, default arguments), with a single
    3D image a patient: SegResNet 32³ .21, U-Net 32³ .85 and 64³ about 1, ResNet10 48³ .96. In 2D it
    is .8 to .9 for a small U-Net and 1.2 for ResNet10 and DenseNet121, and with several images a
    patient the loop costs no more than plain training, in a quarter or less of vmap's memory.
    ``tests/benchmarks/engines.py`` measures the engines against plain training. CUDA devices follow
    the same rule: nothing else has been measured there.

    Parameters
    ----------
    network : torch.nn.Module
        The study's network as it is trained.
    precision : str
        Of the forward pass: ``float32`` or ``bfloat16``.

    Raises
    ------
    ConsiliumError
        ``privacy.engine`` when the engine that the study names cannot compute this network.
    """
    privacy = study.privacy
    assert privacy.mode == "patient"
    if privacy.engine != "auto":
        problem = _problem(privacy.engine, network, precision)
        if problem is not None:
            raise ConsiliumError(
                "privacy.engine",
                f"The engine {privacy.engine} cannot compute this network's gradients: {problem}.",
                where="privacy.engine",
                hint="Set it to auto or loop, which give the same gradients. If the precision is "
                "in the way, set training.precision, or the site's own, to float32.",
            )
        return Choice(privacy.engine, "the study names it")
    single = study.training.patches_per_patient * study.training.augmentation.copies == 1
    if study.task.dimensions == 3 and single:
        problem = _problem("vmap", network, precision)
        if problem is None:
            return Choice("vmap", "a single 3D image a patient, which the loop computes slowly")
        return Choice("loop", f"vmap cannot compute this network: {problem}")
    return Choice("loop", "as fast as vmap on such patients, in far less memory")


def _problem(name: Name, network: Any, precision: str) -> str | None:
    if name == "loop":
        return None
    if precision != "float32":
        # torch.func differentiates PReLU under autocast wrongly or not at all; opacus does not
        # promise to mix types.
        return f"it needs float32 and this site computes in {precision}"
    from consilium_common.models.private import engine_problem

    return engine_problem(network, name)


def build_engine(name: Name, task: PatientTask, *, expected: float) -> LocalEngine:
    """Build an engine that :func:`choose_engine` chose; ``expected`` patients a draw, public."""
    return _BUILDERS[name](task, expected)


def _loop(task: PatientTask, expected: float) -> LocalEngine:
    from consilium_client.training.engines.loop import PatientLoop

    return PatientLoop(task.network, task.patient_loss)


def _vmap(task: PatientTask, expected: float) -> LocalEngine:
    from consilium_client.training.engines.vmap import PatientVmap

    return PatientVmap(task, expected=expected)


def _hooks(task: PatientTask, expected: float) -> LocalEngine:
    from consilium_client.training.engines.hooks import PatientHooks

    return PatientHooks(task, expected=expected)


_BUILDERS: Final[dict[Name, Callable[[PatientTask, float], LocalEngine]]] = {
    "loop": _loop,
    "vmap": _vmap,
    "opacus": _hooks,
}
