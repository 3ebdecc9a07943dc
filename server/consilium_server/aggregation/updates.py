"""The updates of a round: each checked by itself, then read side by side, block by block."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from consilium_common.errors import ConsiliumError
from consilium_common.models.tensor_files import PIECE, TensorFile
from consilium_common.models.weights import TensorSpec
from consilium_common.study import Study
from consilium_server.networks import exchanged

Values = NDArray[np.float64]

#: Elements of all updates together that are held at a time: 4 MB of float64.
_BLOCK: Final = 512 * 1024
#: Elements of one update that are read in one go: fewer would be all system calls.
_LEAST, _MOST = 8 * 1024, 128 * 1024


@dataclass(frozen=True)
class SiteUpdate:
    """One site's update, arrived and decoded.

    Attributes
    ----------
    path : Path
        Float32 safetensors, exactly ``sent_specs(study)``.
    weight : float
        Public weight of the site, positive.
    steps : int
        Local steps that made it, positive.
    norm : float or None
        What :func:`check_update` returned; None: it was not checked yet.
    base : Path or None
        The model that it began from, where that is not the present one (buffered mode).
    staleness : int
        Steps that the global model has made since it began.
    """

    site: str
    path: Path
    weight: float
    steps: int
    norm: float | None = None
    base: Path | None = None
    staleness: int = 0


def open_model(study: Study, path: Path) -> TensorFile:
    """Open a global model of the study; what is wrong with it is no site's fault.

    Raises
    ------
    ConsiliumError
        ``state.checkpoint``: gone, damaged, or of another network.
    """
    try:
        model = TensorFile(path)
        if not set(exchanged(study).shared) <= set(model.specs):
            raise ConsiliumError("run.bad-update", "It is the model of another network.")
    except ConsiliumError as error:
        raise ConsiliumError(
            "state.checkpoint",
            f"The study's global model cannot be used. {error.message}",
            where=str(path),
            hint="Start the study again: it goes on from its last checkpoint, which is verified"
            " first.",
        ) from error
    return model


def check_update(study: Study, path: Path, model: Path) -> float:
    """Refuse an update that is not what the study declares; return how far it goes.

    Parameters
    ----------
    path : Path
        The update, decoded.
    model : Path
        The global model that it began from.

    Returns
    -------
    float
        L2 norm of the change of the model's tensors, in float64.

    Raises
    ------
    ConsiliumError
        ``run.bad-update``: other names, shapes or dtypes, a value that is not finite, or a norm
        above ``federation.screening.norm_bound``; ``state.checkpoint``: the model is damaged.
    """
    what = exchanged(study)
    start = open_model(study, model)
    update = TensorFile(path, what.sent)
    squares = []
    # Filled again and again: new memory for each piece would cost as much as the arithmetic.
    longest = min(PIECE, max((spec.size for spec in what.sent), default=0))
    sent, before = np.empty(longest, "<f4"), np.empty(longest, "<f4")
    squared = np.empty(longest)
    for spec in what.sent:
        of_model = spec in what.shared
        for position in range(0, spec.size, PIECE):
            count = min(PIECE, spec.size - position)
            change = update.read(spec.name, position, count, out=sent)
            if of_model:
                # In float32: the difference is not exact where it is not small, and need not be.
                with np.errstate(over="ignore", invalid="ignore"):
                    change -= start.read(spec.name, position, count, out=before)
            wide = squared[:count]
            np.copyto(wide, change)
            # One look at the sum finds a NaN or an infinity anywhere: squares of float32 are far
            # from the end of float64.
            square = float(np.square(wide, out=wide).sum())
            if not math.isfinite(square):
                raise ConsiliumError(
                    "run.bad-update",
                    f"Tensor {spec.name} has a value that is not finite (NaN or infinity).",
                    hint="Training diverged at the site; a smaller learning rate helps.",
                )
            if of_model:
                squares.append(square)
    norm = math.sqrt(math.fsum(squares))
    check_norm(study, norm)
    return norm


def check_norm(study: Study, norm: float) -> None:
    """Refuse a change that is longer than the study's bound (``run.bad-update``)."""
    bound = study.federation.screening.norm_bound
    if bound is not None and not norm <= bound:
        raise ConsiliumError(
            "run.bad-update",
            f"The change of the model has norm {norm:.4g}, above the study's {bound:.4g}.",
            hint="The site's training diverged or is hostile; look at its data and its log.",
        )


@dataclass(frozen=True)
class Block:
    """The same elements of one tensor in the model, in every update, and in the state.

    Attributes
    ----------
    model : ndarray
        Shape ``(elements,)``, as every array here float64.
    updates : ndarray
        Shape ``(sites, elements)``: the sites' models, clipped where the study says so.
    extras : ndarray or None
        Of the tensor that the strategy exchanges beside this one, same shape.
    state : tuple of ndarray
        What the strategy kept, in its order; zeros before the first round.
    """

    model: Values
    updates: Values
    extras: Values | None = None
    state: tuple[Values, ...] = ()


@dataclass(frozen=True)
class Opened:
    """An update that passed its checks, ready to be read.

    Attributes
    ----------
    scale : float
        What its change is multiplied by: below 1 where it is clipped.
    """

    site: str
    file: TensorFile
    base: TensorFile | None
    weight: float
    steps: int
    staleness: int
    norm: float
    scale: float = 1.0


class Updates:
    """The good updates of a round, in the order of their sites' names.

    Parameters
    ----------
    model : TensorFile
        The global model before the round.
    specs : sequence of TensorSpec
        The tensors that are aggregated.
    """

    def __init__(
        self, model: TensorFile, opened: Sequence[Opened], specs: Sequence[TensorSpec]
    ) -> None:
        self.model = model
        self.opened = tuple(sorted(opened, key=lambda one: one.site))
        self.specs = tuple(specs)
        self.weights = np.array([one.weight for one in self.opened])
        self.steps = np.array([one.steps for one in self.opened], dtype=np.float64)
        self.staleness = np.array([one.staleness for one in self.opened], dtype=np.float64)

    def __len__(self) -> int:
        return len(self.opened)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites whose updates these are."""
        return tuple(one.site for one in self.opened)

    def without(self, sites: Collection[str]) -> Updates:
        """Return the others."""
        kept = [one for one in self.opened if one.site not in sites]
        return Updates(self.model, kept, self.specs)

    def blocks(
        self,
        spec: TensorSpec,
        *,
        extra: str = "",
        state: Sequence[tuple[str, TensorFile | None]] = (),
    ) -> Iterator[Block]:
        """Yield one tensor of all updates from front to back.

        Parameters
        ----------
        extra : str
            Prefix of the tensors that the strategy exchanges beside the model's; empty: none.
        state : sequence of (str, TensorFile or None)
            Prefix and file of each tensor that the strategy keeps.
        """
        # The number of sites decides and never the machine, so that sums have one order.
        length = min(max(_BLOCK // len(self), _LEAST), _MOST)
        read = np.empty(min(length, spec.size), "<f4")
        for start in range(0, spec.size, length):
            count = min(length, spec.size - start)
            model = self.model.read(spec.name, start, count).astype(np.float64)
            updates = np.empty((len(self), count))
            for row, one in zip(updates, self.opened, strict=True):
                row[:] = one.file.read(spec.name, start, count, out=read)
                if one.base is not None or one.scale != 1.0:
                    base = one.base.read(spec.name, start, count) if one.base else model
                    row[:] = model + one.scale * (row - base)
            extras = None
            if extra:
                extras = np.empty((len(self), count))
                for row, one in zip(extras, self.opened, strict=True):
                    row[:] = one.file.read(extra + spec.name, start, count, out=read)
                    if one.scale != 1.0:
                        np.multiply(row, one.scale, out=row)
            kept = tuple(
                np.zeros(count)
                if file is None
                else file.read(prefix + spec.name, start, count).astype(np.float64)
                for prefix, file in state
            )
            yield Block(model, updates, extras, kept)

    def all_blocks(self) -> Iterator[Block]:
        """Yield every block of every tensor: for what must be known before the first is made."""
        for spec in self.specs:
            yield from self.blocks(spec)


def open_update(study: Study, update: SiteUpdate, model: Path) -> Opened:
    """Check an update where that was not done yet, and clip it where the study says so.

    Raises
    ------
    ConsiliumError
        ``run.bad-update``, as :func:`check_update`; or its weight or steps are not positive;
        ``run.stale``: it began too long ago for a buffered study; ``state.checkpoint``: the model
        that it began from is damaged.
    """
    buffered = study.federation.buffered
    if buffered is not None and update.staleness > buffered.most_staleness:
        raise ConsiliumError(
            "run.stale",
            f"It began {update.staleness} steps of the global model ago, more than the study's"
            f" {buffered.most_staleness}.",
        )
    if not (0 < update.weight < math.inf and update.steps > 0):
        raise ConsiliumError(
            "run.bad-update",
            f"The weight {update.weight} or the number of steps {update.steps} is not positive.",
        )
    base = open_model(study, update.base) if update.base else None
    file = TensorFile(update.path, exchanged(study).sent)
    if update.norm is None:
        norm = check_update(study, update.path, update.base or model)
    else:
        norm = update.norm
        check_norm(study, norm)
    opened = Opened(
        update.site,
        file,
        base,
        update.weight,
        update.steps,
        update.staleness,
        norm,
    )
    bound = study.federation.screening.clip_norm
    return replace(opened, scale=bound / norm) if bound is not None and norm > bound else opened
