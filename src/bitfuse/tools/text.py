"""Finished texts for rich, which obeys brackets and names between colons: what comes from elsewhere is shown as it is.

What a terminal itself would obey, `core.lines` has shown by its escapes before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bitfuse.core.lines import one_line, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


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
