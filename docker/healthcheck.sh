#!/usr/bin/env bash
# healthcheck [livez|readyz]: Docker's health check. It uses bash, because starting Python takes 0.1 s.
set -eu
exec 3<>"/dev/tcp/127.0.0.1/${LAUNCH_HEALTH_PORT:-8001}"
printf 'GET /%s HTTP/1.0\r\n\r\n' "${1:-livez}" >&3
read -r _ status _ <&3
cat <&3 | tail -n 1
[ "$status" = 200 ]
