# Install our code into /opt/vllm-launch/own. The engine's Python finds it through own.pth.
set -eu
cd /mnt/source
python=/opt/vllm-launch/engine/bin/python
export UV_LINK_MODE=copy UV_CACHE_DIR=/mnt/cache PATH="/mnt/bin:$PATH"
uv build -q --wheel --python $python --out-dir /tmp/wheel
uv pip install -q --python $python --no-deps --target /opt/vllm-launch/own /tmp/wheel/*.whl
sed -i "1s|.*|#!$python|" /opt/vllm-launch/own/bin/*
install -m 0755 docker/healthcheck.sh /opt/vllm-launch/own/bin/healthcheck
rm -f /opt/vllm-launch/own/.lock
$python -m compileall -q /opt/vllm-launch/own
