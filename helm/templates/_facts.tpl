{{/* Ports, times and sizes, computed from config and from some values. The defaults are the launcher's (settings.py). */}}

{{/* A setting below config.launch, in either spelling: include "vllm.launch" (list . "drain_seconds" 90) */}}
{{- define "vllm.launch" -}}
{{- $launch := (index . 0).Values.config.launch | default dict -}}
{{- $name := index . 1 -}}
{{- if hasKey $launch $name }}{{ get $launch $name }}
{{- else if hasKey $launch (replace "_" "-" $name) }}{{ get $launch (replace "_" "-" $name) }}
{{- else }}{{ index . 2 }}{{ end -}}
{{- end -}}

{{- define "vllm.port" -}}
{{ .Values.config.port | default 8000 | int }}
{{- end -}}

{{- define "vllm.healthPort" -}}
{{ include "vllm.launch" (list . "health_port" 8001) | int }}
{{- end -}}

{{- define "vllm.preStopSeconds" -}}
5
{{- end -}}

{{/* The drain time, plus the preStop time before it. */}}
{{- define "vllm.graceSeconds" -}}
{{ add (include "vllm.launch" (list . "drain_seconds" 90) | int) (include "vllm.preStopSeconds" . | int) }}
{{- end -}}

{{- define "vllm.startSeconds" -}}
{{ mul 60 .Values.rollout.startMinutes }}
{{- end -}}

{{/* "3Gi" or "512Mi" as a number of Mi. */}}
{{- define "vllm.mebibytes" -}}
{{- if hasSuffix "Gi" . }}{{ mul 1024 (trimSuffix "Gi" . | int) }}{{ else }}{{ trimSuffix "Mi" . | int }}{{ end -}}
{{- end -}}

{{/* vLLM's message queues take 240 MiB per engine with several workers. NCCL's buffers take most of the rest. */}}
{{- define "vllm.shm" -}}
{{ .Values.resources.shm | default (printf "%dGi" (max 1 (int .Values.gpus.count))) }}
{{- end -}}

{{- define "vllm.memoryLimit" -}}
{{ add (include "vllm.mebibytes" .Values.resources.memory) (include "vllm.mebibytes" (include "vllm.shm" .)) }}Mi
{{- end -}}

{{/* "true" if the model is a name on the hub, not a folder. */}}
{{- define "vllm.fromHub" -}}
{{- if not (regexMatch "^[/.~]|://" (toString .Values.config.model)) }}true{{ end -}}
{{- end -}}

{{/* "true" if several pods can exist at the same time. */}}
{{- define "vllm.severalPods" -}}
{{- if or (ne .Values.autoscaling.by "none") (gt (int .Values.replicas) 1) .Values.rollout.spare }}true{{ end -}}
{{- end -}}
