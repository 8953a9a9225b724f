{{- define "usbip-plugin.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{/* What Helm wants to know of an object again. */}}
{{- define "usbip-plugin.labels" -}}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version | replace "+" "_" }}
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

{{/* The image of the exporter, by default that of the plugin. */}}
{{- define "usbip-plugin.exporterImage" -}}
{{- $own := .Values.exporter.image -}}
{{ $own.repository | default .Values.image.repository }}:{{ $own.tag | default .Values.image.tag | default .Chart.AppVersion }}
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
