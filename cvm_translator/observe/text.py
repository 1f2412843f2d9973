"""Numbers and foreign text, made fit to be shown in reports.

Guarantees: `escape_markdown` leaves no character that GitHub's Markdown, a terminal or an editor would act upon, and no
secret. Text of the corpus and of models always passes through here or through `runs.text.printable`.
"""

from __future__ import annotations

import math
import re
from datetime import datetime
from typing import Any

from cvm_translator.runs.text import printable

NOT_MEASURED = "not measured"

_MARKDOWN_SPECIAL = re.compile(r"([\\`*_\[\]<>|~&$!])")
_MARKDOWN_LEADING = re.compile(r"^(?:([-+=#:])(?=\1|\s|$)|(\d+)([.)])(?=\s|$))")
_MARKDOWN_COLON = re.compile(r":(?=//|\w+:)")

METRIC_NAMES = {
    "quality_score": "Quality score",
    "bleu": "BLEU",
    "chrf": "chrF",
    "ter": "TER (lower is better)",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bertscore": "BERTScore",
    "comet": "COMET",
    "exact_match": "Exact match (%)",
    "perplexity": "Perplexity (lower is better)",
}


ERROR_NAMES = {
    "empty": "empty output",
    "repetition": "repetition loop",
    "copy": "source copied",
    "length_ratio": "far too short or long",
    "under_translation": "far too short",
    "over_translation": "far too long",
    "numbers": "wrong numbers",
    "placeholders": "wrong placeholders",
    "wrong_language": "wrong language",
    "much_worse_than_teacher": "far below the teacher",
}


def error_name(key: Any) -> str:
    return ERROR_NAMES.get(str(key), str(key).replace("_", " "))


def metric_name(key: str) -> str:
    return METRIC_NAMES.get(key, key.replace("_", " "))


def short_metric_name(key: str) -> str:
    return metric_name(key).split(" (")[0]


def ordered_metrics(keys: Any) -> list[str]:
    """Known metrics in their customary order, then the others by name."""
    known = [key for key in METRIC_NAMES if key in keys]
    return known + sorted(key for key in keys if key not in METRIC_NAMES)


def escape_markdown(text: Any) -> str:
    """The text as GitHub's Markdown shows it literally, in a paragraph, a list item or a table cell."""
    plain = _MARKDOWN_SPECIAL.sub(r"\\\1", printable(text))
    plain = _MARKDOWN_COLON.sub(r"\\:", plain).replace("www.", "www\\.")
    return _MARKDOWN_LEADING.sub(lambda match: f"\\{match[1]}" if match[1] else f"{match[2]}\\{match[3]}", plain)


def parse_time(text: Any) -> float | None:
    """Seconds since 1970 of an event's `time`, or None where there is none."""
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return None


def as_number(value: Any) -> float:
    """A number from JSON; NaN for what is missing or none (events write NaN and infinities as strings)."""
    if isinstance(value, bool) or value is None:
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def is_known(value: Any) -> bool:
    return math.isfinite(as_number(value))


def format_number(value: Any, digits: int = 2, missing: str = "–") -> str:
    number = as_number(value)
    if not math.isfinite(number):
        return missing
    return f"{round(number, digits) + 0.0:,.{digits}f}"  # adding 0 makes -0.00 plain


def format_count(value: Any, missing: str = "–") -> str:
    return format_number(value, 0, missing)


def format_percent(share: Any, digits: int = 1, missing: str = "–") -> str:
    number = as_number(share)
    return f"{100 * number:.{digits}f} %" if math.isfinite(number) else missing


def format_score(key: str, value: Any, missing: str = "–") -> str:
    """A metric's value with the digits that suit its scale."""
    return format_number(value, 3 if key in ("bertscore", "comet", "quality_score") else 2, missing)


def format_bytes(value: Any, missing: str = "–") -> str:
    number = as_number(value)
    if not math.isfinite(number):
        return missing
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024 or unit == "GiB":
            return f"{number:,.0f} {unit}" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1024
    raise AssertionError("unreachable")


def format_seconds(value: Any, missing: str = "–") -> str:
    """A duration as `42 s`, `3 min 05 s`, `2 h 14 min` or `3 d 02 h`."""
    number = as_number(value)
    if not math.isfinite(number):
        return missing
    seconds = round(max(0.0, number))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if seconds < 86400:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600:02d} h"
