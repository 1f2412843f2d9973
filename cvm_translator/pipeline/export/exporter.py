"""`cvm-translator export`: a model folder in another library's format, tried there before it is put in place.

Guarantees: everything is written to a temporary folder beside the target; the export is loaded by the foreign library
in a fresh process and compared with the native model (see `verify`); only then does the folder get its name. Whatever
goes wrong, nothing is left behind and nothing is overwritten.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from cvm_translator import __version__
from cvm_translator.corpus.tokenizer import MODEL_NAME, Tokenizer
from cvm_translator.errors import ModelError, import_optional
from cvm_translator.models.description import WEIGHTS_FILE
from cvm_translator.models.folder import LoadedModel, find_model_folder, load_model, save_model
from cvm_translator.models.runtimes.base import EXPORT_FILE
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.pipeline.export.argos import SUFFIX, write_argos
from cvm_translator.pipeline.export.readmes import build_readme
from cvm_translator.pipeline.export.sentences import Sentences, choose_sentences, load_map_pairs
from cvm_translator.pipeline.export.verify import verify_export
from cvm_translator.pipeline.export.vocabulary_map import add_vocabulary_map
from cvm_translator.pipeline.places import find_float_beside, find_float_folder, find_run, refuse_existing
from cvm_translator.quantization import AdvancedQuantizer, QuantizationType, TiedEmbedding
from cvm_translator.runs.atomic import TEMPORARY_PREFIX, fsync_directory, new_folder, write_json

Report = Callable[[str], None]

MAX_DROP = 0.5


@dataclass(frozen=True)
class ExportRequest:
    """What to export, and how."""

    model: Path
    """A model folder, or a run's `student` folder."""
    format: str
    output: Path
    quantization: str | None = None
    """Number format; None is the format's own default."""
    corpus: Path | None = None
    """Run folder or TSV file that a vocabulary map is learnt from; None is the run in which the model lies, if any."""
    vocabulary_map: bool | None = None
    """None: where the export is int8 for CTranslate2 and a corpus is known."""
    sentences: Path | None = None
    num_sentences: int | None = None
    """At most so many of them; None: all that have references, else 200."""
    max_drop: float | None = None
    """BLEU that an export may lose; None: MAX_DROP, and anything for a copy in our own format."""
    full_attention: bool = False
    """Whether a model with bounded attention may be exported without its bound, which other runtimes do not know."""


@dataclass(frozen=True)
class Job:
    """A model on its way into a format."""

    model: CvmTransformer
    tokenizer: Tokenizer
    facts: dict[str, Any]
    libraries: dict[str, ModuleType]
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Format:
    """A format: the number formats it can have (its default first), what it needs, and how it is written."""

    number_formats: tuple[str, ...]
    libraries: tuple[str, ...]
    write: Callable[[Path, Job], None]
    runtime: str
    """Which of `RUNTIMES` loads it."""


def _write_safetensors(folder: Path, job: Job) -> None:
    save_model(
        folder,
        job.model,
        job.tokenizer,
        source_language=job.facts["source_language"],
        target_language=job.facts["target_language"],
        metadata=job.metadata,
    )


def _write_huggingface(folder: Path, job: Job) -> None:
    from cvm_translator.pipeline.export.huggingface import check_logits, write_huggingface

    write_huggingface(folder, job.model, job.tokenizer)
    check_logits(folder, job.model)


def _write_ctranslate2(folder: Path, job: Job) -> None:
    from cvm_translator.pipeline.export.ctranslate2 import write_ctranslate2

    write_ctranslate2(job.libraries["ctranslate2"], folder, job.model, job.tokenizer)
    shutil.copyfile(job.tokenizer.path, folder / MODEL_NAME)


def _write_argos(folder: Path, job: Job) -> None:
    libraries = job.libraries
    readme = build_readme("argos", job.facts)
    write_argos(libraries["ctranslate2"], libraries["onnx"], folder, job.model, job.tokenizer, job.facts, readme)


def _write_onnx(folder: Path, job: Job) -> None:
    from cvm_translator.pipeline.export.onnx_graph import write_onnx

    write_onnx(job.libraries["onnx"], folder, job.model)
    shutil.copyfile(job.tokenizer.path, folder / MODEL_NAME)


FORMATS: dict[str, Format] = {
    "safetensors": Format(("float32", "int8"), (), _write_safetensors, "native"),
    "huggingface": Format(("float32",), ("transformers",), _write_huggingface, "huggingface"),
    "ctranslate2": Format(("int8", "float32"), ("ctranslate2",), _write_ctranslate2, "ctranslate2"),
    "argos": Format(("int8", "float32"), ("ctranslate2", "onnx"), _write_argos, "argos"),
    "onnx": Format(("int8", "float32"), ("onnx", "onnxruntime"), _write_onnx, "onnx"),
}
"""The names of the formats are the command line's."""


def export_model(request: ExportRequest, report: Report = print) -> Path:
    """Export, verify and put in place; returns the folder, or the .argosmodel file. `report` gets lines of text.

    Raises ModelError, CorpusError or MissingDependencyError, each with a remedy, and then nothing was written.
    """
    if request.format not in FORMATS:
        raise ModelError(f"unknown export format {request.format!r}: known are {', '.join(FORMATS)}")
    form = FORMATS[request.format]
    refuse_existing(request.output)
    source = _find_source(request)
    libraries = {name: import_optional(name, request.format) for name in form.libraries}
    loaded = load_model(source)
    dropped_capacity = _lift_bound(request, source, loaded.model)
    number_format = _choose_number_format(request, form, source, loaded)
    corpus = _find_corpus(request, number_format)
    sentences = choose_sentences(source, request.sentences, loaded.config["source_language"], request.num_sentences)
    _check_references(request, sentences)
    job = Job(
        _convert(loaded.model, number_format),
        loaded.tokenizer,
        _describe(request.format, number_format, loaded) | {"dropped_core_capacity": dropped_capacity},
        libraries,
        loaded.config["metadata"],
    )
    report(
        f"model      {source} ({loaded.config['number_format']}, {job.facts['num_parameters']:,} parameters, "
        f"{job.facts['source_language']} to {job.facts['target_language']})"
    )
    with _new_place(request) as folder, tempfile.TemporaryDirectory() as scratch:
        form.write(folder, job)
        if request.format != "argos":
            write_json(folder / EXPORT_FILE, job.facts)
        if corpus is not None:
            _add_map(folder, corpus, job, report)
        native = source
        if number_format != loaded.config["number_format"] or dropped_capacity is not None:
            native = Path(scratch) / "native"
            _write_safetensors(native, job)
        verification = verify_export(
            form.runtime,
            folder,
            number_format,
            native,
            _find_baseline(source, loaded),
            sentences,
            loaded.config["target_language"],
            _find_max_drop(request),
            is_unbounded=dropped_capacity is not None,
        )
        for line in verification.describe():
            report(line)
        if request.format != "argos":
            write_json(folder / EXPORT_FILE, job.facts | {"verification": verification.to_plain()})
            (folder / "README.md").write_text(build_readme(request.format, job.facts), encoding="utf-8")
    return request.output


def _find_source(request: ExportRequest) -> Path:
    """The model folder to read: of a run's `student` folder the float model, but for a copy in our own format."""
    return find_model_folder(request.model if request.format == "safetensors" else find_float_folder(request.model))


def _lift_bound(request: ExportRequest, source: Path, model: CvmTransformer) -> int | None:
    """Give a model with slots full attention if that was asked for; refuses to if it was not, and where it is needless.

    Returns the capacity that was dropped, if there was one.
    """
    capacity = model.config.core_capacity
    if request.full_attention and (capacity is None or request.format == "safetensors"):
        reason = "its attention is full already" if capacity is None else "--format safetensors copies it as it is"
        raise ModelError(f"--full-attention is for models with core_capacity; of {source} {reason}: leave it out")
    if capacity is None or request.format == "safetensors":
        return None
    if not request.full_attention:
        raise ModelError(
            f"{source} keeps at most {capacity} slots of attention (core_capacity), which --format {request.format} "
            "does not have: with --full-attention it is exported without that bound and its quality is compared"
        )
    model.use_full_attention()
    return capacity


def _check_references(request: ExportRequest, sentences: Sentences) -> None:
    """Raise ModelError where quality is to be compared and no references are known."""
    if sentences.references is not None:
        return
    remedy = "name sentences with their references, --sentences FILE.tsv"
    if request.full_attention:
        raise ModelError(f"--full-attention changes what the model writes, so its quality must be compared: {remedy}")
    if request.max_drop is not None:
        raise ModelError(f"--max-drop {request.max_drop:g} is judged by references, and there are none: {remedy}")


def _find_baseline(source: Path, loaded: LoadedModel) -> Path:
    """What an export is scored against: the float model that the source was made from, if it lies beside it."""
    if loaded.config["number_format"] == "float32":
        return source
    return find_float_beside(source) or source


def _find_max_drop(request: ExportRequest) -> float:
    if request.max_drop is not None:
        return request.max_drop
    return math.inf if request.format == "safetensors" else MAX_DROP


def _choose_number_format(request: ExportRequest, form: Format, source: Path, loaded: LoadedModel) -> str:
    held = str(loaded.config["number_format"])
    if request.format == "safetensors":
        if request.quantization not in (None, held):
            raise ModelError(
                f"{source} is {held}: --format safetensors copies it as it is; for {request.quantization} use "
                "cvm-translator quantize"
            )
        return held
    wanted = request.quantization or form.number_formats[0]
    if wanted not in form.number_formats:
        raise ModelError(
            f"--quantization {wanted}: --format {request.format} offers {' and '.join(form.number_formats)}"
        )
    if held not in ("float32", wanted):
        raise ModelError(
            f"{source} is {held}: --format {request.format} in {wanted} is made from the float model; name its folder "
            "(in a run: student/float)"
        )
    return wanted


def _find_corpus(request: ExportRequest, number_format: str) -> Path | None:
    """The text for a vocabulary map, or None for no map."""
    if request.format != "ctranslate2":
        if request.vocabulary_map or request.corpus is not None:
            raise ModelError(f"vocabulary maps are for --format ctranslate2, not {request.format}: leave the map out")
        return None
    if request.vocabulary_map is False:
        return None
    layout = find_run(request.model)
    corpus = request.corpus or (layout.root if layout is not None else None)
    if request.vocabulary_map and corpus is None:
        raise ModelError("--vocabulary-map is learnt from text: name it with --corpus RUN_DIR or FILE.tsv")
    wants_map = request.vocabulary_map or request.corpus is not None or number_format == "int8"
    return corpus if wants_map else None


def _add_map(folder: Path, corpus: Path, job: Job, report: Report) -> None:
    """Learn a vocabulary map into the folder; its figures become part of the job's facts."""
    start = time.monotonic()
    job.facts["vocabulary_map"] = add_vocabulary_map(folder, load_map_pairs(corpus), report)
    report(f"map        {job.facts['vocabulary_map']['summary']} ({time.monotonic() - start:.0f} s)")


def _convert(model: CvmTransformer, number_format: str) -> CvmTransformer:
    is_float = isinstance(model.embedding, TiedEmbedding)
    if number_format == "int8" and is_float:
        return AdvancedQuantizer(QuantizationType.DYNAMIC).convert(model)
    return model


def _describe(format_name: str, number_format: str, loaded: LoadedModel) -> dict[str, Any]:
    return {
        "format": format_name,
        "number_format": number_format,
        "max_length": loaded.model.config.max_length,
        "num_parameters": loaded.model.num_parameters(),
        "source_language": loaded.config["source_language"],
        "target_language": loaded.config["target_language"],
        "weights_sha256": loaded.config["files"][WEIGHTS_FILE]["sha256"],
        "cvm_translator_version": __version__,
    }


@contextlib.contextmanager
def _new_place(request: ExportRequest) -> Iterator[Path]:
    """A temporary folder beside the output, which becomes the output when the block ends and else vanishes."""
    output = request.output
    if request.format != "argos" or output.suffix != SUFFIX:
        with new_folder(output) as folder:
            yield folder
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{TEMPORARY_PREFIX}{output.name}-", dir=output.parent) as scratch:
        yield Path(scratch)
        (package,) = Path(scratch).glob(f"*{SUFFIX}")
        refuse_existing(output)
        os.rename(package, output)
        fsync_directory(output.parent)
