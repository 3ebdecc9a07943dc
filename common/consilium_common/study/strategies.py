"""The strategies that a study may name: what each needs, its paper, and whether privacy allows it.

What a site does differently is in ``consilium_client.training.strategies``; what the aggregator
does is in ``consilium_server.aggregation``.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from consilium_common.study.strict import Model

_Rate = Annotated[float, Field(gt=0, le=10)]
_Share = Annotated[float, Field(ge=0, lt=1)]
_Count = Annotated[int, Field(ge=0, le=1000)]


class _Strategy(Model):
    """What every strategy says of itself."""

    #: Where it comes from.
    paper: ClassVar[str]
    #: Why a private study cannot take it; empty where it can.
    not_private: ClassVar[str] = ""


class FedAvg(_Strategy):
    """The weighted mean of the sites' models."""

    paper: ClassVar[str] = "McMahan et al., AISTATS 2017"
    name: Literal["fedavg"] = "fedavg"


class FedProx(_Strategy):
    """FedAvg whose sites are held to the global model by μ/2·‖w − w_global‖²."""

    paper: ClassVar[str] = "Li et al., MLSys 2020"
    name: Literal["fedprox"]
    mu: Annotated[float, Field(gt=0, le=100)] = 0.01


class FedAvgM(_Strategy):
    """FedAvg with momentum at the aggregator."""

    paper: ClassVar[str] = "Hsu et al., arXiv:1909.06335"
    name: Literal["fedavgm"]
    server_learning_rate: _Rate = 1.0
    server_momentum: _Share = 0.9


class FedAdam(_Strategy):
    """Adam at the aggregator over the mean change."""

    paper: ClassVar[str] = "Reddi et al., ICLR 2021"
    name: Literal["fedadam"]
    server_learning_rate: _Rate = 0.01
    beta1: _Share = 0.9
    beta2: _Share = 0.99
    tau: Annotated[float, Field(gt=0, le=1)] = 1e-3


class FedYogi(_Strategy):
    """Yogi at the aggregator over the mean change."""

    paper: ClassVar[str] = "Reddi et al., ICLR 2021"
    name: Literal["fedyogi"]
    server_learning_rate: _Rate = 0.01
    beta1: _Share = 0.9
    beta2: _Share = 0.99
    tau: Annotated[float, Field(gt=0, le=1)] = 1e-3


class FedAdagrad(_Strategy):
    """Adagrad at the aggregator over the mean change."""

    paper: ClassVar[str] = "Reddi et al., ICLR 2021"
    name: Literal["fedadagrad"]
    server_learning_rate: _Rate = 0.1
    tau: Annotated[float, Field(gt=0, le=1)] = 1e-3


class Scaffold(_Strategy):
    """Control variates that take the sites' drift out of their steps (option II)."""

    paper: ClassVar[str] = "Karimireddy et al., ICML 2020"
    name: Literal["scaffold"]
    server_learning_rate: _Rate = 1.0


class FedNova(_Strategy):
    """Changes normalised by the number of local steps before they are averaged."""

    paper: ClassVar[str] = "Wang et al., NeurIPS 2020"
    name: Literal["fednova"]


class FedBN(_Strategy):
    """FedAvg whose normalisation layers stay at each site."""

    paper: ClassVar[str] = "Li et al., ICLR 2021"
    not_private: ClassVar[str] = (
        "its normalisation layers stay at the site and are shaped by its patients without noise, "
        "and all that leaves is trained through them"
    )
    name: Literal["fedbn"]


class Ditto(_Strategy):
    """FedAvg, and beside it a personal model at each site, held to the global one by λ/2·‖·‖²."""

    paper: ClassVar[str] = "Li et al., ICML 2021"
    name: Literal["ditto"]
    pull: Annotated[float, Field(ge=0, le=100)] = 0.1


class FedRep(_Strategy):
    """A shared representation and a personal head that never leaves its site."""

    paper: ClassVar[str] = "Collins et al., ICML 2021"
    not_private: ClassVar[str] = (
        "its head is trained on the patients without noise, and the representation that leaves is "
        "trained through it"
    )
    name: Literal["fedrep"]
    #: Parameters of the head by shell-style patterns; None: those of the last layer.
    head: Annotated[list[str], Field(min_length=1)] | None = None
    #: Share of a round's steps that train the head, which come first.
    head_share: Annotated[float, Field(gt=0, lt=1)] = 0.5


class Cyclic(_Strategy):
    """Cyclic weight transfer: the model goes from site to site, one a round."""

    paper: ClassVar[str] = "Chang et al., JAMIA 2018"
    name: Literal["cyclic"]


class Median(_Strategy):
    """The coordinate-wise median."""

    paper: ClassVar[str] = "Yin et al., ICML 2018"
    name: Literal["median"]


class TrimmedMean(_Strategy):
    """The coordinate-wise mean without the largest and the smallest of each coordinate."""

    paper: ClassVar[str] = "Yin et al., ICML 2018"
    name: Literal["trimmed-mean"]
    #: Share of the sites that is left out at either end.
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.2


class _Krum(_Strategy):
    """What both of them need."""

    paper: ClassVar[str] = "Blanchard et al., NeurIPS 2017"
    #: Hostile sites that it withstands.
    hostile: _Count = 1

    @property
    def needed(self) -> int:
        """Fewest updates with which it withstands them (proposition 4.2)."""
        return 2 * self.hostile + 3


class Krum(_Krum):
    """The one model that is closest to its neighbours."""

    name: Literal["krum"]


class MultiKrum(_Krum):
    """The mean of the models that are closest to their neighbours."""

    name: Literal["multi-krum"]
    #: Models that are averaged; None: all but the hostile ones.
    kept: Annotated[int, Field(ge=1, le=1000)] | None = None


class GeometricMedian(_Strategy):
    """The model with the least sum of distances to all (smoothed Weiszfeld)."""

    paper: ClassVar[str] = "Pillutla et al., IEEE TSP 2022"
    name: Literal["geometric-median"]
    iterations: Annotated[int, Field(ge=1, le=100)] = 10
    smoothing: Annotated[float, Field(gt=0, le=1)] = 1e-6


ALL: tuple[type[_Strategy], ...] = (
    FedAvg,
    FedProx,
    FedAvgM,
    FedAdam,
    FedYogi,
    FedAdagrad,
    Scaffold,
    FedNova,
    FedBN,
    Ditto,
    FedRep,
    Cyclic,
    Median,
    TrimmedMean,
    Krum,
    MultiKrum,
    GeometricMedian,
)


def _spelt_out(value: Any) -> Any:
    """Take ``strategy: fedavg`` for ``strategy: {name: fedavg}``."""
    return {"name": value} if isinstance(value, str) else value


Strategy = Annotated[
    FedAvg
    | FedProx
    | FedAvgM
    | FedAdam
    | FedYogi
    | FedAdagrad
    | Scaffold
    | FedNova
    | FedBN
    | Ditto
    | FedRep
    | Cyclic
    | Median
    | TrimmedMean
    | Krum
    | MultiKrum
    | GeometricMedian,
    Field(discriminator="name"),
    BeforeValidator(_spelt_out),
]
