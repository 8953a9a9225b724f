"""USB devices in software with any functions, on the guest's dummy_hcd. Only for the guest."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.rigs.usbipd import RealUsbipd, eventually
from usbip_plugin.model import UsbId

MODULES = ("dummy_hcd", "libcomposite")
CLIENT_DRIVERS = ("cdc-acm", "usblp", "cdc_ether", "snd-usb-audio")
CONFIGFS = Path("/sys/kernel/config")
LINUX_GADGET = UsbId(0x1D6B, 0x0104)
# report descriptor of a keyboard with eight bytes: modifiers, one reserved, six keys
_KEYBOARD = bytes.fromhex("05010906a101050719e029e71500250175019508810295017508810395067508150025650507190029658100c0")


class Gadget:
    """A device that plug() connects and unplug() removes."""

    def __init__(self, usbipd: RealUsbipd, serial: str, folder: Path) -> None:
        self._usbipd, self._serial, self._folder = usbipd, serial, folder

    def write(self, name: str, value: object) -> None:
        (self._folder / name).write_text(f"{value}\n")

    def plug(self) -> None:
        self.write("UDC", "dummy_udc.0")

    def unplug(self) -> None:
        """Removes the device, and waits until the guest's kernel has noticed."""
        if (self._folder / "UDC").read_text().strip():
            self.write("UDC", "")
            eventually(lambda: self._serial not in self._usbipd.busids(), f"{self._serial} is unplugged")


@contextlib.contextmanager
def gadget(usbipd: RealUsbipd, serial: str, *functions: str, usb_id: UsbId = LINUX_GADGET) -> Iterator[Gadget]:
    """Yields a device that is not plugged in yet. functions: as configfs names them (acm, printer, ecm, hid)."""
    usbipd.load_modules((*MODULES, *(f"usb_f_{name}" for name in functions)))
    if not (CONFIGFS / "usb_gadget").exists():
        subprocess.run(["mount", "-t", "configfs", "configfs", str(CONFIGFS)], check=True)
    folder = CONFIGFS / "usb_gadget" / serial
    made: list[Path] = []
    for path in (
        folder,
        folder / "strings/0x409",
        folder / "configs/c.1",
        *(folder / f"functions/{f}.0" for f in functions),
    ):
        path.mkdir()
        made.append(path)
    device = Gadget(usbipd, serial, folder)
    device.write("idVendor", f"0x{usb_id.vendor:04x}")
    device.write("idProduct", f"0x{usb_id.product:04x}")
    for name, value in (("serialnumber", serial), ("manufacturer", "Ma ker"), ("product", "Model 1/2")):
        device.write(f"strings/0x409/{name}", value)
    if "hid" in functions:
        for name, number in (("protocol", 1), ("subclass", 1), ("report_length", 8)):
            device.write(f"functions/hid.0/{name}", number)
        (folder / "functions/hid.0/report_desc").write_bytes(_KEYBOARD)
    links = [folder / f"configs/c.1/{name}.0" for name in functions]
    for link in links:
        link.symlink_to(folder / f"functions/{link.name}")
    try:
        yield device
    finally:
        device.unplug()
        for link in links:
            link.unlink()
        for path in reversed(made):
            path.rmdir()
