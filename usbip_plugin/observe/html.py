"""HTML that is escaped by construction, and the building blocks of the status page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


class Markup(str):
    """HTML that is escaped already. Only text(), join() and tag() make it."""

    __slots__ = ()


Content = str | Markup | int | None
NOTHING = Markup("")


def text(value: object) -> Markup:
    """Returns the value as escaped HTML.

    Characters that cannot be printed, such as marks that change the writing direction, become "?".
    """
    plain = str(value)
    clean = plain if plain.isprintable() else "".join(char if char.isprintable() else "?" for char in plain)
    return Markup(escape(clean, quote=True))


def join(*parts: Content) -> Markup:
    """Returns the parts one after the other, escaped if they are not Markup. Leaves out None."""
    return Markup("".join(part if isinstance(part, Markup) else text(part) for part in parts if part is not None))


def tag(name: str, *content: Content, **attributes: str | float | bool | None) -> Markup:
    """Returns an element with an end tag.

    In attribute names a leading underscore is dropped and others become "-". An attribute that is None or False is
    left out; one that is True has no value.
    """
    pairs = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        shown = key.removeprefix("_").replace("_", "-")
        pairs.append(f" {shown}" if value is True else f' {shown}="{text(value)}"')
    return Markup(f"<{name}{''.join(pairs)}>{join(*content)}</{name}>")


def section(name: str, title: str, content: Markup) -> Markup:
    """Returns a part of the page under a heading."""
    return tag("section", tag("h2", title, id=f"h-{name}"), content, id=name, aria_labelledby=f"h-{name}")


def table(caption: str, head: Sequence[str], rows: Iterable[tuple[str, Sequence[Markup]]]) -> Markup:
    """Returns a table.

    rows: a key that always identifies the row, and the row's cells. ARIA roles are explicit, because the layout for
    narrow screens is not a table.
    """
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
    """Returns a list of names and values. Leaves out pairs whose value is None."""
    found = [tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs if value is not None]
    return tag("dl", *found, _class="facts")


def pill(kind: str, words: str) -> Markup:
    """Returns words on a coloured ground.

    kind: "good", "warn", "bad" or "accent". It sets the colour, and the shape of a mark for people who see no colours.
    """
    return tag("span", words, _class=f"pill {kind}")


def more(count: int, path: str) -> Markup:
    """Returns a link to the rest of a list, or nothing if there is no rest. count: how many are left."""
    return tag("p", f"and {count} more: ", tag("a", path, href=path), _class="muted") if count > 0 else NOTHING


def age(seconds: float) -> str:
    """Returns a duration (seconds) in the largest unit that fits, rounded down: "42 s", "3 min", "5 h", "2 d"."""
    for limit, unit, divisor in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{int(max(0.0, seconds) // divisor)} {unit}"
    return f"{int(seconds // 86_400)} d"
