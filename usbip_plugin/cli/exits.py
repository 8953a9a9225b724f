"""What the command line's exit status says."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType


class Exit(enum.IntEnum):
    """Stable: scripts rely on them."""

    DONE = 0
    PROBLEM = 1
    USAGE = 2
    API = 3
    NO_DEVICE = 4
    REFUSED = 5


MEANING: Mapping[Exit, str] = MappingProxyType(
    {
        Exit.DONE: "done; check: nothing fails; explain: the device can be had",
        Exit.PROBLEM: "a problem was found, or it failed; explain: the device cannot be had now",
        Exit.USAGE: "the command line or the configuration is wrong",
        Exit.API: "the API server cannot be reached, or does not accept the credentials",
        Exit.NO_DEVICE: "no device of that name, or more than one",
        Exit.REFUSED: "release: not confirmed, the device is or may be attached and --force was not given, or its lock "
        "has changed meanwhile",
    }
)
