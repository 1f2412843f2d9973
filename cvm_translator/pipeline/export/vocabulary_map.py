"""Which target pieces a sentence can need: a vocabulary map in CTranslate2's format, learnt from text.

With a map, logits are computed only for the pieces that the source pieces of a batch call for, and for those that are
always included. The map is learnt by IBM Model 1 (Brown et al., 1993) from pairs of ids: the sources of a corpus, and
what the model itself makes of them. References are of less use, since they hold free translations that the model would
never write, and a piece for each of them.

    always      the most frequent target pieces: as many as leave little of held-out sentences without a candidate (a
                large vocabulary has many pieces that no text of this size explains)
    per piece   target pieces that Model 1 explains by it, best first; a byte calls for itself and for the bytes that
                the targets hold; a piece that is rare in the text calls for itself, since names are copied

Lines are `source piece TAB target pieces`, separated by blanks; the line without source piece holds the first kind.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvm_translator.corpus.records import Pair
from cvm_translator.corpus.tokenizer import BOS_ID, EOS_ID, PAD_ID, UNK_ID, Tokenizer
from cvm_translator.models.runtimes.base import RuntimeSettings
from cvm_translator.models.runtimes.ctranslate2 import MAP_FILE, Ctranslate2Runtime
from cvm_translator.pipeline.export.sentences import spaced

MAX_SENTENCES = 40_000
HELD_OUT_EVERY = 20
"""One of so many sentences is not learnt from, but tells what a map misses."""
MAX_MISSED = 0.01
"""Share of the pieces of held-out targets that may be missing from the candidates of their sentence."""
NUM_ITERATIONS = 5

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class MapSettings:
    """How large a map becomes."""

    num_frequent: int = 100
    """Target pieces that are always included, at least."""
    max_per_piece: int = 40
    min_count: float = 0.1
    """Expected number of times, over the text, that the source piece produced the target piece."""
    max_rare_count: int = 20
    """Pieces seen less often on the source side call for themselves."""


@dataclass(frozen=True)
class VocabularyMap:
    """Target ids that are always candidates, and those that each source id adds."""

    always: list[int]
    by_source: dict[int, list[int]]

    def candidates(self, sources: Sequence[Sequence[int]]) -> set[int]:
        """What CTranslate2 computes logits for in a batch of these sources."""
        found = {BOS_ID, EOS_ID, UNK_ID, *self.always}
        for source in sources:
            for index in source:
                found.update(self.by_source.get(index, ()))
        return found

    def format(self, tokenizer: Tokenizer) -> str:
        """The text of vmap.txt."""
        rows = [(None, self.always), *sorted(self.by_source.items())]
        return "".join(
            f"{'' if source is None else tokenizer.id_to_piece(source)}\t"
            + " ".join(tokenizer.id_to_piece(index) for index in targets)
            + "\n"
            for source, targets in rows
        )


def add_vocabulary_map(folder: Path, pairs: Sequence[Pair], report: Callable[[str], None]) -> dict[str, Any]:
    """Learn a map from the sources of the pairs and what the CTranslate2 export in `folder` makes of them, and write it
    there. Returns its figures."""
    runtime = Ctranslate2Runtime(folder, RuntimeSettings(num_threads=1, num_workers=os.cpu_count() or 1))
    tokenizer, longest = runtime.text_tokenizer, runtime.facts["max_length"] - 1
    chosen = spaced(pairs, MAX_SENTENCES)
    sources = [ids[:longest] for ids in tokenizer.encode([pair.source for pair in chosen]) if ids]
    report(f"map        translating {len(sources):,} training sentences to learn from")
    targets = runtime.translate_ids(sources, batch_size=64)
    learnt = fit_vocabulary_map(sources, targets, tokenizer)
    (folder / MAP_FILE).write_text(learnt.format(tokenizer), encoding="utf-8")
    sizes = [len(learnt.candidates([source])) for source in spaced(sources, 1000)]
    mean_size = sum(sizes) / len(sizes)
    return {
        "num_sentences": len(sources),
        "mean_candidates": mean_size,
        "summary": f"{mean_size:,.0f} of {tokenizer.vocab_size:,} pieces for a sentence on average",
    }


def fit_vocabulary_map(
    sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], tokenizer: Tokenizer
) -> VocabularyMap:
    """Learn with twice as many frequent pieces again and again, up to an eighth of the vocabulary, until no more than
    `MAX_MISSED` of the held-out targets is missed."""
    held_out = range(HELD_OUT_EVERY - 1, len(sources), HELD_OUT_EVERY)
    is_learnt = [index % HELD_OUT_EVERY != HELD_OUT_EVERY - 1 for index in range(len(sources))]
    known_sources, known_targets = (list(itertools.compress(side, is_learnt)) for side in (sources, targets))
    settings = MapSettings()
    explained = _explain(known_sources, known_targets, tokenizer.vocab_size)
    while True:
        learnt = learn_vocabulary_map(known_sources, known_targets, tokenizer, settings, explained)
        num_missed, num_pieces = 0, 0
        for index in held_out:
            candidates = learnt.candidates([sources[index]])
            num_missed += sum(piece not in candidates for piece in targets[index])
            num_pieces += len(targets[index])
        more = 2 * settings.num_frequent
        if num_missed <= MAX_MISSED * num_pieces or more > tokenizer.vocab_size // 8:
            return learnt
        settings = replace(settings, num_frequent=more)


def learn_vocabulary_map(
    sources: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    settings: MapSettings | None = None,
    explained: list[tuple[int, int, float]] | None = None,
) -> VocabularyMap:
    """Learn from pairs of ids without marks; at least one target must not be empty. `explained` saves explaining them
    again."""
    settings = settings or MapSettings()
    vocab_size = tokenizer.vocab_size
    source_counts = _count_pieces(sources, vocab_size)
    target_counts = _count_pieces(targets, vocab_size)
    target_counts[[BOS_ID, PAD_ID, EOS_ID, UNK_ID]] = 0
    ranked = np.argsort(-target_counts, kind="stable")[: settings.num_frequent]
    always = [int(index) for index in ranked if target_counts[index] > 0]
    known = set(always)

    lists: dict[int, list[int]] = {}
    for source, target, count in explained or _explain(sources, targets, vocab_size):
        chosen = lists.setdefault(source, [])
        if count >= settings.min_count and len(chosen) < settings.max_per_piece and target not in known:
            chosen.append(target)
    is_byte = [_is_byte(tokenizer.id_to_piece(index)) for index in range(vocab_size)]
    written_bytes = [index for index in range(vocab_size) if is_byte[index] and target_counts[index]]
    for source in range(UNK_ID + 1, vocab_size):
        if is_byte[source]:
            lists[source] = sorted({source, *written_bytes})
        elif source_counts[source] < settings.max_rare_count and source not in known:
            lists[source] = [source, *(index for index in lists.get(source, ()) if index != source)]
    return VocabularyMap(always, {source: chosen for source, chosen in lists.items() if chosen})


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _count_pieces(rows: Sequence[Sequence[int]], vocab_size: int) -> IntArray:
    flat = [index for row in rows for index in row]
    return np.bincount(np.array(flat, dtype=np.int64), minlength=vocab_size)


def _explain(
    sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], vocab_size: int
) -> list[tuple[int, int, float]]:
    """(source piece, target piece, expected count) under IBM Model 1, highest counts of each source piece first.

    Each sentence counts each of its pieces once; `vocab_size` stands for the empty word, whose share is left out.
    """
    left, right, occurrence = [], [], []
    num_occurrences = 0
    for source, target in zip(sources, targets, strict=True):
        if not source or not target:
            continue
        wide = np.array([vocab_size, *sorted(set(source))], dtype=np.int64)
        high = np.array(sorted(set(target)), dtype=np.int64)
        left.append(np.tile(wide, len(high)))
        right.append(np.repeat(high, len(wide)))
        occurrence.append(np.repeat(np.arange(num_occurrences, num_occurrences + len(high)), len(wide)))
        num_occurrences += len(high)
    if not left:
        raise ValueError("no sentence pair to learn a vocabulary map from")
    pairs, place = np.unique(np.concatenate(left) * vocab_size + np.concatenate(right), return_inverse=True)
    owner = np.concatenate(occurrence)
    source_of, target_of = pairs // vocab_size, pairs % vocab_size
    probability: FloatArray = np.ones(len(pairs))
    for _ in range(NUM_ITERATIONS):
        weight = probability[place]
        share = weight / np.bincount(owner, weight, minlength=num_occurrences)[owner]
        counts = np.bincount(place, share, minlength=len(pairs))
        probability = counts / np.bincount(source_of, counts, minlength=vocab_size + 1)[source_of]
    order = np.lexsort((target_of, -counts, source_of))
    order = order[source_of[order] < vocab_size]
    return list(zip(source_of[order].tolist(), target_of[order].tolist(), counts[order].tolist(), strict=True))
