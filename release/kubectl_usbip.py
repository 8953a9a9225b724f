"""The entry of the packed `kubectl usbip`, for systems without Python."""

from usbip_plugin.cli.main import kubectl

kubectl()
