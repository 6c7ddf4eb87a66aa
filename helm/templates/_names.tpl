{{/* Names, labels and the image. Only this file builds them. */}}

{{- define "vllm.name" -}}
{{- .Values.nameOverride | default .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "vllm.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end -}}

{{/* Labels of all objects. */}}
{{- define "vllm.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- define "vllm.image" -}}
{{- $tag := .Values.image.tag | default (printf "%s%s" .Chart.AppVersion (ternary "" "-cpu" (gt (int .Values.gpus.count) 0))) -}}
{{- .Values.image.repository -}}
{{- if .Values.image.digest }}@{{ .Values.image.digest }}{{ else }}:{{ $tag }}{{ end -}}
{{- end -}}

{{/* The name contains a hash of the content. So a change starts a rollout, and old pods keep the old configuration. */}}
{{- define "vllm.configName" -}}
{{ include "vllm.name" . }}-config-{{ toYaml .Values.config | sha256sum | trunc 8 }}
{{- end -}}

{{- define "vllm.cacheClaim" -}}
{{ .Values.cache.existingClaim | default (printf "%s-cache" (include "vllm.name" .)) }}
{{- end -}}

{{- define "vllm.keysSecret" -}}
{{- if .Values.apiKeys.existingSecret }}{{ .Values.apiKeys.existingSecret }}
{{- else if .Values.apiKeys.keys }}{{ include "vllm.name" . }}-keys{{ end -}}
{{- end -}}

{{- define "vllm.tokenSecret" -}}
{{- if .Values.hfToken.existingSecret }}{{ .Values.hfToken.existingSecret }}
{{- else if .Values.hfToken.token }}{{ include "vllm.name" . }}-hub{{ end -}}
{{- end -}}

{{- define "vllm.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (include "vllm.name" .) }}
{{- end -}}
