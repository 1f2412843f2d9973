"""The README.md in an exported folder: what it is, and a program that uses it, in foreign formats without this one."""

from __future__ import annotations

from typing import Any

from cvm_translator.models.runtimes.base import EXPORT_FILE

_HUGGINGFACE = """
```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForSeq2SeqLM.from_pretrained(".")
batch = tokenizer({examples}, return_tensors="pt", padding=True)
print(tokenizer.batch_decode(model.generate(**batch), skip_special_tokens=True))
```

The tokenizer is MarianTokenizer: it takes `>>…<<` at the very start of a text for a language code, and expects composed
characters (`unicodedata.normalize("NFC", text)`). Sentences have at most {longest} tokens.
"""

_CTRANSLATE2 = """
```python
import ctranslate2
import sentencepiece

tokenizer = sentencepiece.SentencePieceProcessor(model_file="sentencepiece.model")
translator = ctranslate2.Translator(".", intra_threads=1)
tokens = tokenizer.encode({examples}, out_type=str)
results = translator.translate_batch(tokens, beam_size=1, disable_unk=True{use_vmap})
print([tokenizer.decode(result.hypotheses[0]) for result in results])
```

Or `cvm-translator translate --runtime ctranslate2 --model .`, which also cuts lines of more than {longest} tokens.
CTranslate2 uses AVX2 on processors that are not Intel's; `CT2_FORCE_CPU_ISA=AVX512` in the environment is faster where
AVX-512 is there.
"""

_ONNX = """
```python
import numpy as np
import onnxruntime
import sentencepiece

tokenizer = sentencepiece.SentencePieceProcessor(model_file="sentencepiece.model")
options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.x64quantprecision", "1")  # exact int8 on processors without VNNI
encoder, decoder = (onnxruntime.InferenceSession(name, options) for name in ("encoder.onnx", "decoder.onnx"))


def translate(text, longest={longest}):
    ids = np.array([[*tokenizer.encode(text), 2]])  # 2 ends a text, and begins a translation
    state = {{"attention_mask": np.ones_like(ids), "input_ids": np.array([2])}}
    outputs = encoder.run(None, {{"input_ids": ids, "attention_mask": state["attention_mask"]}})
    for output, value in zip(encoder.get_outputs(), outputs):
        state[output.name.replace("present", "past_key_values")] = value
    for entry in decoder.get_inputs():
        if "decoder" in entry.name:
            state[entry.name] = np.zeros((1, entry.shape[1], 0, entry.shape[3]), dtype=np.float32)
    names = ["next_token", *(output.name for output in decoder.get_outputs() if "present" in output.name)]
    tokens = []
    while len(tokens) < longest:
        token, *presents = decoder.run(names, state)
        if token[0] == 2:
            break
        tokens.append(int(token[0]))
        state["input_ids"] = token
        state.update((name.replace("present", "past_key_values"), value) for name, value in zip(names[1:], presents))
    return tokenizer.decode(tokens)


print([translate(text) for text in {examples}])
```

Or, from this program: `load_runtime("onnx", ".").translate([...])` of `cvm_translator.models.runtimes`.
"""

_ARGOS = """
```sh
argospm install translate-{source}_{target}-1_0.argosmodel      # or: argos-translate's install_from_path
argos-translate --from {source} --to {target} 'One sentence.'
```

Needs Argos Translate 1.11 or later, or LibreTranslate; the sentence splitter inside needs no download. Argos Translate
searches with four beams and writes blanks for underscores.
"""

_SAFETENSORS = """
```sh
printf '%s\\n' {lines} | cvm-translator translate --model .
```

Or, in Python: `load_runtime("native", ".").translate([...])` of `cvm_translator.models.runtimes`.
"""

_USES = {
    "safetensors": _SAFETENSORS,
    "huggingface": _HUGGINGFACE,
    "ctranslate2": _CTRANSLATE2,
    "onnx": _ONNX,
    "argos": _ARGOS,
}
_NAMES = {
    "safetensors": "CVM Translator",
    "huggingface": "Transformers (M2M100)",
    "ctranslate2": "CTranslate2",
    "onnx": "ONNX Runtime",
    "argos": "Argos Translate and LibreTranslate",
}
_EXAMPLES = {"de": ["Die Datei wurde nicht gefunden.", "Öffnen"], "en": ["The file was not found.", "Open"]}


def build_readme(format_name: str, facts: dict[str, Any]) -> str:
    """README.md of an export; an .argosmodel is closed before it is verified, and says nothing of that."""
    source, target = facts["source_language"], facts["target_language"]
    examples = _EXAMPLES.get(source, _EXAMPLES["en"])
    use = _USES[format_name].format(
        examples=repr(examples).replace("'", '"'),
        lines=" ".join(f"'{example}'" for example in examples),
        longest=facts["max_length"] - 1,
        use_vmap=", use_vmap=True" if facts.get("vocabulary_map") else "",
        source=source,
        target=target,
    )
    capacity = facts.get("dropped_core_capacity")
    dropped = f" Its attention was bounded to {capacity} slots and is not here." if capacity else ""
    found = "" if format_name == "argos" else f" What its verification found is in `{EXPORT_FILE}`."
    return (
        f"# Translation model {source} to {target} for {_NAMES[format_name]}\n\n"
        f"{facts['num_parameters']:,} parameters in {facts['number_format']}, exported by CVM Translator "
        f"{facts['cvm_translator_version']}.{dropped}{found}\n{use}"
    )
