#!/bin/bash
# compile.sh: writes the bytecode that the guest's tests read: of the package, of the tests, and of the asserts that pytest
# rewrites in them. Compiled under emulation it takes ten times as long, at each boot: the guest keeps nothing.
# PYTHON=... chooses the interpreter (.venv/bin/python), which has to be the guest's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || command -v "$python" >/dev/null || { echo "compile.sh: no $python: run make .venv/.test first" >&2; exit 1; }
unset PYTHONDONTWRITEBYTECODE
"$python" -m compileall -q usbip_plugin usbip_sim tests bench
# pytest writes its bytecode during a collection, which sets up no fixtures of the guest
if ! collected=$("$python" -m pytest -q -p no:cacheprovider --collect-only tests/kernel tests/node 2>&1); then
  printf '%s\ncompile.sh: the tests of the guest cannot be collected\n' "$collected" >&2
  exit 1
fi
