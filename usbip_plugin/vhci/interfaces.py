"""The interfaces of a device: as its descriptors list them, as the kernel has them, and which of them it may use.

The kernel authorises each interface of a device that is authorised, unless interface_authorized_default of its root hub
is 0 (usb_set_configuration in drivers/usb/core/message.c). No driver binds to an interface that is not authorised, and
no process can claim it (drivers/usb/core/driver.c). The kernel does not probe an interface that is authorised later:
that takes a write to drivers_probe (Documentation/usb/authorization.rst).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from usbip_plugin.errors import AttachStuck, InterfacesRefused
from usbip_plugin.model import HUB_CLASS, DeviceKey, InterfaceClass, InterfaceRules
from usbip_plugin.vhci.devices import MAX_DESCRIPTORS, text
from usbip_plugin.vhci.hubs import INTERFACES, HubGuard
from usbip_plugin.vhci.sysfs import Port, Writer, refusal

MAX_INTERFACES = 256
"""Interfaces of a device that are authorised; the kernel takes 32 of a configuration (USB_MAXINTERFACES)."""
_DEVICE, _CLASS_AT = 1, 4  # descriptor types and what is where in them (USB 2.0, 9.6)
_CONFIGURATION, _VALUE_AT = 2, 5
_INTERFACE, _NUMBER_AT, _CODES_AT = 4, 2, 5
_NAME = re.compile(r":([0-9]{1,3})\.([0-9]{1,3})")

Place = tuple[int, int]
"""bConfigurationValue of its configuration, and bInterfaceNumber, of an interface."""


@dataclass(frozen=True, slots=True)
class DeviceInterfaces:
    """The class of a device, and its interfaces in all configurations, each with all its alternate settings."""

    device_class: int
    settings: Mapping[Place, frozenset[InterfaceClass]]

    @property
    def is_hub(self) -> bool:
        """Returns whether the hub driver would bind, which looks at both (hub_id_table of drivers/usb/core/hub.c)."""
        classes = {setting.class_ for settings in self.settings.values() for setting in settings}
        return HUB_CLASS in classes | {self.device_class}


def parse_descriptors(raw: bytes) -> DeviceInterfaces:
    """Returns what the `descriptors` file of a device lists. An interface of no configuration has the value 0."""
    device_class = configuration = at = 0
    found: dict[Place, set[InterfaceClass]] = {}
    while at + 2 <= len(raw) and raw[at] >= 2:
        part = raw[at : at + raw[at]]
        if part[1] == _DEVICE and len(part) > _CLASS_AT and at == 0:
            device_class = part[_CLASS_AT]
        elif part[1] == _CONFIGURATION and len(part) > _VALUE_AT:
            configuration = part[_VALUE_AT]
        elif part[1] == _INTERFACE and len(part) >= _CODES_AT + 3:
            codes = InterfaceClass(*part[_CODES_AT : _CODES_AT + 3])
            found.setdefault((configuration, part[_NUMBER_AT]), set()).add(codes)
        at += len(part)
    return DeviceInterfaces(device_class, {place: frozenset(settings) for place, settings in found.items()})


def read_interfaces(device: Path) -> DeviceInterfaces:
    """Returns the interfaces of a device. Raises OSError if they cannot be read.

    The kernel reads them before it authorises the device, and has cut off what it could not parse
    (usb_parse_configuration).
    """
    with (device / "descriptors").open("rb") as file:
        return parse_descriptors(file.read(MAX_DESCRIPTORS))


def present_interfaces(device: Path) -> dict[Place, tuple[Path, bool]]:
    """Returns the interfaces of the present configuration, sorted: the directory, and whether it is authorised."""
    found: dict[Place, tuple[Path, bool]] = {}
    for folder in sorted(device.glob(f"{device.name}:*"))[:MAX_INTERFACES]:
        if (name := _NAME.fullmatch(folder.name.removeprefix(device.name))) is not None:
            found[int(name[1]), int(name[2])] = folder, is_authorized(folder)
    return dict(sorted(found.items()))


def is_authorized(interface: Path) -> bool:
    """Returns whether an interface is authorised. interface: its directory."""
    try:
        return text(interface / "authorized") != "0"
    except OSError:
        return True  # the directory is going


def authorized_and_withheld(device: Path) -> tuple[tuple[InterfaceClass, ...], tuple[InterfaceClass, ...]]:
    """Returns the alternate settings of the interfaces that are authorised, and of those that are not, sorted."""
    try:
        listed = read_interfaces(device).settings
    except OSError:
        return (), ()
    by: dict[bool, set[InterfaceClass]] = {True: set(), False: set()}
    for place, (_folder, authorized) in present_interfaces(device).items():
        by[authorized] |= listed.get(place, frozenset())
    return tuple(sorted(by[True])), tuple(sorted(by[False]))


class InterfaceGate:
    """Authorises devices with those interfaces that their resources allow.

    sysfs, records: directories. write: as for HubGuard. writer: makes all other writes.
    """

    def __init__(self, sysfs: Path, records: Path, write: Callable[[Path, str], None], writer: Writer) -> None:
        self._guard = HubGuard(sysfs, records, write, INTERFACES)
        self._probe_file = sysfs / "bus/usb/drivers_probe"
        self._writer = writer

    def problem(self) -> str | None:
        """Returns why no interface of a device can be withheld, and what to do, or None."""
        if (why := refusal(self._probe_file)) is None:
            return None
        return f"no interface of a device can be withheld: cannot write {self._probe_file}: {why}; mount it writable"

    def withheld(self, key: DeviceKey, found: DeviceInterfaces, rules: InterfaceRules) -> bool:
        """Returns whether an interface of the device is to be withheld. Raises InterfacesRefused if none is allowed.

        Raises InterfacesRefused also if one is to be withheld, and the others could not be probed.
        """
        every = found.settings.values()
        if (problem := rules.problem(found.device_class, every)) is not None:
            raise InterfacesRefused(f"{key} {problem}")
        if all(map(rules.allows, every)):
            return False
        if (problem := self.problem()) is not None:
            raise InterfacesRefused(f"{key} {rules.objection(every)}, and {problem}")
        return True

    async def authorize(
        self,
        key: DeviceKey,
        port: Port,
        device: Path,
        found: DeviceInterfaces,
        rules: InterfaceRules,
        *,
        withheld: bool,
    ) -> None:
        """Authorises the device, and then its allowed interfaces where they are not. Probes these.

        The caller must call release() once the device is detached.
        withheld: the result of withheld(). Raises InterfacesRefused, AttachStuck and OSError; then the caller must
        detach the device, of which no other interface was authorised.
        """
        if withheld:
            self._guard.hold(port)
        else:
            self._guard.release(port.number)  # of a device that was on this port before, over the same connection
        # Write also if the device is authorised already: the write takes the device lock, so when it returns, the
        # kernel has probed the interfaces.
        await self._writer.write(device / "authorized", "1", device=port.number)
        present = present_interfaces(device)
        if withheld:
            settings = {place: found.settings.get(place, frozenset()) for place in present}
            if (problem := rules.problem(found.device_class, settings.values())) is not None:
                raise InterfacesRefused(f"{key} {problem}")
            if any(present[place][1] and not rules.allows(one) for place, one in settings.items()):
                raise AttachStuck(f"{key} on port {port.number}: another process has authorised all its interfaces")
        # not only of a device with some withheld: another one of this hub may be in authorize() now
        closed = [
            folder
            for place, (folder, authorized) in present.items()
            if not authorized and rules.allows(found.settings.get(place, ()))
        ]
        await self._open(port.number, closed)

    async def _open(self, port: int, interfaces: Collection[Path]) -> None:
        """Authorises all these interfaces before it probes the first: a driver may claim several."""
        for folder in interfaces:
            await self._writer.write(folder / "authorized", "1", device=port)
        for folder in interfaces:
            await self._writer.write(self._probe_file, folder.name, device=port)

    def release(self, port: int) -> None:
        """Lets the kernel authorise the interfaces of the port's hub by default again. Idempotent."""
        self._guard.release(port)

    def held(self) -> frozenset[int]:
        """Returns the ports whose devices have interfaces that are withheld."""
        return self._guard.ports()

    def hold_withheld(self, port: Port, device: Path) -> None:
        """Keeps the interfaces withheld that an attached device has unauthorised, if any. Raises OSError."""
        if not all(authorized for _folder, authorized in present_interfaces(device).values()):
            self._guard.hold(port)

    def restore_leftovers(self) -> None:
        """Restores the hubs that an earlier process left closed, and of which no port is held."""
        self._guard.restore_leftovers()
