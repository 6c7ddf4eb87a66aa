# engine.sh cpu|cuda [INDEX]: install vLLM and its pinned requirements into /opt/vllm-launch/engine.
# INDEX is PyTorch's index of CPU wheels. Without it, the CPU image uses PyTorch's CUDA wheel. That wheel loads CUDA's
# libraries when it is imported, so they stay, except for those that only work on a GPU loads.
set -eu
root=/opt/vllm-launch/engine
pinned=/mnt/requirements.txt
export UV_LINK_MODE=copy UV_CACHE_DIR=/mnt/cache PATH="/mnt/bin:$PATH"
uv venv -q --no-managed-python --python /usr/bin/python3 $root
install() { uv pip install -q --python $root/bin/python --no-deps --compile-bytecode "$@"; }
if [ "$1" = cpu ] && [ -n "${2:-}" ]; then
    torch=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' "$pinned")
    # A requirement is its first line and the indented lines below it.
    awk '/^[^ #]/ {drop = /^(torch|triton|nvidia-|cuda-)/} !drop' "$pinned" >/tmp/without-cuda.txt
    install --require-hashes -r /tmp/without-cuda.txt
    install --index-url "$2" "torch==$torch+cpu"
    rm /tmp/without-cuda.txt
else
    install --require-hashes -r "$pinned"
fi
packages=$(echo $root/lib/python3.*/site-packages)
echo /opt/vllm-launch/own >"$packages/own.pth"
find "$packages" -name "*.a" -delete
rm -f $root/.lock
if [ "$1" = cuda ]; then  # a CUDA toolkit in the usual layout, from NVIDIA's wheels
    toolkit=$(echo "$packages"/nvidia/cu1*)
    ln -s "$toolkit" /opt/vllm-launch/cuda
    ln -s lib "$toolkit/lib64"
    for library in "$toolkit"/lib/lib*.so.*; do
        [ -e "${library%%.so.*}.so" ] || ln -s "$(basename "$library")" "${library%%.so.*}.so"
    done
    mkdir "$toolkit/lib/stubs"  # the container gets the driver at run time; linking needs only its symbols
    g++ -E -x c++ "$toolkit/include/cuda.h" | grep -oE '^ *CUresult +cu[A-Z][A-Za-z0-9_]*' | sort -u |
        awk '{print "extern \"C\" void " $2 "() {}"}' |
        g++ -shared -fPIC -x c++ - -Wl,-soname,libcuda.so.1 -o "$toolkit/lib/stubs/libcuda.so"
fi
if [ "$1" = cpu ]; then  # remove libraries that nothing links to and only work on a GPU loads
    cd "$packages"
    rm -rf triton triton-*.dist-info
    rm -f nvidia/cudnn/lib/libcudnn_*.so* nvidia/cu13/lib/libnvrtc.alt.so* nvidia/cu13/lib/libcusolverMg.so* \
        nvidia/cu13/lib/libnvperf_*.so*
fi
