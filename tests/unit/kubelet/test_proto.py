"""The gRPC stubs in the repository are those that proto/generate.sh writes."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
STUBS = ("deviceplugin_pb2.py", "deviceplugin_pb2.pyi", "deviceplugin_pb2_grpc.py")


def test_stubs_are_up_to_date(tmp_path: Path) -> None:
    subprocess.run(
        ["sh", ROOT / "proto" / "generate.sh", tmp_path], check=True, env={**os.environ, "PYTHON": sys.executable}
    )
    written = sorted((tmp_path / "usbip_plugin" / "kubelet").iterdir())
    assert len(written) == 2 * len(STUBS)
    for path in written:
        assert path.read_bytes() == (ROOT / "usbip_plugin" / "kubelet" / path.name).read_bytes(), path.name
