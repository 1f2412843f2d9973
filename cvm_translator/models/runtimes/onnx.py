"""ONNX Runtime (extra `onnx`): greedy decoding of folders that `export --format onnx` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cvm_translator.corpus.tokenizer import MODEL_NAME, Tokenizer
from cvm_translator.errors import CvmError, ModelError, import_optional
from cvm_translator.models.decoding import COMPACT_BELOW
from cvm_translator.models.runtimes.base import Runtime, RuntimeSettings, cut_batches, limit_output, load_export_facts

ENCODER_FILE, DECODER_FILE = "encoder.onnx", "decoder.onnx"


class OnnxRuntime(Runtime):
    """An exported folder. Beam search is not offered: keys and values would have to be reordered by hand."""

    def __init__(self, path: Path, settings: RuntimeSettings) -> None:
        self.facts = load_export_facts(path, "onnx")
        library = import_optional("onnxruntime", "onnx")
        options = library.SessionOptions()
        options.intra_op_num_threads = settings.num_threads or 0
        # without it int8 products saturate on x86 processors that lack VNNI
        options.add_session_config_entry("session.x64quantprecision", "1")
        try:
            self._encoder, self._decoder = (
                library.InferenceSession(str(path / name), options, providers=["CPUExecutionProvider"])
                for name in (ENCODER_FILE, DECODER_FILE)
            )
            self.tokenizer = Tokenizer.load(path / MODEL_NAME)
        except (CvmError, OSError, RuntimeError, ValueError) as error:
            raise ModelError(f"{path} cannot be loaded by ONNX Runtime ({error}): export the model again") from error
        except Exception as error:  # the library's own errors share no base class
            raise ModelError(f"{path} cannot be loaded by ONNX Runtime ({error}): export the model again") from error
        self._inputs = {value.name: value.shape for value in self._decoder.get_inputs()}
        self._presents = [value.name for value in self._decoder.get_outputs() if value.name.startswith("present.")]
        self.num_bytes = sum(file.stat().st_size for file in path.glob("*.onnx*"))

    def translate_ids(
        self, sources: Sequence[Sequence[int]], *, beam_size: int = 1, batch_size: int = 128
    ) -> list[list[int]]:
        if beam_size != 1:
            raise ModelError(f"beam size {beam_size}: the ONNX runtime decodes greedily; use 1, or another runtime")
        results: list[list[int]] = [[] for _ in sources]
        for chosen in cut_batches(sources, batch_size):
            limits = [limit_output(len(sources[i]), self.facts["max_length"]) for i in chosen]
            for i, output in zip(chosen, self._translate_batch([sources[i] for i in chosen], limits), strict=True):
                results[i] = output
        return results

    def _translate_batch(self, sources: Sequence[Sequence[int]], limits: Sequence[int]) -> list[list[int]]:
        state = self._start(sources)
        outputs: list[list[int]] = [[] for _ in sources]
        rows = list(range(len(sources)))  # which sentence each row of the batch belongs to
        is_open = [True] * len(rows)
        while any(is_open):
            tokens, *presents = self._decoder.run(["next_token", *self._presents], state)
            for row, token in enumerate(tokens.tolist()):
                if is_open[row]:
                    output = outputs[rows[row]]
                    if token != Tokenizer.EOS_ID:
                        output.append(token)
                    is_open[row] = token != Tokenizer.EOS_ID and len(output) < limits[rows[row]]
            state["input_ids"] = tokens
            for name, value in zip(self._presents, presents, strict=True):
                state[name.replace("present.", "past_key_values.", 1)] = value
            if 0 < sum(is_open) < COMPACT_BELOW * len(rows):
                kept = [row for row in range(len(rows)) if is_open[row]]
                state = {name: value[kept] for name, value in state.items()}
                rows, is_open = [rows[row] for row in kept], [True] * len(kept)
        return outputs

    def _start(self, sources: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The decoder's inputs before the first token."""
        length = max(len(source) for source in sources) + 1
        ids = np.full((len(sources), length), Tokenizer.PAD_ID, dtype=np.int64)
        for row, source in enumerate(sources):
            ids[row, : len(source) + 1] = [*source, Tokenizer.EOS_ID]
        mask = (ids != Tokenizer.PAD_ID).astype(np.int64)
        names = [value.name for value in self._encoder.get_outputs()]
        views = self._encoder.run(names, {"input_ids": ids, "attention_mask": mask})
        state = {name.replace("present.", "past_key_values.", 1): view for name, view in zip(names, views, strict=True)}
        for name, shape in self._inputs.items():
            if name.endswith(("decoder.key", "decoder.value")):
                state[name] = np.zeros((len(sources), shape[1], 0, shape[3]), dtype=np.float32)
        start = np.full(len(sources), Tokenizer.EOS_ID, dtype=np.int64)
        return state | {"input_ids": start, "attention_mask": mask}
