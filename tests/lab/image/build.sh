#!/bin/bash
# build.sh [--builder docker|buildah] [--arch amd64|arm64] [--base IMAGE] [--offline] [--output TAR]
#          [--revision COMMIT] [--no-cache] [NAME:TAG]
# Builds the image of this checkout, usbip-plugin:VERSION unless named. Where no image registry answers, or with --offline,
# the base is made from Debian packages (base.sh) and the wheels are fetched here (wheels.sh), so that the build itself
# needs no network. --output writes an archive too, for `kind load image-archive`, `ctr images import`, `docker load`.
# --revision takes the files of another commit, --no-cache makes each layer anew. DOCKER names another docker command.
# SOURCE_DATE_EPOCH (0) is the time of files and image; one tree gives one image with buildah. A foreign architecture with
# docker needs BuildKit.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../../.." && pwd)
native=$(uname -m | sed 's/^x86_64$/amd64/; s/^aarch64$/arm64/')
builder='' arch=$native base='' offline='' output='' revision='' image=usbip-plugin
epoch=${SOURCE_DATE_EPOCH:-0} cache=()
docker=${DOCKER:-docker}
REGISTRY_SECONDS=5

fail() { echo "build.sh: $1" >&2; exit "${2:-1}"; }
while [ $# -gt 0 ]; do
  case $1 in
    --builder | --arch | --base | --output | --revision) [ $# -gt 1 ] || fail "$1 wants a value" 2; declare "${1#--}=$2"; shift ;;
    --offline) offline=1 ;;
    --no-cache) cache=(--no-cache) ;;
    -h | --help) sed -n '2,10s/^# //p' "${BASH_SOURCE[0]}"; exit ;;
    -*) fail "there is no $1; see --help" 2 ;;
    *) image=$1 ;;
  esac
  shift
done
case $arch in amd64 | arm64) ;; *) fail "--arch $arch: amd64 and arm64 are built" 2 ;; esac
[ -z "$base" ] || [ -z "$offline" ] || fail "--base and --offline exclude each other" 2

if [ -z "$builder" ]; then
  if "$docker" version >/dev/null 2>&1; then builder=docker
  elif command -v buildah >/dev/null; then builder=buildah
  else fail "neither a Docker engine (DOCKER_HOST) nor buildah is to be had; on Debian: apt-get install buildah"; fi
fi
case $builder in docker | buildah) ;; *) fail "--builder $builder: docker or buildah" 2 ;; esac
if [ -z "$base$offline" ]; then
  # any answer is enough: the registry's is 401
  python3 - "$REGISTRY_SECONDS" <<'P' || offline=1
import sys, urllib.error, urllib.request
try:
    urllib.request.urlopen("https://registry-1.docker.io/v2/", timeout=float(sys.argv[1]))
except urllib.error.HTTPError:
    pass
except OSError as error:
    sys.exit(f"no image registry ({error}): the base is made from Debian packages")
P
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# only files that .dockerignore admits, so that others cost no time
mkdir "$work/context"
files=(Dockerfile .dockerignore pyproject.toml image.lock image-build.lock release/sbom.py README.md LICENSE usbip_plugin usbip_sim)
if [ -n "$revision" ]; then
  # a revision may not have all of them
  mapfile -t files < <(git -C "$root" ls-tree --name-only "$revision" "${files[@]}")
  git -C "$root" archive "$revision" "${files[@]}" | tar -C "$work/context" -xf -
else (cd "$root" && cp -r --parents "${files[@]}" "$work/context/"); fi
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$work/context/usbip_plugin/__init__.py")
[[ $image = *:* ]] || image=$image:$version
# the name as the engines and containerd know it
full=$image
[[ $image = */* ]] || full=docker.io/library/$image
# Only BuildKit says which machine it builds on. buildah 1.28 takes the first stage's platform for the last one, too.
sed -i "s|\${BUILDPLATFORM:-linux/amd64}|linux/$native|" "$work/context/Dockerfile"
[ "$builder" = docker ] || sed -i "s|^FROM \${BASE}|FROM --platform=linux/$arch \${BASE}|" "$work/context/Dockerfile"
arguments=("${cache[@]}" --build-arg "VERSION=$version" --build-arg "SOURCE_DATE_EPOCH=$epoch")
[ -z "$base" ] || arguments+=(--build-arg "BASE=$base")

# buildah: chroot needs no more rights than root has in a container, and RUN runs only code of the project
bud() { BUILDAH_ISOLATION=${BUILDAH_ISOLATION:-chroot} nice -n 10 buildah "$@"; }
if [ "$builder" = buildah ] && [ -z "${STORAGE_DRIVER:-}" ] && ! buildah images >/dev/null 2>&1; then
  # no overlay on overlay
  export STORAGE_DRIVER=vfs
fi

if [ -n "$offline" ]; then
  for wanted in $(printf '%s\n' "$native" "$arch" | sort -u); do
    archive=$("$here/base.sh" "$wanted")
    if [ "$builder" = docker ]; then "$docker" load --quiet --input "$archive" >/dev/null
    else bud pull --quiet --platform "linux/$wanted" "docker-archive:$archive" >/dev/null; fi
  done
  mkdir "$work/context/wheels"
  wheels=$("$here/wheels.sh" "$arch" 3.11)
  cp "$wheels"/*.whl "$work/context/wheels/"
  arguments+=(--build-arg "BASE=localhost/usbip-plugin-base:$arch" --build-arg "BUILDER=localhost/usbip-plugin-base:$native" --build-arg PIP_NO_INDEX=1)
fi

# buildah builds a layer again if the time of a file has changed
find "$work/context" -exec touch -h -d @0 {} +

begin=$SECONDS
case $builder in
  docker)
    [ -z "$offline" ] || arguments+=(--network none)
    if [ "$arch" != "$native" ]; then
      export DOCKER_BUILDKIT=1
      arguments+=(--platform "linux/$arch")
    fi
    nice -n 10 "$docker" build "${arguments[@]}" --tag "$image" "$work/context"
    built=$("$docker" image inspect --format '{{.Architecture}}' "$image")
    ;;
  buildah)
    [ -z "$offline" ] || arguments+=(--pull=never)
    bud build --layers --timestamp "$epoch" --platform "linux/$arch" --build-arg "TARGETARCH=$arch" \
      "${arguments[@]}" --tag "$full" "$work/context"
    built=$(bud inspect --type image --format '{{.OCIv1.Architecture}}' "$full")
    ;;
esac
[ "$built" = "$arch" ] || fail "$builder made an image for $built, not for $arch: give one with BuildKit, or --builder buildah"

if [ -n "$output" ]; then
  # written beside and moved, so that a reader never has a partial file
  mkdir -p "$(dirname "$output")"
  new=$output.new
  rm -f "$new"
  if [ "$builder" = docker ]; then "$docker" save --output "$new" "$image"
  else bud push --quiet "$full" "docker-archive:$new:$full"; fi
  chmod 644 "$new"
  mv "$new" "$output"
fi
echo "$full ($arch, $builder, $((SECONDS - begin)) s)${output:+: $output}" >&2
