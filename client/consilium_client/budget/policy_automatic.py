"""What a site's policy approves by itself: every bound is stated, and none is ever exceeded."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from consilium_common.study.approval import OperatorName

Day = Literal["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
#: In the order of :meth:`datetime.date.weekday`.
DAYS: Final[tuple[Day, ...]] = (
    "monday",
    "tuesday",
    "wednesday",
    "thursday",
    "friday",
    "saturday",
    "sunday",
)
_CLOCK: Final = r"([01][0-9]|2[0-3]):[0-5][0-9]"
_MINUTES_A_DAY: Final = 24 * 60


class Part(BaseModel):
    """Frozen and strict; a misspelt key is an error rather than a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Asked:
    """What the bounds are held against.

    Parameters
    ----------
    operator : str
        Who proposed the study; the signature was checked.
    task : str
        The study's kind of task.
    epsilon, evaluation_epsilon : float or None
        ε of the whole study by itself at the policy's δ, for a training patient (statistics
        included) and for a test patient; None: the study gives no such promise.
    """

    operator: str
    task: str
    epsilon: float | None
    evaluation_epsilon: float | None = None


class AutomaticApproval(Part):
    """Studies that the site approves without asking a person, and when and how they may run."""

    #: Names of the operators whose proposals are approved, as their certificates carry them.
    operators: Annotated[list[OperatorName], Field(min_length=1, max_length=100)]
    tasks: Annotated[list[Literal["segmentation", "classification"]], Field(min_length=1)]
    #: Largest ε of one study by itself, for every patient. A study without privacy has none, and
    #: is never approved by a machine.
    epsilon_per_study: Annotated[float, Field(gt=0, le=100)]
    #: By this machine's clock, ``HH:MM-HH:MM``; may pass midnight. None: at any hour.
    hours: Annotated[str, Field(pattern=rf"^{_CLOCK}-({_CLOCK}|24:00)$")] | None = None
    #: Days on which these hours begin. None: every day.
    days: Annotated[list[Day], Field(min_length=1)] | None = None
    #: Largest share of the GPU's memory that training takes.
    gpu_share: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, names in (
            ("operators", self.operators),
            ("tasks", self.tasks),
            ("days", self.days or []),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"{key} names something twice")
        begin, end = self._span
        if begin == end:
            raise ValueError("hours begin and end at the same minute; leave them out for all day")
        return self

    def refusal(self, asked: Asked, moment: dt.datetime) -> str:
        """Return which bound a study exceeds at this moment, in words; empty where none.

        Parameters
        ----------
        moment : datetime
            By this machine's clock; its own hour and day count.
        """
        return self.study_refusal(asked) or self.time_refusal(moment)

    def study_refusal(self, asked: Asked) -> str:
        """Return which bound the study itself exceeds, in words; empty where none."""
        if asked.operator not in self.operators:
            return f"{asked.operator} is none of its operators"
        if asked.task not in self.tasks:
            return f"{asked.task} is none of its tasks"
        if asked.epsilon is None:
            return "a study without differential privacy is never approved automatically"
        for value, whom in (
            (asked.epsilon, "a training patient"),
            (asked.evaluation_epsilon, "a test patient"),
        ):
            # Written so that not-a-number is refused too.
            if value is not None and not value <= self.epsilon_per_study:
                return f"it costs {whom} ε {value:.3g}, above {self.epsilon_per_study:g}"
        return ""

    def time_refusal(self, moment: dt.datetime) -> str:
        """Return why it is not the time, in words; empty within the hours of a named day."""
        begin, end = self._span
        minute = moment.hour * 60 + moment.minute
        # Of hours that pass midnight, the part after it belongs to the day on which they began.
        after_midnight = end > _MINUTES_A_DAY and minute < end - _MINUTES_A_DAY
        day = moment.date() - dt.timedelta(days=after_midnight)
        inside = after_midnight or begin <= minute < end
        if inside and (self.days is None or DAYS[day.weekday()] in self.days):
            return ""
        return f"it is outside its hours ({self.when})"

    @property
    def when(self) -> str:
        """In words, when these studies may be approved and run."""
        days = "every day" if self.days is None else ", ".join(self.days)
        return f"{self.hours or 'at any hour'}, {days}"

    def lines(self) -> Iterator[str]:
        """Say the bounds in words."""
        yield (
            f"Approved automatically: {' and '.join(self.tasks)} studies of "
            f"{', '.join(self.operators)}, at most ε {self.epsilon_per_study:g} for every patient; "
            f"approved and run {self.when}; at most {self.gpu_share:.0%} of the GPU's memory."
        )

    @property
    def _span(self) -> tuple[int, int]:
        """Minutes after midnight of begin and end; an end after midnight is above 24 hours."""
        if self.hours is None:
            return 0, _MINUTES_A_DAY
        begin, end = (
            int(clock[:2]) * 60 + int(clock[3:]) for clock in self.hours.split("-", maxsplit=1)
        )
        return begin, end + _MINUTES_A_DAY if end < begin else end
