"""What ``consilium study check FILE`` does: read, check, price, and say it in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from consilium_common.errors import ConsiliumError
from consilium_common.privacy.events import ADJACENCY, UNIT
from consilium_common.privacy.noise import noise_to_signal
from consilium_common.study.cost import Cost, cost
from consilium_common.study.document import Document, KeyPath
from consilium_common.study.load import load_document
from consilium_common.study.plan import describe
from consilium_common.study.problems import raise_problems
from consilium_common.study.rules import study_problems
from consilium_common.study.schema import Study
from consilium_common.study.statistics import tables


@dataclass(frozen=True)
class CheckResult:
    """A valid study and its plan.

    Attributes
    ----------
    study : Study
        The study.
    cost : Cost
        Values, bytes and ε.
    data : dict
        For ``--json``: file, name, digest, task, network, parameters, trained, trainable,
        normalised, start, tensors, bytes_per_round, rounds, total_steps, averaging, evaluation,
        statistics (tables and their bins; None where none are released), privacy (mode; with
        privacy the whole mechanism and ε), noise (with ``patients``), plan.
    lines : tuple of str
        The plan for a person, its digest last.
    """

    study: Study
    cost: Cost
    data: dict[str, Any]
    lines: tuple[str, ...]


def check(path: Path, patients: int | None = None) -> CheckResult:
    """Check a study file and price it.

    Parameters
    ----------
    path : Path
        The study's YAML file.
    patients : int, optional
        Patients of a cohort, for which the noise is compared with the signal.

    Raises
    ------
    ConsiliumError
        As :func:`consilium_common.study.load.load_study`; ``study.network`` and others with every
        line that does not fit; ``privacy.network`` with every layer for which privacy cannot be
        proven; ``study.trainable``, ``privacy.engine``, ``privacy.clipping``; ``privacy.…`` where
        the ε asked for cannot be reached or ``patients`` is no number of patients.
    """
    study, document = load_document(path)
    # Here and not while reading: a site reads studies of networks it need not know.
    raise_problems(
        study_problems(study),
        document.where,
        line_of=document.line,
        hint="Correct the file and run `consilium study check` again.",
    )
    try:
        price = cost(study)
    except ConsiliumError as error:
        place = _place(document, error)
        raise ConsiliumError(error.code, error.message, where=place, hint=error.hint) from error
    plan, noise = describe(study, price), None
    if patients is not None and price.privacy is not None:
        noise = noise_to_signal(price.privacy, patients, price.trained, study.federation.quorum)
        plan = [*plan, "", "Noise and signal", f"  {noise.sentence}"]
    data = _data(study, price, str(path), plan)
    if noise is not None:
        data["noise"] = {"patients": patients, **asdict(noise)}
    return CheckResult(study, price, data, (*plan, "", f"Digest {study.digest}"))


#: Where in the file an error stands that was found only by building or pricing.
_PLACES: Final[dict[str, KeyPath]] = {
    "privacy.network": ("model", "arguments", "norm"),
    "privacy.delta-invalid": ("privacy", "delta"),
    "privacy.clipping": ("privacy", "clipping", "count_noise"),
    "study.trainable": ("model", "trainable"),
    "study.strategy": ("federation", "strategy"),
    "privacy.engine": ("privacy", "engine"),
}


def _place(document: Document, error: ConsiliumError) -> str:
    category = error.code.partition(".")[0]
    path: KeyPath = ("privacy",) if category == "privacy" else ("model", "arguments")
    return f"{document.where}:{document.line(_PLACES.get(error.code, path))}"


def _data(study: Study, price: Cost, file: str, plan: list[str]) -> dict[str, Any]:
    start = study.model.start
    return {
        "file": file,
        "name": study.name,
        "digest": study.digest,
        "task": study.task.kind,
        "dimensions": study.task.dimensions,
        "network": study.model.network,
        "parameters": price.parameters,
        "trained": price.trained,
        "trainable": study.model.trainable,
        "normalised": list(price.normalised),
        "start": None if start is None else start.model_dump(),
        "tensors": price.tensors,
        "bytes_per_round": price.bytes_per_round,
        "rounds": study.federation.rounds,
        "total_steps": study.total_steps,
        "averaging": study.federation.averaging,
        "evaluation": {
            "after_rounds": list(study.evaluations),
            "release": study.evaluation.release,
            "sufficient": study.evaluation.sufficient,
        },
        "statistics": None
        if study.statistics is None
        else [{"name": one.name, "bins": list(one.bins)} for one in tables(study)],
        "privacy": _privacy(study, price),
        "plan": plan,
    }


def _privacy(study: Study, price: Cost) -> dict[str, Any]:
    privacy, mechanism = study.privacy, price.privacy
    if privacy.mode == "none" or mechanism is None:
        return {"mode": privacy.mode}
    return {
        "mode": privacy.mode,
        "model": privacy.model,
        "unit": UNIT,
        "adjacency": ADJACENCY,
        "sampling_rate": mechanism.sampling_rate,
        "clip_norm": mechanism.clip_norm,
        "clipping": privacy.clipping.model_dump(),
        "engine": privacy.engine,
        "noise_multiplier": mechanism.noise_multiplier,
        "steps": study.total_steps,
        "delta": mechanism.delta,
        "epsilon": price.epsilon,
        "epsilon_per_round": price.epsilon_per_round,
        "evaluations": mechanism.evaluations,
        "evaluation_noise": mechanism.evaluation_noise,
        "evaluation_epsilon": price.evaluation_epsilon,
        "statistics_noise": mechanism.statistics_noise,
        "statistics_epsilon": price.statistics_epsilon,
        "patient_epsilon": price.patient_epsilon,
    }
