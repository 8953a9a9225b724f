#!/bin/bash
# build.sh [GROUP...]: builds missing binaries of Kubernetes and its tools, and prints their directory.
#   apiserver   kube-apiserver etcd                            (the default)
#   etcdutl     etcdutl, which restores backups of etcd
#   nodes       the rest of a control plane, kubelet, kubectl, containerd, runc, CNI plugins
#   kind        kind, kubeadm, kube-proxy, coredns
#   helm        helm
#   promtool    promtool, prometheus without its pages, and the resource definitions of the Prometheus operator and OpenShift
#               in ../crds
#   release     actionlint, helm-docs, validate-krew-manifest
# K8S=1.31|1.33|1.35|1.36|1.37 and CONTAINERD=1.7|2.4 choose other versions; the newest are the default.
# Kept in the cache ($USBIP_PLUGIN_CACHE, default ~/.cache/usbip-plugin). What is missing or has another version is built from
# Go modules: Go >= 1.26 and, for runc, libseccomp-dev and pkg-config; about 14 minutes for all groups on 2 cores from an empty
# module cache. Takes a lock only to build, one for each group. apiserver alone may come from $KUBEBUILDER_ASSETS instead.
# Exit status 75: something cannot be downloaded (in three tries) or built. That says nothing about the project.
set -euo pipefail
# the last is the default
K8S_VERSIONS='1.31.13 1.33.13 1.35.4 1.36.3 1.37.2' CONTAINERD_VERSIONS='1.7.35 2.4.2'
ETCD=3.7.3 RUNC=1.5.2 CNI=1.9.1 KIND=0.33.0 COREDNS=1.14.6 HELM=3.22.0 PROMETHEUS=0.316.0 OPERATOR=0.85.0
ACTIONLINT=1.7.12 HELM_DOCS=1.14.2 KREW=0.4.3 OPENSHIFT=0.0.0-20251015095338-264e80a2b6e7
[ $# -gt 0 ] || set -- apiserver
if [ "$*" = apiserver ] && [ -n "${KUBEBUILDER_ASSETS:-}" ]; then
  for c in kube-apiserver etcd; do
    [ -x "$KUBEBUILDER_ASSETS/$c" ] || { echo "KUBEBUILDER_ASSETS=$KUBEBUILDER_ASSETS has no $c" >&2; exit 1; }
  done
  echo "$KUBEBUILDER_ASSETS"; exit
fi

# choose NAME WANTED VERSION...: the newest version that is WANTED or of that series, such as 1.31 or 2; the last without WANTED
choose() {
  local version chosen=''
  for version in "${@:3}"; do
    case $version in "${2:-$version}" | "$2".*) chosen=$version ;; esac
  done
  [ -n "$chosen" ] || { echo "build.sh: $1=$2: expected one of ${*:3}, or a series such as ${version%.*}" >&2; return 2; }
  echo "$chosen"
}

# shellcheck disable=SC2086 # one word each
K8S=$(choose K8S "${K8S:-}" $K8S_VERSIONS)
# shellcheck disable=SC2086
CONTAINERD=$(choose CONTAINERD "${CONTAINERD:-}" $CONTAINERD_VERSIONS)
dir=${USBIP_PLUGIN_CACHE:-$HOME/.cache/usbip-plugin}/k8s
# other versions have a directory of their own, with links to what they share
bin=$dir/bin
[ "$K8S $CONTAINERD" = "${K8S_VERSIONS##* } ${CONTAINERD_VERSIONS##* }" ] || bin=$dir/bin-k8s-$K8S-containerd-$CONTAINERD
mkdir -p "$bin"
export CGO_ENABLED=0
building='' missing=() work=''
trap '[ -z "$work" ] || rm -rf "$work"' EXIT

fail() { echo "build.sh: $1" >&2; exit 75; }

# have NAME MODULE VERSION: whether a binary was built from that version, which Go records in each binary; links it if it is
# another directory's
have() {
  local file
  for file in "$bin/$1" "$dir"/bin*/"$1"; do
    [ -x "$file" ] && LC_ALL=C grep -qaF "$(printf '\t%s\tv%s\t' "$2" "$3")" "$file" || continue
    [ "$file" = "$bin/$1" ] || ln -sfn "$(realpath "$file")" "$bin/$1"
    return 0
  done
  return 1
}

need_go() {
  command -v go >/dev/null && return
  fail "go >= 1.26 is needed to build $1, or set KUBEBUILDER_ASSETS to a directory that has kube-apiserver and etcd"
}

# thrice COMMAND...: downloads something, in up to three tries
thrice() {
  local try
  for try in 1 2 3; do
    "$@" >"$work/download.log" 2>&1 && return
    [ "$try" = 3 ] || sleep "${try}0"
  done
  tail -n 20 "$work/download.log" >&2
  fail "download failed three times: $*"
}

# build NAME MODULE-DIR PACKAGE [go build flags]
build() {
  (cd "$2" && go build -trimpath "${@:4}" -o "$work/$1.bin" "$3" >&2) || fail "building $1 failed"
  mv "$work/$1.bin" "$bin/$1"
}

# fetch_kubernetes NAME...
fetch_kubernetes() (
  cd "$work/k8s" || exit
  # -e: test-only imports of staging modules do not resolve
  go mod tidy -e || true
  go list -deps "${@/#/k8s.io/kubernetes/cmd/}"
)

# kubernetes NAME...: commands of k8s.io/kubernetes, with the published versions of its staging modules
kubernetes() {
  local name gomod wanted=()
  for name; do have "$name" k8s.io/kubernetes "$K8S" || wanted+=("$name"); done
  [ ${#wanted[@]} -gt 0 ] || return 0
  missing+=("${wanted[@]}")
  [ -n "$building" ] || return 0
  need_go "${wanted[*]}"
  echo "building ${wanted[*]} $K8S" >&2
  if [ ! -e "$work/k8s/go.mod" ]; then
    mkdir "$work/k8s"
    thrice go mod download "k8s.io/kubernetes@v$K8S"
    gomod=$(go mod download -json "k8s.io/kubernetes@v$K8S" | sed -n 's/.*"GoMod": "\(.*\)".*/\1/p')
    { printf 'module cluster.test/k8s\n\ngo 1.26.0\n\nrequire k8s.io/kubernetes v%s\n\nreplace (\n' "$K8S"
      sed -n 's#^\s*\(k8s.io/[a-z-]*\) => ./staging.*#\t\1 => \1 v0.'"${K8S#1.}"'#p' "$gomod"; echo ')'; } >"$work/k8s/go.mod"
  fi
  # only these: a release may lack a staging module that another command needs
  { printf '//go:build tools\n\npackage k8s\n\n'; printf 'import _ "k8s.io/kubernetes/cmd/%s"\n' "${wanted[@]}"; } \
    >"$work/k8s/tools.go"
  thrice fetch_kubernetes "${wanted[@]}"
  local v=k8s.io/component-base/version flags
  flags="-s -w -X $v.gitVersion=v$K8S -X $v.gitMajor=1 -X $v.gitMinor=$(cut -d. -f2 <<<"$K8S") -X $v.gitTreeState=clean"
  for name in "${wanted[@]}"; do build "$name" "$work/k8s" "k8s.io/kubernetes/cmd/$name" -ldflags "$flags"; done
}

# fetch_command MODULE-DIR PACKAGE@VERSION; without the version it would be the newest one
fetch_command() (
  mkdir -p "$1" && cd "$1" || exit
  [ -e go.mod ] || go mod init cluster.test/tool || exit
  go get "$2"
)

# command_of NAME MODULE@VERSION PACKAGE [go build flags]: one command of any other module
command_of() {
  local module=${2%@*} version=${2##*@v}
  ! have "$1" "$module" "$version" || return 0
  missing+=("$1")
  [ -n "$building" ] || return 0
  need_go "$1"
  echo "building $1 $version" >&2
  thrice fetch_command "$work/$module" "$3@v$version"
  build "$1" "$work/$module" "$3" "${@:4}"
}

# resource_definitions MODULE PREFIX SUFFIX NAME...: files of a module, PREFIXnameSUFFIX; the first line of each has its version
resource_definitions() {
  local name from module=$1
  for name in "${@:4}"; do
    ! grep -qsF "# $module" "$dir/crds/$name.yaml" || continue
    missing+=("$name.yaml")
    [ -n "$building" ] || continue
    need_go "$name.yaml"
    thrice go mod download "$module"
    from=$(go mod download -json "$module" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p')
    mkdir -p "$dir/crds"
    # shellcheck disable=SC2086 # PREFIX may be a pattern
    { echo "# $module"; cat "$from"/$2"$name$3"; } >"$work/$name.yaml"
    mv "$work/$name.yaml" "$dir/crds/$name.yaml"
  done
}

# group NAME: adds to missing what the group lacks, and builds that if building is set
group() {
  local module name v plain=(-ldflags "-s -w")
  case $1 in
    apiserver)
      kubernetes kube-apiserver
      command_of etcd "go.etcd.io/etcd/server/v3@v$ETCD" go.etcd.io/etcd/server/v3 "${plain[@]}"
      ;;
    etcdutl)
      command_of etcdutl "go.etcd.io/etcd/etcdutl/v3@v$ETCD" go.etcd.io/etcd/etcdutl/v3 "${plain[@]}"
      ;;
    nodes)
      kubernetes kube-controller-manager kube-scheduler kubelet kubectl
      module=github.com/containerd/containerd
      [ "${CONTAINERD%%.*}" = 1 ] || module+=/v${CONTAINERD%%.*}
      for name in containerd containerd-shim-runc-v2 ctr; do
        command_of "$name" "$module@v$CONTAINERD" "$module/cmd/$name" -tags no_btrfs,no_zfs,no_devmapper \
          -ldflags "-s -w -X $module/version.Version=$CONTAINERD"
      done
      CGO_ENABLED=1 command_of runc "github.com/opencontainers/runc@v$RUNC" github.com/opencontainers/runc -tags seccomp \
        -ldflags "-s -w -X main.version=$RUNC"
      module=github.com/containernetworking/plugins
      for name in main/ptp main/loopback ipam/host-local meta/portmap; do
        command_of "${name#*/}" "$module@v$CNI" "$module/plugins/$name" "${plain[@]}"
      done
      ;;
    kind)
      kubernetes kubeadm kube-proxy
      command_of kind "sigs.k8s.io/kind@v$KIND" sigs.k8s.io/kind "${plain[@]}"
      command_of coredns "github.com/coredns/coredns@v$COREDNS" github.com/coredns/coredns "${plain[@]}"
      ;;
    helm)
      # without these helm reports Kubernetes 1.20, which the chart rejects
      module=helm.sh/helm/v3 v=helm.sh/helm/v3/pkg/chartutil
      command_of helm "$module@v$HELM" "$module/cmd/helm" \
        -ldflags "-s -w -X $v.k8sVersionMajor=1 -X $v.k8sVersionMinor=$(cut -d. -f2 <<<"$K8S")"
      ;;
    promtool)
      # without the clients of thirty clouds, and without their download
      module=github.com/prometheus/prometheus
      for name in promtool prometheus; do
        GOFLAGS=-tags=remove_all_sd command_of "$name" "$module@v$PROMETHEUS" "$module/cmd/$name" "${plain[@]}"
      done
      resource_definitions "github.com/prometheus-operator/prometheus-operator@v$OPERATOR" \
        example/prometheus-operator-crd/monitoring.coreos.com_ .yaml podmonitors prometheusrules
      resource_definitions "github.com/openshift/api@v$OPENSHIFT" 'payload-manifests/crds/*_' .crd.yaml securitycontextconstraints
      ;;
    release)
      module=github.com/rhysd/actionlint
      command_of actionlint "$module@v$ACTIONLINT" "$module/cmd/actionlint" "${plain[@]}"
      module=github.com/norwoodj/helm-docs
      command_of helm-docs "$module@v$HELM_DOCS" "$module/cmd/helm-docs" "${plain[@]}"
      module=sigs.k8s.io/krew
      command_of validate-krew-manifest "$module@v$KREW" "$module/cmd/validate-krew-manifest" "${plain[@]}"
      ;;
    *) echo "no such group: $1" >&2; exit 2 ;;
  esac
}

for wanted; do
  building='' missing=()
  group "$wanted"
  [ ${#missing[@]} -gt 0 ] || continue
  exec 9>"$dir/build-$wanted.lock"
  flock 9
  [ -n "$work" ] || work=$(mktemp -d "$dir/build.XXXXXX")
  building=yes
  group "$wanted" # looks again: it may have waited for another build
  flock --unlock 9
done
echo "$bin"
