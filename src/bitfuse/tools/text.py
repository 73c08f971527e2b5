"""Text that comes from elsewhere, on a terminal: what a document, a model or an exception says is shown, never obeyed.

A terminal obeys control characters, and rich obeys brackets and names between colons. A line end in somebody's text
begins a line that looks like one of ours, and characters that are not seen or that turn the direction of writing make
one text look like another. Such characters are shown by their escapes, and rich is given finished texts.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

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
    named = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
    code = ord(character)
    return named.get(character) or (
        f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    )


def one_line(text: object, most: int | None = None) -> str:
    """What `text` says in one line, of at most `most` characters; white space of any kind and length is one space."""
    line = visible(" ".join(str(text).split()))
    return line if most is None or len(line) <= most else f"{line[: most - 3]}..."


def cell(text: object, style: str = "") -> Text:
    """One line for rich to show as it is: no markup, no emoji, no highlighting."""
    from rich.text import Text

    return Text(one_line(text), style)


def say(console: Console, *parts: Any) -> None:
    """Print one line, not folded: texts and `cell`s, with a space between each two."""
    from rich.text import Text

    console.print(Text(" ").join(p if isinstance(p, Text) else cell(p) for p in parts), soft_wrap=True)


def say_all(console: Console, text: str) -> None:
    """Print a text of several lines, each as `say` does, its indentation kept."""
    from rich.text import Text

    for line in text.split("\n"):
        console.print(Text(visible(line)), soft_wrap=True)
