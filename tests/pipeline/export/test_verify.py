"""The rules of verification, on translations that are written down: what agrees enough, what loses too much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cvm_translator.errors import ModelError
from cvm_translator.pipeline.export import verify
from cvm_translator.pipeline.export.sentences import Sentences, choose_sentences

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
REFERENCES = [" ".join(WORDS[(start + i) % 10] for i in range(6 + start % 3)) for start in range(120)]
EXPORT, NATIVE, FLOAT = Path("export"), Path("native"), Path("float")


def spoil(texts: list[str], places: range) -> list[str]:
    """The same with half of each sentence at the places lost."""
    return [" ".join(text.split()[:3]) if i in places else text for i, text in enumerate(texts)]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Verify an export by what it, the native model in its format and the float model write."""

    def run(
        translations: dict[Path, list[str]],
        *,
        runtime: str = "ctranslate2",
        number_format: str = "int8",
        references: list[str] | None = REFERENCES,
        max_drop: float = 0.5,
    ) -> verify.Verification:
        def measure(folder: Path, sources: list[str], *, batch_size: int, runtime: str) -> dict[str, Any]:
            formats = {EXPORT: number_format, NATIVE: number_format, FLOAT: "float32"}
            memory = {EXPORT: 20.0, NATIVE: 30.0, FLOAT: 40.0}
            figures = {"num_bytes": 1000, "tokens_per_second": 10.0, "peak_memory_mib": memory[folder]}
            return figures | {"hypotheses": translations[folder], "number_format": formats[folder]}

        monkeypatch.setattr(verify, "measure_sentences", measure)
        sentences = Sentences(REFERENCES, references, "here")
        return verify.verify_export(runtime, EXPORT, number_format, NATIVE, FLOAT, sentences, "en", max_drop)

    return run


def test_the_difference_itself_decides_and_the_float_model_is_the_measure(check: Any) -> None:
    """It loses 20 sentences and gains 16: a loss that is far from certain, and larger than allowed."""
    before, after = spoil(REFERENCES, range(16)), spoil(REFERENCES, range(20, 40))
    found = check({EXPORT: after, NATIVE: after, FLOAT: before}, max_drop=100.0)
    assert found.bleu.low < found.bleu.difference < -0.5 < 0 < found.bleu.high
    assert found.chrf.low < found.chrf.difference < 0 < found.chrf.high
    assert (found.scored_against, found.compared_with) == ("float32 model", "int8 model natively")
    assert (found.native_peak_memory_mib, found.peak_memory_mib) == (30.0, 20.0)
    with pytest.raises(ModelError, match=r"BLEU falls by \d.* more than --max-drop 0\.5: .* or export float32"):
        check({EXPORT: after, NATIVE: after, FLOAT: before})
    check({EXPORT: after, NATIVE: after, FLOAT: before}, max_drop=-found.bleu.difference)


@pytest.mark.parametrize(
    "number_format", ["float32", "float16", "int8", "int8_static", "int8_weights", "int4", "mixed"]
)
@pytest.mark.parametrize("references", [REFERENCES, None])
def test_a_copy_translates_everything_as_its_original(
    number_format: str, references: list[str] | None, check: Any
) -> None:
    options = {"runtime": "native", "number_format": number_format, "references": references, "max_drop": 100.0}
    found = check(dict.fromkeys((EXPORT, NATIVE, FLOAT), REFERENCES), **options)
    assert found.agreement == 1.0
    other = spoil(REFERENCES, range(1))
    with pytest.raises(ModelError, match="the copy translates only 119 of 120 sentences as its original does"):
        check({EXPORT: other, NATIVE: REFERENCES, FLOAT: REFERENCES}, **options)


@pytest.mark.parametrize(("number_format", "allowed"), [("float32", 3), ("int8", 30)])
def test_without_references_so_many_sentences_may_differ(number_format: str, allowed: int, check: Any) -> None:
    options = {"number_format": number_format, "references": None}
    found = check({EXPORT: spoil(REFERENCES, range(allowed)), NATIVE: REFERENCES, FLOAT: REFERENCES}, **options)
    assert (found.bleu, found.chrf) == (None, None)
    assert [line.split()[0] for line in found.describe()] == ["verified", "weights", "speed", "memory"]
    worse = spoil(REFERENCES, range(allowed + 1))
    with pytest.raises(ModelError, match=r"translates only .* as the native model does"):
        check({EXPORT: worse, NATIVE: REFERENCES, FLOAT: REFERENCES}, **options)


def test_all_sentences_with_references_are_taken_unless_fewer_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"Satz {i}\tsentence {i}\n" for i in range(300)))
    assert len(choose_sentences(tmp_path, path, "de", None).sources) == 300
    few = choose_sentences(tmp_path, path, "de", 3)
    assert (few.sources, few.references) == (
        ["Satz 0", "Satz 100", "Satz 200"],
        ["sentence 0", "sentence 100", "sentence 200"],
    )
    path.write_text("".join(f"Satz {i}\n" for i in range(300)))
    assert len(choose_sentences(tmp_path, path, "de", None).sources) == 200
    assert len(choose_sentences(tmp_path, path, "de", 250).sources) == 250
