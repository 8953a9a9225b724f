"""For PyInstaller: packs the sources, too, of which usbip_plugin/kube/lazy_imports.py reads the package files."""

module_collection_mode = "pyz+py"
