"""The noise of many releases: its deviation everywhere, its shape, and that none is used twice."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from consilium_client.auditing.exact import (
    Check,
    correlation_family,
    deviation_family,
    shape_check,
)
from consilium_client.auditing.planted import PlantedPatients
from consilium_client.auditing.subject import Subject

#: Width of the small mechanism whose every value is watched.
_WIDTH: Final = 32
#: Numbers of the full-size releases together; and their least and largest count.
_FULL_VALUES: Final = 1 << 20
_FULL_COUNT: Final = (4, 64)
#: Releases apart that are compared in the small mechanism.
_LAGS: Final = 20
#: Values into the shape test: more would find the mantissa of float32 and not a fault.
_SHAPE_VALUES: Final = 200_000


def noise_checks(subject: Subject, releases: int, false_alarm: float) -> list[Check]:
    """Release noise alone and test it.

    Parameters
    ----------
    releases : int
        Releases of a small mechanism, each with 32 values.
    false_alarm : float
        Probability that a right mechanism fails any of the checks.

    Returns
    -------
    list of Check
        Deviation per tensor and per value, shape, exact repeats, and correlation between
        releases and between values.
    """
    share = false_alarm / 6
    deviation = subject.noise_multiplier
    full_count = int(np.clip(_FULL_VALUES // subject.size, *_FULL_COUNT))
    full = subject.release(_nobody(subject.size), 0, full_count)
    small = subject.release(_nobody(_WIDTH), 0, releases)
    scaled = small.astype(np.float64) / deviation
    return [
        _per_tensor(subject, full, share),
        deviation_family(
            (
                "noise-per-value",
                "Has every single value the noise that is claimed?",
                f"deviation over {releases} releases, as a multiple of the claimed one",
            ),
            (scaled**2).sum(axis=0),
            degrees=np.full(_WIDTH, releases),
            variance=1.0,
            false_alarm=share,
            label=lambda value: f"value {value}",
        ),
        shape_check(
            (
                "noise-shape",
                "Is the noise Gaussian?",
                "largest distance from the Gaussian distribution function",
            ),
            scaled.reshape(-1)[:_SHAPE_VALUES],
            share,
        ),
        _repeats(small, share),
        _between_releases(scaled, full, share),
        _between_values(scaled, share),
    ]


def _nobody(size: int) -> PlantedPatients:
    return PlantedPatients(np.zeros((0, size), dtype=np.float32), 1.0)


def _per_tensor(subject: Subject, full: NDArray[np.float32], false_alarm: float) -> Check:
    ends = np.cumsum([size for _, size in subject.tensors])
    squares = (full.astype(np.float64) ** 2).sum(axis=0)
    return deviation_family(
        (
            "noise-per-tensor",
            "Has every trained tensor the noise that is claimed?",
            f"deviation over {len(full)} releases, as a multiple of the claimed one",
        ),
        np.add.reduceat(squares, np.concatenate([[0], ends[:-1]])),
        degrees=np.array([size * len(full) for _, size in subject.tensors]),
        variance=subject.noise_multiplier**2,
        false_alarm=false_alarm,
        label=lambda index: f"tensor {subject.tensors[index][0]}",
    )


def _repeats(small: NDArray[np.float32], false_alarm: float) -> Check:
    """Find rows that occur twice, whichever they are.

    Two independent rows of 32 values are equal with a probability far below 2^-600.
    """
    rows = np.ascontiguousarray(small).view(np.dtype((np.void, small.shape[1] * 4)))
    repeats = len(small) - len(np.unique(rows))
    return Check(
        "noise-repeats",
        "Is any noise used twice?",
        f"releases among {len(small)} that repeat another exactly",
        observed=float(repeats),
        low=None,
        high=0.0,
        false_alarm=false_alarm,
    )


def _between_releases(
    scaled: NDArray[np.float64], full: NDArray[np.float32], false_alarm: float
) -> Check:
    """Compare every two full-size releases, and small ones up to 20 apart."""
    words = (
        "noise-between-releases",
        "Is the noise of one release independent of the noise of others?",
        "cosine of two releases' noise",
    )
    with np.errstate(invalid="ignore"):  # no noise at all has no direction: nan, and it fails
        unit = full / np.linalg.norm(full, axis=1, keepdims=True)
    first, second = np.triu_indices(len(full), 1)
    pairs = correlation_family(
        words,
        (unit @ unit.T)[first, second].astype(np.float64),
        length=full.shape[1],
        false_alarm=false_alarm / 2,
        label=lambda index: f"releases {first[index]} and {second[index]}",
    )
    if not pairs.passed:
        return pairs
    lags = range(1, min(_LAGS, len(scaled) // 2) + 1)
    cosines = []
    halves = [lagged(scaled, lag) for lag in lags]
    # One length for all lags, so that one distribution serves: the shortest's.
    length = min(a.size for a, _ in halves)
    for pair in halves:
        a, b = (half.reshape(-1)[:length] for half in pair)
        with np.errstate(invalid="ignore"):
            cosines.append(float(a @ b / np.sqrt((a @ a) * (b @ b))))
    return correlation_family(
        words,
        np.array(cosines),
        length=length,
        false_alarm=false_alarm / 2,
        label=lambda index: f"{index + 1} apart",
    )


def lagged(rows: NDArray[np.float64], lag: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return rows and those ``lag`` later, in pairs that share none: every row is used once."""
    blocks = rows[: len(rows) // (2 * lag) * 2 * lag].reshape(-1, 2, lag, rows.shape[1])
    return blocks[:, 0].reshape(-1, rows.shape[1]), blocks[:, 1].reshape(-1, rows.shape[1])


def _between_values(scaled: NDArray[np.float64], false_alarm: float) -> Check:
    with np.errstate(invalid="ignore"):
        unit = scaled / np.linalg.norm(scaled, axis=0)
    first, second = np.triu_indices(scaled.shape[1], 1)
    return correlation_family(
        (
            "noise-between-values",
            "Is the noise of one value independent of the noise of others?",
            "cosine of two values' noise over the releases",
        ),
        (unit.T @ unit)[first, second],
        length=len(scaled),
        false_alarm=false_alarm,
        label=lambda index: f"values {first[index]} and {second[index]}",
    )
