"""What ``consilium study check FILE`` does: read, check, price, and say it in words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consilium_common.errors import ConsiliumError
from consilium_common.study.document import Document, KeyPath
from consilium_common.study.load import load_document
from consilium_common.study.plan import Cost, cost, describe
from consilium_common.study.problems import raise_problems
from consilium_common.study.schema import Study


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
        For ``--json``: file, name, digest, task, network, parameters, tensors, bytes_per_round,
        rounds, total_steps, privacy (mode; with privacy the whole mechanism and ε), plan.
    lines : tuple of str
        The plan for a person, its digest last.
    """

    study: Study
    cost: Cost
    data: dict[str, Any]
    lines: tuple[str, ...]


def check(path: Path) -> CheckResult:
    """Check a study file and price it.

    Raises
    ------
    ConsiliumError
        As :func:`consilium_common.study.load.load_study`; ``study.network`` with every line that
        does not fit; ``privacy.…`` where the ε asked for cannot be reached.
    """
    study, document = load_document(path)
    # Here and not while reading: a site reads studies of networks it need not know.
    from consilium_common.models.registry import network_problems

    raise_problems(
        network_problems(study),
        document.where,
        line_of=document.line,
        hint="Correct the file and run `consilium study check` again.",
    )
    try:
        price = cost(study)
    except ConsiliumError as error:
        place = _place(document, error)
        raise ConsiliumError(error.code, error.message, where=place, hint=error.hint) from error
    plan = describe(study, price)
    return CheckResult(
        study=study,
        cost=price,
        data=_data(study, price, str(path), plan),
        lines=(*plan, "", f"Digest {study.digest}"),
    )


def _place(document: Document, error: ConsiliumError) -> str:
    category = error.code.partition(".")[0]
    path: KeyPath = ("privacy",) if category == "privacy" else ("model", "arguments")
    if error.code == "privacy.delta-invalid":
        path = ("privacy", "delta")
    return f"{document.where}:{document.line(path)}"


def _data(study: Study, price: Cost, file: str, plan: list[str]) -> dict[str, Any]:
    privacy: dict[str, Any] = {"mode": study.privacy.mode}
    if price.privacy is not None:
        from consilium_common.privacy.events import ADJACENCY, UNIT

        privacy |= {
            "model": getattr(study.privacy, "model", ""),
            "unit": UNIT,
            "adjacency": ADJACENCY,
            "sampling_rate": price.privacy.sampling_rate,
            "clip_norm": price.privacy.clip_norm,
            "noise_multiplier": price.privacy.noise_multiplier,
            "steps": study.total_steps,
            "delta": price.privacy.delta,
            "epsilon": price.epsilon,
            "epsilon_per_round": price.epsilon_per_round,
        }
    return {
        "file": file,
        "name": study.name,
        "digest": study.digest,
        "task": study.task.kind,
        "dimensions": study.task.dimensions,
        "network": study.model.network,
        "parameters": price.parameters,
        "tensors": price.tensors,
        "bytes_per_round": price.bytes_per_round,
        "rounds": study.federation.rounds,
        "total_steps": study.total_steps,
        "privacy": privacy,
        "plan": plan,
    }
