"""The command line. parser.py has every command and flag; exits.py what the exit status says."""

from usbip_plugin.kube import lazy_imports

lazy_imports.install()  # before anything brings the libraries

from usbip_plugin.cli.main import kubectl, main  # noqa: E402
from usbip_plugin.cli.parser import parser  # noqa: E402

__all__ = ["kubectl", "main", "parser"]
