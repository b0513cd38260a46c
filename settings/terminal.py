"""What others wrote, on a terminal: none of its escape codes, marks of direction or control characters gets through."""


def clean(text: str) -> str:
    """Make what data, files and other programs say harmless for a terminal: what does not print becomes a mark."""
    whole = text.encode("utf-8", "replace").decode("utf-8")  # a lone half of a pair cannot be printed
    return "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in whole)
