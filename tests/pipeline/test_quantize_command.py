"""`cvm-translator quantize` on a tiny untrained model that belongs to no run: plans, targets, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cvm_translator.cli import main
from cvm_translator.config.schema import ModelConfig, TokenizerConfig
from cvm_translator.corpus.records import Pair
from cvm_translator.corpus.tokenizer import Tokenizer, train_sentencepiece
from cvm_translator.models.folder import load_model, save_model
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.quantization import find_plan

SIZES = {"dim": 16, "num_heads": 2, "feed_forward_dim": 32, "encoder_layers": 1, "decoder_layers": 1, "max_length": 48}
GERMAN = ["eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn", "elf", "zwölf"]
ENGLISH = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
PAIRS = [(f"{GERMAN[i]} und {GERMAN[j]}", f"{ENGLISH[i]} and {ENGLISH[j]}") for i in range(12) for j in range(12)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantize")
    pairs = [Pair(source, target, "") for source, target in PAIRS]
    tokenizer_config = TokenizerConfig(vocab_size=300)
    (folder / "sentencepiece.model").write_bytes(train_sentencepiece(pairs, tokenizer_config))
    tokenizer = Tokenizer.load(folder / "sentencepiece.model")
    torch.manual_seed(1)
    tiny = CvmTransformer(ModelConfig(**SIZES), tokenizer.vocab_size)
    return save_model(folder / "model", tiny, tokenizer, source_language="de", target_language="en")


@pytest.fixture
def quantize(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command in a folder with some pairs in it: its exit code and the lines on standard error."""
    monkeypatch.chdir(tmp_path)
    Path("pairs.tsv").write_text("".join(f"{source}\t{target}\n" for source, target in PAIRS[::8]), encoding="utf-8")

    def run(*options: str, output: str = "out") -> tuple[int, list[str]]:
        exit_code = main(["quantize", "--model", str(model), "--output", output, *options])
        return exit_code, capsys.readouterr().err.splitlines()

    return run


def read_plan(path: str) -> dict[str, Any]:
    plan: dict[str, Any] = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    return plan


def num_bytes(folder: str) -> int:
    return (Path(folder) / "model.safetensors").stat().st_size


# -------------------------------------------------------------------------------------------------------------- plans


def test_what_is_told_of_an_edited_plan_is_of_this_model(quantize: Any) -> None:
    options = ["--method", "mixed", "--calibration", "pairs.tsv", "--target-ratio", "1.5"]
    assert quantize(*options, output="first")[0] == 0
    plan = read_plan("first/quantization_plan.yaml")
    assert plan["num_bytes"] == num_bytes("first") and "layers" in plan
    plan["plan"][next(iter(plan["plan"]))] = {"kind": "float32"}
    Path("edited.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    exit_code, (message, not_judged) = quantize("--method", "mixed", "--plan", "edited.yaml")
    assert exit_code == 0 and not_judged.startswith("not judged")
    size = num_bytes("out")
    assert size > plan["num_bytes"]
    assert message == f"plan of edited.yaml: {plan['float_bytes'] / size:.2f} times smaller, {size:,} bytes"
    assert read_plan("out/quantization_plan.yaml") == {
        "message": message,
        "float_bytes": plan["float_bytes"],
        "num_bytes": size,
        "compression_ratio": plan["float_bytes"] / size,
        "plan": plan["plan"],
    }


def test_static_layers_of_a_plan_are_calibrated(quantize: Any, model: Path) -> None:
    kinds = dict.fromkeys(find_plan(load_model(model).model), "int8")
    kinds["embedding"] = "int8_static"
    Path("plan.yaml").write_text(yaml.safe_dump({"plan": {name: {"kind": kind} for name, kind in kinds.items()}}))
    options = ["--method", "mixed", "--plan", "plan.yaml"]
    exit_code, (error,) = quantize(*options)
    assert exit_code == 1
    assert error.startswith("error: int8_static in plan.yaml calibrates on training sentences, and ")
    assert error.endswith("name some with --calibration FILE.tsv")
    assert quantize(*options, "--calibration", "pairs.tsv")[0] == 0
    loaded = load_model("out").model
    assert {name: layer_format.kind for name, layer_format in find_plan(loaded).items()} == kinds
    assert bool(loaded.embedding.input_scale.isfinite())


# ------------------------------------------------------------------------------------------------------------ targets


def test_a_target_out_of_reach_is_refused_with_what_is_in_reach(quantize: Any, model: Path) -> None:
    options = ["--method", "mixed", "--calibration", "pairs.tsv"]
    for option, value in (("--target-ratio", "100"), ("--target-megabytes", "0.001")):
        exit_code, (error,) = quantize(*options, option, value)
        assert exit_code == 1
        assert error.startswith(f"error: {option} {value} is out of reach for {model}: the smallest has ")
        best = re.search(r"([\d,]+) bytes; ask for --target-ratio ([\d.]+) or less, or --target-megabytes (\S+)", error)
        assert best is not None
        assert [path.name for path in Path().iterdir()] == ["pairs.tsv"]
    assert quantize(*options, "--target-ratio", best[2])[0] == 0
    assert num_bytes("out") == int(best[1].replace(",", ""))
    assert quantize(*options, "--target-megabytes", best[3], output="again")[0] == 0


# ----------------------------------------------------------------------------------------------------------- refusals

BAD = [
    (["--method", "static"], "calibrates on training sentences", "--calibration FILE.tsv"),
    (["--method", "mixed", "--target-ratio", "5"], "calibrates on training sentences", "--calibration FILE.tsv"),
    (["--method", "dynamic", "--max-drop", "1"], "belongs to no run", "--pairs FILE.tsv"),
    (["--method", "dynamic", "--bits", "4"], "method dynamic has no 4 bits", "it has 8"),
    (["--method", "mixed"], "needs one of target_compression_ratio", "got none"),
    (["--method", "mixed", "--plan", "nowhere.yaml"], "nowhere.yaml", "plan"),
    (
        ["--method", "qat"],
        "method qat quantises while it trains",
        "set quantization.method: qat in the config of a run",
    ),
    (["--method", "progressive"], "method progressive quantises while", "set quantization.method: progressive in"),
    (["--method", "mixed", "--target-ratio", "0.5"], "target_compression_ratio: Input should be greater than 1", "0.5"),
    (["--method", "mixed", "--target-ratio", "4", "--bits", "4"], "quantization.bits 4", "leave it out"),
    (["--method", "mixed", "--target-ratio", "4", "--group-size", "32"], "quantization.group_size 32", "leave it out"),
    (["--method", "dynamic", "--group-size", "row"], "quantization.group_size 'row' is that of 4-bit", "with bits 4"),
    (["--method", "weight_only", "--asymmetric"], "quantization.symmetric False is that of 4-bit", "with bits 4"),
    (["--method", "dynamic", "--calibration", "pairs.tsv"], "--calibration pairs.tsv: method dynamic", "leave it out"),
]


@pytest.mark.parametrize(("options", "problem", "remedy"), BAD)
def test_what_cannot_be_done_is_one_line(options: list[str], problem: str, remedy: str, quantize: Any) -> None:
    exit_code, (error,) = quantize(*options)
    assert exit_code == 1
    assert error.startswith("error: ") and problem in error and remedy in error
    assert [path.name for path in Path().iterdir()] == ["pairs.tsv"]


@pytest.mark.parametrize("options", [["static"], ["mixed", "--target-ratio", "1.5"]])
def test_pairs_to_calibrate_on_that_are_all_too_long(options: list[str], quantize: Any) -> None:
    Path("pairs.tsv").write_text(f"{'eins ' * 60}\t{'one ' * 60}\n" * 3)
    exit_code, (error,) = quantize("--calibration", "pairs.tsv", "--method", *options)
    assert exit_code == 1
    assert error.startswith(
        "error: pairs.tsv: all 3 pairs are longer than the model's max_length 48 (in tokens): name "
    )
    assert [path.name for path in Path().iterdir()] == ["pairs.tsv"]
