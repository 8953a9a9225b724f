r"""Prepares this checkout for publishing: writes where a release is published into every file that names it.

    python release/prepare.py --repository https://github.com/OWNER/usbip-plugin \
        --image REGISTRY/OWNER/usbip-plugin --tag v0.1.0

Nothing else in the project names a registry or a repository. The checkout is changed in place, so that the usual
commands (docker build, helm package, kubectl kustomize, python -m build) make what is published. The release workflow
runs this in its own checkout, and nothing of it is committed.
"""

from __future__ import annotations

import argparse
import posixpath
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHART = "deploy/helm/usbip-plugin"
_REPOSITORY = re.compile(r"https://[A-Za-z0-9.-]+(/[A-Za-z0-9._-]+)+")
_IMAGE = re.compile(r"[a-z0-9.-]+(:[0-9]+)?(/[a-z0-9._-]+)+")
_PINNED_BASE = re.compile(r"^ARG BASE=\S+@sha256:[0-9a-f]{64}$", re.MULTILINE)
_RELATIVE_LINK = re.compile(r"(?P<image>!?)(\[[^\]]*\]\()(?!https?://|#)([^)]+\))")


class Unusable(Exception):
    """The release cannot be prepared, with the cause."""


def version(root: Path = ROOT) -> str:
    """Returns the project's version, which stands in usbip_plugin/__init__.py."""
    found = re.search(r'^__version__ = "([^"]+)"$', (root / "usbip_plugin/__init__.py").read_text(), re.MULTILINE)
    if found is None:
        raise Unusable("usbip_plugin/__init__.py has no __version__")
    return found[1]


def prepare(root: Path, repository: str, image: str, tag: str) -> None:
    """Writes repository, image and links of this tag into the files below root.

    repository: URL of the source repository. image: name of the container image without tag. tag: "v" + version.
    Raises Unusable if an argument is not valid, or if a file does not have what is to be replaced.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise Unusable(
            f"--repository: expected a URL such as https://github.com/OWNER/usbip-plugin, got {repository!r}"
        )
    if not _IMAGE.fullmatch(image):
        raise Unusable(f"--image: expected a name with its registry and without a tag, got {image!r}")
    if tag != f"v{version(root)}":
        raise Unusable(
            f"--tag: the project's version is {version(root)}, so the tag must be v{version(root)}, not {tag}"
        )
    if not _PINNED_BASE.search((root / "Dockerfile").read_text(encoding="utf-8")):
        raise Unusable(
            "Dockerfile: ARG BASE has no digest, so the image could have any base; append @sha256:... as printed by:"
            " docker buildx imagetools inspect BASE --format '{{.Manifest.Digest}}'"
        )
    if "[project.urls]" in (root / "pyproject.toml").read_text(encoding="utf-8"):
        raise Unusable("pyproject.toml has [project.urls]: this checkout is prepared already; take a fresh one")
    urls = (
        f'[project.urls]\nHomepage = "{repository}"\nSource = "{repository}"\nIssues = "{repository}/issues"\n'
        f'Documentation = "{repository}/tree/{tag}/docs"\nChangelog = "{repository}/blob/{tag}/CHANGELOG.md"\n\n'
    )
    for project in ("pyproject.toml", "packaging/kubectl-usbip/pyproject.toml"):
        _edit(root / project, lambda text: text.replace("[project.scripts]", urls + "[project.scripts]", 1))

    def link(found: re.Match[str]) -> str:
        # an image needs the file itself
        return f"{found[1]}{found[2]}{repository}/{'raw' if found['image'] else 'blob'}/{tag}/{found[3]}"

    # the long description on the package index, where relative links lead nowhere
    _edit(root / "README.md", lambda text: _RELATIVE_LINK.sub(link, text))
    _prepare_chart(root, repository, image, tag)
    for kustomization in sorted(root.glob("deploy/**/kustomization.yaml")):
        if f"    newTag: {version(root)}\n" in kustomization.read_text():
            name = f"    newName: {image}\n    newTag: {version(root)}\n"
            _edit(kustomization, lambda text, name=name: text.replace(f"    newTag: {version(root)}\n", name, 1))  # type: ignore[misc]


def _prepare_chart(root: Path, repository: str, image: str, tag: str) -> None:
    """Writes the image, the links and what Artifact Hub shows into the chart."""
    head = f"home: {repository}\nsources: [{repository}]\nicon: {repository}/raw/{tag}/docs/icon.svg\n"
    shown = (
        f"  artifacthub.io/images: |\n    - name: usbip-plugin\n      image: {image}:{version(root)}\n"
        f"  artifacthub.io/links: |\n    - name: documentation\n      url: {repository}/tree/{tag}/docs\n"
        f"    - name: support\n      url: {repository}/issues\n"
        "  artifacthub.io/screenshots: |\n    - title: status page of a node\n"
        f"      url: {repository}/raw/{tag}/docs/status-page.png\n"
    )
    _edit(
        root / CHART / "Chart.yaml",
        lambda text: text.replace("type: application\n", f"type: application\n{head}", 1).rstrip("\n") + "\n" + shown,
    )
    _edit(
        root / CHART / "values.yaml",
        lambda text: text.replace("  repository: usbip-plugin\n", f"  repository: {image}\n", 1),
    )
    chart = f"oci://{image.rpartition('/')[0]}/charts/usbip-plugin --version {version(root)}"
    _edit(
        root / CHART / "README.md",
        lambda text: (
            _RELATIVE_LINK.sub(
                lambda link: (
                    f"{link[1]}{link[2]}{repository}/blob/{tag}/{posixpath.normpath(posixpath.join(CHART, link[3]))}"
                ),
                text,
            )
            .replace(f" {CHART} ", f" {chart} ", 1)
            .replace('`"usbip-plugin"`', f'`"{image}"`', 1)
        ),
    )


def _edit(path: Path, change: Callable[[str], str]) -> None:
    before = path.read_text(encoding="utf-8")
    after = change(before)
    if after == before:
        raise Unusable(f"{path}: has nothing to replace")
    path.write_text(after, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repository", required=True, metavar="URL", help="source repository")
    parser.add_argument("--image", required=True, metavar="NAME", help="container image with its registry, without tag")
    parser.add_argument("--tag", required=True, metavar="TAG", help='"v" and the version')
    options = parser.parse_args()
    try:
        prepare(ROOT, options.repository, options.image, options.tag)
    except Unusable as error:
        sys.stderr.write(f"prepare.py: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
