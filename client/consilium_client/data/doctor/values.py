"""Values and axes against the cohort's: cases that stand apart, and units that do not agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from consilium_client.data.doctor.patients import listed_cases
from consilium_client.data.findings import Finding
from consilium_client.data.ingest.cache import Ingested
from consilium_client.data.ingest.facts import ChannelFacts
from consilium_common.report.wording import plural

#: Fewer cases say little about what is usual.
_ENOUGH: Final = 8
#: Distance from the median in robust standard deviations (Iglewicz and Hoaglin 1993 take 3.5 for
#: one small sample; here three figures of hundreds of cases are looked at).
_FAR: Final = 8.0
#: No cohort is tighter than this share of its own spread, by chance or by rounding.
_FLOOR: Final = 0.05
#: When more than this share stands apart, the cohort is a mixture and nobody is an outlier.
_MIXTURE: Final = 0.15
#: Air in Hounsfield units is -1000; what goes this low and was not normalised is a CT.
_AIR: Final = -500.0
_MAJORITY: Final = 0.8


def blank_findings(entries: Mapping[str, Ingested]) -> tuple[Finding, ...]:
    """Find images whose voxels all have one value."""
    return tuple(
        Finding(
            case,
            "data.blank",
            "All voxels of an image have the same value.",
            f"channel {channel}",
            "Export the image again, or leave the case out.",
        )
        for case, entry in entries.items()
        for channel, facts in entry.facts.items()
        if facts.low == facts.high
    )


def intensity_findings(entries: Mapping[str, Ingested]) -> tuple[Finding, ...]:
    """Find cases whose 1st or 99th percentile or mean lies far from the other cases'.

    The distance is the modified z-score, |x - median| / (1.4826 MAD), from eight cases on.
    """
    found = []
    for channel, facts in _by_channel(entries).items():
        if len(facts) < _ENOUGH:
            continue
        names = list(facts)
        table = np.array([[one.p01, one.mean, one.p99] for one in facts.values()])
        usual = np.median(table, axis=0)
        spread = 1.4826 * np.median(np.abs(table - usual), axis=0)
        least = _FLOOR * float(np.median(table[:, 2] - table[:, 0]))
        distance = np.abs(table - usual) / np.maximum(np.maximum(spread, least), 1e-12)
        far = np.flatnonzero(distance.max(axis=1) > _FAR)
        if len(far) > _MIXTURE * len(names):
            found.append(
                Finding(
                    "",
                    "data.intensity-outlier",
                    f"The cases share no scale: {len(far)} of {len(names)} lie far from the "
                    f"cohort's medians, {_short(usual[0])} to {_short(usual[2])}.",
                    f"channel {channel}; {listed_cases([names[row] for row in far])}",
                    "If these are different sequences or units, import them as several channels or "
                    "sites; else let the study normalise each image.",
                )
            )
            continue
        for row in far:
            low, mean, high = table[row]
            found.append(
                Finding(
                    names[row],
                    "data.intensity-outlier",
                    f"Values from {_short(low)} to {_short(high)} (mean {_short(mean)}); the "
                    f"cohort's medians are {_short(usual[0])} to {_short(usual[2])} (mean "
                    f"{_short(usual[1])}).",
                    f"channel {channel}",
                    "Look at the picture; a lost rescale or another sequence is exported again, "
                    "a rare but true image stays.",
                )
            )
    return tuple(found)


def unit_findings(entries: Mapping[str, Ingested]) -> tuple[Finding, ...]:
    """Find CT without Hounsfield units, and channels that mix them with other units."""
    found = []
    for case, entry in entries.items():
        if entry.modality != "CT":
            continue
        found += [
            Finding(
                case,
                "data.unit-mismatch",
                f"The file says CT and no value is below zero (lowest {_short(facts.low)}): these "
                "are not Hounsfield units.",
                f"channel {channel}",
                "Export it again with its rescale slope and intercept.",
            )
            for channel, facts in entry.facts.items()
            if facts.low >= 0 and facts.low < facts.high
        ]
    for channel, by_case in _by_channel(entries).items():
        hounsfield = [case for case, facts in by_case.items() if facts.low <= _AIR]
        arbitrary = [case for case, facts in by_case.items() if facts.low >= 0]
        if (len(hounsfield) > 1 and arbitrary) or (len(arbitrary) > 1 and hounsfield):
            fewer = min(hounsfield, arbitrary, key=len)
            units = "Hounsfield units" if fewer is hounsfield else "values that are never negative"
            found.append(
                Finding(
                    "",
                    "data.unit-mismatch",
                    "One channel mixes units: what looks like Hounsfield units in "
                    f"{plural(len(hounsfield), 'case')}, values that are never negative in "
                    f"{len(arbitrary)}.",
                    f"channel {channel}; {units} in {listed_cases(fewer)}",
                    "Bring all cases to one unit at their source, or import them as two channels.",
                )
            )
    return tuple(found)


def orientation_findings(entries: Mapping[str, Ingested]) -> tuple[Finding, ...]:
    """Find cases whose axes run otherwise than those of at least four fifths of the cohort."""
    axes = {case: entry.axes for case, entry in entries.items() if entry.axes}
    if len(axes) < _ENOUGH:
        return ()
    usual, count = Counter(axes.values()).most_common(1)[0]
    if count == len(axes) or count < _MAJORITY * len(axes):
        return ()
    return tuple(
        Finding(
            case,
            "data.orientation-outlier",
            f"Its axes run {own}, those of {count} of {len(axes)} cases run {usual}.",
            "",
            "Look at the picture: if the anatomy is turned, the header is wrong and the image is "
            "exported again; else nothing is to do, the ingest turns it.",
        )
        for case, own in axes.items()
        if own != usual
    )


def scanner_findings(
    entries: Mapping[str, Ingested], classes: Mapping[str, Sequence[str]]
) -> tuple[Finding, ...]:
    """Find scanners with few cases, and classes that come from one scanner alone.

    Parameters
    ----------
    classes : mapping
        Case to its classes; empty for masks.
    """
    scanners = {case: entry.scanner for case, entry in entries.items() if entry.scanner}
    counts = Counter(scanners.values())
    if len(scanners) < _ENOUGH or len(counts) < 2:
        return ()
    found = []
    rare = [name for name, count in counts.items() if count < 0.1 * len(scanners)]
    if rare:
        # The scanner's name is the file's own text: it stays in `where`.
        listed = "; ".join(f"{name}: {count}" for name, count in counts.most_common())
        found.append(
            Finding(
                "",
                "data.scanner-mix",
                f"The images come from {len(counts)} scanners, and {len(rare)} of them have less "
                "than a tenth of the cases.",
                listed,
                "Nothing, if that is how patients come; else balance the cohort, and look at the "
                "figures by scanner.",
            )
        )
    seen: dict[str, list[str]] = {}
    for case, scanner in scanners.items():
        for name in classes.get(case, ()):
            seen.setdefault(name, []).append(scanner)
    for name, by in seen.items():
        if len(seen) > 1 and len(by) >= 3 and len(set(by)) == 1:
            found.append(
                Finding(
                    "",
                    "data.scanner-mix",
                    f"All {len(by)} cases of one class come from one of {len(counts)} scanners.",
                    f"class {name}; {by[0]}",
                    "Add cases of this class from other scanners, or other classes from this one.",
                )
            )
    return tuple(found)


def _by_channel(entries: Mapping[str, Ingested]) -> dict[str, dict[str, ChannelFacts]]:
    found: dict[str, dict[str, ChannelFacts]] = {}
    for case, entry in entries.items():
        for channel, facts in entry.facts.items():
            if facts.low < facts.high:
                found.setdefault(channel, {})[case] = facts
    return found


def _short(value: float) -> str:
    """Write a value in an image's own units, without digits that say nothing."""
    return f"{value:.0f}" if 100 <= abs(value) < 1e7 else f"{value:.3g}"
