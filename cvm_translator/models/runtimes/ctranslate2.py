"""CTranslate2 (extra `ctranslate2`): fast decoding on CPUs, of folders that `export --format ctranslate2` wrote.

One batch is decoded on every core unless the settings say otherwise, which is faster than all cores on one batch.
Greedy output equals the native runtime's in the same number format but for numerical ties. Beam search is CTranslate2's
own and may differ. On processors that are not Intel's it uses AVX2 even where AVX-512 is there; the environment
variable CT2_FORCE_CPU_ISA=AVX512, set before the program starts, changes that.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from cvm_translator.corpus.tokenizer import MODEL_NAME, Tokenizer
from cvm_translator.errors import CvmError, ModelError, import_optional
from cvm_translator.models.runtimes.base import (
    EXPORT_FILE,
    Runtime,
    RuntimeSettings,
    cut_batches,
    limit_output,
    load_export_facts,
)

WEIGHTS_FILE, MAP_FILE = "model.bin", "vmap.txt"


def arrange(settings: RuntimeSettings) -> tuple[int, int]:
    """Batches at the same time, and threads within each: one thread on every core, unless either was chosen."""
    if settings.num_workers is None and settings.num_threads is None:
        return len(os.sched_getaffinity(0)), 1
    return settings.num_workers or 1, settings.num_threads or 0


class Ctranslate2Runtime(Runtime):
    """An exported folder, or a run's `student` folder with one of the name `ctranslate2` in it."""

    best_batch_size = 32  # faster than 64, and a vocabulary map gains more: its candidates are those of a whole batch

    def __init__(self, path: Path, settings: RuntimeSettings) -> None:
        folder = path if (path / EXPORT_FILE).is_file() else path / "ctranslate2"
        self.facts = load_export_facts(folder if folder.is_dir() else path, "ctranslate2")
        self._load(folder, folder / MODEL_NAME, settings)

    def _load(self, model: Path, tokenizer: Path, settings: RuntimeSettings) -> None:
        library = import_optional("ctranslate2", "ctranslate2")
        self._num_workers, num_threads = arrange(settings)
        try:
            self._translator = library.Translator(
                str(model),
                device=settings.device,
                inter_threads=self._num_workers,
                intra_threads=num_threads,
            )
            self.text_tokenizer = Tokenizer.load(tokenizer)
        except (RuntimeError, ValueError, OSError, CvmError) as error:
            raise ModelError(f"{model} cannot be loaded by CTranslate2 ({error}): export the model again") from error
        self.tokenizer = self.text_tokenizer
        self._pieces = [self.text_tokenizer.id_to_piece(index) for index in range(self.text_tokenizer.vocab_size)]
        self._ids = {piece: index for index, piece in enumerate(self._pieces)}
        # `disable_unk` rules out the third of the tokens that the native decoder never writes
        self._forbidden = [[self._pieces[index]] for index in (Tokenizer.BOS_ID, Tokenizer.PAD_ID)]
        self._has_map = (model / MAP_FILE).is_file()
        self.num_bytes = (model / WEIGHTS_FILE).stat().st_size

    def translate_ids(
        self, sources: Sequence[Sequence[int]], *, beam_size: int = 1, batch_size: int = 128
    ) -> list[list[int]]:
        max_length = self.facts["max_length"]
        waiting = []
        share = -(-len(sources) // self._num_workers)  # smaller batches where a worker would have none
        for chosen in cut_batches(sources, min(batch_size // beam_size, share)):
            limits = [limit_output(len(sources[i]), max_length) for i in chosen]
            outputs = self._translator.translate_batch(
                [[self._pieces[index] for index in sources[i]] for i in chosen],
                beam_size=beam_size,
                max_input_length=0,
                max_decoding_length=max(limits),  # greedy outputs are cut to their own limits below
                disable_unk=True,
                suppress_sequences=self._forbidden,
                use_vmap=self._has_map,
                asynchronous=True,
            )
            waiting.append((chosen, limits, outputs))
        results: list[list[int]] = [[] for _ in sources]
        for chosen, limits, outputs in waiting:
            for i, limit, output in zip(chosen, limits, outputs, strict=True):
                results[i] = [self._ids[piece] for piece in output.result().hypotheses[0][:limit]]
        return results


class ArgosRuntime(Ctranslate2Runtime):
    """The model inside an .argosmodel package, decoded greedily as the native runtime does.

    Argos Translate itself cuts text into sentences, searches with four beams and writes blanks for underscores.
    """

    def __init__(self, path: Path, settings: RuntimeSettings) -> None:
        package = path if path.is_file() else next(iter(sorted(path.glob("*.argosmodel"))), path)
        with tempfile.TemporaryDirectory() as scratch:  # CTranslate2 reads everything when it loads
            try:
                with zipfile.ZipFile(package) as archive:
                    archive.extractall(scratch)
            except (OSError, zipfile.BadZipFile) as error:
                raise ModelError(f"{package} is no .argosmodel package ({error}): export the model again") from error
            roots = [file.parent for file in Path(scratch).glob(f"*/{EXPORT_FILE}")]
            if len(roots) != 1:
                raise ModelError(f"{package} was not written by this program: it has no {EXPORT_FILE}")
            self.facts = load_export_facts(roots[0], "argos")
            self._load(roots[0] / "model", roots[0] / MODEL_NAME, settings)
