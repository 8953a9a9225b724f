{{/* REPOSITORY@DIGEST or REPOSITORY:TAG; called with a list of the root, the repository, the digest and the tag. */}}
{{- define "usbip-plugin.imageName" -}}
{{- $root := index . 0 -}}
{{- with index . 2 }}{{ index $ 1 }}@{{ . }}{{ else }}{{ index . 1 }}:{{ index . 3 | default $root.Chart.AppVersion }}{{ end -}}
{{- end }}

{{- define "usbip-plugin.image" -}}
{{- include "usbip-plugin.imageName" (list . .Values.image.repository .Values.image.digest .Values.image.tag) }}
{{- end }}

{{/* The image of the exporter, by default that of the plugin. */}}
{{- define "usbip-plugin.exporterImage" -}}
{{- $own := .Values.exporter.image -}}
{{- $version := .Values.image -}}
{{- if or $own.digest $own.tag }}{{ $version = $own }}{{ end -}}
{{- include "usbip-plugin.imageName" (list . ($own.repository | default .Values.image.repository) $version.digest $version.tag) }}
{{- end }}

{{- define "usbip-plugin.serviceAccount" -}}
{{ .Values.serviceAccount.name | default "usbip-plugin" }}
{{- end }}

{{- define "usbip-plugin.exporterServiceAccount" -}}
{{ .Values.exporter.serviceAccount.name | default "usbip-exporter" }}
{{- end }}

{{- define "usbip-plugin.podResourcesSocket" -}}
{{ .Values.kubelet.podResourcesSocket | default "/var/lib/kubelet/pod-resources/kubelet.sock" }}
{{- end }}

{{- define "usbip-plugin.cdiDirectory" -}}
{{ .Values.cdiDirectory | default "/var/run/cdi" }}
{{- end }}

{{/* Labels that the chart gives to every object besides its name. */}}
{{- define "usbip-plugin.labels" -}}
{{- $own := dict
  "app.kubernetes.io/instance" .Release.Name
  "app.kubernetes.io/managed-by" .Release.Service
  "app.kubernetes.io/version" .Chart.AppVersion
  "helm.sh/chart" (printf "%s-%s" .Chart.Name (.Chart.Version | replace "+" "_")) -}}
{{- toYaml (mergeOverwrite $own (.Values.commonLabels | default dict)) }}
{{- end }}

{{/* The same of the objects of the Prometheus operator. */}}
{{- define "usbip-plugin.monitoringLabels" -}}
{{- $common := include "usbip-plugin.labels" . | fromYaml -}}
{{- toYaml (mergeOverwrite $common (.Values.monitoring.labels | default dict)) }}
{{- end }}

{{/* The text of a configuration; called with a list of the root, the value (text, a mapping or none) and the default's file. */}}
{{- define "usbip-plugin.configText" -}}
{{- $root := index . 0 -}}
{{- $config := index . 1 -}}
{{- if kindIs "string" $config }}{{ $config -}}
{{- else if $config }}{{ toYaml $config }}{{ "\n" -}}
{{- else }}{{ $root.Files.Get (index . 2) }}{{ end -}}
{{- end }}

{{/* The same for all containers but for the capabilities; called with a list of those to add. */}}
{{- define "usbip-plugin.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
  {{- with . }}
  add: [{{ join ", " . }}]
  {{- end }}
{{- end }}

{{/* securityContext of the containers of plugin and exporter. */}}
{{- define "usbip-plugin.hostContainerSecurity" -}}
{{- $security := deepCopy (.Values.securityContext | default dict) -}}
{{- with .Values.appArmor }}{{ $_ := set $security "appArmorProfile" . }}{{ end -}}
{{- toYaml $security }}
{{- end }}

{{/* securityContext of the pods of plugin and exporter. */}}
{{- define "usbip-plugin.hostPodSecurity" -}}
{{- $security := deepCopy (.Values.podSecurityContext | default dict) -}}
{{- $seLinux := .Values.seLinuxOptions -}}
{{- if and .Values.openshift.enabled (not $seLinux) }}{{ $seLinux = dict "type" "spc_t" }}{{ end -}}
{{- with $seLinux }}{{ $_ := set $security "seLinuxOptions" . }}{{ end -}}
{{- toYaml $security }}
{{- end }}

{{/* The init container that loads a module; called with a list of the root, the module and the image. */}}
{{- define "usbip-plugin.loadModule" -}}
{{- $root := index . 0 -}}
- name: load-module
  image: {{ index . 2 | quote }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy }}
  command: [chroot, /host, modprobe, -a, {{ index . 1 }}]
  resources:
    {{- toYaml $root.Values.loadModules.resources | nindent 4 }}
  terminationMessagePolicy: FallbackToLogsOnError
  securityContext:
    {{- include "usbip-plugin.containerSecurity" (list "SYS_CHROOT" "SYS_MODULE") | nindent 4 }}
  volumeMounts:
    - name: host
      mountPath: /host
      readOnly: true
{{- end }}

{{/* Of the pods of hooks, which Pod Security admits at its level `restricted`. */}}
{{- define "usbip-plugin.hookPod" -}}
restartPolicy: Never
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
# not the plugin's own: it would be sent to nodes that are down
tolerations:
  - key: node-role.kubernetes.io/control-plane
    operator: Exists
securityContext:
  runAsNonRoot: true
  {{- /* OpenShift chooses one of the namespace's own */}}
  {{- if not .Values.openshift.enabled }}
  runAsUser: 65534
  runAsGroup: 65534
  {{- end }}
  seccompProfile:
    type: RuntimeDefault
{{- end }}

{{/* Of their containers. */}}
{{- define "usbip-plugin.hookContainer" -}}
image: {{ include "usbip-plugin.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
resources:
  requests: {cpu: 10m, memory: 64Mi}
  limits: {memory: 64Mi}
# the problems stand in the pod's status
terminationMessagePolicy: FallbackToLogsOnError
securityContext:
  {{- include "usbip-plugin.containerSecurity" (list) | nindent 2 }}
{{- end }}
