"""Takes out of a text what looks like a credential. Pure.

Errors are made so that they hold none. This is the second line, for texts that come from elsewhere: libraries, API
servers, files.
"""

from __future__ import annotations

import re

REDACTED = "[redacted]"
MARGIN = 4096
"""Characters looked at beyond those that are wanted, so that a credential that begins among these is known as one."""

_VALUE = r"[^\s\"',;}\]]{8,}"
_RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), REDACTED),
    (re.compile(rf"\b(bearer|basic)\s+{_VALUE}", re.IGNORECASE), rf"\1 {REDACTED}"),
    # a JSON Web Token, which a ServiceAccount's token is
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
"""One of them, in whatever case, is in every text that a rule can change. Nearly none has it, and each field of each
line of the log is looked at."""


def redacted(text: str, wanted: int) -> str:
    """The text with private keys, bearer tokens, JSON Web Tokens, passwords and users in URLs taken out.

    wanted: how many characters of it the caller will show. What is far beyond is left out unseen: texts come from
    elsewhere, and may be megabytes.
    """
    text = text[: wanted + MARGIN]
    # where case does not count, letters beyond ASCII stand for some of ASCII: those texts are not told so soon
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
