"""One round's aggregation: check, screen, combine block by block, write the next model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from consilium_common.errors import ConsiliumError
from consilium_common.models.exchange import CONTROL
from consilium_common.models.tensor_files import TensorFile, writing
from consilium_common.models.weights import TensorSpec
from consilium_common.study import Study
from consilium_server.aggregation.registry import rule_of
from consilium_server.aggregation.rules import Rule, Told, mean
from consilium_server.aggregation.screening import cosines
from consilium_server.aggregation.updates import (
    Opened,
    SiteUpdate,
    Updates,
    Values,
    open_model,
    open_update,
)
from consilium_server.networks import exchanged


@dataclass(frozen=True)
class Combined:
    """What became of a round's updates.

    Attributes
    ----------
    kept : tuple of str
        Sites whose update passed and took part; a robust strategy may still give it no weight.
    passed_over : tuple of str
        Those of them whose update is not in the model, as the strategy took others (Krum,
        Multi-Krum); they are under no suspicion.
    left_out : dict of str to str
        The other sites, each with the reason.
    norms : dict of str to float
        L2 norm of each site's change, before it was clipped.
    cosines : dict of str to float
        Cosine of each site's change to the median change; empty where the study does not screen.
    state : Path or None
        What the strategy keeps for the next round; None where it keeps nothing.
    """

    kept: tuple[str, ...]
    passed_over: tuple[str, ...]
    left_out: dict[str, str]
    norms: dict[str, float]
    cosines: dict[str, float]
    state: Path | None


def aggregate(
    study: Study,
    model: Path,
    updates: Sequence[SiteUpdate],
    state: Path | None,
    *,
    out: Path,
    out_state: Path,
    round_index: int,
    sites: int | None = None,
) -> Combined:
    """Make the next global model of the updates that are good.

    Memory depends neither on the model nor on the number of sites. Arithmetic is float64; the
    order of ``updates`` does not matter, to the last bit.

    Parameters
    ----------
    model : Path
        The whole global model before the round.
    updates : sequence of SiteUpdate
        At most one of each site.
    state : Path or None
        ``Combined.state`` of the round before.
    out, out_state : Path
        Replaced whole or not at all. They are not made durable: the checkpoint does that.
    round_index : int
        From 0.
    sites : int, optional
        Sites that take part in the study, asked in this round or not (default: those that sent).

    Raises
    ------
    ConsiliumError
        ``run.quorum``: no update is good, or too few for the strategy; ``run.diverged``: the new
        model would not be finite; ``state.disk``: no room; ``state.checkpoint``: the model is
        damaged. Nothing is replaced then.
    ValueError
        Two updates of one site.
    """
    if len({update.site for update in updates}) != len(updates):
        raise ValueError("two updates of one site")
    together, left_out = _good(study, model, updates)
    norms = {one.site: one.norm for one in together.opened}
    screened, found = _screened(study, together, left_out)
    if not screened.opened:
        raise ConsiliumError(
            "run.quorum",
            f"None of the {len(updates)} updates can be used. "
            + " ".join(f"{site}: {why}" for site, why in left_out.items()),
        )
    settings = study.federation.buffered or study.federation.strategy
    rule = rule_of(study.federation)
    told = Told(settings, round_index, sites if sites is not None else len(updates))
    averaged = frozenset() if rule.chooses else exchanged(study).statistics
    taken = rule.select(screened, told) if rule.select else screened.sites
    passed_over = tuple(site for site in screened.sites if site not in taken)
    kept_state = _combine(
        *(screened.without(passed_over), rule, told, state, averaged),
        out=out,
        out_state=out_state,
    )
    kept = out_state if kept_state else None
    return Combined(screened.sites, passed_over, left_out, norms, found, kept)


def offered(study: Study, model: Path, state: Path | None, out: Path) -> Path:
    """Return the file that sites get: the model itself, or with what the strategy adds to it.

    Parameters
    ----------
    state : Path or None
        ``Combined.state`` of the round before.
    out : Path
        Written where the strategy adds something (SCAFFOLD: the aggregator's control variate).
    """
    if study.federation.strategy.name != "scaffold":
        return model
    weights, shared = open_model(study, model), exchanged(study).shared
    controls = tuple(TensorSpec(CONTROL + spec.name, spec.shape) for spec in shared)
    kept = TensorFile(state, controls) if state is not None else None
    with writing(out, (*weights.specs, *controls), durable=False) as writer:
        for spec in weights.specs:
            for _, values in weights.pieces(spec):
                writer.put(spec.name, values)
        for spec in controls:
            if kept is None:
                writer.put(spec.name, np.zeros(spec.size, dtype=np.float32))
                continue
            for _, values in kept.pieces(spec):
                writer.put(spec.name, values)
    return out


def _good(
    study: Study, model: Path, updates: Sequence[SiteUpdate]
) -> tuple[Updates, dict[str, str]]:
    start = open_model(study, model)
    opened: list[Opened] = []
    left_out: dict[str, str] = {}
    for update in sorted(updates, key=lambda one: one.site):
        try:
            opened.append(open_update(study, update, model))
        except ConsiliumError as error:
            if not error.code.startswith("run."):
                raise  # no fault of a site
            left_out[update.site] = f"{error.code}: {error.message}"
    return Updates(start, opened, exchanged(study).shared), left_out


def _screened(
    study: Study, updates: Updates, left_out: dict[str, str]
) -> tuple[Updates, dict[str, float]]:
    least = study.federation.screening.cosine
    if least is None or not updates.opened:
        return updates, {}
    found = cosines(updates)
    away = [site for site, cosine in found.items() if cosine < least]
    for site in away:
        left_out[site] = (
            f"run.bad-update: Its change has cosine {found[site]:.3f} to the median of all sites'"
            f" changes, below the study's {least:g}."
        )
    return updates.without(away), found


def _combine(
    updates: Updates,
    rule: Rule,
    told: Told,
    state: Path | None,
    averaged: frozenset[str],
    *,
    out: Path,
    out_state: Path,
) -> bool:
    """Write the new model and what the strategy keeps; return whether it keeps anything."""
    shared = {spec.name for spec in updates.specs}
    kept = [
        TensorSpec(prefix + spec.name, spec.shape)
        for prefix in rule.state
        for spec in updates.specs
    ]
    before = TensorFile(state, kept) if state is not None and kept else None
    step = rule.begin(updates, told)
    with ExitStack() as stack:
        writer = stack.enter_context(writing(out, updates.model.specs, durable=False))
        keeper = stack.enter_context(writing(out_state, kept, durable=False)) if kept else None
        for spec in updates.model.specs:
            if spec.name not in shared:
                for _, values in updates.model.pieces(spec):
                    writer.put(spec.name, values)
                continue
            read = [(prefix, before) for prefix in rule.state]
            for block in updates.blocks(spec, extra=rule.extra, state=read):
                new, states = step(block)
                if spec.name in averaged:
                    new = mean(block.updates, updates.weights)
                writer.put(spec.name, _finite(new, spec.name))
                if keeper is not None:
                    for prefix, values in zip(rule.state, states, strict=True):
                        keeper.put(prefix + spec.name, _finite(values, spec.name))
    return bool(kept)


def _finite(values: Values, name: str) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        found = values.astype(np.float32)
    if not np.isfinite(found).all():
        raise ConsiliumError(
            "run.diverged",
            f"Aggregation would make tensor {name} infinite or not a number.",
            hint="Take a smaller learning rate, at the sites or at the aggregator, or a norm bound"
            " in federation.screening.",
        )
    return found
