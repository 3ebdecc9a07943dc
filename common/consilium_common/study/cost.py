"""What a study costs a site: values trained, bytes that leave, and ε; public facts alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from consilium_common.models.kept import kept
from consilium_common.study.rules import check_mechanism, check_network
from consilium_common.study.schema import Study

if TYPE_CHECKING:
    from consilium_common.privacy.events import PrivacyParameters


#: What a network cannot depend on.
_NO_MATTER: Final[dict[str, Any]] = {
    "name": True,
    "title": True,
    "approval": True,
    "federation": {"rounds", "quorum", "deadline_seconds", "grace_seconds", "sites_per_round"},
    "training": {"seed", "steps_per_round", "epochs_per_round"},
}


@dataclass(frozen=True)
class NetworkCost:
    """The parts of a :class:`Cost` that follow from the network alone."""

    parameters: int
    trained: int
    normalised: tuple[str, ...]
    tensors: int
    bytes_per_round: int


@dataclass(frozen=True)
class Cost:
    """What a study costs a site, in values, bytes and ε.

    Attributes
    ----------
    parameters : int
        Parameters of the network, adapters included.
    trained : int
        Those of them that are trained, and noised with privacy.
    normalised : tuple of str
        Paths of the batch norms that become group norms.
    tensors : int
        Tensors that every update has.
    bytes_per_round : int
        Bytes of one update, which leaves every site every round; exact, and with a lossless level
        of compression the most that it can be.
    privacy : PrivacyParameters or None
        The mechanism with its noise calibrated; None without privacy.
    epsilon : float or None
        ε over the whole study for a patient who takes part, by PLD, at the study's δ; unit the
        patient, adjacency add or remove one. None without privacy.
    epsilon_per_round : float or None
        ε of the first round alone. Rounds compose: their ε do not add up.
    evaluation_epsilon : float or None
        ε of all released evaluations for a patient whom they score; None where none are released.
        A site trains on some patients and scores others, so that nobody pays both.
    statistics_epsilon : float or None
        ε of the released statistics of the patients trained on; None where none are released.
    patient_epsilon : float or None
        ε of training and statistics composed, for a patient who takes part; ``epsilon`` where no
        statistics are released. None without privacy.
    """

    parameters: int
    trained: int
    normalised: tuple[str, ...]
    tensors: int
    bytes_per_round: int
    privacy: PrivacyParameters | None
    epsilon: float | None
    epsilon_per_round: float | None
    evaluation_epsilon: float | None
    statistics_epsilon: float | None = None
    patient_epsilon: float | None = None


def cost(study: Study) -> Cost:
    """Compute what the study costs. Builds the network's outline, without memory for weights.

    Raises
    ------
    ConsiliumError
        ``study.network`` or ``study.trainable``; ``privacy.…`` where the ε asked for cannot be
        reached, or the network or the clipping cannot keep the promise.
    """
    # Arithmetic first: it is the quicker to fail, and needs no torch.
    from consilium_common.privacy.accounting import epsilon_of, parameters

    privacy = parameters(study)
    epsilon = epsilon_per_round = evaluation_epsilon = None
    statistics_epsilon = patient_epsilon = None
    if privacy is not None:
        check_mechanism(study, privacy)
        epsilon = epsilon_of([privacy.event_total], privacy.delta)
        epsilon_per_round = epsilon_of([privacy.event_per_round], privacy.delta)
        if privacy.evaluation_event is not None:
            events = [privacy.evaluation_event] * privacy.evaluations
            evaluation_epsilon = epsilon_of(events, privacy.delta)
        if privacy.statistics_event is not None:
            statistics_epsilon = epsilon_of([privacy.statistics_event], privacy.delta)
        patient_epsilon = epsilon_of(privacy.events_of(privacy.rounds), privacy.delta)

    network = kept(_decides(study), NetworkCost, partial(_of_network, study))
    return Cost(
        parameters=network.parameters,
        trained=network.trained,
        normalised=network.normalised,
        tensors=network.tensors,
        bytes_per_round=network.bytes_per_round,
        privacy=privacy,
        epsilon=epsilon,
        epsilon_per_round=epsilon_per_round,
        evaluation_epsilon=evaluation_epsilon,
        statistics_epsilon=statistics_epsilon,
        patient_epsilon=patient_epsilon,
    )


def _decides(study: Study) -> dict[str, Any]:
    """Return all of a study but what its network cannot depend on."""
    return study.model_dump(mode="json", exclude=_NO_MATTER)


def _of_network(study: Study) -> NetworkCost:
    from consilium_common.models.compression import most_bytes
    from consilium_common.models.exchange import sent_specs
    from consilium_common.models.registry import normalised_layers, outline

    network = outline(study)
    check_network(study, network)
    specs = sent_specs(study)
    return NetworkCost(
        parameters=sum(p.numel() for p in network.parameters()),
        trained=sum(p.numel() for p in network.parameters() if p.requires_grad),
        normalised=normalised_layers(study),
        tensors=len(specs),
        bytes_per_round=most_bytes(study, specs),
    )
