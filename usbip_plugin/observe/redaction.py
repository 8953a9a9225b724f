"""Removes from a text everything that looks like a credential. Pure.

The plugin's own errors contain no credentials. This is the second line of defence, for texts that come from elsewhere:
libraries, API servers, files.
"""

from __future__ import annotations

import re

REDACTED = "[redacted]"
MARGIN = 4096
"""Characters examined beyond the wanted ones, so that a credential that begins among the wanted ones is recognised."""

_VALUE = r"[^\s\"',;}\]]{8,}"
_RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), REDACTED),
    (re.compile(rf"\b(bearer|basic)\s+{_VALUE}", re.IGNORECASE), rf"\1 {REDACTED}"),
    # a JSON Web Token: the token of a ServiceAccount is one
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?"), REDACTED),
    (
        re.compile(
            r"\b((?:[\w-]{0,64}(?:token|password|passwd|secret|api[_-]?key)|authorization|client-key-data)"
            rf"[\"']?\s*[:=]\s*[\"']?){_VALUE}",
            re.IGNORECASE,
        ),
        rf"\1{REDACTED}",
    ),
    (re.compile(r"(://)[^/\s@]+@"), rf"\1{REDACTED}@"),
)

_HINTS = ("-begin ", "bearer", "basic", "eyj", "token", "passw", "secret", "api", "authorization", "client-key-", "://")
"""Every text that a rule can change contains one of these hints, in upper or lower case.

Few texts contain one, and every field of every log line is examined. Texts without a hint skip the slower rules.
"""


def redacted(text: str, wanted: int) -> str:
    """Returns the text without private keys, bearer tokens, JSON Web Tokens, passwords and users in URLs.

    wanted: how many characters of the text the caller will show. Characters more than MARGIN beyond these are cut off
    unexamined, because the text may have megabytes.
    """
    text = text[: wanted + MARGIN]
    # only for ASCII: some other letters match ASCII letters in re.IGNORECASE, and lower() does not convert all of them
    if text.isascii() and _has_none(text.lower()):
        return text
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text


def _has_none(text: str) -> bool:
    for hint in _HINTS:  # noqa: SIM110 - any() takes twice as long, and most of what is done here is this
        if hint in text:
            return False
    return True
