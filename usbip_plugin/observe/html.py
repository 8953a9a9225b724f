"""HTML, escaped by construction, and the parts that the status page is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


def section(name: str, title: str, content: Markup) -> Markup:
    """A part of the page under a heading."""
    return tag("section", tag("h2", title, id=f"h-{name}"), content, id=name, aria_labelledby=f"h-{name}")


def table(caption: str, head: Sequence[str], rows: Iterable[tuple[str, Sequence[Markup]]]) -> Markup:
    """rows: a key that stays the row's own, and its cells. Roles are said, for narrow screens show no table."""
    columns = [tag("th", name, scope="col", role="columnheader") for name in head]
    body = [
        tag(
            "tr",
            *(
                tag("td", cell, role="cell", data_label=name, _class=None if cell else "none")
                for name, cell in zip(head, cells, strict=True)
            ),
            role="row",
            data_key=key,
        )
        for key, cells in rows
    ]
    return tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *columns, role="row"), role="rowgroup"),
        tag("tbody", *body, role="rowgroup"),
        role="table",
    )


def facts(*pairs: tuple[str, Content]) -> Markup:
    """Names and values; None is left out."""
    found = [tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs if value is not None]
    return tag("dl", *found, _class="facts")


def pill(kind: str, words: str) -> Markup:
    """A word on a coloured ground: good, warn, bad, accent. The form of its mark says the same as the colour."""
    return tag("span", words, _class=f"pill {kind}")


def more(count: int, path: str) -> Markup:
    """Where to find the rest, if there is one."""
    return tag("p", f"and {count} more: ", tag("a", path, href=path), _class="muted") if count > 0 else NOTHING


def age(seconds: float) -> str:
    """The largest unit that fits, rounded down: "42 s", "3 min", "5 h", "2 d"."""
    for limit, unit, divisor in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{int(max(0.0, seconds) // divisor)} {unit}"
    return f"{int(seconds // 86_400)} d"
