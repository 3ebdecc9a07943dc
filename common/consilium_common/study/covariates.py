"""Numbers and words beside an image, as the constant channels in which they reach the network.

Every covariate fills channels of its own after the image's: a number two (its scaled value, and
whether it is known), a word one for each of its public values. A value that is not known is all
zeros, which for a number is the public centre. As channels they pass through every engine, batch
and chunk exactly as pixels do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from consilium_common.errors import ConsiliumError
from consilium_common.study.schema import CategoryCovariate, NumberCovariate, Task

#: Scaled numbers are cut off here: one mistyped age must not swamp the image.
_LARGEST: Final = 10.0


def covariate_channels(task: Task) -> int:
    """Return how many channels the task's covariates fill."""
    return sum(
        2 if isinstance(one, NumberCovariate) else len(one.values) for one in task.covariates
    )


def input_channels(task: Task) -> int:
    """Return the channels of what the network is given: the image's, then the covariates'."""
    return len(task.inputs) + covariate_channels(task)


def in_words(covariate: NumberCovariate | CategoryCovariate) -> str:
    """Say what one covariate is and how it enters the network: public facts alone."""
    if isinstance(covariate, NumberCovariate):
        how = f"a number; less {covariate.centre:g}, divided by {covariate.scale:g}"
        return f"{covariate.name} ({how})"
    *first, last = covariate.values
    return f"{covariate.name} ({', '.join(first)} or {last})"


def encode(task: Task, values: Mapping[str, float | str | None]) -> list[float]:
    """Return one number per covariate channel.

    Parameters
    ----------
    values : mapping
        Covariate name to a case's value; absent or None where it is not known.

    Returns
    -------
    list of float
        ``covariate_channels(task)`` numbers, each within ±10.

    Raises
    ------
    ConsiliumError
        ``data.covariate`` for a word where a number belongs, or one that the study does not name.
        The message names the covariate and not the value.
    """
    channels: list[float] = []
    for one in task.covariates:
        value = values.get(one.name)
        if isinstance(one, NumberCovariate):
            if isinstance(value, str):
                raise _unfit(one.name, "The study takes a number", "Give a number")
            scaled = 0.0 if value is None else (float(value) - one.centre) / one.scale
            known = 0.0 if value is None else 1.0
            channels += [min(max(scaled, -_LARGEST), _LARGEST), known]
            continue
        word = None if value is None else _word(value)
        known_words = [_word(name) for name in one.values]
        if word is not None and word not in known_words:
            listed = ", ".join(one.values)
            raise _unfit(one.name, f"The study knows {listed}", "Write one of these")
        channels += [1.0 if name == word else 0.0 for name in known_words]
    return channels


def _word(value: float | str) -> str:
    text = f"{value:g}" if isinstance(value, float | int) else value
    return text.strip().casefold()


def _unfit(name: str, wanted: str, fix: str) -> ConsiliumError:
    return ConsiliumError(
        "data.covariate",
        f"A case's covariate {name} does not fit. {wanted}.",
        where=f"cases.csv: covariate_{name}",
        hint=f"{fix}, or leave the cell empty where it is not known.",
    )
