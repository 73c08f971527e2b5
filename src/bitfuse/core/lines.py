"""Anything in one line: what an exception, a model or a document says is shown as it is, and obeyed by no terminal.

A line end in somebody's text begins a line that looks like one of ours, and characters that are not seen or that turn
the direction of writing make one text look like another. Such characters are shown by their escapes.
"""

from __future__ import annotations

import re

# Printable by Unicode's categories, and yet nothing is seen of them: joiners, fillers, variation selectors, a blank
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


def visible(text: str, but: str = "") -> str:
    """The text with an escape, as \\x1b or \\u202e, for every character that is not seen, but for those of `but`."""
    if text.isprintable() and not _UNSEEN.search(text):
        return text
    return "".join(c if c in but or (c.isprintable() and not _UNSEEN.match(c)) else _escape(c) for c in text)


def _escape(character: str) -> str:
    if character in "\n\r\t":
        return repr(character)[1:-1]
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def one_line(text: object, most: int | None = None) -> str:
    """What `text` says in one line, of at most `most` characters; white space of any kind and length is one space."""
    line = visible(" ".join(str(text).split()))
    return line if most is None or len(line) <= most else f"{line[: most - 3]}..."


def error_line(error: BaseException, most: int = 200, *, paths: bool = True) -> str:
    """The type of an exception and what it says, in one line: "OSError: [Errno 28] No space left on device".

    most     characters of what it says: of a longer text the first and the last line are kept, as Triton names the
             place first and the error last, and what is still longer is cut off
    paths    False: of an error of the operating system only its own words, without the file's name
    """
    text = str(error).strip()
    if not paths and isinstance(error, OSError):
        text = error.strerror or text
    if len(one_line(text)) > most:
        lines = text.splitlines()
        text = " ".join(dict.fromkeys((lines[0], lines[-1])))
    name, what = type(error).__name__, one_line(text, most)
    return f"{name}: {what}" if what else name
