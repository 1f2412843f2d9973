"""Degeneration probes: faults that a generated sentence either has or has not, whatever the metrics say.

Guarantees: each probe gives one boolean a sentence. Probes are judged against source *and* reference, so that what a
good translator did as well (a number written as a word, a name that stays as it is) is not held against the student.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvm_translator.errors import import_optional
from cvm_translator.metrics.placeholders import PLACEHOLDER, find_placeholders

BoolArray = NDArray[np.bool_]
Probe = Callable[[Sequence[str], Sequence[str], Sequence[str], str], BoolArray]

MAX_LENGTH_RATIO = 2.0
LENGTH_SLACK_CHARACTERS = 10
MIN_LANGUAGE_LETTERS = 30
MIN_LANGUAGE_PROBABILITY = 0.7

NUMBER = re.compile(r"\d+(?:[.,'\u00a0\u202f]\d+)*")
WORD = re.compile(r"\w+")


def find_numbers(text: str) -> list[str]:
    """Numbers outside placeholders, as bare digits: 1.000,5 and 1,000.5 are the same number in two languages."""
    return [re.sub(r"\D", "", number) for number in NUMBER.findall(PLACEHOLDER.sub(" ", text))]


def has_loop(units: Sequence[str], max_period: int, min_repeats: int, min_units: int) -> bool:
    """Whether some stretch of at most `max_period` units follows itself at least `min_repeats` times in all, over at
    least `min_units` units."""
    for period in range(1, max_period + 1):
        needed = max(min_units, period * min_repeats) - period
        run = 0
        for index in range(period, len(units)):
            run = run + 1 if units[index] == units[index - period] else 0
            if run >= needed:
                return True
    return False


def _loops(text: str) -> bool:
    return has_loop(text.casefold().split(), max_period=8, min_repeats=3, min_units=4) or has_loop(
        "".join(text.split()), max_period=12, min_repeats=5, min_units=16
    )


def probe_empty(
    sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str], language: str
) -> BoolArray:
    """Nothing was generated."""
    return np.array([not hypothesis.strip() for hypothesis in hypotheses], dtype=np.bool_)


def probe_repetition(
    sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str], language: str
) -> BoolArray:
    """A repetition loop that neither source nor reference has."""
    return np.array(
        [
            _loops(hypothesis) and not _loops(source) and not _loops(reference)
            for source, hypothesis, reference in zip(sources, hypotheses, references, strict=True)
        ],
        dtype=np.bool_,
    )


def probe_copy(
    sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str], language: str
) -> BoolArray:
    """The source came back untranslated (case and punctuation aside), though the reference is a translation."""

    def words(text: str) -> list[str]:
        return WORD.findall(text.casefold())

    return np.array(
        [
            bool(words(hypothesis)) and words(hypothesis) == words(source) != words(reference)
            for source, hypothesis, reference in zip(sources, hypotheses, references, strict=True)
        ],
        dtype=np.bool_,
    )


def length_ratios(hypotheses: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
    """Characters of hypothesis to reference, with slack for short sentences."""
    return np.array(
        [
            (len(hypothesis.strip()) + LENGTH_SLACK_CHARACTERS) / (len(reference.strip()) + LENGTH_SLACK_CHARACTERS)
            for hypothesis, reference in zip(hypotheses, references, strict=True)
        ],
        dtype=np.float64,
    )


def probe_length_ratio(
    sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str], language: str
) -> BoolArray:
    """More than twice or less than half as long as the reference (empty output has its own probe)."""
    ratios = length_ratios(hypotheses, references)
    outside = (ratios > MAX_LENGTH_RATIO) | (ratios < 1.0 / MAX_LENGTH_RATIO)
    return outside & ~probe_empty(sources, hypotheses, references, language)


def _lost_or_invented(find: Callable[[str], list[str]], *texts: Sequence[str]) -> BoolArray:
    """By sentence of sources, hypotheses and references, for what `find` finds in each of the three.

    Lost: in source and reference but not in the hypothesis. Invented: there more often than in source or reference.
    """
    verdicts = []
    for source, hypothesis, reference in zip(*texts, strict=True):
        in_source, here, in_reference = (Counter(find(text)) for text in (source, hypothesis, reference))
        verdicts.append(bool((in_source & in_reference) - here) or bool(here - (in_source | in_reference)))
    return np.array(verdicts, dtype=np.bool_)


def probe_numbers(
    sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str], language: str
) -> BoolArray:
    """A number was lost or invented."""
    return _lost_or_invented(find_numbers, sources, hypotheses, references)


def probe_placeholders(
    sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str], language: str
) -> BoolArray:
    """A format placeholder was lost or invented: the program that shows this sentence would fail."""
    return _lost_or_invented(find_placeholders, sources, hypotheses, references)


@lru_cache(maxsize=1)
def _identifier() -> Any:
    langid = import_optional("py3langid.langid", "metrics")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def base_language(code: str) -> str:
    """`pt` of `pt-BR` or `pt_BR`."""
    return code.replace("_", "-").split("-")[0].lower()


def can_identify(language: str) -> bool:
    """Whether the language identifier knows this language at all."""
    return base_language(language) in _identifier().labels


@lru_cache(maxsize=50_000)
def _identify(text: str) -> tuple[str, float]:
    language, probability = _identifier().classify(PLACEHOLDER.sub(" ", text))
    return language, probability


def probe_wrong_language(
    sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str], language: str
) -> BoolArray:
    """Clearly another language than the target, where the reference is not. Texts too short to tell pass."""
    target = base_language(language)
    if not can_identify(language):
        raise ValueError(f"py3langid does not know the language {language!r}")
    flags = []
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        if sum(character.isalpha() for character in hypothesis) < MIN_LANGUAGE_LETTERS:
            flags.append(False)
            continue
        found, probability = _identify(hypothesis)
        is_other = found != target and probability >= MIN_LANGUAGE_PROBABILITY
        flags.append(is_other and _identify(reference)[0] != found)
    return np.array(flags, dtype=np.bool_)


PROBES: dict[str, Probe] = {
    "empty": probe_empty,
    "repetition": probe_repetition,
    "copy": probe_copy,
    "length_ratio": probe_length_ratio,
    "numbers": probe_numbers,
    "placeholders": probe_placeholders,
    "wrong_language": probe_wrong_language,
}
