"""What a Flower message of ours carries, in both directions.

Instructions, figures, and the names of files. Models and updates are such files: they go beside
Flower's messages, straight from disk to disk, over the same port.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from consilium_common.errors import ConsiliumError
from consilium_common.models.registry import MAX_PARAMETERS

if TYPE_CHECKING:
    from flwr.app import RecordDict

INSTRUCTIONS: Final = "instructions"
UPDATE: Final = "update"
FIGURES: Final = "figures"
#: The largest network that a study may name, twice: a strategy may send as much beside it.
MAX_FILE_BYTES: Final = 2 * 4 * MAX_PARAMETERS + 8 * 1024 * 1024


@dataclass(frozen=True)
class Reference:
    """A file named by its content.

    Attributes
    ----------
    sha256 : str
        64 hexadecimal digits.
    bytes : int
        Its length.

    Raises
    ------
    ConsiliumError
        ``run.bad-message`` for what names no file.
    """

    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        if (
            type(self.bytes) is not int
            or not 0 < self.bytes <= MAX_FILE_BYTES
            or not isinstance(self.sha256, str)
            or not re.fullmatch(r"[0-9a-f]{64}", self.sha256)
        ):
            raise ConsiliumError("run.bad-message", "The message names no valid file.")

    @classmethod
    def of(cls, path: Path) -> Reference:
        """Return the reference of a file on disk."""
        with path.open("rb") as stream:
            return cls(hashlib.file_digest(stream, "sha256").hexdigest(), path.stat().st_size)


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
    model : Reference or None
        The global model's file; None for statistics, which need none.
    """

    study: str
    round_index: int
    cohort_size: int
    last: bool = False
    model: Reference | None = None


def to_site(instructions: Instructions) -> RecordDict:
    """Return the content of a message to a site."""
    from flwr.app import ConfigRecord, RecordDict

    model = instructions.model
    record = ConfigRecord(
        {
            "study": instructions.study,
            "round": instructions.round_index,
            "cohort_size": instructions.cohort_size,
            "last": instructions.last,
            "model": "" if model is None else model.sha256,
            "model_bytes": 0 if model is None else model.bytes,
        }
    )
    return RecordDict({INSTRUCTIONS: record})


def instructions_of(content: RecordDict) -> Instructions:
    """Return what a message asks for, or raise ``run.bad-message``."""
    try:
        record = content.config_records[INSTRUCTIONS]
        sha256, size = _typed(record["model"], str), _typed(record["model_bytes"], int)
        return Instructions(
            study=_typed(record["study"], str),
            round_index=_typed(record["round"], int),
            cohort_size=_typed(record["cohort_size"], int),
            last=_typed(record["last"], bool),
            model=Reference(sha256, size) if sha256 or size else None,
        )
    except (KeyError, TypeError) as error:
        raise ConsiliumError(
            "run.bad-message", "The aggregator's message has no valid instructions."
        ) from error


def to_server(update: Reference | None, figures: dict[str, float] | None) -> RecordDict:
    """Return the content of a site's reply.

    ``figures`` are exact numbers in a study without privacy, where the site's policy permits it,
    and noised ones in a private study.
    """
    from flwr.app import ConfigRecord, MetricRecord, RecordDict

    content = RecordDict()
    if update is not None:
        content[UPDATE] = ConfigRecord({"sha256": update.sha256, "bytes": update.bytes})
    if figures:
        # In one order: a reply's objects are named by their bytes.
        content[FIGURES] = MetricRecord(dict(sorted(figures.items())))
    return content


def update_of(content: RecordDict) -> Reference:
    """Return the reference of a reply's update, or raise ``run.bad-message``."""
    try:
        record = content.config_records[UPDATE]
        return Reference(_typed(record["sha256"], str), _typed(record["bytes"], int))
    except (KeyError, TypeError) as error:
        raise ConsiliumError("run.bad-message", "The reply names no update.") from error


def figures_of(content: RecordDict) -> dict[str, float]:
    """Return the exact figures of a reply; empty where none were released."""
    if FIGURES not in content.metric_records:
        return {}
    return {
        key: float(value)
        for key, value in content.metric_records[FIGURES].items()
        if isinstance(value, int | float)
    }


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}")
    return value
