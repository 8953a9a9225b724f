"""image.py KERNEL.deb BUSYBOX INIT OUTDIR: a kernel QEMU can boot, and its initramfs, from a Debian kernel package.

OUTDIR/vmlinux is the uncompressed kernel (QEMU starts it through PVH, faster than through a bzImage's own boot code);
OUTDIR/initrd.cpio holds busybox, INIT and the modules named here with all they depend on. Needs dpkg-deb and zstd.
"""

from __future__ import annotations

import lzma
import re
import stat
import struct
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

MODULES = (
    *("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay", "virtio_net", "virtio_blk"),
    *("xhci-pci", "usb-storage", "uas", "sd_mod", "usbhid", "hid-generic", "evdev", "usbserial", "ftdi_sio", "cdc-acm"),
    *("usbip-core", "usbip-host", "vhci-hcd", "usbip-vudc"),
    *("dummy_hcd", "libcomposite", "usb_f_acm", "usb_f_mass_storage", "usb_f_hid", "usb_f_printer", "usb_f_ecm"),
    *("usblp", "cdc_ether", "snd-usb-audio"),
    *("loop", "veth", "bridge", "dummy", "sch_netem", "ext4", "vfat", "fuse", "tls"),
    # libcrc32c requests crc32c by its crypto alias, not as a dependency
    *("nf_tables", "nft_compat", "nft_chain_nat", "xt_nat", "xt_MASQUERADE", "xt_tcpudp", "crc32c_generic"),
)


@dataclass(frozen=True)
class Module:
    """A module: its path below lib/modules/VERSION, its bytes, its dependencies and its aliases."""

    path: str
    data: bytes
    needs: tuple[str, ...]
    aliases: tuple[str, ...]


def main(package: Path, busybox: Path, init: Path, outdir: Path) -> None:
    version, kernel, files = read_package(package)
    modules: dict[str, Module] = {}
    missing = [name for name in MODULES if not select(plain(name), files, modules)]
    outdir.mkdir(parents=True)
    (outdir / "vmlinux").write_bytes(uncompressed(kernel))
    (outdir / "initrd.cpio").write_bytes(initramfs(version, modules, busybox.read_bytes(), init.read_bytes()))
    print(f"{version}: {len(modules)} modules; built in or absent: {' '.join(missing) or 'none'}")


def plain(name: str) -> str:
    """Returns a module name with _ in place of -, which mean the same."""
    return name.replace("-", "_")


def read_package(package: Path) -> tuple[str, bytes, dict[str, tuple[str, bytes]]]:
    """Returns the version, vmlinuz, and path and stored bytes of each module."""
    version, kernel, files = "", b"", {}
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as archive,
    ):
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content is None:
                continue
            name = Path(member.name).name
            found = re.search(r"lib/modules/[^/]+/(kernel/.*/([^/]+)\.ko)(\.xz|\.zst)?$", member.name)
            if name.startswith("vmlinuz-"):
                version, kernel = name.removeprefix("vmlinuz-"), content.read()
            elif found:
                files[plain(found[2])] = (found[1], content.read())
    if not kernel:
        sys.exit(f"{package}: no kernel inside")
    return version, kernel, files


def uncompressed(vmlinuz: bytes) -> bytes:
    """Returns the ELF kernel inside a bzImage, whose header Documentation/arch/x86/boot.rst describes."""
    setup = (vmlinuz[0x1F1] or 4) + 1
    offset, length = struct.unpack_from("<II", vmlinuz, 0x248)
    payload = vmlinuz[setup * 512 + offset : setup * 512 + offset + length]
    # The last four bytes are the size of the result. zstd would read them as the next frame.
    return decompressed(payload[:-4] if payload.startswith(b"\x28\xb5\x2f\xfd") else payload)


def decompressed(data: bytes) -> bytes:
    if data.startswith(b"\x28\xb5\x2f\xfd"):
        return subprocess.run(["zstd", "-dcq"], input=data, stdout=subprocess.PIPE, check=True).stdout
    if data.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor().decompress(data)
    if data.startswith(b"\x7fELF"):
        return data
    sys.exit(f"unknown compression: {data[:6]!r}")


def select(name: str, files: dict[str, tuple[str, bytes]], chosen: dict[str, Module]) -> bool:
    """Adds a module and its dependencies. Returns False if the package does not have it."""
    if name in chosen or name not in files:
        return name in files
    path, data = files[name]
    data = decompressed(data)
    info = modinfo(data)
    needs = tuple(plain(need) for key, value in info if key == "depends" for need in value.split(",") if need)
    soft = [plain(need) for key, value in info if key == "softdep" for need in value.partition(":")[2].split()]
    chosen[name] = Module(path, data, needs, tuple(value for key, value in info if key == "alias"))
    for need in (*needs, *soft):
        select(need, files, chosen)
    return True


def modinfo(elf: bytes) -> list[tuple[str, str]]:
    """Returns the fields of section .modinfo of an ELF64 file."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", elf, table + index * size) for index in range(count)]
    for name, _type, _flags, _address, offset, length in sections:
        start = sections[names][4] + name
        if elf[start : elf.index(b"\0", start)] == b".modinfo":
            texts = elf[offset : offset + length].decode("latin-1").split("\0")
            return [(key, value) for key, equals, value in (text.partition("=") for text in texts) if equals]
    return []


def load_order(name: str, modules: dict[str, Module]) -> list[str]:
    """Returns a module and its dependencies, deepest first."""
    order: list[str] = []
    for need in modules[name].needs:
        if need in modules:
            order += [one for one in load_order(need, modules) if one not in order]
    return [*order, name]


class Cpio:
    """Returns a newc archive."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._folders: set[str] = set()

    def add(self, path: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        for parent in reversed(Path(path).parents[:-1]):
            if str(parent) not in self._folders:
                self._folders.add(str(parent))
                self.add(str(parent), stat.S_IFDIR | 0o755)
        if stat.S_ISDIR(mode):
            self._folders.add(path)
        name = path.encode() + b"\0"
        numbers = (len(self._parts) + 1, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name), 0)
        head = b"070701" + b"".join(b"%08X" % number for number in numbers) + name
        self._parts.append(head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4))

    def finish(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return b"".join(self._parts)


def initramfs(version: str, modules: dict[str, Module], busybox: bytes, init: bytes) -> bytes:
    archive = Cpio()
    for folder in ("bin", "sbin", "proc", "sys", "dev", "tmp"):
        archive.add(folder, stat.S_IFDIR | 0o755)
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive.add("bin/busybox", stat.S_IFREG | 0o755, busybox)
    archive.add("bin/sh", stat.S_IFLNK | 0o777, b"busybox")
    # absolute: the kernel runs it also when another root is mounted over this one, and then ".." is that root
    archive.add("sbin/modprobe", stat.S_IFLNK | 0o777, b"/bin/busybox")
    archive.add("init", stat.S_IFREG | 0o755, init)
    base = f"lib/modules/{version}"
    needs, aliases = [], []
    for name, module in sorted(modules.items()):
        archive.add(f"{base}/{module.path}", stat.S_IFREG | 0o644, module.data)
        before = [modules[need].path for need in reversed(load_order(name, modules)[:-1])]
        needs.append(" ".join([module.path + ":", *before]))
        aliases += [f"alias {alias} {name}" for alias in module.aliases]
    for name, lines in (("dep", needs), ("alias", aliases), ("builtin", []), ("symbols", [])):
        text = "".join(f"{line}\n" for line in lines)
        archive.add(f"{base}/modules.{name}", stat.S_IFREG | 0o644, text.encode())
    return archive.finish()


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:5]))
