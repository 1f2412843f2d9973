"""What a command says beside its result."""

from __future__ import annotations

import sys

from cvm_translator.runs.secrets import redact


def tell(line: str) -> None:
    """One line on standard error, without the secrets that this process has read."""
    print(redact(line), file=sys.stderr, flush=True)
