"""A sentence splitter in the form that Argos Translate packages may carry: a MiniSBD model, made by rule.

Without one, Argos Translate and LibreTranslate download a splitter when the package is first used. This one needs no
download and no training: an ONNX graph over character classes, with MiniSBD's inputs (`units`, `features`), its output
(a score of five labels a character, of which 2 ends a sentence) and its metadata. It cuts

- after `!`, `?` and their like, and after `.` and `…` behind a word of three letters or more (so not in `z. B.`, `Nr.`
  or `3.`), with closing quotes or brackets, where a blank follows and then no small letter (after a dot, no digit);
- after full stops that need no blank (`。！？`).
"""

from __future__ import annotations

import json
import sys
import unicodedata
from typing import Any

import numpy as np

from cvm_translator.pipeline.export.onnx_graph import Graph

STRONG, DOTS, WIDE = "!?؟։।॥", ".…", "。！？"
CLOSERS = "\"')]}»”’›“‘"
PAD, UNKNOWN = "<PAD>", "<UNK>"
SENTENCE_END, NUM_LABELS = 2, 5
REACH = 4
"""How many characters to either side a decision looks at."""


def classify(character: str) -> set[str]:
    """The classes of a character; letters that are not small have none."""
    classes = {
        "strong": character in STRONG,
        "dot": character in DOTS,
        "wide": character in WIDE,
        "closer": character in CLOSERS,
        "space": character == " ",
        "lower": character.islower(),
        "digit": character.isdigit(),
        "mark": unicodedata.category(character)[0] in "PSZ",
    }
    return {name for name, holds in classes.items() if holds}


CLASSES = ("strong", "dot", "wide", "closer", "space", "lower", "digit", "mark")


def build_vocabulary() -> list[str]:
    """Padding, anything else, and every character of the basic plane with a class."""
    characters = (chr(code) for code in range(32, min(0xFFFF, sys.maxunicode)) if not 0xD800 <= code < 0xE000)
    return [PAD, UNKNOWN, *(character for character in characters if classify(character))]


def build_sentence_boundaries(onnx: Any, language: str) -> Any:
    """The ONNX model, with MiniSBD's metadata."""
    vocabulary = build_vocabulary()
    table = np.array(
        [
            [name in classify(unit) for name in CLASSES] if len(unit) == 1 else [False] * len(CLASSES)
            for unit in vocabulary
        ]
    )
    graph = Graph(onnx)
    units = graph.input("units", np.int64, "batch", "characters")
    graph.input("features", np.float32, "batch", "characters", "features")
    float32 = onnx.TensorProto.FLOAT
    classes = {
        name: graph.add("Cast", graph.add("Gather", graph.constant(name, column), units), to=float32)
        for name, column in zip(CLASSES, table.astype(np.uint8).T, strict=True)
    }

    def at(name: str, offset: int) -> str:
        """1.0 where the character `offset` places on is of the class; 0.0 beyond the ends."""
        padded = graph.add("Pad", classes[name], graph.integers(0, REACH, 0, REACH))
        start, end = REACH + offset, offset - REACH
        stop = graph.integers(end) if end < 0 else graph.integers(np.iinfo(np.int64).max)
        return graph.add("Slice", padded, graph.integers(start), stop, graph.integers(1))

    def both(*values: str) -> str:
        result = values[0]
        for value in values[1:]:
            result = graph.add("Mul", result, value)
        return result

    def either(*values: str) -> str:
        return graph.add("Max", *values)

    def no(value: str) -> str:
        return graph.add("Sub", graph.number(1.0), value)

    def ends_at(offset: int) -> str:
        """Whether the character `offset` places on ends a sentence if a blank and no small letter follow."""
        is_word = [no(either(at("mark", offset - back), at("digit", offset - back))) for back in (1, 2, 3)]
        dot = both(at("dot", offset), *is_word, no(at("digit", 2)))
        return either(at("strong", offset), dot)

    blank_follows = both(at("space", 1), no(at("lower", 2)))
    narrow = both(either(ends_at(0), both(at("closer", 0), ends_at(-1))), blank_follows)
    wide = both(
        either(at("wide", 0), both(at("closer", 0), at("wide", -1))), no(either(at("wide", 1), at("closer", 1)))
    )
    end = graph.add("Unsqueeze", either(narrow, wide), graph.integers(2))  # (B, T, 1)
    nothing = graph.add("Mul", end, graph.number(0.0))
    half = graph.add("Add", nothing, graph.number(0.5))
    labels = [half, nothing, end, nothing, nothing]
    assert labels[SENTENCE_END] == end and len(labels) == NUM_LABELS
    scores = graph.add("Concat", *labels, name="scores", axis=2)
    graph.output(scores, np.float32, "batch", "characters", NUM_LABELS)
    model = graph.build("sentence_boundaries")
    metadata = {
        "lang_code": language,
        "config": json.dumps({"feat_funcs": ["capitalized"]}),
        "vocab": json.dumps(
            {
                "lang": "",
                "idx": 0,
                "cutoff": 0,
                "lower": False,
                "_unit2id": {unit: index for index, unit in enumerate(vocabulary)},
                "_id2unit": vocabulary,
            }
        ),
        "lexicon": "null",
    }
    onnx.helper.set_model_props(model, metadata)
    return model
