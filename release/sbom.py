"""Writes the SBOM of installed Python packages to standard output, as SPDX 2.3 in JSON.

    sbom.py DIRECTORY...        each with packages and their .dist-info

The time in it is SOURCE_DATE_EPOCH, so that the same packages give the same text. Runs with any Python from 3.11 on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from datetime import UTC, datetime
from importlib.metadata import Distribution, distributions


def package(found: Distribution) -> dict[str, object]:
    """Returns the SPDX package of an installed distribution."""
    name = re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower()
    stated = "License-Expression" in found.metadata
    declared = found.metadata["License-Expression"] if stated else "NOASSERTION"
    purl = {"referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl"}
    return {
        "SPDXID": f"SPDXRef-{name}",
        "name": name,
        "versionInfo": found.version,
        "downloadLocation": "NOASSERTION",
        "filesAnalyzed": False,
        "licenseConcluded": "NOASSERTION",
        "licenseDeclared": declared,
        "copyrightText": "NOASSERTION",
        "externalRefs": [{**purl, "referenceLocator": f"pkg:pypi/{name}@{found.version}"}],
    }


def document(paths: list[str], epoch: int) -> dict[str, object]:
    """Returns the SPDX document of all distributions in these directories. epoch: seconds since 1970."""
    packages = sorted((package(one) for one in distributions(path=paths)), key=lambda one: str(one["SPDXID"]))
    digest = hashlib.sha256(json.dumps(packages, sort_keys=True).encode()).hexdigest()
    return {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": "usbip-plugin",
        "documentNamespace": f"https://spdx.org/spdxdocs/usbip-plugin-{digest}",
        "creationInfo": {
            "created": datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "creators": ["Tool: usbip-plugin release/sbom.py"],
        },
        "packages": packages,
        "relationships": [
            {"spdxElementId": "SPDXRef-DOCUMENT", "relationshipType": "DESCRIBES", "relatedSpdxElement": one["SPDXID"]}
            for one in packages
        ],
    }


if __name__ == "__main__":
    json.dump(document(sys.argv[1:], int(os.environ.get("SOURCE_DATE_EPOCH", "0"))), sys.stdout, indent=1)
    sys.stdout.write("\n")
