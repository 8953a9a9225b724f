"""HTML built from values: every text is escaped, unless it was built here."""

from __future__ import annotations

from html import escape


class Markup(str):
    """HTML that is sound already. Made by tag() and join() only."""

    __slots__ = ()


Content = str | Markup | int | None
NOTHING = Markup("")


def text(value: object) -> Markup:
    """Escaped; what cannot be printed, such as marks that turn the writing direction, becomes "?"."""
    plain = str(value)
    clean = plain if plain.isprintable() else "".join(char if char.isprintable() else "?" for char in plain)
    return Markup(escape(clean, quote=True))


def join(*parts: Content) -> Markup:
    """One after the other; None is nothing."""
    return Markup("".join(part if isinstance(part, Markup) else text(part) for part in parts if part is not None))


def tag(name: str, *content: Content, **attributes: str | float | bool | None) -> Markup:
    """An element with an end tag. Attributes: a leading underscore is dropped, others become "-"; None and False leave
    one out."""
    pairs = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        shown = key.removeprefix("_").replace("_", "-")
        pairs.append(f" {shown}" if value is True else f' {shown}="{text(value)}"')
    return Markup(f"<{name}{''.join(pairs)}>{join(*content)}</{name}>")
