"""A model whose attention is bounded to slots goes into other runtimes only where its bound may be dropped."""

from __future__ import annotations

from pathlib import Path

import pytest

from cvm_translator.errors import ModelError
from cvm_translator.models.folder import load_model, save_model
from cvm_translator.models.runtimes import RuntimeSettings, load_runtime
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.pipeline.export import ExportRequest, export_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # the reference run may still have to be made


@pytest.fixture(scope="module")
def bounded(exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student's weights with two slots."""
    loaded = load_model(exports.student / "float")
    config = loaded.model.config.model_copy(update={"core_capacity": 2})
    model = CvmTransformer(config, loaded.model.vocab_size)
    model.load_state_dict(loaded.model.state_dict())
    folder = tmp_path_factory.mktemp("bounded") / "model"
    return save_model(folder, model, loaded.tokenizer, source_language="de", target_language="en")


def test_it_is_refused_unless_full_attention_is_asked_for(bounded: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"at most 2 slots of attention .* --full-attention"):
        export_model(ExportRequest(bounded, "huggingface", tmp_path / "out"))
    assert not any(tmp_path.iterdir())


def test_with_full_attention_it_is_the_unbounded_model_and_is_scored(exports, bounded: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    request = ExportRequest(
        bounded, "ctranslate2", tmp_path / "out", "float32", sentences=exports.sentences, full_attention=True
    )
    export_model(request, lines.append)
    (before, after) = (part.split()[-1 if i == 0 else 0] for i, part in enumerate(_bleu_line(lines).split(" -> ")))
    assert float(before) < float(after)  # two slots are too few for this model
    assert "bounded to 2 slots" in (tmp_path / "out" / "README.md").read_text()
    assert any("without its bound" in line for line in lines)
    sources, _ = exports.read_rows()
    exported = load_runtime("ctranslate2", tmp_path / "out", RuntimeSettings(num_threads=1))
    unbounded, slots = exports.load_native("float32"), load_runtime("native", bounded, RuntimeSettings(num_threads=1))
    ours, theirs = unbounded.translate(sources[:50], batch_size=32), exported.translate(sources[:50], batch_size=32)
    assert sum(a.strip() == b.strip() for a, b in zip(ours, theirs, strict=True)) >= 49
    assert slots.translate(sources[:50], batch_size=32) != ours


def test_an_export_that_loses_more_than_allowed_is_not_written(exports, bounded: Path, tmp_path: Path) -> None:
    """Here the unbounded model is the better one, so the limit is set to a gain that no model could have."""
    request = ExportRequest(
        bounded, "huggingface", tmp_path / "out", sentences=exports.sentences, full_attention=True, max_drop=-200.0
    )
    with pytest.raises(ModelError, match="more than --max-drop -200: nothing was written; allow more"):
        export_model(request)
    assert not any(tmp_path.iterdir())


def test_without_references_its_quality_cannot_be_compared(bounded: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"quality must be compared: name sentences .* --sentences FILE\.tsv"):
        export_model(ExportRequest(bounded, "huggingface", tmp_path / "out", full_attention=True))
    assert not any(tmp_path.iterdir())


def test_a_needless_full_attention_is_refused(exports, bounded: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="its attention is full already: leave it out"):
        export_model(ExportRequest(exports.student, "huggingface", tmp_path / "out", full_attention=True))
    with pytest.raises(ModelError, match="--format safetensors copies it as it is: leave it out"):
        export_model(ExportRequest(bounded, "safetensors", tmp_path / "out", full_attention=True))


def test_a_copy_in_our_own_format_keeps_the_bound(bounded: Path, tmp_path: Path) -> None:
    export_model(ExportRequest(bounded, "safetensors", tmp_path / "out"))
    assert load_model(tmp_path / "out").model.config.core_capacity == 2


def _bleu_line(lines: list[str]) -> str:
    return next(line for line in lines if line.startswith("BLEU"))
