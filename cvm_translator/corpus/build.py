"""The corpus stage: sources in; clean, split, hashed files out.

Guarantees: the folder holds train, validation, test and unseen .tsv (source, target, origin), quarantine.tsv,
filters.json, and manifest.json, which is written last: without it the corpus does not exist. A second build with
unchanged inputs and intact outputs reads nothing and says `reused`.
Refuses (CorpusError): an input that changed since the manifest was written, too many malformed rows, an empty corpus.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cvm_translator.config.schema import CorpusConfig, GettextSource, Source
from cvm_translator.corpus.cleaning import FILTERS, Rules
from cvm_translator.corpus.manifest import (
    Manifest,
    describe_source,
    hash_inputs,
    read_manifest,
    write_manifest,
)
from cvm_translator.corpus.packages import fetch_packages, find_cache_dir
from cvm_translator.corpus.pool import Numbered, Pool, fill_pool
from cvm_translator.corpus.readers import ReaderContext, read_source
from cvm_translator.corpus.split_file import SplitFile
from cvm_translator.corpus.splits import check_disjoint, choose_sample, find_shared, hold_out
from cvm_translator.corpus.tally import Tally, check_role
from cvm_translator.errors import CorpusError
from cvm_translator.runs.atomic import TEMPORARY_PREFIX, sha256_file, write_json, write_stream

Report = Callable[[str], None]
ROLES: tuple[str, ...] = ("train", "validation", "test", "unseen")


@dataclass(frozen=True)
class CorpusSummary:
    """What a build made (or found)."""

    directory: Path
    reused: bool
    sizes: dict[str, int]
    """Pairs in each split."""
    filters: dict[str, int]
    """Pairs dropped by each filter, over all sources, in order."""
    quarantine: dict[str, int]
    """Malformed rows by reason."""
    sha256: str
    """Hash over the hashes of all outputs: the identity of this corpus."""
    outputs: dict[str, str]
    """SHA-256 by file name, as it was just found."""

    def open_splits(self) -> dict[str, SplitFile]:
        """All splits, whose files are not read for it."""
        return {
            role: SplitFile(self.directory / f"{role}.tsv", self.sizes[role], self.outputs[f"{role}.tsv"])
            for role in ROLES
        }


def build_corpus(
    config: CorpusConfig, directory: Path, *, seed: int, base_dir: Path, report: Report, rebuild: bool = False
) -> CorpusSummary:
    """Build the corpus in `directory`, or reuse what is there; `rebuild` forgets what is there."""
    previous = None if rebuild else read_manifest(directory)
    inputs = hash_inputs(config, base_dir, seed)
    if previous is not None:
        previous.check_inputs(inputs, directory)
        damaged = previous.find_damaged(directory)
        if not damaged:
            report(f"corpus: reused {directory} ({_describe_sizes(previous.sizes)})")
            return _summarise(directory, previous, reused=True)
        report(f"corpus: {', '.join(damaged)} in {directory} missing or damaged, building again")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "manifest.json").unlink(missing_ok=True)
    for left in directory.glob(f"{TEMPORARY_PREFIX}*"):  # of a build that was killed
        shutil.rmtree(left) if left.is_dir() else left.unlink()

    context = _make_context(config, base_dir, report)
    _fetch_all_packages(config, context)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=directory) as spool:
        pools, tallies, quarantine = _read_pools(config, directory, context, Path(spool), seed)
        splits, split_drops = _split(config, pools)
        check_disjoint({name: pool.own_keys for name, pool in splits.items()})
        for name in ROLES:
            write_stream(directory / f"{name}.tsv", splits[name].write)
    total = Counter[str]()
    for tally in tallies:
        total.update(tally.dropped)
    ordered = {name: total[name] for name in FILTERS if total[name]} | split_drops
    sizes = {name: len(pairs) for name, pairs in splits.items()}
    plain = {"order": list(FILTERS), "sources": [tally.to_plain() for tally in tallies]}
    plain |= {"total": ordered, "quarantine": dict(quarantine.most_common()), "sizes": sizes}
    write_json(directory / "filters.json", plain)
    if hash_inputs(config, base_dir, seed) != inputs:
        raise CorpusError("corpus: an input file changed while it was read: build again")
    outputs = {
        name: sha256_file(directory / name)
        for name in (*(f"{role}.tsv" for role in ROLES), "quarantine.tsv", "filters.json")
    }
    manifest = Manifest(inputs, outputs, sizes, ordered, dict(quarantine.most_common()))
    write_manifest(directory, manifest)
    _report_counts(tallies, ordered, quarantine, sizes, report)
    return _summarise(directory, manifest, reused=False)


def load_split(directory: Path, name: str) -> SplitFile:
    """The pairs of a split, after comparing its hash with the manifest."""
    manifest = read_manifest(directory)
    if manifest is None:
        raise CorpusError(f"{directory} is no corpus: it has no manifest.json; build it with `corpus build`")
    path = directory / f"{name}.tsv"
    if path.name not in manifest.outputs:
        raise CorpusError(f"{directory} has no split {name!r}: known are {', '.join(ROLES)}")
    if manifest.find_damaged(directory, [path.name]):
        raise CorpusError(f"{path} differs from its hash in manifest.json: it was changed or damaged; build it again")
    return SplitFile(path, manifest.sizes[name], manifest.outputs[path.name])


# ------------------------------------------------------------------------------------------------------------ reading


def _make_context(config: CorpusConfig, base_dir: Path, report: Report) -> ReaderContext:
    return ReaderContext(
        source_language=config.source_language,
        target_language=config.target_language,
        base_dir=base_dir,
        cache_dir=find_cache_dir(config.cache_dir, base_dir),
        max_line_bytes=config.cleaning.max_line_bytes,
        report=report,
    )


def _fetch_all_packages(config: CorpusConfig, context: ReaderContext) -> None:
    sources = (source for role in ROLES for source in getattr(config, role) if isinstance(source, GettextSource))
    fetch_packages([package for source in sources for package in source.packages], context.cache_dir, context.report)


def _one_by_one(source: Source) -> Iterator[Source]:
    """A source of many packages as many sources, each counted by itself."""
    if isinstance(source, GettextSource) and source.packages:
        for package in source.packages:
            yield source.model_copy(update={"packages": [package]})
    else:
        yield source


def _read_pools(
    config: CorpusConfig, directory: Path, context: ReaderContext, spool: Path, seed: int
) -> tuple[dict[str, Pool], list[Tally], Counter[str]]:
    """Clean pairs of each role; malformed rows stream into quarantine.tsv."""
    pools: dict[str, Pool] = {}
    tallies: list[Tally] = []
    rules = Rules(config.cleaning, config.source_language, config.target_language)

    def fill(stream: BinaryIO) -> None:
        stream.write(b"origin\treason\ttext\n")
        for role in ROLES:
            parts = [part for source in getattr(config, role) for part in _one_by_one(source)]
            own = {len(tallies) + number: Tally(role, describe_source(part)) for number, part in enumerate(parts)}
            tallies.extend(own.values())
            records = _read_all(dict(zip(own, parts, strict=True)), context)
            pools[role] = fill_pool(records, own, stream, spool / role, rules, seed)

    write_stream(directory / "quarantine.tsv", fill)
    quarantine = Counter[str]()
    for tally in tallies:
        quarantine.update(tally.quarantined)
    for role in ROLES:
        check_role(role, config.cleaning, [tally for tally in tallies if tally.role == role], directory)
    return pools, tallies, quarantine


def _read_all(sources: dict[int, Source], context: ReaderContext) -> Iterator[Numbered]:
    for number, source in sources.items():
        for record in read_source(source, context):
            yield Numbered(number, record)


# ----------------------------------------------------------------------------------------------------------- splitting


def _split(config: CorpusConfig, pools: dict[str, Pool]) -> tuple[dict[str, Pool], dict[str, int]]:
    """The final splits, and how many pairs were dropped to keep them apart.

    Test goes before validation, validation before train. Unseen comes last: a pair of it that resembles any other
    split is dropped from it, so that training loses nothing and the domain is truly unseen.
    """
    drops: dict[str, int] = {}
    splits = dict(pools)

    def drop_shared(role: str, other: str, reason: str) -> None:
        shared = find_shared(splits[role].own_keys, splits[other].own_keys)
        if shared.any():
            drops[reason] = int(shared.sum())
            splits[role] = splits[role].keep(~shared)

    drop_shared("validation", "test", "validation_shared_with_test")
    drop_shared("train", "test", "leaks_into_test")
    drop_shared("train", "validation", "leaks_into_validation")
    sizes = {"validation": config.validation_size, "test": config.test_size}
    sizes = {name: size for name, size in sizes.items() if not getattr(config, name)}
    for role in ("test", "validation", "train"):
        drop_shared("unseen", role, f"unseen_shared_with_{role}")

    train = splits["train"]
    held_out = hold_out(train.own_keys, train.own_draws, sizes)
    if held_out.num_left_over:
        drops["left_over_of_held_out_groups"] = held_out.num_left_over
    splits |= {name: train.keep(places) for name, places in held_out.sets.items()}
    splits["train"] = train.keep(held_out.rest)
    splits["unseen"] = splits["unseen"].keep(choose_sample(splits["unseen"].own_draws, config.unseen_size))
    for role in ROLES:
        if not len(splits[role]) and (getattr(config, role) or role in sizes):
            raise CorpusError(
                f"corpus.{role}: nothing is left once the pairs shared with other splits are dropped ({drops}): "
                "name other text for it"
            )
    return splits, drops


# ------------------------------------------------------------------------------------------------------------- output


def _describe_sizes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size:,}" for name, size in sizes.items())


def _report_counts(
    tallies: list[Tally], filters: dict[str, int], quarantine: Counter[str], sizes: dict[str, int], report: Report
) -> None:
    report(f"corpus: read {sum(tally.num_read for tally in tallies):,} rows from {len(tallies)} sources")
    for name, count in filters.items():
        report(f"corpus: dropped {count:,} {name.replace('_', ' ')}")
    for name, count in quarantine.most_common():
        report(f"corpus: quarantined {count:,} {name.replace('_', ' ')}")
    report(f"corpus: {_describe_sizes(sizes)} pairs")


def _summarise(directory: Path, manifest: Manifest, *, reused: bool) -> CorpusSummary:
    return CorpusSummary(
        directory,
        reused,
        dict(manifest.sizes),
        dict(manifest.filters),
        dict(manifest.quarantine),
        manifest.sha256,
        dict(manifest.outputs),
    )
