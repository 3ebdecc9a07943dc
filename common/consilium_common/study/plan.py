"""A study in words: what is trained, on what, what leaves a site and what it costs in ε."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from consilium_common.study.document import dotted, printable
from consilium_common.study.schema import Study

if TYPE_CHECKING:
    from consilium_common.privacy.events import PrivacyParameters


@dataclass(frozen=True)
class Cost:
    """What a study costs a site, in values, bytes and ε.

    Attributes
    ----------
    parameters : int
        Values that are trained.
    tensors : int
        Tensors that are exchanged.
    bytes_per_round : int
        Bytes of one packed update, which leaves every site every round; exact.
    privacy : PrivacyParameters or None
        The mechanism with its noise calibrated; None without privacy.
    epsilon : float or None
        ε over the whole study for a patient who takes part, by PLD, at the study's δ; unit the
        patient, adjacency add or remove one. None without privacy.
    epsilon_per_round : float or None
        ε of the first round alone. Rounds compose: their ε do not add up.
    """

    parameters: int
    tensors: int
    bytes_per_round: int
    privacy: PrivacyParameters | None
    epsilon: float | None
    epsilon_per_round: float | None


@dataclass(frozen=True)
class Section:
    """One heading of the plan and its sentences."""

    title: str
    lines: tuple[str, ...]


def cost(study: Study) -> Cost:
    """Compute what the study costs. Builds the network's outline, without memory for weights.

    Raises
    ------
    ConsiliumError
        ``study.network``, or ``privacy.…`` where the ε asked for cannot be reached.
    """
    # Arithmetic first: it is the quicker to fail, and needs no torch.
    from consilium_common.privacy.accounting import epsilon_of, parameters

    privacy = parameters(study)
    epsilon = epsilon_per_round = None
    if privacy is not None:
        epsilon = epsilon_of([privacy.event_total], privacy.delta)
        epsilon_per_round = epsilon_of([privacy.event_per_round], privacy.delta)

    from consilium_common.models.registry import parameter_count, tensor_specs
    from consilium_common.models.weights import packed_size

    specs = tensor_specs(study)
    return Cost(
        parameters=parameter_count(study),
        tensors=len(specs),
        bytes_per_round=packed_size(specs),
        privacy=privacy,
        epsilon=epsilon,
        epsilon_per_round=epsilon_per_round,
    )


def describe(study: Study, known: Cost | None = None) -> list[str]:
    """Return the plan as lines for a person: headings, and sentences indented by two spaces.

    Parameters
    ----------
    study : Study
        A valid study.
    known : Cost, optional
        The study's cost where it has been computed.
    """
    # The title is free text from outside: it must not be able to forge a line of the plan.
    lines = [f"Study {study.name}" + (f": {printable(study.title)}" if study.title else "")]
    for section in sections(study, known or cost(study)):
        lines += ["", section.title, *(f"  {line}" for line in section.lines)]
    return lines


def sections(study: Study, price: Cost) -> tuple[Section, ...]:
    """Return the plan by headings."""
    return (
        Section("What is trained", tuple(_trained(study, price))),
        Section("On what", tuple(_images(study))),
        Section("How", tuple(_training(study))),
        Section("What leaves a site", tuple(_leaves(study, price))),
        Section("Privacy", tuple(_privacy(price))),
    )


def _trained(study: Study, price: Cost) -> Iterable[str]:
    from consilium_common.models.registry import NETWORKS, network_arguments

    task, arguments = study.task, network_arguments(study)
    norm = f"group norm of {arguments.groups} groups"
    if arguments.norm == "instance":
        norm = "instance norm"
    title = NETWORKS[study.model.network].title
    yield (
        f"{title}, {_count(price.parameters, 'parameter')} in {_count(price.tensors, 'tensor')}, "
        f"{norm}, all trained from seed {study.training.seed}."
    )
    kind = "multi-label classification" if task.multi_label else task.kind
    yield (
        f"{task.dimensions}D {kind}: {_count(len(task.inputs), 'input channel')} "
        f"({', '.join(task.inputs)}) to {_count(len(task.classes), 'class')} "
        f"({', '.join(task.classes)})."
    )


def _images(study: Study) -> Iterable[str]:
    steps, task = study.preprocessing, study.task
    if task.dimensions == 3 and steps.orientation != "none":
        yield f"Volumes are turned to {steps.orientation}."
    if steps.spacing is not None:
        yield f"Resampled to {_sizes(steps.spacing)} mm."
    else:
        yield "Each image keeps its own voxel size."
    if steps.size is not None:
        how = "Resized" if task.kind == "classification" else "Padded or cropped"
        yield f"{how} to {_sizes(steps.size)} voxels."
    intensity = steps.intensity
    yield {
        "zscore": "Intensities: each image to mean 0 and standard deviation 1, by its own values.",
        "percentile": "Intensities: scaled between each image's own percentiles.",
        "window": f"Intensities: {_number(intensity.low)} to {_number(intensity.high)} "
        "(Hounsfield units for CT) become 0 to 1, the rest is cut off.",
        "none": "Intensities stay as they are.",
    }[intensity.kind]
    training = study.training
    if training.patch is not None:
        share = f"{training.foreground_share:.0%}"
        yield f"Trained on patches of {_sizes(training.patch)}, {share} centred on foreground."
    changes = [
        f"{name} {_number(value)}"
        for name, value in training.augmentation.model_dump().items()
        if value
    ]
    if changes:
        yield f"Random changes while training: {', '.join(changes)}."


def _training(study: Study) -> Iterable[str]:
    training, optimiser, federation = study.training, study.training.optimiser, study.federation
    loss = {
        "dice_ce": "Dice plus cross-entropy",
        "cross_entropy": "cross-entropy",
        "focal": "focal loss",
        "bce": "binary cross-entropy per class",
    }[training.loss]
    name = {"adamw": "AdamW", "sgd": f"SGD with momentum {_number(optimiser.momentum)}"}
    yield (
        f"Loss: {loss}. Optimiser: {name[optimiser.name]}, learning rate "
        f"{_number(optimiser.learning_rate)} ({optimiser.schedule}), weight decay "
        f"{_number(optimiser.weight_decay)}."
    )
    if study.privacy.mode == "patient":
        yield (
            f"Each patient of a step counts once: one gradient, averaged over "
            f"{_count(training.patches_per_patient, 'image or patch', 'images or patches')}."
        )
    else:
        yield f"{_count(training.batch_size, 'image or patch', 'images or patches')} a step."
    yield (
        f"{_count(federation.rounds, 'round')} of {_count(training.steps_per_round, 'step')} at "
        f"each site: {_count(study.total_steps, 'step')} in all."
    )
    weights = {
        "uniform": "all sites weigh alike",
        "cohort": "sites weigh by the cohort size they declared publicly",
    }[federation.weighting]
    yield (
        f"A round needs {_count(federation.quorum, 'site')} and waits at most "
        f"{_duration(federation.deadline_seconds)}; {weights}."
    )
    yield (
        "Precision: "
        + {
            "auto": "bfloat16 arithmetic where the device has it, float32 weights.",
            "float32": "float32.",
            "bfloat16": "bfloat16 arithmetic, float32 weights.",
        }[training.precision]
    )


def _leaves(study: Study, price: Cost) -> Iterable[str]:
    rounds = study.federation.rounds
    yield (
        f"Each round one update: {_count(price.tensors, 'tensor')} of float32, "
        f"{size_in_words(price.bytes_per_round)}; {size_in_words(price.bytes_per_round * rounds)} "
        f"over {_count(rounds, 'round')}."
    )
    if price.privacy is not None:
        yield "The update is made of clipped, noised gradients only."
    else:
        yield "The update is exact: it is not protected, and can tell about single patients."
    if study.evaluation.release == "exact":
        every = study.evaluation.every
        when = f"every {_count(every, 'round')} and after the last" if every else "after the last"
        figures = "Dice" if study.task.kind == "segmentation" else "accuracy and AUC"
        yield f"Exact evaluation figures ({figures} per class), {when}, where policy permits it."
        yield "Nothing else: no image, no label, no identity."
    else:
        yield "Nothing else: no image, no label, no identity, no loss, no metric, no count."


def _privacy(price: Cost) -> Iterable[str]:
    mechanism = price.privacy
    if mechanism is None or price.epsilon is None or price.epsilon_per_round is None:
        yield "None. Runs only at sites whose policy permits studies without privacy."
        return
    # Beyond 1000 the accountant gives the looser bound: nothing is protected there anyhow.
    how = "PLD" if price.epsilon <= 1000 else "RDP bound; this protects nobody"
    yield (
        f"ε = {price.epsilon:.3f} at δ = {_number(mechanism.delta)} for each patient who takes "
        f"part, over the whole study ({how}); the first round alone {price.epsilon_per_round:.3f}."
    )
    yield (
        "Unit: the patient, with every image, patch and augmentation. Adjacency: add or remove "
        "one patient."
    )
    yield (
        "Threat model: silo-local noise. Each site adds its own, which protects against the "
        "aggregator, the other sites and whoever receives the model."
    )
    yield (
        f"Mechanism: in each step every patient takes part with probability q = "
        f"{_number(mechanism.sampling_rate)} (Poisson); gradients are clipped to C = "
        f"{_number(mechanism.clip_norm)}; noise of σ = {_number(mechanism.noise_multiplier)} × C; "
        f"{_count(mechanism.rounds * mechanism.steps_per_round, 'step')}."
    )
    # The convention of the privacy rules: δ at most 1 / (10 N).
    yield (
        f"This δ suits a site of up to {_count(int(0.1 / mechanism.delta + 1e-9), 'patient')} "
        "(δ ≤ 1 / (10 N))."
    )


def compare(old: Study, new: Study) -> list[str]:
    """Return one line for each value that differs, by key path; empty when the studies are one."""
    before, after = _flat(old.to_canonical(), ()), _flat(new.to_canonical(), ())
    lines = []
    for key in [*before, *(key for key in after if key not in before)]:
        if key not in after:
            lines.append(f"{key}: {_plain(before[key])} is gone")
        elif key not in before:
            lines.append(f"{key}: {_plain(after[key])} is new")
        elif before[key] != after[key] or type(before[key]) is not type(after[key]):
            lines.append(f"{key}: {_plain(before[key])} → {_plain(after[key])}")
    return lines


def _flat(value: Any, path: tuple[str, ...]) -> dict[str, Any]:
    """Return the leaves by key path; lists are leaves, and so are empty mappings."""
    if isinstance(value, dict) and value:
        return {
            key: leaf
            for name, item in value.items()
            for key, leaf in _flat(item, (*path, name)).items()
        }
    return {dotted(path): value} if value != {} else {}


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return f"[{', '.join(_plain(item) for item in value)}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return _number(value) if isinstance(value, float) else printable(str(value))


def size_in_words(count: int) -> str:
    """Return a number of bytes in decimal units: ``549 kB``."""
    if count < 1000:
        return _count(count, "byte")
    amount = float(count)
    for unit in ("kB", "MB", "GB", "TB"):
        amount /= 1000
        if amount < 999.5 or unit == "TB":
            break
    return f"{amount:.3g} {unit}" if amount < 999.5 else f"{amount:,.0f} {unit}"


def _count(number: int, one: str, many: str = "") -> str:
    plural = many or (f"{one}es" if one.endswith("s") else f"{one}s")
    return f"{number:,} {one if number == 1 else plural}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.6g}"


def _sizes(values: Sequence[float]) -> str:
    return " × ".join(_number(value) for value in values)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h"
