#!/bin/bash
# node-image.sh: makes a node image for kind where no registry has one, from Debian packages and the binaries of
# ../cluster/build.sh, loads it into the Docker engine (DOCKER_HOST) and prints its name. An archive is kept in the cache.
# Needs root; about a minute once the binaries are there.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bin=$("$here/../cluster/build.sh" apiserver nodes kind | tail -1)
kubernetes=$("$bin/kubelet" --version | sed 's/.* v//')
kind=$("$bin/kind" version -q 2>/dev/null || "$bin/kind" version | sed 's/kind v\([^ ]*\).*/\1/')
kind=${kind#v}
cache=${USBIP_PLUGIN_CACHE:-$HOME/.cache/usbip-plugin}/kind
# the name depends on every input, the versions of the binaries included
recipe=$({ cat "$here/node-image.sh" "$here/cni.sh" "$here/cni.yaml" "$here/../image/archive.py" "$here/../cluster/pause.c"
  grep -A 1 '^K8S_VERSIONS=' "$here/../cluster/build.sh"; } | sha256sum | cut -c1-8)
repository=localhost/usbip-plugin-node
image=$repository:v$kubernetes-$recipe
docker image inspect "$image" >/dev/null 2>&1 && { echo "$image"; exit; }
mkdir -p "$cache"
exec 8>"$cache/node-image.lock"
flock 8
archive=$cache/node-$kubernetes-$recipe.tar
if [ -e "$archive" ]; then
  docker load --quiet --input "$archive" >&2
  echo "$image"
  exit
fi
[ "$(id -u)" = 0 ] || { echo "making a node image needs root; NODE_IMAGE names one that is to be had" >&2; exit 1; }
missing=()
for pair in mmdebstrap:mmdebstrap jq:jq gcc:gcc python3:python3 go:golang-go; do
  command -v "${pair%:*}" >/dev/null || missing+=("${pair#*:}")
done
busybox=/bin/busybox
file "$busybox" 2>/dev/null | grep -q 'statically linked' || dpkg -s busybox-static >/dev/null 2>&1 || missing+=(busybox-static)
[ ${#missing[@]} = 0 ] || { echo "missing commands; on Debian: apt-get install ${missing[*]}" >&2; exit 1; }
say() { echo "node image: $1" >&2; }

work=$(mktemp -d "$cache/build.XXXXXX")
containerd_pid=
cleanup() {
  [ -z "$containerd_pid" ] || kill "$containerd_pid" 2>/dev/null || true
  rm -rf "$work"
}
trap cleanup EXIT
arch=$(dpkg --print-architecture)
triplet=$(gcc -dumpmachine)
export CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS=1
libraries=usr/lib/$triplet
root=$work/root
mkdir -p "$root" "$work/images"

# kind's own entrypoint and units, from its module
mkdir "$work/module"
(cd "$work/module" && go mod init node.test/kind && go get "sigs.k8s.io/kind@v$kind") >/dev/null 2>"$work/go.log" || { cat "$work/go.log" >&2; exit 1; }
files=$(cd "$work/module" && go mod download -json "sigs.k8s.io/kind@v$kind" | jq -r .Dir)/images/base/files

say "root file system"
# bookworm: its systemd still runs on cgroup v1
nice -n 10 mmdebstrap --quiet --mode=root --variant=minbase --aptopt='Acquire::Languages "none"' \
  --include=systemd,conntrack,iptables,nftables,iproute2,ethtool,util-linux,mount,kmod,procps,jq,bash,ca-certificates,libseccomp2,curl,e2fsprogs \
  --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
  bookworm "$work/root.tar" >&2
tar -C "$root" -xf "$work/root.tar" --exclude='./dev/*'
rm "$work/root.tar"

say "the images inside"
tree=$work/tree
begin_tree() { rm -rf "$tree"; mkdir -p "$tree"/{tmp,etc,bin,usr/local/bin}; chmod 1777 "$tree/tmp"; }
end_tree() { # end_tree NAME [ENTRYPOINT]: the tree as an image
  tar -C "$tree" --owner=0 --group=0 -cf "$work/tree.tar" .
  python3 "$here/../image/archive.py" "$work/tree.tar" "$arch" "$1" "$work/images/$(basename "${1%:*}").tar" "${2:-sh}"
}
wanted=$("$bin/kubeadm" config images list --kubernetes-version "v$kubernetes" 2>/dev/null)
named() { grep "/$1:" <<<"$wanted"; }
for name in kube-apiserver kube-controller-manager kube-scheduler etcd coredns; do
  begin_tree
  cp "$bin/$name" "$tree/usr/local/bin/"
  # kubeadm names the commands; for coredns it gives arguments only
  end_tree "$(named "$name")" "/usr/local/bin/$name"
done
begin_tree
gcc -static -Os -s -o "$tree/pause" "$here/../cluster/pause.c"
end_tree "$(sed -n 's/.*sandbox_image = "\(.*\)"/\1/p' "$files/etc/containerd/config.toml")" /pause
begin_tree
cp "$busybox" "$tree/bin/busybox"
for name in sh cat sleep chroot; do ln -s busybox "$tree/bin/$name"; done
end_tree localhost/busybox:lab
# kube-proxy calls iptables and nft: they come from the root file system with their libraries, and with those of the
# matches, which load later (statistic needs libm: without it no Service with two endpoints works)
begin_tree
cp "$bin/kube-proxy" "$tree/usr/local/bin/"
rmdir "$tree/bin"
mkdir -p "$tree"/usr/{sbin,bin} "$tree/$libraries" "$tree"/{run,var,lib64}
ln -s usr/sbin "$tree/sbin"; ln -s usr/bin "$tree/bin"; ln -s usr/lib "$tree/lib"
for name in xtables-nft-multi xtables-legacy-multi nft conntrack; do cp "$root/usr/sbin/$name" "$tree/usr/sbin/"; done
cp -r "$root/$libraries/xtables" "$tree/$libraries/"
{
  for name in xtables-nft-multi xtables-legacy-multi nft conntrack; do chroot "$root" ldd "/usr/sbin/$name"; done
  chroot "$root" sh -c "ldd /$libraries/xtables/*.so"
} 2>/dev/null | grep -o '/lib[^ :]*' | sort -u >"$work/libraries"
while read -r library; do
  [ -f "$root$library" ] || continue
  case $library in
    /lib64/*) cp -L "$root$library" "$tree$library" ;;
    *) cp -L "$root$library" "$tree/$libraries/" ;;
  esac
done <"$work/libraries"
for name in iptables ip6tables; do
  for suffix in "" -save -restore; do
    ln -s xtables-nft-multi "$tree/usr/sbin/$name$suffix"
    ln -s xtables-nft-multi "$tree/usr/sbin/$name-nft$suffix"
    ln -s xtables-legacy-multi "$tree/usr/sbin/$name-legacy$suffix"
  done
done
end_tree "$(named kube-proxy)"

say "the node"
cp -r --no-preserve=mode,ownership "$files"/. "$root/"
chmod 755 "$root"/usr/local/bin/* "$root"/kind/bin/*
install -m755 "$bin"/{kubelet,kubeadm,kubectl} "$root/usr/bin/"
install -m755 "$bin"/{containerd,containerd-shim-runc-v2,ctr} "$root/usr/local/bin/"
install -m755 "$bin/runc" "$root/usr/local/sbin/"
mkdir -p "$root"/{opt/cni/bin,etc/kubernetes/manifests,etc/kubernetes/kubelet.conf.d,kind/manifests}
install -m755 "$bin"/{ptp,loopback,host-local,portmap} "$root/opt/cni/bin/"
install -m755 "$here/cni.sh" "$root/kind/bin/cni.sh"
install -m644 "$here/cni.yaml" "$root/kind/manifests/default-cni.yaml"
printf 'v%s' "$kubernetes" >"$root/kind/version"
# only these services start, as in kind's own image
find "$root/lib/systemd/system/sysinit.target.wants/" -name systemd-tmpfiles-setup.service -delete
rm -f "$root"/lib/systemd/system/{multi-user,local-fs,basic}.target.wants/* "$root"/etc/systemd/system/*.wants/* \
  "$root"/lib/systemd/system/sockets.target.wants/*{udev,initctl}*
echo ReadKMsg=no >>"$root/etc/systemd/journald.conf"
[ -e "$root/sbin/init" ] || ln -s /lib/systemd/systemd "$root/sbin/init"
chroot "$root" systemctl enable kubelet containerd undo-mount-hacks 2>/dev/null
chroot "$root" systemctl mask systemd-binfmt 2>/dev/null
"$bin/ctr" oci spec | jq '.hooks.createContainer += [{"path": "/kind/bin/mount-product-files.sh"}] | del(.process.rlimits)' \
  >"$root/etc/containerd/cri-base.json"
# a machine whose containers lack CAP_SYS_RESOURCE: OOM scores stay
sed -i 's/restrict_oom_score_adj = false/restrict_oom_score_adj = true/' "$root/etc/containerd/config.toml"
# for a machine with cgroup v1, which the kubelet refuses by default
printf 'apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nfailCgroupV1: false\n' \
  >"$root/etc/kubernetes/kubelet.conf.d/10-lab.conf"
sed -i 's#^KUBELET_EXTRA_ARGS=.*#& --config-dir=/etc/kubernetes/kubelet.conf.d#' "$root/etc/default/kubelet"

say "the images into its containerd"
cat >"$work/containerd.toml" <<C
version = 3
root = "$root/var/lib/containerd"
state = "$work/containerd.run"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"]
[grpc]
address = "$work/containerd.sock"
[ttrpc]
address = "$work/containerd.sock.ttrpc"
C
PATH=$bin:$PATH "$bin/containerd" -c "$work/containerd.toml" >"$work/containerd.log" 2>&1 8>&- &
containerd_pid=$!
for _ in $(seq 100); do "$bin/ctr" -a "$work/containerd.sock" version >/dev/null 2>&1 && break; sleep .1; done
for inner in "$work"/images/*.tar; do
  "$bin/ctr" -a "$work/containerd.sock" -n k8s.io images import --no-unpack --digests "$inner" >/dev/null
done
kill "$containerd_pid"
wait "$containerd_pid" || true
containerd_pid=
awk -v at="$root/" 'index($2, at) == 1 {print $2}' /proc/self/mounts | while read -r mounted; do umount "$mounted"; done

say "into Docker"
tar -C "$root" --numeric-owner -c . |
  docker import -c 'ENV container=docker' -c 'ENTRYPOINT ["/usr/local/bin/entrypoint", "/sbin/init"]' - "$image" >&2
docker save --output "$archive.new" "$image"
rm -f "$cache"/node-*.tar
mv "$archive.new" "$archive"
# older images take a gigabyte each; an image in use stays
docker images --format '{{.Repository}}:{{.Tag}}' "$repository" | { grep -vxF "$image" || true; } |
  while read -r old; do docker rmi "$old" >/dev/null 2>&1 || true; done
echo "$image"
