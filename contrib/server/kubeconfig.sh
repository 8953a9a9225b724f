#!/bin/sh
# contrib/server/kubeconfig.sh >kubeconfig: prints a kubeconfig for an exporter outside the cluster. It may read the
# Leases of the plugin's namespace (NAMESPACE, by default usbip-system), and does not expire.
# Needs kubectl with the rights of an administrator. To take it back: kubectl -n usbip-system delete secret usbip-exporter
set -eu
here=$(cd "$(dirname "$0")" && pwd)
namespace=${NAMESPACE:-usbip-system}
file=$(mktemp)
trap 'rm -f "$file"' EXIT

# of Helm, if the chart's own exporters are installed
kubectl -n "$namespace" get role usbip-exporter >/dev/null 2>&1 ||
  sed "s/namespace: usbip-system/namespace: $namespace/" "$here/../../deploy/components/exporter/rbac.yaml" |
  kubectl apply -f - >&2
kubectl apply -f - >&2 <<S
apiVersion: v1
kind: Secret
metadata:
  name: usbip-exporter
  namespace: $namespace
  annotations: {kubernetes.io/service-account.name: usbip-exporter}
type: kubernetes.io/service-account-token
S
kubectl -n "$namespace" wait --for=jsonpath='{.data.token}' --timeout=30s secret/usbip-exporter >&2
token=$(kubectl -n "$namespace" get secret usbip-exporter -o 'jsonpath={.data.token}' | base64 -d)

# the cluster of the current context, with another user
kubectl config view --raw --minify --flatten >"$file"
kubectl --kubeconfig="$file" config unset users >&2
kubectl --kubeconfig="$file" config set-credentials usbip-exporter --token="$token" >&2
kubectl --kubeconfig="$file" config set-context --current --user=usbip-exporter --namespace="$namespace" >&2
cat "$file"
