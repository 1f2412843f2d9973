"""The public German-English corpus (placeholder while the package list is drawn up)."""

from typing import Any

DEFAULT_CORPUS: dict[str, Any] = {
    "train": [{"format": "tsv", "path": "missing.tsv"}],
}
