"""Messages of a real usbipd, in golden/."""

from pathlib import Path

_GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> bytes:
    return bytes.fromhex((_GOLDEN / f"{name}.hex").read_text())
