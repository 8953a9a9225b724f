"""What people do about each reason of a device and of a failed Allocate, for docs/reference/reasons.md.

Used by docs/generate.py and by the tests. Reason and the error classes say what each reason means.
"""

from __future__ import annotations

from collections.abc import Mapping

from usbip_plugin.model import Reason

DEVICES: Mapping[Reason, str] = {
    Reason.FREE: "nothing: it is available here",
    Reason.ATTACHED: "nothing: a pod on this node has it",
    Reason.IN_PROGRESS: "wait: this takes `allocateTimeout` at most; a release waits for kernel and API server",
    Reason.HOLDER_EXPIRED: "nothing: the next pod takes it over",
    Reason.OTHER_RESOURCE: "nothing, or narrow the selectors: two resources select it",
    Reason.IN_PLACE_OF: "wait for that pod's end: its device was replugged here and followed by serial number",
    Reason.NOT_CONFIGURED: "wait for its release, or put it back into the configuration",
    Reason.HELD_ELSEWHERE: "end the pod that has it; if that has ended, see [a device is not released][released]",
    Reason.HANDED_OVER: "wait 10 s at most: nodes offer a released device one after another, so that one pod gets it",
    Reason.LOST: "bring server and device back: [UsbipDeviceLost]",
    Reason.LOCK_LOST: "wait: it is being detached; see [UsbipLockLost]",
    Reason.SERVER_UNREACHABLE: "see [the server does not answer][server]",
    Reason.NOT_LISTED: "plug it in, and run `usbip bind -b BUSID` on the server; it may be in use outside the cluster",
    Reason.LISTED_WRONG: "put the device back, or correct the configuration",
    Reason.NOT_READ: "wait a second; if it stays, the log has the cause",
    Reason.MOVED: "nothing: it is offered from there; correct a selector with the old `bus_id`",
    Reason.AMBIGUOUS: "unplug one of the devices, or add `bus_id` to the selector: [serial numbers][serial]",
    Reason.API_UNREACHABLE: "see [UsbipApiUnreachable]: without the API server nobody can lock",
    Reason.NO_DRIVER: "[load it][module], or update the kernel",
    Reason.NO_PORT: "see [UsbipNoFreePort]",
    Reason.ALLOCATES_FAILED: "as the error says: it is offered again after a time, at once after a replug",
    Reason.UNKNOWN: "see [the server does not answer][server]: it never answered since the plugin started",
}
"""What to do about the reason of a device."""

ALLOCATES: Mapping[str, str] = {
    "lock_lost": "nothing if it happened once; else [UsbipLockLost]",
    "lock_unavailable": "see [UsbipApiUnreachable]; `check` tests the rights",
    "server_unreachable": "see [the server does not answer][server]",
    "server_timeout": "restart `usbipd`: its host is overloaded or hangs",
    "malformed_reply": "check host and port in the configuration, and proxies in between",
    "device_busy": "run `usbip port` on other machines; on the server, unbind and bind the device",
    "not_exported": "run `usbip bind -b BUSID` on the server",
    "import_refused": "as the error says; see the log of `usbipd`, and `dmesg` on the server",
    "wrong_device": "put the device back; if it changes its USB ID by itself, select the new ID as well",
    "wrong_serial": "put the right device back, or correct the selector; no pod got it",
    "no_driver": "[load it][module], or update the kernel",
    "driver_not_writable": "see [AppArmor and SELinux][objects]; `check` tests it",
    "no_port": "see [UsbipNoFreePort]",
    "attach_refused": "see `dmesg` of the node",
    "attach_stuck": "see `dmesg` of node and server; power-cycle the device. If it is slow, raise `allocateTimeout`",
    "hub": "select the devices behind the hub",
    "interfaces": "see [allowClasses](configuration.md#which-interfaces)",
    "nodes_missing": "load its driver, or change `children` or `childrenTimeout`",
    "detach_failed": "see `dmesg` of the node; a process may hold the device open",
    "record_not_writable": "as the error says: disk full, read-only, not mounted",
    "cdi_not_writable": "as the error says: disk full, read-only, not mounted",
    "unknown_device": "nothing: the kubelet knows by now",
    "timeout": "the error names the step: [UsbipAllocateSlow]",
    "claim_busy": "nothing: the next pod gets it",
    "path_taken": "change `containerPath` as the error says",
    "other": "see the error, and the log around it",
}
"""What to do about a failed Allocate, by the label `reason` of the metric."""

TARGETS: Mapping[str, str] = {
    "released": "../howto/troubleshooting.md#a-device-is-not-released",
    "server": "../howto/troubleshooting.md#the-server-does-not-answer",
    "serial": "../howto/serial-number.md#if-two-devices-have-the-same-serial-number",
    "module": "../howto/load-module.md",
    "objects": "../howto/install.md#if-the-cluster-objects",
}
"""The targets of links in the texts. Names of alerts lead to their section of troubleshooting.md."""


def linked(text: str) -> str:
    """Returns a text of this module with complete links."""
    for name, target in TARGETS.items():
        text = text.replace(f"][{name}]", f"]({target})")
    before, bracket, alert = text.partition("[Usbip")
    if not bracket:
        return text
    name, _, rest = alert.partition("]")
    return f"{before}[Usbip{name}](../howto/troubleshooting.md#usbip{name.lower()}){rest}"
