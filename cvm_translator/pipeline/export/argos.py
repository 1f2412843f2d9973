"""An .argosmodel package: what Argos Translate (from 1.11 on) installs and LibreTranslate serves, with no download.

    translate-de_en-1_0/metadata.json  README.md  sentencepiece.model  cvm_translator.json
    translate-de_en-1_0/model/         the CTranslate2 folder
    translate-de_en-1_0/minisbd/       the sentence splitter, made by rule (see `sentence_boundaries`)

Argos Translate asks CTranslate2 for four beams, never uses a vocabulary map, and passes sentences of up to 1,024 tokens
on, so the model gets positions for as many; translations of more than max_length tokens are no better for it.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

from cvm_translator.corpus.tokenizer import MODEL_NAME, Tokenizer
from cvm_translator.models.runtimes.base import EXPORT_FILE
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.pipeline.export.ctranslate2 import write_ctranslate2
from cvm_translator.pipeline.export.sentence_boundaries import build_sentence_boundaries

SUFFIX = ".argosmodel"
PACKAGE_VERSION, ARGOS_VERSION = "1.0", "1.11"
NUM_POSITIONS = 1024 + 2
"""CTranslate2 truncates to 1,024 tokens by default; then come the end mark and a place to spare."""

LANGUAGE_NAMES = {
    "ar": "Arabic",
    "bg": "Bulgarian",
    "ca": "Catalan",
    "cs": "Czech",
    "da": "Danish",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "et": "Estonian",
    "fa": "Persian",
    "fi": "Finnish",
    "fr": "French",
    "he": "Hebrew",
    "hi": "Hindi",
    "hr": "Croatian",
    "hu": "Hungarian",
    "id": "Indonesian",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "lt": "Lithuanian",
    "lv": "Latvian",
    "nb": "Norwegian",
    "nl": "Dutch",
    "pl": "Polish",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "sk": "Slovak",
    "sl": "Slovenian",
    "sr": "Serbian",
    "sv": "Swedish",
    "th": "Thai",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "vi": "Vietnamese",
    "zh": "Chinese",
}
"""As Argos Translate shows them; other languages go by their codes."""


def name_package(source_language: str, target_language: str) -> str:
    """Argos Translate's own naming, without suffix."""
    return f"translate-{source_language}_{target_language}-{PACKAGE_VERSION.replace('.', '_')}"


def write_argos(
    ctranslate2: Any,
    onnx: Any,
    folder: Path,
    model: CvmTransformer,
    tokenizer: Tokenizer,
    facts: dict[str, Any],
    readme: str,
) -> Path:
    """Write the package into an existing folder; returns its path."""
    source, target = facts["source_language"], facts["target_language"]
    name = name_package(source, target)
    root = folder / name
    for part in ("model", "minisbd"):
        (root / part).mkdir(parents=True)
    write_ctranslate2(ctranslate2, root / "model", model, tokenizer, num_positions=NUM_POSITIONS)
    shutil.copyfile(tokenizer.path, root / MODEL_NAME)
    onnx.save_model(build_sentence_boundaries(onnx, source), root / "minisbd" / "rules.onnx")
    metadata = {
        "package_version": PACKAGE_VERSION,
        "argos_version": ARGOS_VERSION,
        "from_code": source,
        "from_name": LANGUAGE_NAMES.get(source, source),
        "to_code": target,
        "to_name": LANGUAGE_NAMES.get(target, target),
    }
    (root / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    (root / EXPORT_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (root / "README.md").write_text(readme, encoding="utf-8")
    package = folder / f"{name}{SUFFIX}"
    with zipfile.ZipFile(package, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(root.rglob("*")):
            if path.is_file():
                entry = zipfile.ZipInfo(str(path.relative_to(folder)))  # with a fixed date: same model, same bytes
                entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
                archive.writestr(entry, path.read_bytes())
    shutil.rmtree(root)
    return package
