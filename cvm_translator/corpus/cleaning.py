"""The filters: what is dropped from a stream of pairs, and why, counted in order.

Guarantees: filters run in the order of `FILTERS`; each dropped pair is counted under exactly one. Time is linear in the
text, memory is 16 bytes or so per pair kept (hashes of what has been seen).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from cvm_translator.config.schema import CleaningConfig
from cvm_translator.corpus.records import Pair
from cvm_translator.corpus.text import count_letters, hash_key, make_key, normalise_text
from cvm_translator.metrics.placeholders import PLACEHOLDER, find_placeholders

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


class Cleaner:
    """Cleans the pairs of one pool (train, validation, test or unseen), counting drops."""

    def __init__(self, config: CleaningConfig, source_language: str, target_language: str) -> None:
        self.config = config
        self.counts: Counter[str] = Counter()
        self._is_wrong_language = (
            build_language_check(source_language, target_language) if config.language_check else lambda *_: False
        )
        self._seen_exactly: set[int] = set()
        self._seen_nearly: set[int] = set()

    def clean(self, pair: Pair) -> Pair | None:
        """The pair, normalised, or None when a filter drops it."""
        source, target = normalise_text(pair.source), normalise_text(pair.target)
        reason = self._find_reason(source, target)
        if reason:
            self.counts[reason] += 1
            return None
        return Pair(source, target, pair.origin)

    def _find_reason(self, source: str, target: str) -> str | None:
        return self._find_form_reason(source, target) or self._find_content_reason(source, target)

    def _find_form_reason(self, source: str, target: str) -> str | None:
        config = self.config
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

    def _find_content_reason(self, source: str, target: str) -> str | None:
        if not count_letters(source) or not count_letters(target):
            return "no_letters"
        if self.config.drop_identical and source.casefold() == target.casefold():
            return "identical"
        if sorted(find_placeholders(source)) != sorted(find_placeholders(target)):
            return "placeholders_differ"
        if self._is_wrong_language(source, target):
            return "wrong_language"
        if _was_seen(self._seen_exactly, f"{source}\t{target}"):
            return "exact_duplicate"
        if _was_seen(self._seen_nearly, f"{make_key(source)}\t{make_key(target)}"):
            return "near_duplicate"
        return None


def _was_seen(seen: set[int], key: str) -> bool:
    hashed = hash_key(key)
    if hashed in seen:
        return True
    seen.add(hashed)
    return False


# ---------------------------------------------------------------------------------------------------------- language


@functools.cache
def build_language_check(source_language: str, target_language: str) -> Callable[[str, str], bool]:
    """A function that tells whether either side is clearly in another language than its own.

    Judged by py3langid, among the pair and a few common languages, on sides long enough to tell. A language that it
    does not know is not judged.
    """
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    known = set(identifier.labels)
    candidates = [language for language in (source_language, target_language) if language in known]
    if len(candidates) < 2:
        return lambda source, target: False
    identifier.set_languages(sorted({*candidates, *COMMON_LANGUAGES} & known))

    def is_foreign(text: str, language: str) -> bool:
        plain = PLACEHOLDER.sub(" ", text)
        if len(plain.split()) < LANGUAGE_MIN_WORDS or count_letters(plain) < LANGUAGE_MIN_LETTERS:
            return False
        best, _ = identifier.classify(plain)
        return bool(best != language and dict(identifier.rank(plain))[language] <= LANGUAGE_MAX_PROBABILITY)

    return lambda source, target: is_foreign(source, source_language) or is_foreign(target, target_language)
