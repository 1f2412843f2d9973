"""What a command says beside its result."""

from __future__ import annotations

import sys

from cvm_translator.runs.text import printable


def tell(line: str) -> None:
    """One line on standard error: nothing in it acts on the terminal, and no secret that this process has read is
    shown."""
    print(printable(line), file=sys.stderr, flush=True)
