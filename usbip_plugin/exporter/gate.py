"""Who may import a device: the Gate that the exporter asks, and the gate that is open to everybody."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from usbip_plugin.model import Endpoint


@dataclass(frozen=True, slots=True)
class Refusal:
    """The answer to an import that is not granted. reason: for the log, with the cure."""

    reason: str


class Gate(Protocol):
    """Decides which connection may import a device, and which connection may keep it."""

    async def admits(self, busid: str, peer: Endpoint) -> Refusal | None:
        """Returns None if peer may import the device, else why not. Takes at most 2 s. Cancel-safe."""

    def may_stay(self, busid: str, peer: Endpoint | None) -> bool:
        """Returns whether the connection from peer may keep the device.

        Is asked after each export, for each export found at start, and after each call of a subscriber.
        peer: None if it is not known, because another program exported the device.
        """

    def subscribe(self, callback: Callable[[str], None]) -> Callable[[], None]:
        """Calls callback with a bus ID when may_stay() may answer otherwise. Returns an unsubscriber.

        The callback must be quick and must not raise.
        """

    async def run(self) -> None:
        """Keeps the answers up to date. Runs until cancelled."""

    def problem(self) -> str | None:
        """Returns for people why the gate cannot decide now, and what it does instead; None if it can decide."""


class OpenGate:
    """The Gate that admits everybody."""

    async def admits(self, busid: str, peer: Endpoint) -> Refusal | None:  # noqa: ARG002
        return None

    def may_stay(self, busid: str, peer: Endpoint | None) -> bool:  # noqa: ARG002
        return True

    def subscribe(self, callback: Callable[[str], None]) -> Callable[[], None]:  # noqa: ARG002
        return lambda: None

    async def run(self) -> None:
        await asyncio.get_running_loop().create_future()

    def problem(self) -> str | None:
        return None
