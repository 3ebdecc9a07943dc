"""One study at one site, alive across rounds: network, device and data are made once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from consilium_client.training.cases import Array, Case, PatientCohort, Split
from consilium_client.training.compute import Compute, choose_compute, repeat_exactly
from consilium_client.training.evaluation import (
    Evaluation,
    evaluate_classification,
    evaluate_segmentation,
)
from consilium_common.errors import ConsiliumError
from consilium_common.study import Study

if TYPE_CHECKING:
    from consilium_client.training.engines.choice import Choice
    from consilium_client.training.learner import Learner
    from consilium_client.training.round import TrainResult

_log = logging.getLogger(__name__)

#: Images in one forward pass when classifying.
_IMAGES: Final = 32


class TrainingSession:
    """Local training and evaluation of one study; lives across rounds in one process.

    Parameters
    ----------
    study : Study
        The approved study.
    cohort : PatientCohort
        The site's patients.
    device : str
        ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N`` (default: auto).
    precision : str or None
        ``auto``, ``float32`` or ``bfloat16``; None takes the study's.
    threads : int
        CPU threads of this process (default: 1; several sites may share a machine).

    Raises
    ------
    ConsiliumError
        ``state.device`` or ``state.precision`` when the machine lacks what was asked;
        ``privacy.network`` when the network cannot be trained privately; ``privacy.engine`` when
        the engine that the study names cannot compute it; ``study.strategy`` when the strategy
        does not fit the network; ``study.patches`` and the errors of
        :class:`~consilium_client.training.patches.PatchSource`, at the first round, when study and
        data do not fit.
    """

    def __init__(
        self,
        study: Study,
        cohort: PatientCohort,
        *,
        device: str = "auto",
        precision: str | None = None,
        threads: int = 1,
    ) -> None:
        import torch

        from consilium_client.training.engines.choice import choose_engine
        from consilium_client.training.strategies import site_strategy
        from consilium_common.models.exchange import CONTROL, received_specs
        from consilium_common.models.private import check_private
        from consilium_common.models.registry import build_network
        from consilium_common.privacy.accounting import parameters
        from consilium_common.study.problems import raise_problems
        from consilium_common.study.rules import patch_problems

        torch.set_num_threads(threads)
        self._threads = threads
        self.study = study
        self.compute: Compute = choose_compute(study, device, precision)
        self._cohort = cohort
        self._privacy = parameters(study)
        # Where noise is drawn no two runs are alike anyway.
        repeat_exactly(self._privacy is None)
        network = build_network(study)
        self._engine: Choice | None = None
        if self._privacy is not None:
            check_private(network)
            raise_problems(list(patch_problems(study)), f"study {study.name}")
            self._engine = choose_engine(study, network, precision=self.compute.precision)
            _log.info("gradient engine: %s (%s)", self._engine.name, self._engine.why)
        self._network = self.compute.place(network)
        self._strategy = site_strategy(study, self._network)
        self._extras = [s for s in received_specs(study) if s.name.startswith(CONTROL)]
        self._learner: Learner | None = None

    def train(
        self,
        weights: Mapping[str, NDArray[np.float32]],
        round_index: int,
        cohort_size: int,
        progress: Callable[[int, int], None] | None = None,
        *,
        clip_norm: float | None = None,
        kept: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> TrainResult:
        """Train one round from the global model.

        Parameters
        ----------
        weights : mapping of str to float32 arrays
            What the aggregator sent: exactly
            :func:`~consilium_common.models.exchange.received_specs`.
        round_index : int
            From 0; decides the learning rate and, without privacy, the order of cases.
        cohort_size : int
            The cohort size that this site declared in public. With privacy it sets the denominator
            of the noisy gradients; with ``training.epochs_per_round`` the number of steps. It need
            not be the true number.
        progress : callable or None
            Told (step, steps) after each step, those of a personal model included.
        clip_norm : float or None
            What this site's round before returned, for adaptive clipping; None begins anew.
        kept : mapping of str to float32 arrays, or None
            What this site's last round kept; None begins anew.

        Raises
        ------
        ConsiliumError
            ``run.bad-update`` for a model that is not this study's, or a control variate that no
            honest training makes; ``run.round`` for a round that the study does not have;
            ``run.diverged`` for a loss (without privacy) or a weight that is not finite;
            ``privacy.truth`` when the mechanism that ran is not the one charged.
        """
        from consilium_client.training.mechanism import Mechanism
        from consilium_client.training.optimiser import RoundSteps
        from consilium_client.training.round import Round
        from consilium_common.models.state import write_weights

        rounds = self.study.federation.rounds
        if not 0 <= round_index < rounds:
            raise ConsiliumError(
                "run.round",
                f"Round {round_index + 1} was asked for; the study has {rounds}.",
                hint="Check that aggregator and site hold the same version of the study.",
            )
        model, control = self._divided(weights, training=True)
        write_weights(self._network, self._strategy.start(model, kept or {}))
        steps = RoundSteps.of(self.study, round_index, cohort_size)
        round_ = Round(self._ready(), self._strategy, steps, model, control, kept or {}, progress)
        if self._privacy is None or self._engine is None:
            return round_.run()
        privacy = self.study.privacy
        assert privacy.mode == "patient"
        mechanism = Mechanism.for_round(
            self._privacy,
            cohort_size,
            clipping=privacy.clipping,
            clip_norm=clip_norm,
            threads=self._threads,
        )
        return round_.run(mechanism, self._engine)

    def require_model(self, weights: bytes, *, training: bool = False) -> None:
        """Raise ``run.bad-update`` for a model that is not exactly this study's.

        Also for a control variate longer than
        :func:`~consilium_client.training.control_bound.control_bound`.

        Parameters
        ----------
        training : bool
            Whether it must hold what the strategy needs for training as well.
        """
        from consilium_common.models.state import specs_of
        from consilium_common.models.weights import check_tensors, unpack

        model, _ = self._divided(unpack(weights), training=training)
        check_tensors(model, specs_of(self._network), norm_bound=None)

    def personal(
        self,
        weights: Mapping[str, NDArray[np.float32]],
        kept: Mapping[str, NDArray[np.float32]],
    ) -> dict[str, NDArray[np.float32]] | None:
        """Return this site's personal model, all tensors; None where there is none (yet)."""
        return self._strategy.personal(self._divided(weights, training=False)[0], kept)

    def take_at_most(self, share: float) -> None:
        """Keep to a share of the GPU's memory from here on; on a CPU there is nothing to keep to.

        It bounds what this process allocates through PyTorch; CUDA's own context, some hundred
        MB, comes on top, and computing time is not bounded. Whoever needs more fails with
        ``run.out-of-memory`` and takes nothing from others.

        Parameters
        ----------
        share : float
            Above 0, at most 1.
        """
        import torch

        device = torch.device(self.compute.device)
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            torch.cuda.set_per_process_memory_fraction(share, index)

    def evaluate(
        self,
        weights: Mapping[str, NDArray[np.float32]],
        split: Split,
        before_case: Callable[[], None] = lambda: None,
    ) -> Evaluation:
        """Evaluate a model on one split. The figures are exact and so stay at the site.

        Parameters
        ----------
        before_case : callable
            Called before each case (before each batch of images when classifying); what it raises
            ends the evaluation.

        Raises
        ------
        ConsiliumError
            ``run.bad-update`` for a model that is not this study's.
        """
        from consilium_common.models.state import write_weights

        write_weights(self._network, self._divided(weights, training=False)[0])
        cases = [case for patient in self._cohort.patients(split) for case in patient.cases]
        classes = self.study.task.classes
        if self.study.task.kind == "segmentation":
            segmented = self._segmented(cases, before_case)
            return evaluate_segmentation(split, classes, segmented)
        probabilities = np.zeros((len(cases), len(classes)))
        truth = np.zeros((len(cases), len(classes)), dtype=bool)
        for start in range(0, len(cases), _IMAGES):
            before_case()
            part = cases[start : start + _IMAGES]
            probabilities[start : start + len(part)] = self._classified(part)
        for row, case in enumerate(cases):
            label = np.asarray(case.label())
            truth[row] = label > 0.5 if label.ndim else np.arange(len(classes)) == label
        return evaluate_classification(
            split,
            classes,
            [case.case_id for case in cases],
            probabilities,
            truth,
            multi_label=self.study.task.multi_label,
        )

    def predict(self, weights: Mapping[str, NDArray[np.float32]], case: Case) -> Array:
        """Predict one case.

        Returns
        -------
        numpy.ndarray
            Segmentation: the label map, uint8, shape (\\*spatial). Classification: probabilities,
            float64, shape (classes,).

        Raises
        ------
        ConsiliumError
            ``run.bad-update`` for a model that is not this study's.
        """
        from consilium_client.training.inference import segment
        from consilium_common.models.state import write_weights

        write_weights(self._network, self._divided(weights, training=False)[0])
        if self.study.task.kind == "segmentation":
            return segment(self.study, self._network, self.compute, case.image())
        return np.asarray(self._classified([case])[0])

    def _divided(
        self, weights: Mapping[str, NDArray[np.float32]], *, training: bool
    ) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
        """Return the network's tensors and the strategy's extras of what the aggregator sent.

        For training the extras must be there, exactly, and be such as honest sites can make;
        otherwise they may be, and are not used.
        """
        from consilium_client.training.control_bound import require_honest_control
        from consilium_common.models.exchange import CONTROL
        from consilium_common.models.weights import check_tensors

        control = {name: tensor for name, tensor in weights.items() if name.startswith(CONTROL)}
        if training or control:
            check_tensors(control, self._extras, norm_bound=None)
        if control:
            require_honest_control(control, self.study, self._privacy)
        return {name: weights[name] for name in weights if name not in control}, control

    def _ready(self) -> Learner:
        """Load the training data at the first round, and keep it for the next ones."""
        from consilium_client.training.learner import Learner
        from consilium_client.training.losses import build_loss
        from consilium_client.training.patches import PatchSource

        if self._learner is None:
            self._learner = Learner(
                study=self.study,
                network=self._network,
                compute=self.compute,
                loss=build_loss(self.study),
                source=PatchSource(self.study, self._cohort.patients("train")),
            )
        return self._learner

    def _segmented(
        self, cases: list[Case], before_case: Callable[[], None]
    ) -> Iterator[tuple[str, Array, Array]]:
        from consilium_client.training.inference import segment

        for case in cases:
            before_case()
            prediction = segment(self.study, self._network, self.compute, case.image())
            yield case.case_id, prediction, case.label()

    def _classified(self, cases: list[Case]) -> NDArray[np.float64]:
        from consilium_client.training.inference import classify

        images = [case.image() for case in cases]
        return classify(self.study, self._network, self.compute, images)
