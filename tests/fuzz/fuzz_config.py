"""Targets: the configuration files of the plugin and of the exporter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.fuzz.fuzz_target import Target, fit_to_raise, fit_to_show
from usbip_plugin.config import schema
from usbip_plugin.config.document import MAX_PROBLEMS
from usbip_plugin.config.export import MAX_NAMES, MAX_NETWORKS, MAX_SELECTORS, parse_export
from usbip_plugin.config.parse import parse_config
from usbip_plugin.config.reload import _parse
from usbip_plugin.config.schema import Config, render
from usbip_plugin.config.selectors import matches
from usbip_plugin.errors import ConfigError
from usbip_plugin.model import Descriptor, UsbId

DEVICE = Descriptor("1-1.4", "/sys/x", 1, 2, 3, UsbId(0x0951, 0x1666), 1, 0, 0, 0, 1, 1, 0)
# Characters of one problem with its place.
MAX_LINE = 2000
FULL = """resources:
  storage:
    - target: {host: 10.20.30.40, port: 3240}
      selector: {vendor: "0951", product: "1666"}
      extras: [{hostPath: /dev/fuse, containerPath: /dev/fuse, permissions: rw}]
  modem:
    devices: &modems
      - target: {host: "[fd00::1]"}
        selector: {bus_id: ["1-*", "2-1"], serial: A1, class: "02", vendor: ["0951", "1050"], usb_ids: ["0951:1666"]}
    onLoss: evict
    evictAfter: 2m
    cdi: true
    children: [tty, hidraw]
    childrenTimeout: 3s
    containerPath: ["/dev/{resource}/{index}-{serial}", "/dev/{kind}{number}"]
    byId: true
    permissions: {mode: "0660", group: 20}
    readOnly: true
    allowClasses: [comm, hid, "0a"]
    nodeNames: ["lab-?", a]
  again: {devices: *modems}
lock: {duration: 1m30s}
allocateTimeout: 8
publishNodeStatus: false
domain: usbip.dev
log-level: debug
"""


def configuration(data: bytes) -> None:
    try:
        loaded = _parse(Path("config.yaml"), data, parse_config)
    except ConfigError as error:
        lines(error.problems)
        fit_to_raise(error, (MAX_PROBLEMS + 2) * MAX_LINE)
        return
    lines(loaded.warnings)
    usable(loaded.config)
    assert _parse(Path("config.yaml"), data, parse_config) == loaded


def export_configuration(data: bytes) -> None:
    try:
        loaded = _parse(Path("export.yaml"), data, parse_export)
    except ConfigError as error:
        lines(error.problems)
        fit_to_raise(error, (MAX_PROBLEMS + 2) * MAX_LINE)
        return
    lines(loaded.warnings)
    config = loaded.config
    assert len(config.export) <= MAX_SELECTORS
    assert len(config.names) <= MAX_NAMES
    assert config.allow is None or 0 < len(config.allow) <= MAX_NETWORKS
    for selector in config.export:
        fit_to_show(str(selector), 400)
        matches(selector, DEVICE)
    assert _parse(Path("export.yaml"), data, parse_export) == loaded


def lines(found: Sequence[str]) -> None:
    assert len(found) <= MAX_PROBLEMS + 1
    for line in found:
        fit_to_show(line, MAX_LINE)


def usable(config: Config) -> None:
    assert schema.MIN_LOCK_DURATION_S <= config.lock.duration <= schema.MAX_LOCK_DURATION_S
    assert schema.MIN_ALLOCATE_TIMEOUT_S <= config.allocate_timeout <= schema.MAX_ALLOCATE_TIMEOUT_S
    for server in config.servers():
        assert 0 < server.port < 1 << 16
        fit_to_show(str(server), 300)
    for resource in config.resources:
        fit_to_show(resource.name, 63)
        for entry in resource.devices:
            fit_to_show(str(entry.selector), 400)
            matches(entry.selector, DEVICE)
        for template in resource.container_paths:
            path = render(template, {"serial": "../../etc/passwd", "model": "..", "resource": resource.name})
            assert ".." not in path.split("/")
        permissions = resource.permissions
        if permissions is not None:
            assert resource.cdi
            assert 0 <= (permissions.mode or 0) <= 0o777
            assert 0 <= (permissions.user or 0) < 1 << 32
        assert 0 <= resource.children_timeout <= schema.MAX_CHILDREN_TIMEOUT_S


def _seeds() -> Iterable[bytes]:
    yield FULL.encode()
    yield b"resources: {}\n"
    yield b"resources: {a: [{target: {host: h}, selector: {all: true, serial: ' A1 ', vid: 1, bus_id: }}]}\n"
    yield b"a: &a [x, x]\nb: &b [*a, *a]\nresources: {r: [*b, {<<: {target: {host: h}}}]}\n"
    for value in ("0x_", "0666", "1e3", "1_0", "12345", "~", "!!binary AA==", "[1]"):
        yield f"resources:\n  a:\n    - target: {{host: h}}\n      selector: {{vendor: {value}}}\n".encode()


def _export_seeds() -> Iterable[bytes]:
    yield b"export: [{vendor: '0951', product: '1666'}, {bus_id: ['1-*', '2-1'], serial: A1, class: '02'}]\n"
    yield b"export: [{all: true}]\nallow: ['10.0.0.0/8', 'fd00::/8', '1.2.3.4/16']\n"
    yield b"export: &e []\nallow: *e\nfence: true\nwhenApiIsAway: serve\nnames: [pi.local, '[fd00::1]', 'pi:1']\n"


TARGETS = (
    Target("configuration", configuration, _seeds, 16384),
    Target("export configuration", export_configuration, _export_seeds, 16384),
)
