"""The command line. parser.py has every command and flag; exits.py what the exit status says."""

from usbip_plugin.cli.main import kubectl, main
from usbip_plugin.cli.parser import parser

__all__ = ["kubectl", "main", "parser"]
