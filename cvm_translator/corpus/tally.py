"""Counts of what happened to the rows of each source, and when they are a reason to stop.

Refuses (CorpusError): a share of malformed rows above the allowed one, sources that give no clean pair at all.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cvm_translator.config.schema import CleaningConfig
from cvm_translator.corpus.cleaning import FILTERS
from cvm_translator.errors import CorpusError


@dataclass
class Tally:
    """Counts of one source, for filters.json."""

    role: str
    source: str
    num_read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)
    num_kept: int = 0

    def to_plain(self) -> dict[str, Any]:
        return {
            "role": self.role,
            "source": self.source,
            "num_read": self.num_read,
            "dropped": {name: self.dropped[name] for name in FILTERS if self.dropped[name]},
            "quarantined": dict(sorted(self.quarantined.items())),
            "num_kept": self.num_kept,
        }


def check_role(role: str, config: CleaningConfig, tallies: list[Tally], directory: Path) -> None:
    """Refuse a role that is malformed beyond the allowed share, or empty although it has sources."""
    num_read = sum(tally.num_read for tally in tallies)
    reasons = Counter[str]()
    for tally in tallies:
        reasons.update(tally.quarantined)
    num_bad = reasons.total()
    counts = ", ".join(f"{name} {count}" for name, count in reasons.most_common())
    allowed = config.max_quarantine_share
    if num_bad > allowed * num_read:
        raise CorpusError(
            f"corpus.{role}: {num_bad} of {num_read} rows are malformed ({counts}), more than max_quarantine_share "
            f"{allowed:g}: see {directory / 'quarantine.tsv'} and mend the files, or raise the share"
        )
    if tallies and not any(tally.num_kept for tally in tallies):
        names = ", ".join(tally.source for tally in tallies[:3])
        dropped = Counter[str]()
        for tally in tallies:
            dropped.update(tally.dropped)
        why = f"; dropped: {', '.join(f'{n} {c}' for n, c in dropped.most_common())}" if dropped else ""
        raise CorpusError(f"corpus.{role}: no clean pairs in {names} ({num_read} rows read{why}): the corpus is empty")
