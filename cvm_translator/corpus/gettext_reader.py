"""gettext sources: which catalogues belong to the language pair, and their entries as clean pairs.

Guarantees: of the .po and .mo of one domain the .po is read (it marks fuzzy entries); accelerator marks and HTML tags
are removed from both sides; symbolic msgids are never taken for text.
Refuses (CorpusError): a folder or package without a catalogue of the language, a pair without the msgid language.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from cvm_translator.config.schema import GettextPackage, GettextSource
from cvm_translator.corpus.catalogues import CatalogueError, Entry, read_catalogue
from cvm_translator.corpus.packages import describe_package, fetch_package, open_members
from cvm_translator.corpus.records import BadRow, Record, Skipped, make_excerpt, make_pair
from cvm_translator.corpus.text import count_letters, strip_accelerators, strip_markup
from cvm_translator.errors import CorpusError

MAX_TAG_SHARE = 0.4
"""Of an entry's characters; one with more tags than that is dropped."""
UNREADABLE = "unreadable_catalogue"
PROMPT_CHOICES = "$$ &"
"""Mercurial's mark between the choices of a prompt, which is no sentence."""
_SYMBOL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:\-]*")


def read_gettext(
    source: GettextSource,
    *,
    source_language: str,
    target_language: str,
    base_dir: Path,
    cache_dir: Path,
    report: Callable[[str], None],
) -> Iterator[Record]:
    """Pairs of all catalogues that translate between the msgid language and the other one."""
    catalogue_language = find_catalogue_language(source, source_language, target_language)
    swap = source_language != source.msgid_language  # the msgid is the target side

    if source.path is not None:
        yield from _read_path(base_dir / source.path, str(source.path), catalogue_language, swap)
    for package in source.packages:
        yield from read_package(package, catalogue_language, swap, cache_dir, report)


def find_catalogue_language(source: GettextSource, source_language: str, target_language: str) -> str:
    """The language of the msgstrs: the one of the pair that is not the msgids'."""
    if source.msgid_language not in (source_language, target_language):
        raise CorpusError(
            f"corpus: msgid_language {source.msgid_language!r} is neither source_language {source_language!r} nor "
            f"target_language {target_language!r}: gettext catalogues translate only from or into it"
        )
    return target_language if source_language == source.msgid_language else source_language


def read_package(
    package: GettextPackage, language: str, swap: bool, cache_dir: Path, report: Callable[[str], None]
) -> Iterator[Record]:
    """Pairs of one package, downloaded if it is not in the cache."""
    archive = fetch_package(package, cache_dir, report)
    label = describe_package(package)
    with open_members(archive, label) as (names, read):
        chosen = choose_catalogues(names, language)
        if not chosen:
            found = ", ".join(list_languages(names)[:12]) or "no catalogues at all"
            raise CorpusError(
                f"corpus: package {label} has no gettext catalogue for language {language!r} (it has: {found}): "
                "drop the package or correct the languages"
            )
        for name in chosen:
            yield from _read_entries(read(name), name.endswith(".mo"), f"{label}:{name}", swap)


def _read_path(path: Path, label: str, language: str, swap: bool) -> Iterator[Record]:
    if path.is_file():
        for record in _read_entries(path.read_bytes(), path.suffix in (".mo", ".gmo"), label, swap):
            if isinstance(record, BadRow) and record.reason == UNREADABLE:
                raise CorpusError(
                    f"{label} is no gettext catalogue ({record.excerpt}): name a .po or .mo file or a folder"
                )
            yield record
        return
    for name in list_catalogue_files(path, label, language):
        yield from _read_entries((path / name).read_bytes(), name.endswith(".mo"), f"{label}/{name}", swap)


def list_catalogue_files(path: Path, label: str, language: str) -> list[str]:
    """Catalogues of one language in a folder, as relative names."""
    if not path.is_dir():
        raise CorpusError(f"corpus: gettext path {label} does not exist: name a .po or .mo file or a folder of them")
    names = sorted(
        p.relative_to(path).as_posix() for p in path.rglob("*") if p.suffix in (".po", ".mo") and p.is_file()
    )
    chosen = choose_catalogues(names, language)
    if not chosen:
        found = ", ".join(list_languages(names)[:12]) or "no catalogues at all"
        raise CorpusError(f"corpus: {label} has no gettext catalogue for language {language!r} (it has: {found})")
    return chosen


# ------------------------------------------------------------------------------------------------- which catalogues


def _find_locale(name: str, language: str) -> tuple[int, str] | None:
    """How well a catalogue's path names the language (0 best), and the path with the locale blanked; None if not."""
    path = PurePosixPath(name)
    token = re.compile(rf"(?:^|(?<=[-_.])){re.escape(language)}(?:[-_]([A-Za-z]{{2}}))?$")
    for index in range(len(path.parts) - 1, -1, -1):
        part = path.parts[index] if index < len(path.parts) - 1 else path.stem
        match = token.match(part) if index < len(path.parts) - 1 else token.search(part)
        if match:
            region = (match.group(1) or "").upper()
            rank = 0 if not region else 1 if region == language.upper() else 2
            blanked = "/".join([*path.parts[:index], part[: match.start()] + "*", *path.parts[index + 1 :]])
            return rank, blanked
    return None


def choose_catalogues(names: list[str], language: str) -> list[str]:
    """The catalogues of a language: per domain the plainest locale (`de`, `de_DE`, `de_AT`), .po before .mo."""
    best: dict[str, tuple[int, int, str]] = {}
    for name in names:
        if not name.endswith((".po", ".mo")):
            continue
        found = _find_locale(name, language)
        if found:
            rank, blanked = found
            domain = blanked.removesuffix(".po").removesuffix(".mo")
            best[domain] = min(best.get(domain, (9, 9, "")), (rank, int(name.endswith(".mo")), name))
    return sorted(name for _, _, name in best.values())


def list_languages(names: list[str]) -> list[str]:
    """The languages whose catalogues are there, for messages."""
    languages = set()
    for name in names:
        path = PurePosixPath(name)
        if path.suffix in (".po", ".mo"):
            languages.add(path.parts[-3] if "LC_MESSAGES" in path.parts[:-1] and len(path.parts) > 2 else path.stem)
    return sorted(languages)


# ------------------------------------------------------------------------------------------------------- the entries


def _read_entries(data: bytes, is_binary: bool, label: str, swap: bool) -> Iterator[Record]:
    try:
        entries = list(read_catalogue(data, is_binary))
    except CatalogueError as error:
        yield BadRow(label, UNREADABLE, make_excerpt(str(error)))
        return
    for entry in entries:
        yield _make_record(entry, f"{label}:{entry.line}", swap)


def is_symbolic(msgid: str) -> bool:
    """Whether a msgid is a key such as `label_file` or `menu.open`, not text such as `Open...`."""
    core = msgid.rstrip(".:")
    return _SYMBOL.fullmatch(core) is not None and any(mark in core for mark in "_.:")


def _make_record(entry: Entry, origin: str, swap: bool) -> Record:
    if entry.state:
        return Skipped(origin, entry.state)
    text = entry.default or entry.msgid
    if is_symbolic(text):
        return Skipped(origin, "symbolic_msgid")
    translation = entry.msgstr
    if not text.strip() or not translation.strip():
        return Skipped(origin, "untranslated")
    if PROMPT_CHOICES in text or PROMPT_CHOICES in translation:
        return Skipped(origin, "markup")
    stripped, stripped_translation = strip_markup(text), strip_markup(translation)
    for (plain, removed), original in ((stripped, text), (stripped_translation, translation)):
        if removed > MAX_TAG_SHARE * len(original) or not count_letters(plain):
            return Skipped(origin, "markup")
    plain, plain_translation = strip_accelerators(stripped[0], stripped_translation[0])
    return make_pair(plain_translation, plain, origin) if swap else make_pair(plain, plain_translation, origin)
