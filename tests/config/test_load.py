"""Settings from files, flat keywords and overrides: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cvm_translator.config import DistillationConfig, RunConfig, dump_config, load_config
from cvm_translator.config.load import FLAT_KEYS, build_quantization
from cvm_translator.config.schema import MetricName
from cvm_translator.errors import ConfigError

MINIMAL = "corpus: {train: [{format: tsv, path: train.tsv}]}\n"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_config(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_config


# ----------------------------------------------------------------------------------------------------------- defaults


def test_the_specifications_snippet() -> None:
    """The flat keywords of the specification, with its defaults for what they leave out."""
    config = DistillationConfig(
        num_iterations=10000, validation_frequency=1000, quality_threshold=0.9, temperature=6.0, alpha=0.8
    )
    assert isinstance(config, RunConfig)
    settings = config.distillation
    assert (settings.num_iterations, settings.temperature, settings.alpha, settings.beta) == (10_000, 6.0, 0.8, 0.2)
    assert (settings.batch_size, settings.learning_rate, settings.warmup_steps) == (32, 5e-5, 1000)
    assert (settings.max_grad_norm, config.seed, str(config.output_dir)) == (1.0, 13, "distillation_output")
    assert (config.validation.every_steps, config.guard.quality_threshold) == (1000, 0.9)
    assert (config.guard.degradation_threshold, config.guard.max_rollbacks) == (0.05, 3)
    assert (config.quantization.method, config.quantization.bits) == ("qat", 8)
    assert (config.corpus.preset, config.corpus.source_language, len(config.corpus.unseen)) == (
        "gettext_de_en",
        "de",
        1,
    )
    assert config.student.model.encoder_layers < config.teacher.model.encoder_layers
    assert config == DistillationConfig()


@pytest.mark.parametrize("flat", sorted(FLAT_KEYS))
def test_each_flat_keyword_is_its_nested_setting(flat: str) -> None:
    values: dict[str, Any] = {"source_language": "fr", "target_language": "es", "quantization_method": "dynamic"}
    values |= {"quantization_bits": 8, "precision": "float32", "vocab_size": 512, "alpha": 0.4, "beta": 0.4}
    values |= {"label_smoothing": 0.25, "quality_threshold": 0.25, "degradation_threshold": 0.25, "learning_rate": 0.25}
    value = values.get(flat, 7)
    section, key = FLAT_KEYS[flat]
    extra = {"num_iterations": 2000} if flat not in ("num_iterations", "warmup_steps") else {"warmup_steps": 3}
    if flat == "warmup_steps":
        extra = {}
    config = DistillationConfig(**(extra | {flat: value}))
    assert getattr(getattr(config, section), key) == value
    assert DistillationConfig(**extra, **{flat: value}) == config


def test_flat_and_nested_keywords_mix() -> None:
    config = DistillationConfig(alpha=0.5, distillation={"beta": 0.5}, guard={"max_rollbacks": 1})
    assert (config.distillation.alpha, config.distillation.beta, config.guard.max_rollbacks) == (0.5, 0.5, 1)
    assert DistillationConfig(alpha=0.5, distillation={"alpha": 0.5}).distillation.alpha == 0.5


def test_arguments_are_left_as_they_were() -> None:
    nested = {"beta": 0.5}
    DistillationConfig(alpha=0.5, distillation=nested)
    assert nested == {"beta": 0.5}


# ----------------------------------------------------------------------------------------------------------- refusals

BAD_SUM = {"name": "a", "version": "1", "sha256": "0"}

REFUSED_KEYWORDS = [
    ({"temprature": 2.0}, "unknown setting temprature: did you mean temperature?"),
    ({"distillation": {"temprature": 2.0}}, "distillation.temprature: did you mean distillation.temperature?"),
    ({"guard": {"max_rolbacks": 1}}, "unknown setting guard.max_rolbacks: did you mean guard.max_rollbacks?"),
    ({"temperature": 2.0, "beam_size": 4}, "unknown setting beam_size: did you mean validation.beam_size?"),
    ({"teacher": {"model": {"dimension": 8}}}, "teacher.model.dimension: did you mean teacher.model.dim?"),
    ({"quantization": {"xyzzy": 1}}, "unknown setting quantization.xyzzy: known here are bits, "),
    ({"alpha": 0.5, "distillation": {"alpha": 0.6}}, "alpha=0.5 contradicts distillation.alpha=0.6"),
    ({"validation_frequency": 10, "validation": {"every_steps": 20}}, "contradicts validation.every_steps=20"),
    ({"alpha": 0, "beta": 0}, "alpha and beta are both 0"),
    ({"temperature": 0}, "distillation.temperature: Input should be greater than 0 (got 0)"),
    ({"learning_rate": "fast"}, "distillation.learning_rate: Input should be a valid number"),
    ({"num_iterations": 0}, "distillation.num_iterations: Input should be greater than or equal to 1 (got 0)"),
    ({"num_iterations": 1000}, "warmup_steps 1000 must be below num_iterations 1000"),
    ({"grad_accum_steps": 64}, "grad_accum_steps 64 exceeds batch_size 32"),
    ({"source_language": "en"}, "source_language and target_language are the same"),
    ({"quantization_bits": 3}, "quantization.bits: Input should be 4, 8 or 16 (got 3)"),
    ({"quantization_bits": 16}, "method qat has no 16 bits: it has 8 or 4"),
    ({"quantization": {"method": "static", "bits": 4}}, "method static has no 4 bits: it has 8"),
    ({"quantization": {"widths": [16, 8]}}, "widths belongs to method progressive"),
    ({"quantization": {"method": "progressive", "widths": [8, 16]}}, "widths [8, 16] must fall and end in bits, 8"),
    ({"quantization": {"method": "progressive", "bits": 4, "widths": [16, 8]}}, "must fall and end in bits, 4"),
    ({"quantization": {"method": "mixed"}}, "needs one of target_compression_ratio"),
    ({"quantization": {"target_megabytes": 2.0}}, "target_megabytes belongs to method mixed"),
    ({"quantization": {"group_size": 7}}, "quantization.group_size"),
    ({"quantization": {"group_size": "column"}}, "quantization.group_size"),
    ({"device": "gpu"}, "device: "),
    ({"teacher": {"kind": "checkpoint"}}, "teacher.path is needed for kind checkpoint"),
    ({"teacher": {"path": "model"}}, "teacher.path is needed for kind checkpoint, and only there"),
    ({"student": {"model": {"dim": 30, "num_heads": 4}}}, "dim 30 must be even and a multiple of num_heads 4"),
    ({"validation": {"metrics": ["bleu"]}}, "validation.metrics must hold bleu and chrf"),
    ({"validation": {"metrics": ["bleu", "chrf", "bluert"]}}, "validation.metrics.2"),
    ({"validation": {"weights": {"blue": 1.0}}}, "validation.weights names unknown metrics ['blue']"),
    ({"compile": "maybe"}, "compile: Input should be 'auto', True or False (got 'maybe')"),
    ({"score_beside_training": 2}, "score_beside_training: Input should be 'auto', True or False (got 2)"),
    ({"keep_checkpoints": 1}, "keep_checkpoints: Input should be greater than or equal to 2 (got 1)"),
    ({"corpus": {"train": []}}, "corpus.train: "),
    ({"corpus": {"train": [{"format": "csv", "path": "a"}]}}, "corpus.train.0: "),
    ({"corpus": {"train": [{"format": "tsv", "pth": "a"}]}}, "did you mean corpus.train.0.tsv.path?"),
    ({"corpus": {"train": [{"format": "gettext"}]}}, "needs either path or packages"),
    ({"corpus": {"preset": "gettext_de_fr"}}, "corpus.preset"),
    ({"corpus": {"train": [{"format": "gettext", "packages": [BAD_SUM]}]}}, "sha256: String should match pattern"),
    ({"fault_injection": [{"kind": "flood", "from_step": 1}]}, "fault_injection.0.kind"),
    ({"guard": 3}, "guard: "),
    ({"teacher": {"top_k": 8, "store_states": False}}, "teacher.top_k is what is stored: leave store_states true"),
    ({"teacher": {"top_k": 8}, "fault_injection": [{"kind": "nan_loss", "from_step": 1}]}, "leave teacher.top_k out"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "words"), REFUSED_KEYWORDS, ids=[words[:40] for _, words in REFUSED_KEYWORDS])
def test_a_bad_setting_is_refused_in_one_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DistillationConfig(**settings)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message


REFUSED_FILES = [
    (MINIMAL + "seed: 1\nseed: 2\n", "key 'seed' is given twice (line 3); keep one"),
    (MINIMAL + "guard:\n  confidence: 0.9\n  confidence: 0.95\n", "key 'confidence' is given twice (line 4)"),
    (MINIMAL + "alpha: 0.5\ndistillation: {alpha: 0.6}\n", "alpha=0.5 contradicts distillation.alpha=0.6"),
    (MINIMAL + "distilation: {alpha: 0.6}\n", "unknown setting distilation: did you mean distillation?"),
    ("corpus: {train: [}\n", "not valid YAML"),
    ("", "holds no settings"),
    ("- 1\n", "holds no settings"),
    (MINIMAL + "!!python/object/apply:os.system ['true']: 1\n", "not valid YAML"),
]


@pytest.mark.parametrize(("text", "words"), REFUSED_FILES, ids=[words[:40] for _, words in REFUSED_FILES])
def test_a_bad_file_is_refused_by_its_name(text: str, words: str, write: Any) -> None:
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    if "contradicts" not in words:
        assert str(path) in message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml: no such config file; see configs/"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"# \xff\xfe\nseed: 1\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml: not valid YAML"):
        load_config(tmp_path / "latin.yaml")


# ---------------------------------------------------------------------------------------------------- paths, overrides


def test_paths_are_relative_to_the_file(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
output_dir: out
corpus:
  train: [{format: tsv, path: data/a.tsv}, {format: plain, source_path: a.de, target_path: /b.en}]
  test: [{format: jsonl, path: ../t.jsonl}]
  unseen: [{format: huggingface, path: owner/name}]
  cache_dir: cache
tokenizer: {path: spm.model}
teacher: {kind: checkpoint, path: teacher, cache_dir: ~/teachers}
"""
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", "/home/somebody")
    config = load_config(write(text))
    assert config.corpus.train[0].path == tmp_path / "data/a.tsv"  # type: ignore[union-attr]
    assert config.corpus.train[1].source_path == tmp_path / "a.de"  # type: ignore[union-attr]
    assert config.corpus.train[1].target_path == Path("/b.en")  # type: ignore[union-attr]
    assert config.corpus.test[0].path == tmp_path / "../t.jsonl"  # type: ignore[union-attr]
    assert config.corpus.unseen[0].path == "owner/name"  # type: ignore[union-attr]
    assert config.corpus.cache_dir == tmp_path / "cache"
    assert config.tokenizer.path == tmp_path / "spm.model"
    assert config.teacher.path == tmp_path / "teacher"
    assert config.teacher.cache_dir == Path("/home/somebody/teachers")
    assert config.output_dir == Path("out")  # relative to where the command runs


def test_overrides_win_over_the_file(write: Any) -> None:
    path = write(MINIMAL + "distillation: {num_iterations: 4000, alpha: 0.5}\nalpha: 0.5\n")
    overrides = ["distillation.alpha=0.7", "beta=0.3", "guard.max_rollbacks=1", "validation.metrics=[bleu, chrf]"]
    config = load_config(path, [*overrides, "quantization.method=none", "corpus.cache_dir=/a=b"], "elsewhere")
    assert (config.distillation.alpha, config.distillation.beta, config.guard.max_rollbacks) == (0.7, 0.3, 1)
    assert config.validation.metrics == ["bleu", "chrf"]
    assert (config.quantization.method, config.corpus.cache_dir) == ("none", Path("/a=b"))
    assert config.output_dir == Path("elsewhere")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("alpha", "--set alpha: expected key=value"),
        ("=3", "--set =3: expected key=value"),
        ("seed.deeper=3", "seed is a value, not a section"),
        ("distillation.alhpa=3", "unknown setting distillation.alhpa: did you mean distillation.alpha?"),
        ("distillation.alpha=-1", "distillation.alpha: Input should be greater than or equal to 0 (got -1)"),
    ],
)
def test_a_bad_override_is_refused(override: str, words: str, write: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config(write(MINIMAL + "seed: 1\n"), [override])


def test_relative_paths_of_overrides_and_keywords_hold_from_anywhere(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are relative to where the command runs; a resume from elsewhere reads the same ones."""
    here = tmp_path / "here"
    (here / "data").mkdir(parents=True)
    monkeypatch.chdir(here)
    overrides = ["corpus.train=[{format: tsv, path: a.tsv}, {format: huggingface, path: data}]", "tokenizer.path=t"]
    config = load_config(write(MINIMAL), [*overrides, "teacher.kind=checkpoint", "teacher.path=../teacher"])
    assert config.corpus.train[0].path == here / "a.tsv"  # type: ignore[union-attr]
    assert config.corpus.train[1].path == str(here / "data")  # type: ignore[union-attr]
    assert (config.tokenizer.path, config.teacher.path) == (here / "t", here / "../teacher")
    given = {"kind": "checkpoint", "path": Path("teacher")}
    config = DistillationConfig(teacher=given, validation={"bertscore_model": "data", "comet_model": "owner/name"})
    assert config.teacher.path == here / "teacher"
    assert config.validation.bertscore_model == str(here / "data")
    assert config.validation.comet_model == "owner/name"
    assert given["path"] == Path("teacher")  # the caller's own data


def test_models_by_name(write: Any) -> None:
    text = "teacher: {model: spec_teacher}\nstudent: {model: {preset: deep_encoder_student, dropout: 0.25}}\n"
    config = load_config(write(MINIMAL + text), ["teacher.model=spec_teacher"])
    assert (config.teacher.model.dim, config.teacher.model.num_heads) == (768, 12)
    student = config.student.model
    assert (student.dim, student.encoder_layers, student.decoder_layers, student.dropout) == (512, 6, 2, 0.25)
    assert "preset" not in config.to_plain()["student"]["model"]


def test_overrides_leave_no_trace_in_the_next_config(write: Any) -> None:
    path = write(MINIMAL)
    before = load_config(path)
    changed = load_config(path, ["teacher.training.num_iterations=7000", "student.model.dropout=0.5"])
    assert (changed.teacher.training.num_iterations, changed.student.model.dropout) == (7000, 0.5)
    assert load_config(path) == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1: 2\n", "1 is no name of a setting"),
        ("guard: {on: 3}\n", "True is no name of a setting"),
        ("? [a, b]\n: 3\n", "['a', 'b'] is no name of a setting (line 2)"),
        ("student: {init: teacher_layers, model: {dim: 128}}\n", "the student's dim is 128, the teacher's 256"),
        ("student: {init: teacher_layers, encoder_layers_from: [0]}\n", "encoder_layers_from [0] names 1 layers"),
        ("student: {init: teacher_layers, decoder_layers_from: [7]}\n", "layer 7: the teacher has layers 0 to 1"),
        ("student: {encoder_layers_from: [0, 1, 2]}\n", "need student.init teacher_layers"),
        ("validation: {weights: {bleu: 1.0, comet: 1.0}}\n", "weighs comet, which validation.metrics does not measure"),
        ("student: {model: spec_studnet}\n", "unknown preset 'spec_studnet': known are spec_teacher, spec_student"),
        ("validation: {weights: {bleu: -1.0}}\n", "negative weight"),
    ],
)
def test_what_could_only_fail_later_is_refused_now(text: str, words: str, write: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config(write(MINIMAL + text))


# ------------------------------------------------------------------------------------------------ quantisation alone


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"method": "mixed", "target_megabytes": -1.0},
            "quantization.target_megabytes: Input should be greater than 0",
        ),
        ({"method": "mixed", "target_megabytes": -1.0}, "(got -1.0)"),
        (
            {"method": "mixed", "target_compression_ratio": 0.5},
            "quantization.target_compression_ratio: Input should be",
        ),
        ({"method": "mixed", "target_compression_ratio": float("nan")}, "(got nan)"),
        ({"method": "mixed", "target_compression_ratio": float("inf")}, "Input should be a finite number (got inf)"),
        ({"method": "weight_only", "bits": 5}, "quantization.bits: Input should be 4, 8 or 16 (got 5)"),
        ({"method": "dynamic", "bits": 4}, "quantization: method dynamic has no 4 bits: it has 8"),
        ({"method": "mixed", "target_megabytes": 1.0, "bits": 4}, "quantization.bits 4: method mixed chooses"),
        ({"method": "mixed", "target_megabytes": 1.0, "group_size": 64}, "quantization.group_size 64 is that of 4-bit"),
        ({"method": "mixed", "target_megabytes": 1.0, "symmetric": False}, "quantization.symmetric False is that of"),
        (
            {"method": "dynamic", "group_size": "row"},
            "quantization.group_size 'row' is that of 4-bit weights: leave it",
        ),
        ({"method": "weight_only", "bits": 16, "symmetric": False}, "choose method weight_only with bits 4"),
    ],
)
def test_a_bad_quantisation_setting_is_named_with_its_value(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        build_quantization(settings)


def test_what_the_other_settings_of_quantisation_mean_is_asked_of_the_command_line_only() -> None:
    """A run's config spells out every default, whatever the method."""
    assert build_quantization({"method": "dynamic", "bits": 8}).bits == 8
    grid = {"method": "weight_only", "bits": 4, "group_size": 32, "symmetric": False}
    assert build_quantization(grid).model_dump(include=set(grid)) == grid
    for given in ({"method": "dynamic"}, {"method": "mixed", "target_megabytes": 1.0}):
        config = DistillationConfig(quantization=given)
        assert RunConfig(**yaml.safe_load(dump_config(config))).quantization == build_quantization(given)


# ---------------------------------------------------------------------------------------------------------- round trip


def test_dump_and_load_are_inverse(write: Any, tmp_path: Path) -> None:
    config = load_config(write(MINIMAL + "distillation: {learning_rate: 1.0e-7}\nguard: {confidence: 0.99}\n"))
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_config(config), encoding="utf-8")
    assert load_config(dumped) == config
    assert RunConfig(**config.to_plain()) == config
    assert yaml.safe_load(dump_config(config)) == config.to_plain()
    assert DistillationConfig(**DistillationConfig().to_plain()).to_plain() == DistillationConfig().to_plain()


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        DistillationConfig().distillation.alpha = 2.0  # type: ignore[misc]


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_shipped_configs_load(path: Path) -> None:
    config = load_config(path)
    assert set(config.validation.metrics) <= set(MetricName.__args__)  # type: ignore[attr-defined]
    assert config.student.model.dim <= config.teacher.model.dim
