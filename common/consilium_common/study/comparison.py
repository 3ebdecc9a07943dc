"""What differs between two versions of a study: key by key, and what of it a site would notice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from consilium_common.study.document import dotted, printable
from consilium_common.study.schema import Study
from consilium_common.study.words import count_of, number_of, size_in_words

if TYPE_CHECKING:
    from consilium_common.study.cost import Cost

#: What the parts of a study are about, for people who do not know its keys.
_TOPICS: Final = {
    "name": "Name and title",
    "title": "Name and title",
    "task": "What is predicted from what",
    "preprocessing": "How images are prepared",
    "model": "The network",
    "training": "Training",
    "privacy": "Privacy",
    "federation": "Rounds",
    "evaluation": "Evaluation",
    "statistics": "Statistics",
    "approval": "Whose signatures it needs",
}


@dataclass(frozen=True)
class Difference:
    """One value that differs; None where one of the two studies has no such key."""

    key: str
    was: str | None
    is_: str | None

    @property
    def topic(self) -> str:
        """What it is about, in words."""
        return _TOPICS.get(self.key.partition(".")[0], "Other")

    def sentence(self) -> str:
        """Say it in words."""
        if self.is_ is None:
            return f"{self.key}: {self.was} is gone"
        if self.was is None:
            return f"{self.key}: {self.is_} is new"
        return f"{self.key}: {self.was} → {self.is_}"

    def to_dict(self) -> dict[str, str | None]:
        """Return plain values."""
        return {"key": self.key, "topic": self.topic, "was": self.was, "is": self.is_}


def differences(old: Study, new: Study) -> list[Difference]:
    """Return every value that differs, in the order of the keys; empty when they are one.

    Every default is written out, also those that the canonical form leaves out.
    """
    before, after = (_flat(one.model_dump(mode="json", by_alias=True), ()) for one in (old, new))
    found = []
    for key in [*before, *(key for key in after if key not in before)]:
        if _opened(key, before, after) or _opened(key, after, before):
            continue  # a part that one of them has: its keys tell
        was, is_ = before.get(key, _ABSENT), after.get(key, _ABSENT)
        if was != is_ or type(was) is not type(is_):
            found.append(Difference(key, _plain(was), _plain(is_)))
    return found


def compare(old: Study, new: Study) -> list[str]:
    """Return one line for each value that differs, by key path; empty when the studies are one."""
    return [one.sentence() for one in differences(old, new)]


def cost_differences(old: Cost, new: Cost) -> Iterator[str]:
    """Say what changes in what leaves a site and in ε, each at its study's own δ.

    ε is for unit patient, adjacency add or remove one; of two versions that both ran, ε compose
    and are not given by either.
    """
    if (old.tensors, old.bytes_per_round) != (new.tensors, new.bytes_per_round):
        yield (
            f"What leaves each round: {count_of(old.tensors, 'tensor')}, "
            f"{size_in_words(old.bytes_per_round)} → {count_of(new.tensors, 'tensor')}, "
            f"{size_in_words(new.bytes_per_round)}."
        )
    if old.trained != new.trained:
        yield f"Trained values: {old.trained:,} → {new.trained:,}."
    for was, is_, whom in (
        (old.patient_epsilon, new.patient_epsilon, "a training patient"),
        (old.evaluation_epsilon, new.evaluation_epsilon, "a test patient"),
    ):
        before, after = _epsilon(was, old), _epsilon(is_, new)
        if before != after:
            more = "" if was is None or is_ is None else f" ({is_ - was:+.2f})"
            yield f"ε of the whole study for {whom}: {before} → {after}{more}."


def _delta(cost: Cost) -> float | None:
    return None if cost.privacy is None else cost.privacy.delta


def _epsilon(value: float | None, cost: Cost) -> str:
    if value is None:
        return "no promise" if cost.privacy is None else "nothing released"
    return f"{value:.2f} at δ {number_of(_delta(cost))}"


_ABSENT: Final = object()


def _opened(key: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a key is none in one study and a part of several keys in the other."""
    return one.get(key, _ABSENT) is None and any(name.startswith(f"{key}.") for name in other)


def _flat(value: Any, path: tuple[str, ...]) -> dict[str, Any]:
    """Return the leaves by key path; lists are leaves, and so are empty mappings."""
    if isinstance(value, dict) and value:
        return {
            key: leaf
            for name, item in value.items()
            for key, leaf in _flat(item, (*path, name)).items()
        }
    return {dotted(path): value} if value != {} else {}


def _plain(value: Any) -> str | None:
    if value is _ABSENT:
        return None
    if value is None:
        return "none"
    if isinstance(value, list):
        return f"[{', '.join(_plain(item) or '' for item in value)}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return number_of(value) if isinstance(value, float) else printable(str(value))
