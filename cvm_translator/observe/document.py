"""A report as blocks, written as GitHub Markdown and as one self-contained HTML page.

Guarantees: what is put into blocks is text, never markup; both writers escape all of it (HTML by Jinja's autoescape,
Markdown by `escape_markdown`, control and direction characters by `printable`). The page holds no script and loads
nothing: plots are data URIs, and its Content-Security-Policy forbids the rest.
"""

from __future__ import annotations

import base64
import functools
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cvm_translator.observe.text import escape_markdown
from cvm_translator.runs.text import printable

if TYPE_CHECKING:
    import jinja2


@dataclass(frozen=True)
class Cell:
    """A table cell with a tone: good, bad, muted or strong."""

    text: str
    tone: str = ""


@dataclass(frozen=True)
class Verdict:
    """The answer, before anything else; tone good, bad or neutral."""

    title: str
    detail: str
    tone: str
    kind: str = "verdict"


@dataclass(frozen=True)
class Heading:
    text: str
    kind: str = "heading"


@dataclass(frozen=True)
class Text:
    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]
    kind: str = "bullets"


@dataclass(frozen=True)
class Table:
    """Rows of text or `Cell`s; the first column is left-aligned, the others right-aligned if `numeric`."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    numeric: bool = True
    kind: str = "table"


@dataclass(frozen=True)
class Picture:
    """A PNG, saved beside the report under plots/."""

    name: str
    title: str
    png: bytes
    kind: str = "picture"

    @property
    def data_uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class Records:
    """Labelled texts in groups, such as a source with its translations."""

    items: Sequence[Sequence[tuple[str, str]]]
    kind: str = "records"


@dataclass(frozen=True)
class Fold:
    """Blocks behind a summary, for what is looked up rather than read."""

    title: str
    blocks: Sequence[Block]
    kind: str = "fold"


Block = Verdict | Heading | Text | Bullets | Table | Picture | Records | Fold


@dataclass(frozen=True)
class Document:
    title: str
    subtitle: str
    blocks: list[Block] = field(default_factory=list)

    def pictures(self) -> list[Picture]:
        return [block for block in self.blocks if isinstance(block, Picture)]


def to_markdown(document: Document) -> str:
    lines = [f"# {escape_markdown(document.title)}", "", escape_markdown(document.subtitle), ""]
    for block in document.blocks:
        lines += [*_markdown_lines(block), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _markdown_lines(block: Block) -> list[str]:
    escape = escape_markdown
    match block:
        case Verdict():
            sign = {"good": "✅ ", "bad": "❌ "}.get(block.tone, "")
            return [f"> ### {sign}{escape(block.title)}", ">", f"> {escape(block.detail)}"]
        case Heading():
            return [f"## {escape(block.text)}"]
        case Text():
            return [escape(block.text)]
        case Bullets():
            return [f"- {escape(item)}" for item in block.items]
        case Table():
            return _markdown_table(block)
        case Picture():
            return [f"![{escape(block.title)}](plots/{block.name}.png)"]
        case Records():
            return [
                "\n".join(
                    f"{f'{number}.' if first else '   '} **{escape(label)}:** {escape(text)}  "
                    for first, (label, text) in zip([True] + [False] * len(record), record, strict=False)
                )
                for number, record in enumerate(block.items, start=1)
            ]
        case Fold():
            inner = [line for part in block.blocks for line in [*_markdown_lines(part), ""]]
            return [f"<details><summary>{html.escape(printable(block.title))}</summary>", "", *inner, "</details>"]


def _markdown_table(table: Table) -> list[str]:
    align = "--:" if table.numeric else ":--"
    head = "| " + " | ".join(escape_markdown(header) for header in table.headers) + " |"
    rule = "| " + " | ".join([":--", *[align] * (len(table.headers) - 1)]) + " |"
    return [head, rule, *("| " + " | ".join(_markdown_cell(cell) for cell in row) + " |" for row in table.rows)]


def _markdown_cell(cell: str | Cell) -> str:
    if isinstance(cell, str):
        return escape_markdown(cell)
    text = escape_markdown(cell.text)
    return f"**{text}**" if cell.tone in ("good", "bad", "strong") and text else text


def to_html(document: Document, refresh_seconds: int | None = None) -> str:
    """The page; with `refresh_seconds` a browser reads it anew so often (for a page that is written again)."""
    template = _environment().get_template("document.html.j2")
    return template.render(document=document, refresh_seconds=refresh_seconds)


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("cvm_translator.observe"),
        autoescape=True,
        finalize=_make_printable,  # every expression of the template passes through here, then through the escaping
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _make_printable(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value
