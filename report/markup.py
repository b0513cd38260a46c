"""Text, numbers and sections as HTML. What models and data say is untrusted: it reaches a page through `text` only."""

import html
from typing import Any

from evaluation.metrics import is_number


def text(value: object) -> str:
    """Escape anything for HTML; lone surrogates and control characters, which models do write, become visible marks."""
    clean = str(value).encode("utf-8", "replace").decode("utf-8")
    return html.escape("".join(c if c in "\n\t" or c.isprintable() or c == "\u200d" else "\ufffd" for c in clean))


def number(value: Any, digits: int = 3) -> str:
    """Write a score; a dash where there is none."""
    return f"{value:.{digits}f}" if is_number(value) else "–"


def section(name: str, title: str, body: str) -> str:
    """Wrap a part of the page."""
    return f'<section id="{name}"><h2>{title}</h2>{body}</section>'
