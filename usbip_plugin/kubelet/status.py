"""From the error tree to the gRPC status the kubelet puts into a pod's event."""

from __future__ import annotations

import grpc

from usbip_plugin.errors import (
    AllocateError,
    AllocateTimeout,
    AttachStuck,
    ClaimBusy,
    DeviceBusy,
    DeviceUnknown,
    KubeServerError,
    KubeThrottled,
    KubeUnreachable,
    LockHeld,
    LockLost,
    LockUnavailable,
    NotAttached,
    PluginError,
    PortsExhausted,
    ServerTimeout,
    ServerUnreachable,
    UnknownDevice,
)

# Details travel in an HTTP/2 header, which gRPC bounds at 8 KiB with everything else in it, and where each byte that is
# not printable ASCII takes three.
MAX_DETAIL_CHARACTERS = 1024
MAX_HEADER_BYTES = 6 * 1024

_CODES: tuple[tuple[tuple[type[PluginError], ...], grpc.StatusCode], ...] = (
    ((LockHeld, LockLost, DeviceBusy, ClaimBusy), grpc.StatusCode.FAILED_PRECONDITION),
    ((ServerTimeout, AllocateTimeout, AttachStuck), grpc.StatusCode.DEADLINE_EXCEEDED),
    (
        (ServerUnreachable, LockUnavailable, KubeUnreachable, KubeThrottled, KubeServerError, NotAttached),
        grpc.StatusCode.UNAVAILABLE,
    ),
    ((UnknownDevice, DeviceUnknown), grpc.StatusCode.NOT_FOUND),
    ((PortsExhausted,), grpc.StatusCode.RESOURCE_EXHAUSTED),
)


def status_code(error: PluginError) -> grpc.StatusCode:
    """FAILED_PRECONDITION: somebody has the device. UNAVAILABLE: server or API does not answer. DEADLINE_EXCEEDED: time
    is up. NOT_FOUND: no such device. RESOURCE_EXHAUSTED: no port. INTERNAL: anything else.

    A bare AllocateError stands for the error it was raised from.
    """
    for classes, code in _CODES:
        if isinstance(error, classes):
            return code
    if isinstance(error, AllocateError) and isinstance(error.__cause__, PluginError):
        return status_code(error.__cause__)
    return grpc.StatusCode.INTERNAL


def status_details(error: PluginError) -> str:
    """The error's message on one line, printable, at most MAX_DETAIL_CHARACTERS long and MAX_HEADER_BYTES encoded."""
    words = " ".join(str(error).split()) or type(error).__name__
    text = "".join(char if char.isprintable() else "?" for char in words[: MAX_DETAIL_CHARACTERS + 1])
    if len(text) > MAX_DETAIL_CHARACTERS:
        text = text[: MAX_DETAIL_CHARACTERS - 1] + "…"
    while sum(1 if char.isascii() and char != "%" else 3 * len(char.encode()) for char in text) > MAX_HEADER_BYTES:
        text = text[: len(text) * 3 // 4] + "…"
    return text
