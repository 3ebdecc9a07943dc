"""What aggregator and sites exchange in a round, by the study alone: names, shapes, steps.

Beside the network's own tensors a strategy may exchange others, under names that begin with
``consilium.``, which no network has. Both sides, the link's gate and what a site reviews take them
from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from consilium_common.models.weights import TensorSpec

if TYPE_CHECKING:
    from torch import nn

    from consilium_common.study import Study

#: SCAFFOLD: the aggregator's control variate on its way to a site, and a site's change of its own
#: on the way back; a tensor for each that is trained.
CONTROL: Final = "consilium.control."


def received_specs(study: Study) -> tuple[TensorSpec, ...]:
    """Return what a site gets in a round of training, sorted by name: the model, and extras."""
    from consilium_common.models.registry import outline
    from consilium_common.models.state import specs_of

    network = outline(study)
    return tuple(sorted((*specs_of(network), *_controls(study, _shared(study, network)))))


def sent_specs(study: Study) -> tuple[TensorSpec, ...]:
    """Return what a site's update is made of, sorted by name: what is trained and not its own.

    Raises
    ------
    ConsiliumError
        ``study.strategy`` when the strategy does not fit the network.
    """
    shared = shared_specs(study)
    return tuple(sorted((*shared, *_controls(study, shared))))


def shared_specs(study: Study) -> tuple[TensorSpec, ...]:
    """Return the network's tensors that are trained and aggregated, sorted by name.

    Raises as :func:`sent_specs`.
    """
    from consilium_common.models.registry import outline

    return _shared(study, outline(study))


def statistics_names(study: Study) -> frozenset[str]:
    """Return which of :func:`shared_specs` are running statistics of batch norm.

    No gradient trains them, so no step along a mean change is right for them: a momentum or an
    adaptive rate at the aggregator would leave them far from what the sites measured.
    """
    from consilium_common.models.registry import outline

    network = outline(study)
    parameters = {name for name, _ in network.named_parameters()}
    return frozenset(spec.name for spec in _shared(study, network)) - parameters


def kept_specs(study: Study) -> tuple[TensorSpec, ...]:
    """Return what the strategy keeps at a site from round to round, sorted by name.

    It never leaves: its own layers (FedBN, FedRep), its personal model (Ditto), its control
    variate (SCAFFOLD). Raises as :func:`sent_specs`.
    """
    from consilium_common.models.registry import outline
    from consilium_common.models.state import trained_specs_of

    network = outline(study)
    shared = _shared(study, network)
    match study.federation.strategy.name:
        case "scaffold":
            return tuple(sorted(_controls(study, shared)))
        case "ditto":
            return trained_specs_of(network)
        case _:
            return tuple(sorted(set(trained_specs_of(network)) - set(shared)))


def steps_of(study: Study, cohort_size: int) -> int:
    """Return the local steps that a site makes in a round; public, by its declared cohort size.

    ``training.steps_per_round``, or whole passes over the declared cohort in batches
    (``training.epochs_per_round``), one case a patient.

    Parameters
    ----------
    cohort_size : int
        Patients that the site declared in public, at least 1.
    """
    training = study.training
    if training.epochs_per_round is None:
        return training.steps_per_round
    return training.epochs_per_round * -(-max(cohort_size, 1) // training.batch_size)


def _shared(study: Study, network: nn.Module) -> tuple[TensorSpec, ...]:
    from consilium_common.models.personal import own_names
    from consilium_common.models.state import trained_specs_of

    own = own_names(network, study.federation.strategy)
    return tuple(spec for spec in trained_specs_of(network) if spec.name not in own)


def _controls(study: Study, shared: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    if study.federation.strategy.name != "scaffold":
        return ()
    return tuple(TensorSpec(CONTROL + spec.name, spec.shape) for spec in shared)
