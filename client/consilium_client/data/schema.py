"""What site.yaml and cases.csv may hold: strict models, a misspelt key is an error."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from consilium_client.data.ranges import Range, parse_range
from consilium_common.study.strict import Name

#: The name of the single channel of a site that has not named its inputs.
UNNAMED_INPUT: Final = "image"
CASES_FILE: Final = "cases.csv"

LocalName = Annotated[str, Field(min_length=1, max_length=120)]


class Model(BaseModel):
    """Frozen, and a misspelt key is an error rather than a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SplitFractions(Model):
    """Shares of patients; they must add up to one."""

    train: Annotated[float, Field(ge=0, le=1)] = 0.7
    validation: Annotated[float, Field(ge=0, le=1)] = 0.1
    test: Annotated[float, Field(ge=0, le=1)] = 0.2

    @model_validator(mode="after")
    def _check(self) -> Self:
        if abs(self.train + self.validation + self.test - 1) > 1e-9:
            raise ValueError("train, validation and test must add up to 1")
        return self


class SiteManifest(Model):
    """The content of site.yaml."""

    schema_: Annotated[Literal["consilium/site/v1"], Field(alias="schema")]
    site: Name
    #: Folder that the paths in cases.csv start from; relative to site.yaml's own folder.
    root: Annotated[str, Field(min_length=1)]
    cases: str = CASES_FILE
    #: Input channels; the first is the column ``image``, the others ``image_<channel>``.
    inputs: Annotated[list[Name], Field(min_length=1, max_length=16)] = [UNNAMED_INPUT]
    #: mask: the column ``label`` names an image of labels; class: it holds a class.
    label_kind: Literal["mask", "class"]
    #: Local label name to its value in the masks, to what cases.csv calls the class, or to the
    #: range of numbers that make the class.
    labels: dict[LocalName, int | str] = {}
    #: Local label name to the study's class name, where they differ in more than spelling.
    classes: dict[LocalName, Name] = {}
    #: Facts beside the image, such as an age: the columns ``covariate_<name>``.
    covariates: Annotated[list[Name], Field(max_length=64)] = []
    split: SplitFractions = SplitFractions()
    #: Most the cache of pixels may take, GiB; None for as much as the disk holds.
    cache_quota_gib: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.inputs)) != len(self.inputs):
            raise ValueError("inputs has a name twice")
        if len(set(self.covariates)) != len(self.covariates):
            raise ValueError("covariates has a name twice")
        if self.label_kind == "mask":
            for name, value in self.labels.items():
                if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 65536:
                    raise ValueError(f"labels: {name} needs a mask value between 0 and 65535")
        shown = [str(value) for value in self.labels.values()]
        if len(set(shown)) != len(shown):
            raise ValueError("labels gives one value to two names")
        unknown = [name for name in self.classes if name not in self.labels]
        if unknown:
            raise ValueError(f"classes names {unknown[0]}, which labels does not have")
        named = list(self.ranges().items())
        for position, (name, span) in enumerate(named):
            other = next((n for n, later in named[position + 1 :] if span.overlaps(later)), None)
            if other is not None:
                raise ValueError(f"labels: a number may be {name} and {other}; part their ranges")
        return self

    def ranges(self) -> dict[str, Range]:
        """Return the label names that stand for a range of numbers.

        Raises
        ------
        ValueError
            A range holds no number.
        """
        if self.label_kind != "class":
            return {}
        found = {name: parse_range(str(value)) for name, value in self.labels.items()}
        return {name: span for name, span in found.items() if span is not None}


class Case(Model):
    """One row of cases.csv.

    ``patient_id`` is the hospital's own identifier. It stays in cases.csv: everywhere else a
    patient is named by :meth:`consilium_client.data.split.PatientKey.name`.
    """

    case_id: Annotated[str, Field(min_length=1, max_length=200)]
    patient_id: Annotated[str, Field(min_length=1, max_length=200, repr=False)]
    #: Channel name to a file, a folder with one DICOM series, a SeriesInstanceUID, or ``file#n``
    #: for channel n of a four-dimensional NIfTI file.
    images: dict[str, str]
    label: str = ""
    #: By name: a number, a word, or None where the value is missing.
    covariates: Annotated[dict[str, float | str | None], Field(repr=False)] = {}
    split: Literal["train", "validation", "test"] | None = None
