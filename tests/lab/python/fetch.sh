#!/bin/bash
# fetch.sh 3.13|3.14: a Python that this machine does not have, from the packages of a newer Debian. Prints its path. It
# brings the C library that it was built with, and runs this machine's programs. Kept in the cache; remove it there to
# fetch it again. Needs root, mmdebstrap and patchelf.
# Exit status 75: no Debian has it, or it cannot be downloaded. That says nothing about the project.
set -euo pipefail
version=${1:-}
case $version in
  3.13) suite=trixie ;;
  3.14) suite=forky ;;
  *)
    echo "no Python '$version' >= 3.11 found, and only 3.13 and 3.14 are fetched; name one with: make test-python PYTHON=/path/to/python" >&2
    exit 75
    ;;
esac
for command in mmdebstrap patchelf; do
  command -v "$command" >/dev/null || { echo "fetch.sh: $command is missing: apt-get install $command" >&2; exit 1; }
done

directory=${USBIP_PLUGIN_CACHE:-$HOME/.cache/usbip-plugin}/python/$version
mkdir -p "${directory%/*}"
exec 9>"$directory.lock"
flock 9
if [ ! -e "$directory" ]; then
  new=$(mktemp -d "$directory.XXXXXX")
  trap 'rm -rf "$new"' EXIT
  # a mirror may be older than the week for which the list of a Debian that is not released yet is valid
  mmdebstrap --quiet --variant=extract --include="python$version-venv" --aptopt='Acquire::Languages "none"' \
    --aptopt='Acquire::Check-Valid-Until "false"' "$suite" "$new" >&2 || { echo "fetch.sh: download failed" >&2; exit 75; }
  python=usr/bin/python$version
  loader=$(basename "$(patchelf --print-interpreter "$new/$python")")
  libraries=$(cd "$new" && echo usr/lib/*/"$loader")
  libraries=${libraries%/*}
  patchelf --set-interpreter "$directory/$libraries/$loader" --force-rpath --set-rpath "$directory/$libraries" "$new/$python"
  # where venv looks for pip
  grep -rIl --include='_sysconfig*' '/usr/share/python-wheels' "$new/usr/lib/python$version" |
    xargs sed -i "s|/usr/share/python-wheels|$directory&|"
  chmod 755 "$new"
  mv "$new" "$directory"
fi
echo "$directory/usr/bin/python$version"
