"""What a command says beside its result."""

from __future__ import annotations

import sys


def tell(line: str) -> None:
    """One line on standard error."""
    print(line, file=sys.stderr, flush=True)
