"""Strings only: whitespace, markup and the keys by which near-duplicates are found.

Guarantees: every function is pure and linear in the length of its text.
"""

from __future__ import annotations

import hashlib
import html
import re
import unicodedata

from cvm_translator.metrics.placeholders import PLACEHOLDER

HTML_NAMES = (
    "a abbr b big blockquote br button center cite code dd del div dl dt em embed font form h1 h2 h3 h4 h5 h6 hr html i"
    " iframe img input ins kbd label li link meta nobr ol option p pre q qt s samp script section select small span"
    " strike strong style sub sup table tbody td textarea tfoot th thead tr tt u ul body head nav"
)
HTML_TAG = re.compile(
    rf"<\s?(/?)\s?({'|'.join(sorted(HTML_NAMES.split(), key=len, reverse=True))})(?:\s[^<>]*)?/?>|<!--.{{0,1000}}?-->",
    re.IGNORECASE | re.DOTALL,
)
INLINE_NAMES = frozenset(
    "a abbr b big cite code del em font i ins kbd nobr q s samp small span strike strong sub sup tt u".split()  # noqa: SIM905
)
ENTITY = re.compile(r"&(?:[A-Za-z][A-Za-z0-9]{1,10}|#\d{1,6}|#x[0-9A-Fa-f]{1,5});")

# Within a word a mark stands before a small letter: `S_peichern`, but not `Q&A`.
_ACCELERATORS = {mark: re.compile(rf"(?<!\w){mark}(?=[^\W_])|(?<=\w){mark}(?=[a-zäöüß])") for mark in ("&", "_")}
_FORMAT_CHARACTERS = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff\ufff9-\uffff]")
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")
_RULES = re.compile(r"([-=~#^*])\1{3,}")  # the line under a reStructuredText heading
_NOT_LETTERS = re.compile(r"[\W\d_]+")


def normalise_text(text: str) -> str:
    """NFC, without control and invisible formatting characters, whitespace (line breaks too) as single blanks."""
    text = unicodedata.normalize("NFC", text)
    text = _CONTROLS.sub(" ", _FORMAT_CHARACTERS.sub("", text))
    return " ".join(text.split())


def strip_accelerators(source: str, target: str) -> tuple[str, str]:
    """Remove keyboard accelerator marks (`&Datei`, `_Datei`, `Abbre_chen`) from both sides alike.

    A mark is taken for one where each side has at most one, and it is not part of a word that both sides share
    (`user_id`), of a placeholder or of an entity.
    """
    for mark, pattern in _ACCELERATORS.items():
        if mark not in source and mark not in target:
            continue
        found = [_find_accelerators(text, mark, pattern) for text in (source, target)]
        if any(len(places) > 1 for places in found) or not any(found):
            continue
        words = [
            _word_at(text, places[0]) if places else "" for text, places in zip((source, target), found, strict=True)
        ]
        if words[0] == words[1]:
            continue
        if not all(found):  # one side only: a mark only at the beginning of a word
            word = words[0] or words[1]
            if not word.startswith(mark) or word.count(mark) > 1:
                continue
        source, target = (
            text[: places[0]] + text[places[0] + 1 :] if places else text
            for text, places in zip((source, target), found, strict=True)
        )
    return source.replace("&&", "&"), target.replace("&&", "&")


def _find_accelerators(text: str, mark: str, pattern: re.Pattern[str]) -> list[int]:
    if mark not in text:
        return []
    taken = [match.span() for match in (*PLACEHOLDER.finditer(text), *ENTITY.finditer(text))]
    places = (match.start() for match in pattern.finditer(text) if text[match.start() - 1 : match.start()] != mark)
    return [place for place in places if not any(begin <= place < end for begin, end in taken)]


def _word_at(text: str, place: int) -> str:
    begin = text.rfind(" ", 0, place) + 1
    end = text.find(" ", place)
    return text[begin : end if end >= 0 else len(text)]


def strip_markup(text: str) -> tuple[str, int]:
    """The text without HTML tags and heading rules, with entities resolved; and how many characters the tags took."""
    text = _RULES.sub(" ", text)
    if "<" not in text and "&" not in text:
        return text, 0
    removed = 0

    def blank(match: re.Match[str]) -> str:
        nonlocal removed
        removed += len(match.group())
        return "" if (match.group(2) or "").lower() in INLINE_NAMES else " "

    text = HTML_TAG.sub(blank, text)
    return ENTITY.sub(lambda match: html.unescape(match.group()), text), removed


def make_key(text: str) -> str:
    """What near-duplicates have in common: the letters, case-folded, without placeholders, digits and punctuation.

    A text without letters is its own key.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    key = _NOT_LETTERS.sub(" ", PLACEHOLDER.sub(" ", folded)).strip()
    return key or folded.strip()


def hash_key(key: str) -> int:
    """64 bits of a key; the same on every machine."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8"), digest_size=8).digest(), "big")


def count_letters(text: str) -> int:
    return sum(map(str.isalpha, text))
