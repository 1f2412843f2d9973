"""The filters: what is dropped from the text, and why.

Guarantees: filters run in the order of `FILTERS`; each dropped pair is counted under exactly one. What a pair alone
decides is found by `judge_pair`, in any process; what its forerunners decide, by `find_duplicates` at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cvm_translator.config.schema import CleaningConfig
from cvm_translator.corpus.records import Pair
from cvm_translator.corpus.text import count_letters, normalise_text
from cvm_translator.errors import import_optional
from cvm_translator.metrics.placeholders import PLACEHOLDER, find_placeholders
from cvm_translator.metrics.probes import base_language

# In the order in which they run; the first five are entries that catalogues mark or that are no plain text.
FILTERS = (
    "untranslated",
    "fuzzy",
    "obsolete",
    "symbolic_msgid",
    "markup",
    "empty_after_normalisation",
    "too_short",
    "too_long",
    "length_ratio",
    "no_letters",
    "identical",
    "placeholders_differ",
    "wrong_language",
    "exact_duplicate",
    "near_duplicate",
)

RATIO_SLACK_CHARACTERS = 20
LANGUAGE_MIN_LETTERS = 25
LANGUAGE_MIN_WORDS = 4
LANGUAGE_MAX_PROBABILITY = 0.1
"""A side is in the wrong language if its own has at most this probability. Measured on the default corpus: 7 of 7,900
good sides are dropped, and 99.5 % of the sides in the other language."""
COMMON_LANGUAGES = ("de", "en", "fr", "es", "it", "nl", "pt", "pl", "cs", "sv", "da", "ru", "uk", "ja", "zh", "tr")


@dataclass(frozen=True)
class Rules:
    """What decides about a pair by itself."""

    config: CleaningConfig
    source_language: str
    target_language: str


def judge_pair(pair: Pair, rules: Rules) -> Pair | str:
    """The pair, normalised, or the name of the filter that drops it."""
    source, target = normalise_text(pair.source), normalise_text(pair.target)
    reason = _find_form_reason(source, target, rules.config) or _find_content_reason(source, target, rules)
    return reason or Pair(source, target, pair.origin)


def _find_form_reason(source: str, target: str, config: CleaningConfig) -> str | None:
    if not source or not target:
        return "empty_after_normalisation"
    shortest, longest = sorted((len(source), len(target)))
    if shortest < config.min_characters:
        return "too_short"
    if longest > config.max_characters or max(len(source.split()), len(target.split())) > config.max_words:
        return "too_long"
    if longest >= RATIO_SLACK_CHARACTERS and longest > config.max_length_ratio * shortest:
        return "length_ratio"
    return None


def _find_content_reason(source: str, target: str, rules: Rules) -> str | None:
    if not count_letters(source) or not count_letters(target):
        return "no_letters"
    if rules.config.drop_identical and source.casefold() == target.casefold():
        return "identical"
    if sorted(find_placeholders(source)) != sorted(find_placeholders(target)):
        return "placeholders_differ"
    if rules.config.language_check:
        is_wrong = build_language_check(rules.source_language, rules.target_language)
        return "wrong_language" if is_wrong(source, target) else None
    return None


def find_duplicates(exact: NDArray[np.uint64], nearly: NDArray[np.uint64]) -> dict[str, NDArray[np.int64]]:
    """Places of the pairs that the last two filters drop; the first of equal ones stays.

    `exact`, `nearly`: (N,) hashes of the texts and of their near-duplicate keys, in the order of the pairs.
    """
    first = np.unique(exact, return_index=True)[1]
    first.sort()
    first_of_near = first[np.unique(nearly[first], return_index=True)[1]]
    everything = np.arange(len(exact))
    return {
        "exact_duplicate": np.setdiff1d(everything, first, assume_unique=True),
        "near_duplicate": np.setdiff1d(first, first_of_near, assume_unique=True),
    }


# ---------------------------------------------------------------------------------------------------------- language


@functools.cache
def build_language_check(source_language: str, target_language: str) -> Callable[[str, str], bool]:
    """A function that tells whether either side is clearly in another language than its own.

    Judged by py3langid, among the pair and a few common languages, on sides long enough to tell. Regions make no
    difference (pt_BR is pt), and a side in a language that it does not know is not judged.
    """
    langid = import_optional("py3langid.langid", "metrics")
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    known = set(identifier.labels)
    sides = (base_language(source_language), base_language(target_language))
    identifier.set_languages(sorted({*sides, *COMMON_LANGUAGES} & known))

    def is_foreign(text: str, language: str) -> bool:
        if language not in known:
            return False
        plain = PLACEHOLDER.sub(" ", text)
        if len(plain.split()) < LANGUAGE_MIN_WORDS or count_letters(plain) < LANGUAGE_MIN_LETTERS:
            return False
        best, _ = identifier.classify(plain)
        return bool(best != language and dict(identifier.rank(plain))[language] <= LANGUAGE_MAX_PROBABILITY)

    return lambda source, target: any(map(is_foreign, (source, target), sides))
