"""The study's schema: strict pydantic models whose canonical JSON is hashed and signed."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from consilium_common.canonical import digest
from consilium_common.study.approval import Approval
from consilium_common.study.federation import LATER, Federation
from consilium_common.study.strategies import FedAvg
from consilium_common.study.strict import Literals, Model, Name


class NumberCovariate(Model):
    """A number beside the image, such as age: scaled by public constants."""

    kind: Literal["number"]
    name: Name
    #: Subtracted, and divided by, before the number enters the network. Public: from literature or
    #: from a private query, never computed from the patients who train.
    centre: Annotated[float, Field(ge=-1e12, le=1e12)]
    scale: Annotated[float, Field(gt=0, le=1e12)]


class CategoryCovariate(Model):
    """A word beside the image, such as sex: one of a public list."""

    kind: Literal["category"]
    name: Name
    values: Annotated[list[Name], Field(min_length=2, max_length=64)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.values)) != len(self.values):
            raise ValueError("values has a word twice")
        return self


class Task(Model):
    """What is predicted from what."""

    kind: Literal["segmentation", "classification"]
    dimensions: Literal[2, 3]
    #: Names of the input channels, in order; they match the site's manifest.
    inputs: Annotated[list[Name], Field(min_length=1, max_length=16)]
    #: Class names, in order. For segmentation the first is the background (label value 0).
    classes: Annotated[list[Name], Field(min_length=2, max_length=256)]
    #: Classification only: a case may have any number of the classes.
    multi_label: bool = False
    #: Segmentation only: whether a case whose label is all background may take part.
    empty_labels: Literal["allowed", "refused"] = "allowed"

    #: Classification only: numbers and words beside the image, joined to what the network sees.
    covariates: Annotated[
        list[Annotated[NumberCovariate | CategoryCovariate, Field(discriminator="kind")]],
        Field(max_length=32),
    ] = Field(default=[])

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.multi_label and self.kind != "classification":
            raise ValueError("multi_label is for classification only")
        if self.covariates and self.kind != "classification":
            raise ValueError("covariates are for classification only")
        if self.empty_labels == "refused" and self.kind != "segmentation":
            raise ValueError("empty_labels is for segmentation only")
        for what, names in (
            ("inputs", self.inputs),
            ("classes", self.classes),
            ("covariates", [one.name for one in self.covariates]),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"{what} has a name twice")
        return self


class Intensity(Model):
    """How voxel values become network inputs: fixed numbers or per-image statistics."""

    #: zscore and percentile use the image's own statistics; window uses fixed bounds (CT).
    kind: Literal["zscore", "percentile", "window", "none"] = "zscore"
    #: window: the bounds mapped to 0 and 1, in the image's unit (Hounsfield for CT).
    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "window":
            if self.low is None or self.high is None or self.low >= self.high:
                raise ValueError("a window needs low < high")
        elif self.low is not None or self.high is not None:
            raise ValueError("low and high belong to kind: window")
        return self


class Preprocessing(Model):
    """Deterministic steps, done once per case and cached at the site."""

    #: Axis codes that volumes are brought to; 3D only.
    orientation: Literal["RAS", "LPS", "none"] = "RAS"
    #: Voxel size in millimetres, one per dimension; None keeps the image's own.
    spacing: list[Annotated[float, Field(gt=0.05, le=50)]] | None = None
    #: Fixed size in voxels (resize for classification, pad or crop for segmentation).
    size: list[Annotated[int, Field(ge=8, le=1024)]] | None = None
    intensity: Intensity = Intensity()


class PublicStart(Model):
    """Weights trained on public data that the study begins with; they cost no budget."""

    #: SHA-256 of the safetensors file, which the operator hands over with the proposal.
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    #: Which public data they were trained on; shown to every site that approves.
    data: Annotated[str, Field(min_length=3, max_length=500)]


class Network(Model):
    """A network from the registry by name, with literal arguments, and what of it is trained."""

    network: Name
    arguments: Literals = Field(default={})
    #: Replace batch norm, which patient-level privacy cannot allow, by group norm.
    normalise: bool = False
    #: What is trained, noised and sent; the rest stays as it began. ``adapters`` adds low-rank
    #: matrices to the layers and trains those; a list names parameters by shell-style patterns.
    trainable: (
        Literal["all", "first+last", "adapters"]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(min_length=1)]
    ) = "all"
    #: Rank of the adapters.
    adapter_rank: Annotated[int, Field(ge=1, le=256)] = 8
    start: PublicStart | None = None


class Optimiser(Model):
    """Optimiser and its schedule over all steps of the study."""

    #: ``adamw-bc`` takes the known variance of the privacy noise out of the second moment (DP).
    name: Literal["adamw", "adamw-bc", "sgd"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 1e-5
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    schedule: Literal["constant", "cosine"] = "cosine"


class Augmentation(Model):
    """Random changes of the training images; each is off at 0."""

    #: Differently changed copies of an image or patch, averaged in one gradient.
    copies: Annotated[int, Field(ge=1, le=16)] = 1

    #: Probability of mirroring, per axis.
    flip: Annotated[float, Field(ge=0, le=1)] = 0.0
    #: Probability of a rotation by a multiple of 90 degrees in the first two axes.
    rotate90: Annotated[float, Field(ge=0, le=1)] = 0.0
    #: Largest relative change of contrast (gain) and shift of brightness, in units of the
    #: normalised intensity.
    gain: Annotated[float, Field(ge=0, le=1)] = 0.0
    shift: Annotated[float, Field(ge=0, le=1)] = 0.0
    #: Standard deviation of added Gaussian noise, in the same units.
    noise: Annotated[float, Field(ge=0, le=1)] = 0.0


class Training(Model):
    """Local training of one round at one site."""

    loss: Literal["dice_ce", "cross_entropy", "focal", "bce"] = "dice_ce"
    optimiser: Optimiser = Optimiser()
    steps_per_round: Annotated[int, Field(ge=1, le=10_000)] = 20
    #: Passes over the declared cohort in a round, in place of ``steps_per_round``; sites of
    #: different size then take different numbers of steps. Not with privacy.
    epochs_per_round: Annotated[int, Field(ge=1, le=1000)] | None = None
    #: Images (or patches) a step; with privacy the sampling rate decides instead.
    batch_size: Annotated[int, Field(ge=1, le=256)] = 4
    #: Patch size in voxels; None trains on whole (resized) images.
    patch: list[Annotated[int, Field(ge=8, le=512)]] | None = None
    #: With privacy: images or patches averaged into a patient's one gradient.
    patches_per_patient: Annotated[int, Field(ge=1, le=64)] = 2
    #: Share of patches centred on foreground, drawn class by class.
    foreground_share: Annotated[float, Field(ge=0, le=1)] = 0.67
    augmentation: Augmentation = Augmentation()
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    #: Seed of initial weights and of training order; never of privacy noise.
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


class NoPrivacy(Model):
    """No differential privacy. Runs only where a site's policy permits it."""

    mode: Literal["none"] = "none"


class FlatClipping(Model):
    """Scale gradients longer than C down to C."""

    kind: Literal["flat"] = "flat"


class AutomaticClipping(Model):
    """Scale every gradient to C·‖g‖/(‖g‖ + γ): nearly one length for all (AUTO-S)."""

    kind: Literal["automatic"]
    #: γ, in units of the gradient's norm.
    stability: Annotated[float, Field(gt=0, le=100)] = 0.01


class AdaptiveClipping(Model):
    """Follow a quantile of the patients' gradient norms by a noisy count, which is charged.

    C begins at ``clip_norm``. The count and the gradient share the study's noise multiplier: the
    gradient alone gets the larger one that makes both together cost what the study says.
    """

    kind: Literal["adaptive"]
    #: Share of the sampled patients whose gradient should be shorter than C.
    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    #: Step size of the geometric update of C.
    rate: Annotated[float, Field(gt=0, le=1)] = 0.2
    #: Standard deviation of the count's noise, in patients.
    count_noise: Annotated[float, Field(gt=0, le=1e4)] = 5.0


class PatientPrivacy(Model):
    """Patient-level DP-SGD: unit the patient, adjacency add or remove one."""

    mode: Literal["patient"]
    #: Who adds the noise; silo-local protects against the aggregator and the other sites too.
    model: Literal["silo-local"] = "silo-local"
    #: Probability q that a patient takes part in a step (Poisson), public.
    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    #: L2 bound C of one patient's gradient.
    clip_norm: Annotated[float, Field(gt=0, le=1e4)]
    clipping: Annotated[
        FlatClipping | AutomaticClipping | AdaptiveClipping, Field(discriminator="kind")
    ] = FlatClipping()
    #: How patients' gradients are computed; all give the same. auto: by a measured rule.
    engine: Literal["auto", "loop", "vmap", "opacus"] = "auto"
    #: Standard deviation of the noise as a multiple of C. Give this or epsilon.
    noise_multiplier: Annotated[float, Field(gt=0.2, le=1e4)] | None = None
    #: Upper bound of ε of all training steps; the noise is calibrated to it (PLD).
    epsilon: Annotated[float, Field(gt=0.01, le=100)] | None = None
    delta: Annotated[float, Field(gt=0, lt=0.1)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.noise_multiplier is None) == (self.epsilon is None):
            raise ValueError("give either noise_multiplier or epsilon, and not both")
        # Two releases of multipliers z1 and z2 cost as one of (1/z1² + 1/z2²)^(-1/2), and a count
        # of patients, each counted as a half or its negative, has the multiplier 2 · count_noise.
        if (
            isinstance(self.clipping, AdaptiveClipping)
            and self.noise_multiplier is not None
            and 2 * self.clipping.count_noise <= self.noise_multiplier
        ):
            raise ValueError("clipping.count_noise must be above half the noise_multiplier")
        return self


class Evaluation(Model):
    """Evaluation of the global model at the sites."""

    #: Evaluate every so many rounds; the last round always is. 0: the last only.
    every: Annotated[int, Field(ge=0)] = 0
    #: Overlap of sliding windows, share of the patch.
    overlap: Annotated[float, Field(ge=0, lt=0.95)] = 0.25
    #: What leaves the sites: nothing; exact figures, in a study without privacy where policy
    #: permits it; or noised ones, each a private query of its own.
    release: Literal["none", "exact", "private"] = "none"
    #: With release private: ε of all evaluations together, at the study's δ.
    epsilon: Annotated[float, Field(gt=0.01, le=100)] | None = None
    #: End before the first private step when the starting model's noised score reaches this.
    sufficient: Annotated[float, Field(gt=0, le=1)] | None = None


class Statistics(Model):
    """Statistics of the sites' training patients, gathered once before training.

    Each site releases one noised sum of histograms over public bins, a private query of its own
    that is charged to the patients it counts; see :mod:`consilium_common.study.statistics`.
    """

    #: ε of the query at the study's δ; it composes with that of training.
    epsilon: Annotated[float, Field(gt=0.01, le=100)]
    #: What is counted: classes present, normalised intensities, and voxel size and number of
    #: voxels of the original images. Fewer tables have less noise each.
    of: Annotated[
        list[Literal["classes", "intensity", "spacing", "size"]], Field(min_length=1, max_length=4)
    ]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.of)) != len(self.of):
            raise ValueError("of has a name twice")
        return self

    @property
    def tables(self) -> int:
        """Tables that are released: spacing has two, of the smallest and of the largest edge."""
        return len(self.of) + ("spacing" in self.of)


class Study(Model):
    """One study. Its digest is its identity: any change is another study."""

    schema_: Annotated[Literal["consilium/study/v1"], Field(alias="schema")]
    name: Name
    title: Annotated[str, Field(max_length=200)] = ""
    task: Task
    preprocessing: Preprocessing = Preprocessing()
    model: Network
    training: Training = Training()
    privacy: Annotated[NoPrivacy | PatientPrivacy, Field(discriminator="mode")]
    federation: Federation = Federation()
    evaluation: Evaluation = Evaluation()
    #: None: nothing is gathered beside what training and evaluation release.
    statistics: Statistics | None = None
    #: None: the signature of the operator who proposes it is enough.
    approval: Approval | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        n = self.task.dimensions
        for where, values in (
            ("preprocessing.spacing", self.preprocessing.spacing),
            ("preprocessing.size", self.preprocessing.size),
            ("training.patch", self.training.patch),
        ):
            if values is not None and len(values) != n:
                raise ValueError(f"{where} needs {n} numbers, one per dimension")
        if self.task.kind == "classification":
            if self.preprocessing.size is None:
                raise ValueError("preprocessing.size is needed for classification")
            if self.training.patch is not None:
                raise ValueError("training.patch is for segmentation")
            if self.training.loss == "dice_ce":
                raise ValueError("training.loss dice_ce is for segmentation")
        if self.training.loss == "bce" and not self.task.multi_label:
            raise ValueError("training.loss bce is for multi_label classification")
        if self.task.multi_label and self.training.loss not in ("bce", "focal"):
            raise ValueError("multi_label needs training.loss bce or focal")
        if self.privacy.mode == "patient" and self.evaluation.release == "exact":
            raise ValueError("evaluation.release exact is not possible in a private study")
        if self.evaluation.release == "private" and self.privacy.mode == "none":
            raise ValueError("evaluation.release private is for a study with privacy")
        if (self.evaluation.release == "private") != (self.evaluation.epsilon is not None):
            raise ValueError("evaluation.epsilon is needed with release private, and only there")
        if self.evaluation.sufficient is not None and self.evaluation.release != "private":
            raise ValueError("evaluation.sufficient needs evaluation.release private")
        if self.training.optimiser.name == "adamw-bc" and self.privacy.mode == "none":
            raise ValueError("training.optimiser adamw-bc corrects privacy noise; take adamw")
        self._check_strategy()
        self._check_statistics()
        return self

    def _check_strategy(self) -> None:
        steps = self.training.steps_per_round
        if steps < 2 and self.federation.strategy.name == "fedrep":
            raise ValueError(
                "training.steps_per_round must be at least 2 with fedrep: head and rest take turns"
            )
        if self.privacy.mode == "none":
            return
        strategy = self.federation.strategy
        if strategy.not_private:
            raise ValueError(
                f"federation.strategy {strategy.name} is not possible in a private study: "
                f"{strategy.not_private}"
            )
        if self.training.epochs_per_round is not None:
            raise ValueError("training.epochs_per_round is for a study without privacy")

    def _check_statistics(self) -> None:
        if self.statistics is None:
            return
        if self.privacy.mode == "none":
            raise ValueError(
                "statistics are for a study with privacy: exact ones never leave a site"
            )
        of = self.statistics.of
        if "intensity" in of and self.preprocessing.intensity.kind == "none":
            raise ValueError(
                "statistics.of intensity needs a preprocessing.intensity.kind other than none: "
                "bins must be public"
            )
        if "spacing" in of and self.task.dimensions == 2 and self.preprocessing.spacing is None:
            raise ValueError(
                "statistics.of spacing needs preprocessing.spacing in 2D: pictures need not say "
                "how large their pixels are"
            )

    def to_canonical(self) -> dict[str, Any]:
        """Return the plain values that are hashed and signed, every default written out.

        But for what came later, which is left out where it is the default: a study that says
        nothing of it keeps its digest.
        """
        plain = self.model_dump(mode="json", by_alias=True)
        federation = plain["federation"]
        if self.federation.strategy == FedAvg():
            federation["strategy"] = "fedavg"
        for part, name in ((plain, "approval"), (plain["training"], "epochs_per_round")):
            if part[name] is None:
                del part[name]
        for name in LATER:
            if getattr(self.federation, name) == Federation.model_fields[name].default:
                del federation[name]
        return plain

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, 64 hexadecimal digits: the study's identity."""
        return digest(self.to_canonical())

    @property
    def evaluations(self) -> tuple[int, ...]:
        """Numbers of rounds done after which the global model is evaluated at the sites.

        A private study begins with one of the starting model (0): nobody should spend budget on
        what they already have.
        """
        rounds, every = self.federation.rounds, self.evaluation.every
        found = {rounds} | (set(range(every, rounds, every)) if every else set())
        return tuple(sorted(found | ({0} if self.privacy.mode == "patient" else set())))

    @property
    def total_steps(self) -> int:
        """Local steps over the whole study, at each site."""
        return self.federation.rounds * self.training.steps_per_round
