"""Interpolation marks of printf, Python, str.format, string.Template, Qt, Django and Zope: what a program fills in."""

from __future__ import annotations

import re

PLACEHOLDER = re.compile(
    r"""
      %\([A-Za-z_][\w.\-]*\)[-+0#\ ]?\d*(?:\.\d+)?l?[diouxXeEfFgGcrsa]  # %(name)s
    | %\d+\$[-+0#]?\d*(?:\.\d+)?(?:l{0,2}|h)[diouxXeEfFgGcsp]         # %1$s
    | %[-+0#]?\d*(?:\.\d+)?(?:l{1,2}|h|z)?[diouxXfgcrs](?![^\W\d_])  # %s, %.2f; not the % of "50 %ige"
    | %[1-9]\d?(?![\w%])                                             # %1
    | \$\{[A-Za-z_][\w.\-]*\}                                        # ${name}
    | \{\$[^{}]{1,80}\$\}                                           # {$ name $}
    | \{\{[\w.\-|:\ ]{1,80}\}\}                                      # {{ name }}
    | \{[\w.\[\]\-]{0,60}(?:![rsa])?(?::[^{}\s]{0,20})?\}              # {}, {0}, {name:.2f}
    """,
    re.VERBOSE,
)


def find_placeholders(text: str) -> list[str]:
    """The placeholders of a text, in the order in which they stand."""
    return PLACEHOLDER.findall(text)
