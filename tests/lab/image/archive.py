"""archive.py ROOTFS.TAR ARCHITECTURE NAME OUTPUT [ENTRYPOINT]: one root file system as an image archive.

The archive is such as `docker save` writes.
`docker import` cannot say the architecture of what it imports; an archive can.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def write_archive(rootfs: Path, architecture: str, name: str, output: Path, entrypoint: str | None = None) -> None:
    """Writes `output`, which holds one image `name` of one layer, the uncompressed tar `rootfs`."""
    with rootfs.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    # buildah also compares the variant of an arm64 image
    platform = {"architecture": architecture} | ({"variant": "v8"} if architecture == "arm64" else {})
    program = {"Entrypoint": [entrypoint]} if entrypoint else {"Cmd": ["python3"]}
    config = json.dumps(
        {
            **platform,
            "os": "linux",
            "config": {"Env": [f"PATH={PATH}"], **program},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
            "history": [{"created_by": "mmdebstrap"}],
        }
    ).encode()
    config_name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = json.dumps([{"Config": config_name, "RepoTags": [name], "Layers": [f"{digest}/layer.tar"]}]).encode()
    with tarfile.open(output, "w") as archive:
        for member, content in ((config_name, config), ("manifest.json", manifest)):
            entry = tarfile.TarInfo(member)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        archive.add(rootfs, f"{digest}/layer.tar")


if __name__ == "__main__":
    if len(sys.argv) not in (5, 6):
        sys.exit(__doc__)
    write_archive(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]), *sys.argv[5:])
