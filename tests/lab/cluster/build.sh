#!/bin/bash
# build.sh: makes sure that kube-apiserver and etcd are there, and prints the directory they are in.
# Taken from $KUBEBUILDER_ASSETS if set, else from the cache ($USBIP_PLUGIN_CACHE, default ~/.cache/usbip-plugin), else
# built from Go modules into the cache: Go >= 1.26, about 5 minutes on 2 cores from an empty module cache.
set -euo pipefail
K8S=1.37.2 ETCD=3.7.3
if [ -n "${KUBEBUILDER_ASSETS:-}" ]; then
  for c in kube-apiserver etcd; do
    [ -x "$KUBEBUILDER_ASSETS/$c" ] || { echo "KUBEBUILDER_ASSETS=$KUBEBUILDER_ASSETS has no $c" >&2; exit 1; }
  done
  echo "$KUBEBUILDER_ASSETS"; exit
fi
dir=${USBIP_PLUGIN_CACHE:-$HOME/.cache/usbip-plugin}/k8s
mkdir -p "$dir/bin"
exec 9>"$dir/build.lock"
flock 9
have() { [ -x "$dir/bin/$1" ]; }
have kube-apiserver && have etcd && { echo "$dir/bin"; exit; }
command -v go >/dev/null || { echo "go >= 1.26 is needed to build kube-apiserver and etcd, or set KUBEBUILDER_ASSETS to a directory that has them" >&2; exit 1; }
work=$(mktemp -d "$dir/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
export CGO_ENABLED=0

if ! have kube-apiserver; then
  echo "building kube-apiserver $K8S" >&2
  mkdir "$work/k8s"; cd "$work/k8s"
  gomod=$(go mod download -json "k8s.io/kubernetes@v$K8S" | sed -n 's/.*"GoMod": "\(.*\)".*/\1/p')
  { printf 'module cluster.test/k8s\n\ngo 1.26.0\n\nrequire k8s.io/kubernetes v%s\n\nreplace (\n' "$K8S"
    sed -n 's#^\s*\(k8s.io/[a-z-]*\) => ./staging.*#\t\1 => \1 v0.'"${K8S#1.}"'#p' "$gomod"; echo ')'; } > go.mod
  printf '//go:build tools\n\npackage k8s\n\nimport _ "k8s.io/kubernetes/cmd/kube-apiserver"\n' > tools.go
  go mod tidy -e >tidy.log 2>&1 || true  # -e: test-only imports of staging modules do not resolve
  v="-s -w -X k8s.io/component-base/version.gitVersion=v$K8S -X k8s.io/component-base/version.gitMajor=1"
  v+=" -X k8s.io/component-base/version.gitMinor=$(echo "$K8S" | cut -d. -f2)"
  go build -trimpath -ldflags "$v" -o "$work/kube-apiserver" k8s.io/kubernetes/cmd/kube-apiserver >&2 || { tail tidy.log >&2; exit 1; }
  mv "$work/kube-apiserver" "$dir/bin/"
fi
if ! have etcd; then
  echo "building etcd $ETCD" >&2
  mkdir "$work/etcd"; cd "$work/etcd"
  go mod init cluster.test/etcd >&2
  go get "go.etcd.io/etcd/server/v3@v$ETCD" >&2
  go build -trimpath -ldflags "-s -w" -o "$work/etcd.bin" go.etcd.io/etcd/server/v3 >&2
  mv "$work/etcd.bin" "$dir/bin/etcd"
fi
echo "$dir/bin"
