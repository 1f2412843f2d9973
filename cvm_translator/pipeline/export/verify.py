"""Is an export the model it was made from? All translate the same sentences, each from its files in a fresh process.

A float32 export must translate as the native runtime does, but for numerical ties: at least 98 % of the sentences
identically. An int8 export is compared with the native int8 model; where there are no references, at least 75 % of the
sentences must be identical, which catches a broken export and nothing finer. A copy in our own format translates all of
them as its original. A model that was exported without the bound of its attention is compared with itself without the
bound. Where references are known, no export may lose more BLEU than allowed against the float model, or against the
model as it is where no float one is known: by the difference itself, as `quantize` judges.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cvm_translator.errors import ModelError
from cvm_translator.metrics.resampling import PairedComparison
from cvm_translator.pipeline.comparison import compare_texts, refuse_loss
from cvm_translator.pipeline.export.sentences import Sentences
from cvm_translator.pipeline.measure import measure_sentences

MIN_AGREEMENT = {"float32": 0.98, "int8": 0.75}
BATCH_SIZE = 32


@dataclass(frozen=True)
class ScoreChange:
    """Export minus the model that it is scored against, with a 95 % interval."""

    before: float
    after: float
    difference: float
    low: float
    high: float

    @classmethod
    def from_comparison(cls, compared: PairedComparison) -> ScoreChange:
        return cls(compared.score_a, compared.score_b, compared.difference, *compared.interval)

    def describe(self) -> str:
        return (
            f"{self.before:.2f} -> {self.after:.2f} ({self.difference:+.2f}, 95 % interval {self.low:+.2f} to"
            f" {self.high:+.2f})"
        )


@dataclass(frozen=True)
class Verification:
    """What was found; speeds are of one thread at batches of 32, `native` is the model that was compared with."""

    sentences: str
    num_sentences: int
    compared_with: str
    agreement: float
    """Share of sentences that both translate identically."""
    scored_against: str
    bleu: ScoreChange | None
    """None without references, as is `chrf`."""
    chrf: ScoreChange | None
    num_bytes: int
    native_num_bytes: int
    tokens_per_second: float
    native_tokens_per_second: float
    peak_memory_mib: float
    native_peak_memory_mib: float

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> list[str]:
        scores = {"BLEU": self.bleu, "chrF": self.chrf}
        return [
            f"verified   {self.agreement:.1%} of {self.num_sentences:,} sentences ({self.sentences}) translated as by "
            f"the {self.compared_with}",
            *(
                f"{name:<11}{change.describe()} against the {self.scored_against}"
                for name, change in scores.items()
                if change is not None
            ),
            f"weights    {self.native_num_bytes / 2**20:.1f} MiB -> {self.num_bytes / 2**20:.1f} MiB",
            f"speed      {self.native_tokens_per_second:,.0f} -> {self.tokens_per_second:,.0f} tokens/s (one thread, "
            f"batches of {BATCH_SIZE})",
            f"memory     {self.native_peak_memory_mib:,.0f} -> {self.peak_memory_mib:,.0f} MiB at their peaks, "
            "libraries included",
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
    """Compare an export with the native model in the same number format, and its scores with those of `baseline`.

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
    if runtime == "native":
        _check_copy(num_same, len(our_texts))
    elif number_format == "float32" or sentences.references is None:
        _check_agreement(num_same, len(our_texts), MIN_AGREEMENT[number_format])
    changes: dict[str, PairedComparison] = {}
    if sentences.references is not None:
        texts = (before["hypotheses"], their_texts, sentences.sources, sentences.references)
        changes = compare_texts(*texts, target_language, ["bleu", "chrf"])
        is_coarse = runtime != "native" and number_format != "float32"
        refuse_loss(changes["bleu"], max_drop, "allow more, or export float32" if is_coarse else "allow more")
    scores = {name: ScoreChange.from_comparison(compared) for name, compared in changes.items()}
    return Verification(
        sentences.origin,
        len(our_texts),
        f"{number_format} model natively{', without its bound' if is_unbounded else ''}",
        num_same / len(our_texts),
        f"{before['number_format']} model",
        scores.get("bleu"),
        scores.get("chrf"),
        theirs["num_bytes"],
        ours["num_bytes"],
        theirs["tokens_per_second"],
        ours["tokens_per_second"],
        theirs["peak_memory_mib"],
        ours["peak_memory_mib"],
    )


def _check_copy(num_same: int, num_sentences: int) -> None:
    if num_same < num_sentences:
        raise ModelError(
            f"the copy translates only {num_same} of {num_sentences} sentences as its original does, so it is not "
            "written: this is a defect of the program"
        )


def _check_agreement(num_same: int, num_sentences: int, share: float) -> None:
    allowed = math.ceil((1 - share) * num_sentences) if num_sentences >= 10 else 0
    if num_sentences - num_same > allowed:
        raise ModelError(
            f"the export translates only {num_same / num_sentences:.1%} of {num_sentences} sentences as the native "
            f"model does (at least {share:.0%} is asked for), so it is not written: this is a defect of the program, "
            "or the text is too far from what the model knows; try --sentences with text of its kind"
        )
