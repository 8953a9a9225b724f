"""Notes the Python of the unit tests."""

from __future__ import annotations

import os
import platform

import pytest

from tests.rigs.tested_with import ran_with

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
"""Names of Debian and of image registries, by those of the kernel."""


def pytest_configure(config: pytest.Config) -> None:
    architecture = ARCHITECTURES.get(platform.machine(), platform.machine())
    if os.environ.get("EMULATED"):  # by tests/lab/image/units.sh
        ran_with(config, "architecture", f"{architecture} under emulation")
    else:
        ran_with(config, "python", platform.python_version())
        ran_with(config, "architecture", architecture)
