"""How a study's rounds go over the sites: quorum, deadline, strategy, compression, screening."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from consilium_common.study.strategies import Cyclic, FedAvg, Krum, MultiKrum, Strategy
from consilium_common.study.strict import Model


class Compression(Model):
    """How an update is made smaller before it leaves; under privacy after the noise."""

    #: none: float32. bfloat16: half of it, rounded to the nearest. int8: a quarter, rounded at
    #: random without bias, one scale per tensor. top-k: the largest entries alone. Tensors of fewer
    #: than two dimensions (biases, normalisation) stay exact whatever is said here.
    encoding: Literal["none", "bfloat16", "int8", "top-k"] = "none"
    #: Share of the entries that top-k keeps.
    share: Annotated[float, Field(gt=0, le=1)] = 0.01
    #: Encode the change against the global model rather than the model itself.
    delta: bool = True
    #: Keep at the site what encoding lost and add it to the next update.
    error_feedback: bool = True
    #: Level of lossless compression on top, 0 (off) to 9.
    level: Annotated[int, Field(ge=0, le=9)] = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.encoding == "top-k" and not self.delta:
            raise ValueError("top-k needs delta: of a whole model no entry may be left out")
        return self


class Screening(Model):
    """What an update must keep to beside its form; each site's figures are shown."""

    #: Largest L2 norm of a site's change of the global model; a longer one is left out.
    norm_bound: Annotated[float, Field(gt=0, le=1e9)] | None = None
    #: L2 norm that a longer change is scaled down to.
    clip_norm: Annotated[float, Field(gt=0, le=1e9)] | None = None
    #: Least cosine between a site's change and the coordinate-wise median of all sites' changes.
    cosine: Annotated[float, Field(ge=-1, le=1)] | None = None


class Buffered(Model):
    """FedBuff: the global model moves whenever so many updates are in, however old each is."""

    #: Updates that make a step of the global model, which is called a round here too.
    size: Annotated[int, Field(ge=1, le=10_000)]
    #: An update that began so many steps ago is left out.
    most_staleness: Annotated[int, Field(ge=0, le=1000)] = 10
    #: Share of a step that is taken.
    server_learning_rate: Annotated[float, Field(gt=0, le=10)] = 1.0


#: What a study without it is the same study as before it was there.
LATER: Final = (
    "sites_per_round",
    "deadline_bound_seconds",
    "grace_seconds",
    "compression",
    "screening",
    "buffered",
)


class Federation(Model):
    """Rounds over the sites."""

    rounds: Annotated[int, Field(ge=1, le=10_000)] = 20
    #: Fewest sites whose update makes a round.
    quorum: Annotated[int, Field(ge=1, le=10_000)] = 2
    #: Sites asked in a round, drawn at random; those drawn least often first. None: all.
    sites_per_round: Annotated[int, Field(ge=1, le=10_000)] | None = None
    #: Seconds after which a round goes on without the late ones; ``learned`` takes them from
    #: the rounds before, at most ``deadline_bound_seconds``.
    deadline_seconds: Annotated[float, Field(gt=0, le=7 * 24 * 3600)] | Literal["learned"] = 1800.0
    deadline_bound_seconds: Annotated[float, Field(gt=0, le=7 * 24 * 3600)] = 1800.0
    #: Seconds that are waited longer for the late ones when the quorum is there.
    grace_seconds: Annotated[float, Field(ge=0, le=24 * 3600)] = 0.0
    strategy: Strategy = FedAvg()
    #: Public weights only: all sites alike, or by the cohort size each site declared.
    weighting: Literal["uniform", "cohort"] = "cohort"
    #: Decay of the running average of the global models over rounds; the average is evaluated and
    #: kept. 0: the last model.
    averaging: Annotated[float, Field(ge=0, lt=1)] = 0.0
    compression: Compression = Compression()
    screening: Screening = Screening()
    #: None: rounds, in which all sites begin with the same model.
    buffered: Buffered | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sites_per_round is not None and self.sites_per_round < self.quorum:
            raise ValueError("sites_per_round is below the quorum")
        if self.buffered is not None and not isinstance(self.strategy, FedAvg):
            raise ValueError("buffered takes strategy fedavg: it is a strategy of its own")
        if self.buffered is not None and self.quorum > self.buffered.size:
            raise ValueError("the quorum is above buffered.size, which is what makes a step")
        if isinstance(self.strategy, Cyclic) and self.quorum != 1:
            raise ValueError("strategy cyclic asks one site a round; set quorum: 1")
        if isinstance(self.strategy, Krum | MultiKrum) and self.quorum < self.strategy.needed:
            raise ValueError(f"{self.strategy.name} needs quorum: {self.strategy.needed}")
        return self

    @property
    def longest_seconds(self) -> float:
        """The longest that a round may take, grace included."""
        if self.deadline_seconds == "learned":
            return self.deadline_bound_seconds + self.grace_seconds
        return self.deadline_seconds + self.grace_seconds
