"""The plan says in words, and in exact numbers, what a study does and costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from study_samples import TEXT, study_of

from consilium_common.errors import ConsiliumError
from consilium_common.models.registry import initial_weights
from consilium_common.models.weights import pack
from consilium_common.study.check import check
from consilium_common.study.comparison import compare
from consilium_common.study.cost import cost
from consilium_common.study.load import parse_study
from consilium_common.study.plan import describe
from consilium_common.study.words import size_in_words

pytest.importorskip("consilium_common.privacy.accounting")


def saved(folder: Path, text: str) -> Path:
    path = folder / "s.yaml"
    path.write_text(text)
    return path


def line_of(text: str, part: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if part in line)


def test_the_price_is_that_of_what_is_really_sent_and_spent() -> None:
    from consilium_common.privacy.accounting import epsilon_of
    from consilium_common.privacy.events import PrivacyEvent

    study = parse_study(TEXT, "x")
    price = cost(study)
    weights = initial_weights(study)
    assert price.bytes_per_round == len(pack(weights))
    assert price.tensors == len(weights)
    assert price.parameters == price.trained == sum(w.size for w in weights.values())
    assert price.evaluation_epsilon is None
    assert price.epsilon == epsilon_of([PrivacyEvent(0.25, 1.5, 20)], 1e-3)
    assert price.epsilon_per_round == epsilon_of([PrivacyEvent(0.25, 1.5, 5)], 1e-3)


def test_a_private_plan_states_unit_adjacency_threat_model_and_mechanism() -> None:
    study = parse_study(TEXT, "x")
    price = cost(study)
    text = "\n".join(describe(study, price))
    for part in (
        f"ε = {price.epsilon:.3f} at δ = 0.001",
        "Unit: the patient",
        "Adjacency: add or remove one patient.",
        "silo-local noise",
        "q = 0.25 (Poisson)",
        "C = 1;",
        "σ = 1.5 × C; 20 steps",
        "up to 100 patients",
        "Nothing else: no image, no label",
        "4 rounds of 5 steps",
        "Clipping: flat;",
        "Gradient engine: chosen at each site",
        "The starting model first, before the first private step",
        "The figures stay at the site.",
        "All of them are trained.",
        "to 2 classes (background, organ)",
        f"{price.parameters:,} parameters",
        size_in_words(price.bytes_per_round),
    ):
        assert part in text
    assert "exact" not in text


def test_a_plan_without_privacy_says_so() -> None:
    text = "\n".join(describe(study_of(augmentation={"flip": 0.5})))
    assert "The update is exact: it is not protected" in text
    assert "Runs only at sites whose policy permits" in text
    assert "flip 0.5" in text
    assert "ε" not in text


def test_a_title_cannot_forge_a_line_of_the_plan() -> None:
    title = '"x\\nPrivacy\\n  ε = 0.1 \\e[2J\\u202E"'
    study = parse_study(TEXT.replace("A tiny study", title), "x")
    assert "\n" in study.title
    lines = describe(study)
    assert lines[0] == "Study tiny: x�Privacy�  ε = 0.1 �[2J�"
    assert all("\n" not in line for line in lines)
    assert compare(study, parse_study(TEXT, "y")) == [
        "title: x�Privacy�  ε = 0.1 �[2J� → A tiny study"
    ]


def test_released_figures_are_named() -> None:
    text = TEXT[: TEXT.index("privacy:")] + "privacy: {mode: none}\nevaluation: {release: exact}\n"
    said = "\n".join(describe(parse_study(text, "x")))
    assert "Exact evaluation figures (Dice per class)" in said
    assert "After round 20." in said
    assert "starting model" not in said
    assert "no metric" not in said


def test_check_gives_the_same_to_people_and_programs(tmp_path: Path) -> None:
    result = check(saved(tmp_path, TEXT))
    data = json.loads(json.dumps(result.data, allow_nan=False))
    assert data["digest"] == result.study.digest
    assert result.lines[-1] == f"Digest {result.study.digest}"
    assert list(result.lines[:-2]) == data["plan"]
    assert data["parameters"] == result.cost.parameters
    assert data["bytes_per_round"] == result.cost.bytes_per_round
    assert data["privacy"]["epsilon"] == result.cost.epsilon
    assert data["privacy"]["unit"] == "patient"
    assert data["privacy"]["adjacency"] == "add-or-remove-one"
    assert "s.yaml" in data["file"]


def test_an_epsilon_asked_for_is_kept() -> None:
    study = parse_study(TEXT.replace("noise_multiplier: 1.5", "epsilon: 3"), "x")
    price = cost(study)
    assert price.privacy is not None
    assert price.epsilon is not None
    assert 2.9 < price.epsilon <= 3


def test_a_network_that_does_not_fit_is_said_by_line(tmp_path: Path) -> None:
    text = TEXT.replace("patch: [16, 16, 16]", "patch: [16, 18, 16]")
    with pytest.raises(ConsiliumError) as caught:
        check(saved(tmp_path, text))
    assert caught.value.code == "study.network"
    assert caught.value.where.endswith("s.yaml:17")
    text = text.replace("    channels:", "    norm: batches\n    chanels:")
    with pytest.raises(ConsiliumError) as caught:
        check(saved(tmp_path, text))
    assert 'line 12: `model.arguments.norm` is "batches"; it can be group' in caught.value.message
    assert "line 13: `chanels` is not a key of model.arguments" in caught.value.message


def test_a_price_that_cannot_be_computed_is_said_by_line(tmp_path: Path) -> None:
    with pytest.raises(ConsiliumError) as caught:
        check(saved(tmp_path, TEXT.replace("delta: 1e-3", "delta: 1e-300")))
    assert caught.value.code == "privacy.delta-invalid"
    assert caught.value.where.endswith("s.yaml:23")
    large = TEXT.replace(
        "[8, 16, 32]", "[512, 512, 512]\n    kernel_size: 7\n    up_kernel_size: 7"
    )
    large = large.replace("patch: [16, 16, 16]", "patch: [32, 32, 32]")
    with pytest.raises(ConsiliumError) as caught:
        check(saved(tmp_path, large))
    assert caught.value.code == "study.network"
    assert caught.value.where.endswith("s.yaml:11")


RICH = (
    TEXT.replace("    channels:", "    norm: batch\n    channels:")
    .replace(
        "training:\n",
        "  normalise: true\n  trainable: adapters\n  adapter_rank: 2\n"
        f"  start: {{sha256: {'ab' * 32}, data: 'A public set, CC BY 4.0'}}\n"
        "training:\n  augmentation: {copies: 3, flip: 0.5}\n",
    )
    .replace("delta:", "engine: vmap\n  clipping: {kind: adaptive}\n  delta:")
    .replace("rounds: 4", "rounds: 4\n  averaging: 0.9\n  sites_per_round: 3")
    + "evaluation: {release: private, epsilon: 1, every: 2, sufficient: 0.8}\n"
)


def test_what_is_trained_released_and_paid_is_said_one_by_one(tmp_path: Path) -> None:
    from consilium_common.privacy.accounting import epsilon_of

    result = check(saved(tmp_path, RICH), patients=30)
    price, said = result.cost, "\n".join(result.lines)
    assert price.privacy is not None
    assert price.privacy.evaluation_event is not None
    assert price.trained < price.parameters / 2
    assert price.evaluation_epsilon == epsilon_of([price.privacy.evaluation_event] * 3, 1e-3)
    assert price.evaluation_epsilon <= 1
    for part in (
        "4 batch norms become group norm.",
        f"Trained: {price.trained:,} of {price.parameters:,} values (adapters of rank 2",
        "trained on: A public set, CC BY 4.0",
        "3 times for each image",
        "Gradient engine: vmap",
        "running average of the global models (decay 0.9)",
        "Each round asks 3 sites, drawn at random",
        "After rounds 2, 4.",
        f"deviation {price.privacy.evaluation_noise / 2:.6g}",  # type: ignore[operator]
        "scores 0.8 or more ends the study",
        f"Each round one update: {price.tensors} tensors",
        "the noised sum of the scored patients' scores",
        f"Evaluation: ε = {price.evaluation_epsilon:.3f}",
        "over 3 released evaluations",
        "Clipping: adaptive;",
        "With 30 patients at each of 2 sites and",
    ):
        assert part in said
    data = json.loads(json.dumps(result.data, allow_nan=False))
    assert data["trained"] == price.trained
    assert data["normalised"] == list(price.normalised)
    assert data["start"]["data"] == "A public set, CC BY 4.0"
    assert data["evaluation"]["after_rounds"] == [0, 2, 4]
    assert data["privacy"]["clipping"]["kind"] == "adaptive"
    assert data["privacy"]["engine"] == "vmap"
    assert data["privacy"]["evaluation_epsilon"] == price.evaluation_epsilon
    assert data["noise"]["patients"] == 30
    assert data["noise"]["verdict"] == "drowned"
    assert "noise" not in check(saved(tmp_path, TEXT)).data


@pytest.mark.parametrize(
    ("change", "code", "line", "part"),
    [
        (("normalise: true", "normalise: false"), "privacy.network", "norm: batch", "BatchNorm3d"),
        (("adapters", "[model.*, x]"), "study.trainable", "trainable:", "trainable[1]"),
        (("vmap", "opacos"), "study.invalid", "engine:", "loop, vmap or opacus"),
        (("adaptive", "adaptiv"), "study.invalid", "clipping:", "`privacy.clipping.kind`"),
        (("{kind: adaptive}", "{}"), "study.invalid", "clipping:", "clipping.kind` is missing"),
        (("adapters", "adapter"), "study.invalid", "trainable:", "did you mean adapters"),
        (("adapters", "[]"), "study.invalid", "trainable:", "at least 1 item"),
        (("adapters", "[3]"), "study.invalid", "trainable:", "`model.trainable[0]` is 3"),
    ],
)
def test_what_cannot_be_proven_is_refused_by_line_before_any_site_is_asked(
    tmp_path: Path, change: tuple[str, str], code: str, line: str, part: str
) -> None:
    text = RICH.replace(*change)
    with pytest.raises(ConsiliumError) as caught:
        check(saved(tmp_path, text))
    assert caught.value.code == code
    assert caught.value.where.endswith(f"s.yaml:{line_of(text, line)}")
    assert part in caught.value.message
    assert caught.value.hint


def test_a_count_as_dear_as_the_whole_study_is_refused_once_the_noise_is_known(
    tmp_path: Path,
) -> None:
    text = RICH.replace("noise_multiplier: 1.5", "epsilon: 0.5").replace(
        "kind: adaptive", "kind: adaptive, count_noise: 1"
    )
    with pytest.raises(ConsiliumError, match=r"privacy\.clipping") as caught:
        check(saved(tmp_path, text))
    assert caught.value.where.endswith(f"s.yaml:{line_of(text, 'clipping:')}")
    assert "Set count_noise above" in caught.value.hint


def test_what_cannot_fit_together_is_refused_with_the_fix(tmp_path: Path) -> None:
    text = TEXT.replace("steps_per_round: 5", "steps_per_round: 5\n  patches_per_patient: 1")
    with pytest.raises(ConsiliumError, match="to 2 or more") as caught:
        check(saved(tmp_path, text))
    assert caught.value.code == "study.patches"
    assert caught.value.where.endswith("s.yaml:17")
    bare = text[: text.index("privacy:")] + "privacy: {mode: none}\n"
    check(saved(tmp_path, bare))  # without privacy one patch is as good as any
    large = TEXT.replace("model:\n", "preprocessing: {size: [16, 12, 16]}\nmodel:\n")
    with pytest.raises(ConsiliumError, match=r"take at most \[16, 12, 16\]"):
        check(saved(tmp_path, large))
    copies = TEXT.replace("training:\n", "training:\n  augmentation: {copies: 4}\n")
    with pytest.raises(ConsiliumError, match="are one image; turn on a change"):
        check(saved(tmp_path, copies))
    flat = TEXT.replace("dimensions: 3", "dimensions: 2").replace("[16, 16, 16]", "[16, 16]")
    with pytest.raises(ConsiliumError, match="leave it out of a 2D study"):
        check(saved(tmp_path, flat + "preprocessing: {orientation: LPS}\n"))
    check(saved(tmp_path, flat + "preprocessing: {orientation: none}\n"))


def test_batch_norm_in_a_study_without_privacy_is_allowed_and_named(tmp_path: Path) -> None:
    text = TEXT[: TEXT.index("privacy:")] + "privacy: {mode: none}\n"
    text = text.replace("    channels:", "    norm: batch\n    channels:")
    result = check(saved(tmp_path, text))
    assert any("running means and variances" in line for line in result.lines)
    assert result.cost.normalised == ()


def test_versions_are_compared_by_key_path() -> None:
    old = parse_study(TEXT, "x")
    assert compare(old, old) == []
    text = TEXT.replace("1e-3\n  steps", "2e-3\n  steps").replace("channels: [8,", "channels: [4,")
    text = text.replace("noise_multiplier: 1.5", "epsilon: 3").replace("title: A tiny study\n", "")
    text = text.replace("[4, 16, 32]", "[4, 16, 32]\n    act: relu")
    assert sorted(compare(old, parse_study(text, "y"))) == [
        "model.arguments.act: relu is new",
        "model.arguments.channels: [8, 16, 32] → [4, 16, 32]",
        "privacy.epsilon: none → 3",
        "privacy.noise_multiplier: 1.5 → none",
        "title: A tiny study → ",
        "training.optimiser.learning_rate: 0.001 → 0.002",
    ]
    bare = TEXT[: TEXT.index("privacy:")] + "privacy: {mode: none}\n"
    lines = compare(old, parse_study(bare, "z"))
    assert "privacy.mode: patient → none" in lines
    assert "privacy.delta: 0.001 is gone" in lines


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (1, "1 byte"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (549_300, "549 kB"),
        (999_999, "1 MB"),
        (1_110_000_000, "1.11 GB"),
        (2 * 10**15, "2,000 TB"),
    ],
)
def test_sizes_are_said_in_words(count: int, words: str) -> None:
    assert size_in_words(count) == words
