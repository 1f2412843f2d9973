"""The sentence splitter of Argos packages, through the file that MiniSBD would read."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest

from cvm_translator.pipeline.export.sentence_boundaries import build_sentence_boundaries


@pytest.fixture(scope="module")
def session() -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(build_sentence_boundaries(onnx, "de").SerializeToString())


def split(session: onnxruntime.InferenceSession, text: str) -> list[str]:
    """As MiniSBD does it: ids of characters, the best of five labels each, and 2 ends a sentence."""
    vocabulary = json.loads(session.get_modelmeta().custom_metadata_map["vocab"])["_unit2id"]
    units = np.array([[*(vocabulary.get(character, vocabulary["<UNK>"]) for character in text), 0]])
    features = np.zeros((1, units.shape[1], 1), dtype=np.float32)
    labels = session.run(None, {"units": units, "features": features})[0].argmax(2)[0, : len(text)]
    ends = [*(np.flatnonzero(labels == 2) + 1).tolist(), len(text)]
    parts = [text[start:end].strip() for start, end in zip([0, *ends], ends, strict=False)]
    return [part for part in parts if part]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Das ist gut. Und das? Ja! Sicher…", ["Das ist gut.", "Und das?", "Ja!", "Sicher…"]),
        ("Das ist z. B. ein Test, Nr. 5 vom 3. Mai.", ["Das ist z. B. ein Test, Nr. 5 vom 3. Mai."]),
        ("Er rief: „Komm!“ Dann kam er.", ["Er rief: „Komm!“", "Dann kam er."]),
        ("Das war (wirklich.) Heute nicht.", ["Das war (wirklich.)", "Heute nicht."]),
        ("siehe datei.txt und ende. klein geht es weiter", ["siehe datei.txt und ende. klein geht es weiter"]),
        ("Version 1.5 ist da. 2 Fehler bleiben.", ["Version 1.5 ist da. 2 Fehler bleiben."]),
        ("你好。我很好！你呢？", ["你好。", "我很好！", "你呢？"]),
        ("वह आया। मैं गया।", ["वह आया।", "मैं गया।"]),
        ("gelöscht. %s bleibt", ["gelöscht.", "%s bleibt"]),
        ("x", ["x"]),
    ],
)
def test_sentences(session: onnxruntime.InferenceSession, text: str, expected: list[str]) -> None:
    assert split(session, text) == expected


def test_padded_batches(session: onnxruntime.InferenceSession) -> None:
    units = np.zeros((3, 5), dtype=np.int64)
    scores = session.run(None, {"units": units, "features": np.zeros((3, 5, 1), dtype=np.float32)})[0]
    assert scores.shape == (3, 5, 5)
    assert (scores.argmax(2) == 0).all()
