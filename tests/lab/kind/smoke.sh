#!/bin/bash
# smoke.sh [IMAGE]: checks that a cluster (KUBECONFIG) does what the tests rely on, without the plugin. A DaemonSet on every
# node sees the kubelet's directory for device plugins; pods reach one another across nodes, by DNS, through a Service and
# through that of the API server. It checks answers, not states: a kube-proxy without working rules is Running, too.
# IMAGE has Python and is on the nodes, default usbip-plugin:e2e. For a cluster that KEEP=1 left, or any other.
set -euo pipefail
image=${1:-usbip-plugin:e2e} namespace=usbip-smoke
READY=90s ASK_SECONDS=5
bad=0
check() { # check WHAT GOT WANTED
  if [ "$2" = "$3" ]; then echo "ok    $1"; else echo "FAIL  $1: got '$2', want '$3'"; bad=1; fi
}
k() { kubectl -n "$namespace" "$@"; }
trap 'kubectl delete namespace "$namespace" --ignore-not-found --wait=false >/dev/null' EXIT

kubectl create namespace "$namespace" >/dev/null
k apply -f - >/dev/null <<Y
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: plug}
spec:
  selector: {matchLabels: {app: plug}}
  template:
    metadata: {labels: {app: plug}}
    spec:
      hostNetwork: true
      terminationGracePeriodSeconds: 1
      tolerations: [{operator: Exists}]
      containers:
        - name: plug
          image: $image
          imagePullPolicy: IfNotPresent
          command: [sleep, infinity]
          securityContext: {runAsUser: 0}
          volumeMounts: [{name: plugins, mountPath: /plugins, readOnly: true}]
      volumes: [{name: plugins, hostPath: {path: /var/lib/kubelet/device-plugins, type: Directory}}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 1
      topologySpreadConstraints:
        - {maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: DoNotSchedule, labelSelector: {matchLabels: {app: web}}}
      containers:
        - name: web
          image: $image
          imagePullPolicy: IfNotPresent
          command: [sh, -c, 'cd "\$(mktemp -d)" && hostname >index.html && exec python3 -m http.server 8080']
          readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
          volumeMounts: [{name: tmp, mountPath: /tmp}]
      volumes: [{name: tmp, emptyDir: {}}]
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
Y
k rollout status daemonset/plug "--timeout=$READY" >/dev/null
k rollout status deployment/web "--timeout=$READY" >/dev/null
nodes=$(kubectl get nodes -o name | wc -l)
read -r first second < <(k get pods -l app=web -o 'jsonpath={.items[*].metadata.name}')
of() { k get pod "$1" -o "jsonpath={$2}"; }
# ask URL [TIMES]: prints each answer; the rules of a Service may come a moment after its pods
ask() {
  k exec "$first" -- python3 -c '
import ssl, sys, time, urllib.request
url, times, limit = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
context = ssl._create_unverified_context() if url.startswith("https") else None
answers, failure, until = set(), "", time.monotonic() + 4 * limit
while len(answers) < times and time.monotonic() < until:
    try:
        with urllib.request.urlopen(url, timeout=limit, context=context) as answer:
            answers.add(answer.read().decode().strip())
    except OSError as error:
        failure = f"{url}: {error}"
        time.sleep(0.2)
print("\n".join(sorted(answers)) or failure)' "$1" "${2:-1}" "$ASK_SECONDS"
}
check "the DaemonSet sees kubelet.sock on all nodes" \
  "$(for pod in $(k get pods -l app=plug -o name); do k exec "$pod" -- sh -c 'test -S /plugins/kubelet.sock && echo yes'; done | grep -c yes)" "$nodes"
check "the pods are on different nodes" "$([ "$(of "$first" .spec.nodeName)" != "$(of "$second" .spec.nodeName)" ] && echo yes)" yes
check "a pod reaches the other on its node" "$(ask "http://$(of "$second" .status.podIP):8080/")" "$second"
check "the Service's name leads to both" "$(ask "http://web.$namespace.svc.cluster.local/" 2 | sort | tr '\n' ' ')" \
  "$(printf '%s\n' "$first" "$second" | sort | tr '\n' ' ')"
check "the API server answers at its Service" "$(ask https://kubernetes.default.svc/version | grep -c gitVersion)" 1
exit "$bad"
