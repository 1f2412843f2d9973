"""Is an export the model it was made from? Both translate the same sentences, each from its files in a fresh process.

A float32 export must translate as the native runtime does, but for numerical ties: at least 98 % of the sentences
identically. An int8 export is compared with the native int8 model; where there are no references, at least 75 % of the
sentences must be identical, which catches a broken export and nothing finer. A model that was exported without the
bound of its attention is compared with itself without the bound. Where references are known, no export may lose more
BLEU than allowed against the model as it is, with confidence (the guard's rule: the lower bound of the loss counts).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cvm_translator.errors import ModelError
from cvm_translator.pipeline.comparison import compare_texts
from cvm_translator.pipeline.export.sentences import Sentences
from cvm_translator.pipeline.measure import measure_sentences

MIN_AGREEMENT = {"float32": 0.98, "int8": 0.75}
BATCH_SIZE = 32


@dataclass(frozen=True)
class BleuChange:
    """Export minus the model it was made from."""

    before: float
    after: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Verification:
    """What was found; speeds are of one thread at batches of 32."""

    sentences: str
    num_sentences: int
    compared_with: str
    agreement: float
    """Share of sentences that both translate identically."""
    bleu: BleuChange | None
    num_bytes: int
    native_num_bytes: int
    tokens_per_second: float
    native_tokens_per_second: float
    peak_memory_mib: float

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> list[str]:
        lines = [
            f"verified   {self.agreement:.1%} of {self.num_sentences} sentences ({self.sentences}) translated as by "
            f"the {self.compared_with}"
        ]
        if self.bleu is not None:
            lines.append(
                f"BLEU       {self.bleu.before:.2f} -> {self.bleu.after:.2f} ({self.bleu.difference:+.2f}, 95 % "
                f"interval {self.bleu.low:+.2f} to {self.bleu.high:+.2f})"
            )
        return [
            *lines,
            f"weights    {self.native_num_bytes / 2**20:.1f} MiB -> {self.num_bytes / 2**20:.1f} MiB",
            f"speed      {self.native_tokens_per_second:,.0f} -> {self.tokens_per_second:,.0f} tokens/s (one thread, "
            f"batches of {BATCH_SIZE})",
            f"memory     {self.peak_memory_mib:,.0f} MiB at its peak, libraries included",
        ]


def verify_export(
    runtime: str,
    exported: Path,
    number_format: str,
    native: Path,
    baseline: Path,
    sentences: Sentences,
    target_language: str,
    max_drop: float,
    *,
    is_unbounded: bool = False,
) -> Verification:
    """Compare an export with the native model in the same number format, and its BLEU with that of `baseline`.

    `baseline` is the float model, where there is one; `is_unbounded`: it has a bound that the other two have lost.
    Raises ModelError if the export is not the same model or loses too much.
    """

    def measure(folder: Path, name: str) -> dict[str, Any]:
        return measure_sentences(folder, sentences.sources, batch_size=BATCH_SIZE, runtime=name)

    theirs, ours = measure(exported, runtime), measure(native, "native")
    before = ours if baseline == native else measure(baseline, "native")
    their_texts, our_texts = theirs["hypotheses"], ours["hypotheses"]
    # blanks at the ends are left out: MarianTokenizer drops them
    num_same = sum(their.strip() == our.strip() for their, our in zip(their_texts, our_texts, strict=True))
    change = None
    if sentences.references is not None:
        compared = compare_texts(
            before["hypotheses"], their_texts, sentences.sources, sentences.references, target_language, ["bleu"]
        )["bleu"]
        change = BleuChange(compared.score_a, compared.score_b, compared.difference, *compared.interval)
    verification = Verification(
        sentences.origin,
        len(our_texts),
        f"{number_format} model natively{', without its bound' if is_unbounded else ''}",
        num_same / len(our_texts),
        change,
        theirs["num_bytes"],
        ours["num_bytes"],
        theirs["tokens_per_second"],
        ours["tokens_per_second"],
        theirs["peak_memory_mib"],
    )
    _check(verification, number_format, len(our_texts) - num_same, max_drop)
    return verification


def _check(verification: Verification, number_format: str, num_different: int, max_drop: float) -> None:
    bleu = verification.bleu
    if bleu is not None and -bleu.high > max_drop:
        remedy = "allow it" if number_format == "float32" else "export float32, or allow it"
        raise ModelError(
            f"the export loses {-bleu.difference:.2f} BLEU ({bleu.before:.2f} to {bleu.after:.2f}; at least "
            f"{-bleu.high:.2f} with confidence), more than --max-drop {max_drop:g}: {remedy}"
        )
    if number_format != "float32" and bleu is not None:
        return
    share = MIN_AGREEMENT[number_format]
    allowed = math.ceil((1 - share) * verification.num_sentences) if verification.num_sentences >= 10 else 0
    if num_different > allowed:
        raise ModelError(
            f"the export translates only {verification.agreement:.1%} of {verification.num_sentences} sentences as the "
            f"native model does (at least {share:.0%} is asked for), so it is not written: this is a defect of the "
            "program, or the text is too far from what the model knows; try --sentences with text of its kind"
        )
