"""The vocabulary map, learnt from toy text."""

from __future__ import annotations

import random
from typing import Any

import pytest

from cvm_translator.pipeline.export.vocabulary_map import (
    MapSettings,
    VocabularyMap,
    fit_vocabulary_map,
    learn_vocabulary_map,
)


class FakeTokenizer:
    """40 pieces: marks, two bytes, and numbers."""

    vocab_size = 40

    def id_to_piece(self, index: int) -> str:
        return {4: "<0x41>", 5: "<0x42>"}.get(index, f"p{index}")


def make_pairs(num_pairs: int) -> tuple[list[list[int]], list[list[int]]]:
    """Source piece s in 10 … 19 is translated by s + 10; 9 is in every target, whatever the source."""
    generator = random.Random(1)
    sources = [[generator.randrange(10, 20) for _ in range(4)] for _ in range(num_pairs)]
    return sources, [[9, *(index + 10 for index in reversed(source))] for source in sources]


def learn(num_pairs: int = 300, **settings: Any) -> VocabularyMap:
    return learn_vocabulary_map(*make_pairs(num_pairs), FakeTokenizer(), MapSettings(**settings))  # type: ignore[arg-type]


def test_each_piece_calls_for_its_translation_and_frequent_ones_are_always_there() -> None:
    learnt = learn(num_frequent=1, max_per_piece=1, max_rare_count=0)
    assert learnt.always == [9]
    assert {source: targets for source, targets in learnt.by_source.items() if source >= 10} == {
        source: [source + 10] for source in range(10, 20)
    }


def test_candidates_are_what_a_batch_needs() -> None:
    learnt = learn(num_frequent=1, max_per_piece=1, max_rare_count=0)
    assert learnt.candidates([[10, 11], [10]]) == {0, 2, 3, 9, 20, 21}
    assert learnt.candidates([[39]]) == {0, 2, 3, 9}


def test_rare_pieces_are_copied_and_bytes_call_for_bytes() -> None:
    sources, targets = make_pairs(300)
    learnt = learn_vocabulary_map(
        [*sources, [33, 4]],
        [*targets, [33, 5]],
        FakeTokenizer(),
        MapSettings(num_frequent=1),  # type: ignore[arg-type]
    )
    assert learnt.by_source[33][0] == 33
    assert learnt.by_source[34] == [34]  # never seen
    assert learnt.by_source[4] == [4, 5]
    assert 12 not in learnt.by_source[12]


def test_the_file_is_ctranslate2_s() -> None:
    lines = VocabularyMap([9, 8], {12: [22, 23], 10: [20]}).format(FakeTokenizer()).split("\n")  # type: ignore[arg-type]
    assert lines == ["\tp9 p8", "p10\tp20", "p12\tp22 p23", ""]


def test_without_text_there_is_no_map() -> None:
    with pytest.raises(ValueError, match="no sentence pair"):
        learn_vocabulary_map([[]], [[]], FakeTokenizer())  # type: ignore[arg-type]


def test_pieces_that_occur_together_by_chance_are_left_out() -> None:
    learnt = learn(num_frequent=1, max_per_piece=20, min_count=1.0, max_rare_count=0)
    assert max(len(targets) for source, targets in learnt.by_source.items() if source >= 10) <= 3


@pytest.mark.parametrize(("vocab_size", "num_kinds", "expected"), [(4000, 20, 20), (4000, 300, 300), (1000, 300, 100)])
def test_frequent_pieces_grow_with_what_held_out_sentences_miss(vocab_size: int, num_kinds: int, expected: int) -> None:
    """Of targets that no source explains; at most an eighth of the vocabulary."""
    tokenizer, generator = FakeTokenizer(), random.Random(2)
    tokenizer.vocab_size = vocab_size
    sources = [[10, 11] for _ in range(2000)]
    targets = [[generator.randrange(100, 100 + num_kinds) for _ in range(5)] for _ in sources]
    learnt = fit_vocabulary_map(sources, targets, tokenizer)  # type: ignore[arg-type]
    assert len(learnt.always) == expected
