"""Known and unknown keys of a mapping."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping

from usbip_plugin.config.document import Node, Problems, normal_key

_CLOSE = 0.74  # how alike two keys must be for one to be taken for a misspelling of the other


class Unknown(enum.Enum):
    """What an unknown key is.

    WARN: the Go program ignores it, so a file that has one goes on working.
    WARN_UNLESS_TYPO: the same, but a misspelling is an error, because leaving it out would name more devices.
    ERROR: the mapping did not exist in the Go program.
    """

    WARN = "warn"
    WARN_UNLESS_TYPO = "warn unless typo"
    ERROR = "error"


def read_fields(
    node: Node, problems: Problems, known: tuple[str, ...], unknown: Unknown, what: str
) -> Mapping[str, Node] | None:
    """Values of a mapping by their canonical key, those of `known`. A key without a value is as good as absent.

    None, with an error in problems, if the node is no mapping.
    """
    if not node.is_mapping:
        problems.error(node, f"{node.describe()} where {what} is wanted: a mapping with {', '.join(known)}")
        return None
    canonical = {normal_key(key): key for key in known}
    found: dict[str, Node] = {}
    for written, value in node.pairs(problems):
        key = canonical.get(normal_key(written))
        if key is not None:
            if not value.empty:
                found[key] = value
            continue
        # the search takes its time: it is left out where its answer would be neither shown nor acted upon
        looked_for = problems.room or unknown is Unknown.WARN_UNLESS_TYPO
        close = _close(normal_key(written), canonical) if looked_for else []
        cure = f"did you mean {canonical[close[0]]}?" if close else f"known here: {', '.join(known)}"
        text = f"unknown key; {cure}"
        if unknown is Unknown.ERROR or (unknown is Unknown.WARN_UNLESS_TYPO and close):
            problems.error(value, text)
        else:
            problems.warn(value, f"ignored: {text}", hint=bool(close))
    return found


def _close(key: str, known: Iterable[str]) -> list[str]:
    """The known key it is taken for, if any."""
    import difflib  # noqa: PLC0415 - a file without mistakes needs none of it

    return difflib.get_close_matches(key, known, n=1, cutoff=_CLOSE)
