"""What a Flower message of ours carries, in both directions.

A round's message holds one record of instructions and one record with the model. The model travels
as a single safetensors blob: Flower sends every tensor as an object of its own, and a hundred small
objects a message would cost a round more than its training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from consilium_common.errors import ConsiliumError

if TYPE_CHECKING:
    from flwr.app import RecordDict

MODEL: Final = "model"
WEIGHTS: Final = "weights"
INSTRUCTIONS: Final = "instructions"
FIGURES: Final = "figures"
#: Flower's name for how an array's bytes are to be read; Flower itself never looks inside.
BLOB_TYPE: Final = "safetensors.blob"


@dataclass(frozen=True)
class Instructions:
    """What a site is asked to do.

    Attributes
    ----------
    study : str
        Digest of the study.
    round_index : int
        Round, from 0; for an evaluation the number of rounds done; for statistics 0.
    cohort_size : int
        The cohort size this site declared when it approved, repeated to it.
    last : bool
        Whether the study ends with this message.
    """

    study: str
    round_index: int
    cohort_size: int
    last: bool = False


def to_site(instructions: Instructions, weights: bytes | None) -> RecordDict:
    """Return the content of a message to a site; statistics need no weights."""
    from flwr.app import ConfigRecord, RecordDict

    content = _with_weights(weights) if weights is not None else RecordDict()
    content[INSTRUCTIONS] = ConfigRecord(
        {
            "study": instructions.study,
            "round": instructions.round_index,
            "cohort_size": instructions.cohort_size,
            "last": instructions.last,
        }
    )
    assert isinstance(content, RecordDict)
    return content


def from_server(content: RecordDict) -> tuple[Instructions, bytes]:
    """Read a message from the aggregator, or raise ``run.bad-message``."""
    return instructions_of(content), weights_of(content)


def instructions_of(content: RecordDict) -> Instructions:
    """Return what a message asks for, or raise ``run.bad-message``."""
    try:
        record = content.config_records[INSTRUCTIONS]
        return Instructions(
            study=_typed(record["study"], str),
            round_index=_typed(record["round"], int),
            cohort_size=_typed(record["cohort_size"], int),
            last=_typed(record["last"], bool),
        )
    except (KeyError, TypeError) as error:
        raise ConsiliumError(
            "run.bad-message", "The aggregator's message has no valid instructions."
        ) from error


def to_server(weights: bytes | None, figures: dict[str, float] | None) -> RecordDict:
    """Return the content of a site's reply.

    ``figures`` are exact numbers in a study without privacy, where the site's policy permits it,
    and noised ones in a private study.
    """
    from flwr.app import MetricRecord, RecordDict

    content = _with_weights(weights) if weights is not None else RecordDict()
    if figures:
        # In one order: a reply's objects are named by their bytes.
        content[FIGURES] = MetricRecord(dict(sorted(figures.items())))
    return content


def weights_of(content: RecordDict) -> bytes:
    """Return the safetensors blob of a message, or raise ``run.bad-message``."""
    try:
        array = content.array_records[MODEL][WEIGHTS]
    except KeyError as error:
        raise ConsiliumError("run.bad-message", "The message carries no model.") from error
    if array.stype != BLOB_TYPE:
        raise ConsiliumError("run.bad-message", "The message's model is not in safetensors form.")
    return bytes(array.data)


def figures_of(content: RecordDict) -> dict[str, float]:
    """Return the exact figures of a reply; empty where none were released."""
    if FIGURES not in content.metric_records:
        return {}
    return {
        key: float(value)
        for key, value in content.metric_records[FIGURES].items()
        if isinstance(value, int | float)
    }


def _with_weights(weights: bytes) -> RecordDict:
    from flwr.app import Array, ArrayRecord, RecordDict

    array = Array(dtype="uint8", shape=(len(weights),), stype=BLOB_TYPE, data=weights)
    return RecordDict({MODEL: ArrayRecord({WEIGHTS: array})})


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}")
    return value
