{{/* The pod template of the Deployment. */}}
{{- define "vllm.pod" -}}
{{- $hub := include "vllm.fromHub" . -}}
{{- $keys := include "vllm.keysSecret" . -}}
{{- $token := include "vllm.tokenSecret" . -}}
metadata:
  labels:
    {{- include "vllm.selector" . | nindent 4 }}
    app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
    {{- with .Values.podLabels }}{{ toYaml . | nindent 4 }}{{ end }}
  annotations:
    kubectl.kubernetes.io/default-container: vllm
    {{- if or .Values.apiKeys.keys .Values.hfToken.token }}
    checksum/secrets: {{ list .Values.apiKeys.keys .Values.hfToken.token | toJson | sha256sum | trunc 16 }}
    {{- end }}
    {{- with .Values.podAnnotations }}{{ toYaml . | nindent 4 }}{{ end }}
spec:
  serviceAccountName: {{ include "vllm.serviceAccount" . }}
  automountServiceAccountToken: false
  enableServiceLinks: false  # else a Service called launch or vllm would set variables that both programs read
  terminationGracePeriodSeconds: {{ include "vllm.graceSeconds" . }}
  {{- with .Values.gpus.runtimeClass }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with .Values.scheduling.priorityClass }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with .Values.scheduling.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.scheduling.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.scheduling.affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.scheduling.spreadOver }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: {{ . }}
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels: {{- include "vllm.selector" $ | nindent 10 }}
      matchLabelKeys: [pod-template-hash]
  {{- end }}
  {{- with .Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  securityContext: {{- include "vllm.podSecurity" . | nindent 4 }}
  {{- if .Values.download.enabled }}
  initContainers:
    - name: wait-for-download
      image: {{ include "vllm.image" . }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args: [download, --wait, --config, /etc/vllm-launch/config.yaml]
      env: {{- include "vllm.hubEnv" . | nindent 8 }}
      resources: {{- include "vllm.small" . | nindent 8 }}
      securityContext: {{- include "vllm.locked" . | nindent 8 }}
      terminationMessagePolicy: FallbackToLogsOnError
      volumeMounts:
        - {name: config, mountPath: /etc/vllm-launch, readOnly: true}
        - {name: cache, mountPath: /cache}
        - {name: tmp, mountPath: /tmp}
  {{- end }}
  containers:
    - name: vllm
      image: {{ include "vllm.image" . }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args: [serve, --config, /etc/vllm-launch/config.yaml]
      env:
        {{- include "vllm.hubEnv" . | nindent 8 }}
        {{- if $keys }}
        - {name: LAUNCH_API_KEY_FILE, value: /etc/vllm-launch-keys/keys}
        {{- end }}
      ports:
        - {name: api, containerPort: {{ include "vllm.port" . }}}
        - {name: health, containerPort: {{ include "vllm.healthPort" . }}}
      # The launcher decides what the probes return. A start may take rollout.startMinutes. Load fails no probe.
      startupProbe:
        httpGet: {path: /startupz, port: health}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: {{ div (include "vllm.startSeconds" .) 5 }}
      readinessProbe:
        httpGet: {path: /readyz, port: health}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 2
      livenessProbe:
        httpGet: {path: /livez, port: health}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 6
      lifecycle:
        preStop:  # the pod still serves, until load balancers send it no more requests
          sleep: {seconds: {{ include "vllm.preStopSeconds" . }}}
      terminationMessagePolicy: FallbackToLogsOnError
      resources:
        requests:
          cpu: {{ .Values.resources.cpu | quote }}
          memory: {{ include "vllm.memoryLimit" . }}
          {{- if .Values.gpus.count }}
          {{ .Values.gpus.resource }}: {{ .Values.gpus.count }}
          {{- end }}
        limits:
          memory: {{ include "vllm.memoryLimit" . }}
          {{- if .Values.gpus.count }}
          {{ .Values.gpus.resource }}: {{ .Values.gpus.count }}
          {{- end }}
      securityContext: {{- include "vllm.locked" . | nindent 8 }}
      volumeMounts:
        - {name: config, mountPath: /etc/vllm-launch, readOnly: true}
        - {name: cache, mountPath: /cache}
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
        {{- if or .Values.models.claim .Values.models.image }}
        - {name: models, mountPath: /models, readOnly: true}
        {{- end }}
        {{- if $keys }}
        - {name: keys, mountPath: /etc/vllm-launch-keys, readOnly: true}
        {{- end }}
        {{- if $token }}
        - {name: hub, mountPath: /etc/vllm-launch-hub, readOnly: true}
        {{- end }}
        {{- with .Values.volumeMounts }}{{ toYaml . | nindent 8 }}{{ end }}
  volumes:
    - name: config
      configMap: {name: {{ include "vllm.configName" . }}}
    - name: cache
      {{- if eq .Values.cache.kind "claim" }}
      persistentVolumeClaim: {claimName: {{ include "vllm.cacheClaim" . }}}
      {{- else if eq .Values.cache.kind "ephemeral" }}
      ephemeral:
        volumeClaimTemplate:
          spec: {{- include "vllm.claimSpec" . | nindent 12 }}
      {{- else }}
      emptyDir: {sizeLimit: {{ .Values.cache.size }}}
      {{- end }}
    - name: tmp
      emptyDir: {}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ include "vllm.shm" . }}}
    {{- if .Values.models.claim }}
    - name: models
      persistentVolumeClaim: {claimName: {{ .Values.models.claim }}, readOnly: true}
    {{- else if .Values.models.image }}
    - name: models
      image: {reference: {{ .Values.models.image }}, pullPolicy: {{ .Values.image.pullPolicy }}}
    {{- end }}
    {{- if $keys }}
    - name: keys
      secret: {secretName: {{ $keys }}, defaultMode: 0440, items: [{key: keys, path: keys}]}
    {{- end }}
    {{- if $token }}
    - name: hub
      secret: {secretName: {{ $token }}, defaultMode: 0440, items: [{key: token, path: token}]}
    {{- end }}
    {{- with .Values.volumes }}{{ toYaml . | nindent 4 }}{{ end }}
{{- end -}}

{{/* Environment variables of containers that use the hub. */}}
{{- define "vllm.hubEnv" -}}
- {name: VLLM_NO_USAGE_STATS, value: "1"}
{{- if include "vllm.tokenSecret" . }}
- {name: HF_TOKEN_PATH, value: /etc/vllm-launch-hub/token}
{{- end }}
{{- with .Values.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The pod's group may write to the volumes, so any user id works. */}}
{{- define "vllm.podSecurity" -}}
runAsNonRoot: true
{{- if .Values.user }}
runAsUser: {{ int .Values.user }}
runAsGroup: 0
fsGroup: {{ int .Values.user }}
fsGroupChangePolicy: OnRootMismatch
{{- end }}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "vllm.locked" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "vllm.small" -}}
requests: {cpu: 100m, memory: 256Mi}
limits: {memory: 1Gi}
{{- end -}}

{{- define "vllm.claimSpec" -}}
accessModes: [{{ ternary "ReadWriteOnce" .Values.cache.accessMode (eq .Values.cache.kind "ephemeral") }}]
{{- with .Values.cache.storageClass }}
storageClassName: {{ . }}
{{- end }}
resources: {requests: {storage: {{ .Values.cache.size }}}}
{{- end -}}
