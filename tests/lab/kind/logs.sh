#!/bin/bash
# logs.sh DIRECTORY [CLUSTER]: keeps the state of a running kind cluster (KUBECONFIG): the logs of its nodes and of every
# container, ended ones included, the objects, the events and the Leases. It leaves out Secrets.
# A file of a command that fails has its error.
set -uo pipefail
directory=${1:?logs.sh DIRECTORY [CLUSTER]} cluster=${2:-usbip-e2e}
LIMIT=30 EXPORT_LIMIT=120
namespaces=(usbip-system usbip-e2e)
mkdir -p "$directory"

keep() { timeout "$LIMIT" kubectl "${@:2}" >"$directory/$1" 2>&1 || echo "exit status $?: kubectl ${*:2}" >>"$directory/$1"; }

keep pods.txt get pods -A -o wide
keep nodes.txt describe nodes
keep events.txt get events -A --sort-by=.lastTimestamp
keep leases.yaml get leases -A -o yaml
keep admission.yaml get validatingadmissionpolicies,validatingadmissionpolicybindings -o yaml
for namespace in "${namespaces[@]}"; do
  keep "$namespace.txt" describe all,configmaps,leases -n "$namespace"
  keep "$namespace.yaml" get all,configmaps,serviceaccounts -n "$namespace" -o yaml
done
# shellcheck disable=SC2016 # the template is kubectl's
template='{{range $pod := .items}}{{range .spec.initContainers}}{{$pod.metadata.namespace}} {{$pod.metadata.name}} {{.name}}
{{end}}{{range .spec.containers}}{{$pod.metadata.namespace}} {{$pod.metadata.name}} {{.name}}
{{end}}{{end}}'
for namespace in "${namespaces[@]}"; do
  timeout "$LIMIT" kubectl get pods -n "$namespace" -o "go-template=$template" 2>/dev/null
done | while read -r namespace pod container; do
  keep "$namespace-$pod-$container.log" logs -n "$namespace" "$pod" -c "$container" </dev/null
  timeout "$LIMIT" kubectl logs -n "$namespace" "$pod" -c "$container" --previous \
    >"$directory/$namespace-$pod-$container.previous.log" 2>/dev/null </dev/null ||
    rm -f "$directory/$namespace-$pod-$container.previous.log"
done
timeout "$EXPORT_LIMIT" kind export logs --name "$cluster" "$directory/kind" >/dev/null 2>"$directory/export.txt" ||
  echo "exit status $?: kind export logs" >>"$directory/export.txt"
exit 0
