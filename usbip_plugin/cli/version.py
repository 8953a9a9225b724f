"""`usbip-plugin version`."""

from __future__ import annotations

import argparse
import platform

from usbip_plugin import __version__
from usbip_plugin.cli.parser import Exit
from usbip_plugin.cli.tables import structured


def version(options: argparse.Namespace) -> int:
    """Carries out `usbip-plugin version`."""
    found = {"version": __version__, "python": platform.python_version(), "platform": platform.platform()}
    text = f"usbip-plugin {__version__}" if options.output == "text" else structured(found, options.output)
    print(text)  # noqa: T201 - the command line's own voice
    return Exit.DONE
