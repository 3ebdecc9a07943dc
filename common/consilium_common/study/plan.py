"""A study in words: what is trained, on what, what leaves a site and what it costs in ε."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from consilium_common.privacy.noise import patients_needed
from consilium_common.study.approval import in_words as signatures_in_words
from consilium_common.study.cost import Cost, cost
from consilium_common.study.covariates import in_words
from consilium_common.study.document import printable
from consilium_common.study.federation import Compression
from consilium_common.study.federation_words import federation_sentences
from consilium_common.study.schema import Study
from consilium_common.study.statistics import tables
from consilium_common.study.strategy_words import rounds_sentence, strategy_sentences
from consilium_common.study.words import (
    count_of,
    number_of,
    size_in_words,
    sizes_of,
)


@dataclass(frozen=True)
class Section:
    """One heading of the plan and its sentences."""

    title: str
    lines: tuple[str, ...]


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
        Section("Evaluation at the sites", tuple(_evaluation(study, price))),
        Section("What leaves a site", tuple(_leaves(study, price))),
        Section("Privacy", tuple(_privacy(study, price))),
        Section("Who must sign it", (signatures_in_words(study.approval),)),
    )


def _trained(study: Study, price: Cost) -> Iterable[str]:
    from consilium_common.models.registry import NETWORKS, network_arguments

    task, arguments = study.task, network_arguments(study)
    norm = f"{arguments.norm} norm"
    if arguments.norm == "group":
        norm += f" of {arguments.groups} groups"
    title = NETWORKS[study.model.network].title
    yield f"{title}, {count_of(price.parameters, 'parameter')}, {norm}."
    if price.normalised:
        became = "becomes" if len(price.normalised) == 1 else "become"
        yield f"{count_of(len(price.normalised), 'batch norm')} {became} group norm."
    elif study.model.normalise:
        yield "There is no batch norm to replace: normalise changes nothing."
    which = study.model.trainable
    if which == "all":
        yield "All of them are trained."
    else:
        what = {
            "first+last": "the first and the last layer",
            "adapters": f"adapters of rank {study.model.adapter_rank} at most, and the last layer",
        }.get(which if isinstance(which, str) else "") or printable(", ".join(which))
        yield (
            f"Trained: {price.trained:,} of {count_of(price.parameters, 'value')} ({what}); "
            "the rest stays as it began."
        )
    start = study.model.start
    if start is not None:
        yield (
            f"Begins with public weights (SHA-256 {start.sha256[:16]}…), trained on: "
            f"{printable(start.data, 500)}"
        )
    else:
        frozen = "" if which == "all" else " What stays as it began stays random."
        yield f"Begins with random weights, from seed {study.training.seed}.{frozen}"
    kind = "multi-label classification" if task.multi_label else task.kind
    yield (
        f"{task.dimensions}D {kind}: {count_of(len(task.inputs), 'input channel')} "
        f"({', '.join(task.inputs)}) to {count_of(len(task.classes), 'class')} "
        f"({', '.join(task.classes)})."
    )
    if task.covariates:
        named = ", ".join(in_words(one) for one in task.covariates)
        yield (
            f"Beside the image the network sees {count_of(len(task.covariates), 'covariate')} as "
            f"the site's case list states them: {named}. A value may be missing."
        )


def _images(study: Study) -> Iterable[str]:
    steps, task = study.preprocessing, study.task
    if task.dimensions == 3 and steps.orientation != "none":
        yield f"Volumes are turned to {steps.orientation}."
    if steps.spacing is not None:
        yield f"Resampled to {sizes_of(steps.spacing)} mm."
    else:
        yield "Each image keeps its own voxel size."
    if steps.size is not None:
        how = "Resized" if task.kind == "classification" else "Padded or cropped"
        yield f"{how} to {sizes_of(steps.size)} voxels."
    intensity = steps.intensity
    yield {
        "zscore": "Intensities: each image to mean 0 and standard deviation 1, by its own values.",
        "percentile": "Intensities: scaled between each image's own percentiles.",
        "window": f"Intensities: {number_of(intensity.low)} to {number_of(intensity.high)} "
        "(Hounsfield units for CT) become 0 to 1, the rest is cut off.",
        "none": "Intensities stay as they are.",
    }[intensity.kind]
    training = study.training
    if training.patch is not None:
        share = f"{training.foreground_share:.0%}"
        yield f"Trained on patches of {sizes_of(training.patch)}, {share} centred on foreground."
    changes = [
        f"{name} {number_of(value)}"
        for name, value in training.augmentation.model_dump().items()
        if value and name != "copies"
    ]
    if changes:
        copies = training.augmentation.copies
        times = f", {copies} times for each image and averaged" if copies > 1 else ""
        yield f"Random changes while training: {', '.join(changes)}{times}."


def _training(study: Study) -> Iterable[str]:
    training, optimiser, federation = study.training, study.training.optimiser, study.federation
    loss = {
        "dice_ce": "Dice plus cross-entropy",
        "cross_entropy": "cross-entropy",
        "focal": "focal loss",
        "bce": "binary cross-entropy per class",
    }[training.loss]
    name = {
        "adamw": "AdamW",
        "adamw-bc": "AdamW, its second moment freed of the known variance of the noise",
        "sgd": f"SGD with momentum {number_of(optimiser.momentum)}",
    }
    yield (
        f"Loss: {loss}. Optimiser: {name[optimiser.name]}, learning rate "
        f"{number_of(optimiser.learning_rate)} ({optimiser.schedule}), weight decay "
        f"{number_of(optimiser.weight_decay)}."
    )
    if study.privacy.mode == "patient":
        yield (
            f"Each patient of a step counts once: one gradient, averaged over "
            f"{count_of(training.patches_per_patient, 'image or patch', 'images or patches')}."
        )
        yield {
            "auto": "Gradient engine: chosen at each site by a measured rule; all give the same.",
            "loop": "Gradient engine: a loop over patients.",
            "vmap": "Gradient engine: vmap, many patients at once.",
            "opacus": "Gradient engine: opacus, by hooks.",
        }[study.privacy.engine]
    else:
        yield f"{count_of(training.batch_size, 'image or patch', 'images or patches')} a step."
    yield rounds_sentence(study)
    yield from strategy_sentences(study)
    if federation.averaging:
        yield (
            f"The running average of the global models (decay {number_of(federation.averaging)}) "
            "is evaluated and kept."
        )
    yield from federation_sentences(study)
    yield (
        "Precision: "
        + {
            "auto": "bfloat16 arithmetic where the device has it, float32 weights.",
            "float32": "float32.",
            "bfloat16": "bfloat16 arithmetic, float32 weights.",
        }[training.precision]
    )


def _leaves(study: Study, price: Cost) -> Iterable[str]:
    from consilium_common.models.registry import network_arguments

    rounds, arguments = study.federation.rounds, network_arguments(study)
    compression = study.federation.compression
    most = "at most " if compression.level else ""
    yield (
        f"Each round one update: {count_of(price.tensors, 'tensor')} {_form(compression)}, {most}"
        f"{size_in_words(price.bytes_per_round)}; {size_in_words(price.bytes_per_round * rounds)} "
        f"over {count_of(rounds, 'round')}."
    )
    if compression.encoding != "none" and compression.error_feedback:
        yield "What its encoding loses stays at the site and is added to the site's next update."
    if price.privacy is not None:
        yield "The update is made of clipped, noised gradients only."
    else:
        yield "The update is exact: it is not protected, and can tell about single patients."
        if arguments.norm == "batch" and not study.model.normalise:
            yield "It holds batch norm's running means and variances of the site's images."
    yield from _statistics(study, price)
    released = study.evaluation.release
    figures = "Dice" if study.task.kind == "segmentation" else "accuracy and AUC"
    if released == "exact":
        yield f"Exact evaluation figures ({figures} per class), where policy permits it."
        yield "Nothing else: no image, no label, no identity."
    elif released == "private":
        yield "Each evaluation one number: the noised sum of the scored patients' scores."
        yield "Nothing else: no image, no label, no identity, no loss, no exact metric, no count."
    else:
        yield "Nothing else: no image, no label, no identity, no loss, no metric, no count."


def _form(compression: Compression) -> str:
    """Say in what form an update's tensors travel."""
    words = {
        "none": "of float32",
        "bfloat16": "rounded to bfloat16",
        "int8": "rounded at random to 8 bits",
        "top-k": f"of which the largest {compression.share:.3g} of the entries travel",
    }[compression.encoding]
    if compression.encoding != "none":
        relative = ", as changes of the global model" if compression.delta else ""
        words += f" (those of one dimension exact){relative}"
    return words + (f", packed at level {compression.level}" if compression.level else "")


def _statistics(study: Study, price: Cost) -> Iterable[str]:
    """Say what statistics leave, and how noisy they are."""
    deviation = None if price.privacy is None else price.privacy.statistics_deviation
    if deviation is None:
        return
    wanted = tables(study)
    listed = "; ".join(f"{table.title[0].lower()}{table.title[1:]}" for table in wanted)
    numbers = sum(len(table.bins) for table in wanted)
    yield (
        f"Once, before the first round, {count_of(numbers, 'noised number')} about the training "
        f"patients: shares over public bins ({listed}), summed, with noise of standard deviation "
        f"{number_of(deviation)} on each."
    )


def _evaluation(study: Study, price: Cost) -> Iterable[str]:
    evaluation, after = study.evaluation, study.evaluations
    shown = [str(number) for number in after if number]
    listed = ", ".join(shown if len(shown) <= 6 else [*shown[:3], "…", shown[-1]])
    if after[0] == 0:
        yield (
            "The starting model first, before the first private step: nobody should spend budget "
            "on what they already have."
        )
    yield f"After round {listed}." if len(shown) == 1 else f"After rounds {listed}."
    deviation = price.privacy.evaluation_deviation if price.privacy is not None else None
    if deviation is not None:
        yield (
            f"Released: the sum of one score a patient, between 0 and 1, with noise of standard "
            f"deviation {number_of(deviation)}."
        )
    else:
        yield {
            "none": "The figures stay at the site.",
            "exact": "The exact figures are released.",
            "private": "",
        }[evaluation.release]
    if evaluation.sufficient is not None:
        yield (
            f"A starting model that scores {number_of(evaluation.sufficient)} or more ends the "
            "study before any budget is spent on training."
        )


def _privacy(study: Study, price: Cost) -> Iterable[str]:
    mechanism, privacy = price.privacy, study.privacy
    if (
        mechanism is None
        or privacy.mode == "none"
        or price.epsilon is None
        or price.epsilon_per_round is None
    ):
        yield "None. Runs only at sites whose policy permits studies without privacy."
        return
    # Beyond 1000 the accountant gives the looser bound: nothing is protected there anyhow.
    how = "PLD" if price.epsilon <= 1000 else "RDP bound; this protects nobody"
    yield (
        f"Training: ε = {price.epsilon:.3f} at δ = {number_of(mechanism.delta)} for each patient "
        f"who takes part, over the whole study ({how}); the first round alone "
        f"{price.epsilon_per_round:.3f}."
    )
    if price.evaluation_epsilon is not None:
        yield (
            f"Evaluation: ε = {price.evaluation_epsilon:.3f} at the same δ for each patient who is "
            f"scored, over {count_of(mechanism.evaluations, 'released evaluation')}. Those "
            "patients are not trained on."
        )
    if price.statistics_epsilon is not None and price.patient_epsilon is not None:
        yield (
            f"Statistics: ε = {price.statistics_epsilon:.3f} at the same δ, once, for each patient "
            f"trained on; with training ε = {price.patient_epsilon:.3f} in all."
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
        f"{number_of(mechanism.sampling_rate)} (Poisson); gradients are clipped to C = "
        f"{number_of(mechanism.clip_norm)}; noise of σ = {number_of(mechanism.noise_multiplier)} × "
        f"C; {count_of(mechanism.rounds * mechanism.steps_per_round, 'step')}."
    )
    clipping = privacy.clipping
    if clipping.kind == "flat":
        yield "Clipping: flat; longer gradients are scaled down to C."
    elif clipping.kind == "automatic":
        yield (
            f"Clipping: automatic (AUTO-S, γ = {number_of(clipping.stability)}); every gradient is "
            "scaled to nearly C."
        )
    else:
        yield (
            "Clipping: adaptive; C begins at this value and follows the "
            f"{number_of(clipping.quantile)} quantile of gradient norms by a count with noise "
            f"{number_of(clipping.count_noise)}, which this ε covers."
        )
    # The convention of the privacy rules: δ at most 1 / (10 N).
    yield (
        f"This δ suits a site of up to {count_of(int(0.1 / mechanism.delta + 1e-9), 'patient')} "
        "(δ ≤ 1 / (10 N))."
    )
    sites = study.federation.quorum
    afloat, clear = patients_needed(mechanism, price.trained, sites)
    yield (
        f"With {count_of(price.trained, 'trained value')}, {count_of(sites, 'site')} of fewer than "
        f"{count_of(afloat, 'patient')} each drown in their noise; from {clear:,} each on they are "
        "clearly heard."
    )
