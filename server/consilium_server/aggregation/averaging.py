"""The exponential average of the global models over rounds, from file to file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from consilium_common.models.tensor_files import TensorFile, writing


def running_average(
    average: Path, model: Path, *, decay: float, rounds_done: int, out: Path
) -> None:
    """Write the average of the global models after one more round.

    ``d·average + (1 − d)·model`` with ``d = min(decay, (1 + t)/(10 + t))`` after t rounds: the
    usual warm-up, so that the starting model is soon forgotten. It costs no privacy: a function of
    what was released. Frozen tensors, the same in both, stay what they are.

    Parameters
    ----------
    average : Path
        Average before; the starting model before the first round. A whole model, as the others.
    model : Path
        Global model after this round.
    decay : float
        In [0, 1).
    rounds_done : int
        t, this round included.
    out : Path
        Replaced whole or not at all; may be ``average``.

    Raises
    ------
    ConsiliumError
        ``state.disk``: no room.
    """
    d = min(decay, (1 + rounds_done) / (10 + rounds_done))
    after = TensorFile(model)
    before = TensorFile(average, after.specs)
    with writing(out, after.specs, durable=False) as writer:
        for spec in after.specs:
            for start, values in after.pieces(spec):
                # Both in float64: what no round changes, like an untrained tensor, stays exact.
                past, value = (
                    piece.astype(np.float64)
                    for piece in (before.read(spec.name, start, values.size), values)
                )
                writer.put(spec.name, (d * past + (1 - d) * value).astype(np.float32))
