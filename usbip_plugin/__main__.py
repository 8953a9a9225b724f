"""`python -m usbip_plugin`."""

import sys

from usbip_plugin.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
