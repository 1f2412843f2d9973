"""Foreign text shows and never acts: checked with a CommonMark parser as the judge."""

from __future__ import annotations

import pytest
from markdown_it import MarkdownIt

from cvm_translator.observe.text import escape_markdown, format_bytes, format_seconds
from cvm_translator.runs.text import printable

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1)) ![x](http://evil/x.png)",
    "a | b | c",
    "`code` **bold** _it_ ~~gone~~ &lt;b&gt; $x$",
    "# heading",
    "- item",
    "1. one",
    "> quote",
    "---",
    "===",
    "\\` \\\\ \\[",
    "[ref]: http://evil",
    "<!-- comment",
    "\x1b[31mred\x1b[0m\x07",
    "line\nbreak\r\ttab",
    "\u202egnp.exe \u2066x\u2069 \u200fmark \ufeff",
    "\u0085\u2028\u2029 \ud800",
    "100 % of {0} and %(name)s",
    "https://example.org www.example.org :smile:",
]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("frame", ["{}", "- {}", "| a | b |\n| --- | --- |\n| x | {} |", "1. **Source:** {}"])
def test_markdown_shows_the_text_literally(text: str, frame: str) -> None:
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    shape = [token.type for token in parser.parse(frame.format("harmless"))]
    tokens = parser.parse(frame.format(escape_markdown(text)))
    assert [token.type for token in tokens] == shape
    last = [token for token in tokens if token.type == "inline"][-1]
    children = [child for child in last.children or [] if not child.type.startswith("strong")]
    assert all(child.type.startswith("text") for child in children)
    shown = "".join(child.content for child in children).removeprefix("Source:").strip()
    assert shown == printable(text).strip()


def test_links_are_not_made_from_bare_addresses() -> None:
    assert escape_markdown("see https://evil and www.evil.org") == "see https\\://evil and www\\.evil.org"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599.7, "1 h 00 min"),
        (90061, "1 d 01 h"),
        (None, "–"),
        ("nan", "–"),
    ],
)
def test_format_seconds(seconds: object, shown: str) -> None:
    assert format_seconds(seconds) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0 B"), (1536, "1.5 KiB"), (4_810_000, "4.6 MiB"), (3 << 40, "3,072.0 GiB")]
)
def test_format_bytes(value: int, shown: str) -> None:
    assert format_bytes(value) == shown
