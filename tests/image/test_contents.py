"""Tests of the contents of the images."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from containers import CUDA_IMAGE, IMAGE, LOCKED_DOWN, docker, run_once
from machine import ROOT

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(params=[IMAGE, CUDA_IMAGE])
def image(request):
    return request.param


def output_lines(image, script, *flags):
    code, out, err = run_once("-c", script, flags=("--entrypoint=bash", "--network=none", *flags), image=image)
    assert code == 0, err
    return out.splitlines()


def test_no_file_is_setuid_or_writable_by_others(image):
    assert output_lines(image, r"find / -xdev -type f \( -perm /6000 -o -perm /002 \) -print", "--user=0:0") == []


def test_only_the_volumes_are_writable(image):
    paths = output_lines(
        image, "find / -xdev -writable -not -type l -print 2>/dev/null; true", *LOCKED_DOWN, "--tmpfs=/tmp", "-v=/cache"
    )
    assert [path for path in paths if not path.startswith(("/dev/", "/proc/", "/sys/"))] == ["/tmp", "/cache"]
    assert output_lines(image, "touch /cache/a /tmp/a && echo both", *LOCKED_DOWN, "--tmpfs=/tmp", "-v=/cache") == [
        "both"
    ]


def test_the_image_has_no_caches_tests_or_secrets(image):
    paths = output_lines(
        image,
        r"find / -xdev \( -path '*/vllm_launch/*test*' -o -path '*/.cache/*' -o -path '/var/lib/apt/lists/*' "
        r"-o -name '*.whl' -o -name '.git' -o -name '.netrc' \) -print 2>/dev/null; true",
        "--user=0:0",
    )
    assert paths == []
    environ = json.loads(docker("image", "inspect", "--format", "{{json .Config.Env}}", image))
    history = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image)
    assert [word for word in ("KEY=", "TOKEN=", "SECRET", "PASSWORD") if word in f"{environ} {history}".upper()] == []


def test_our_own_code_is_the_last_layer_and_small(image):
    layers = docker(
        "history", "--no-trunc", "--human=false", "--format", "{{.Size}}\t{{.CreatedBy}}", image
    ).splitlines()
    size, made_by = next(line.split("\t") for line in layers if not line.startswith("0\t"))
    assert "own.sh" in made_by
    assert int(size) < 5_000_000


def test_labels_have_the_version_and_the_revision(image):
    labels = json.loads(docker("image", "inspect", "--format", "{{json .Config.Labels}}", image))
    assert labels["org.opencontainers.image.version"] == run_once("--version", image=image)[1].split()[1].rstrip(",")
    assert len(labels["org.opencontainers.image.revision"]) == 40


def test_every_command_is_there(image, tiny_model):
    mounted = [f"-v={tiny_model}:/model:ro"]
    code, out, err = run_once("plan", "/model", "--hardware=H100:1", "--format=json", flags=mounted, image=image)
    assert code == 0, err
    assert json.loads(out)["reasons"]
    assert run_once("vllm-health", "--help", image=image)[0] == 0
    code, _, err = run_once(flags=[*LOCKED_DOWN, "--tmpfs=/tmp"], image=image)
    assert code == 2
    assert "no model is given" in err


def test_both_targets_have_the_same_configuration():
    """The Dockerfile has to repeat the configuration for each target."""
    cpu, cuda = (
        json.loads(docker("image", "inspect", "--format", "{{json .Config}}", name)) for name in (IMAGE, CUDA_IMAGE)
    )
    for key in ("User", "ExposedPorts", "Volumes", "WorkingDir", "Entrypoint", "Cmd", "Healthcheck"):
        assert cpu[key] == cuda[key], key
    assert {word for word in cuda["Env"] if word not in cpu["Env"]} == {
        "NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute,utility", "CUDA_HOME=/opt/vllm-launch/cuda",
    }  # fmt: skip


@pytest.mark.parametrize(("target", "name"), [("cpu", IMAGE), ("cuda", CUDA_IMAGE)])
def test_the_image_has_not_grown(target, name):
    done = subprocess.run(
        [sys.executable, str(ROOT / "docker/size.py"), name, target], check=False, capture_output=True, text=True
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_for_gpus_reports_a_missing_gpu(tiny_model):
    code, _, err = run_once("serve", "/model", flags=[f"-v={tiny_model}:/model:ro", "--tmpfs=/tmp"], image=CUDA_IMAGE)
    assert code == 2
    assert "give the container its GPUs (--gpus all)" in err


def test_kernels_can_be_compiled_in_the_image_for_gpus():
    """A user ID without a name compiles a FlashInfer kernel on a read-only root. The compiler needs no GPU."""
    script = "from flashinfer.jit.norm import gen_norm_module as module; module().build(verbose=False); print('built')"
    flags = [*LOCKED_DOWN, "--network=none", "--tmpfs=/tmp:exec", "-e=HOME=/tmp", "-e=FLASHINFER_CUDA_ARCH_LIST=9.0a"]
    code, out, err = run_once("-c", script, flags=[*flags, "--entrypoint=python3"], image=CUDA_IMAGE)
    assert code == 0, err[-3000:]
    assert out.split() == ["built"]


@pytest.mark.long
def test_the_kernels_of_a_first_start_are_prebuilt():
    """They are prebuilt for an H100, which this image is built for. For a B200, FlashInfer would compile them."""
    script = (
        "from flashinfer.jit.comm import gen_trtllm_comm_module as comm; "
        "from flashinfer.jit.sampling import gen_sampling_module as sampling; "
        "print([module().is_aot for module in (sampling, comm)])"
    )
    for generation, prebuilt in (("9.0a", [True] * 2), ("10.0a", [False] * 2)):
        flags = ["--network=none", "--entrypoint=python3", "-e=HOME=/tmp", f"-e=FLASHINFER_CUDA_ARCH_LIST={generation}"]
        code, out, err = run_once("-c", script, flags=flags, image=CUDA_IMAGE)
        assert code == 0, err[-3000:]
        assert out.strip() == str(prebuilt), generation


def test_vllms_facts_about_model_classes_are_in_the_image(image):
    """The image has vLLM's cache of facts about model classes. Without it, vLLM starts a process that imports everything.

    With another cache folder, vLLM still starts that process.
    """
    script = """
import os
from vllm.model_executor.models import registry
registry._run_in_subprocess = None
llama = registry.ModelRegistry.models["LlamaForCausalLM"]
os.environ["VLLM_CACHE_ROOT"] = "/opt/vllm-launch/engine/share/vllm-launch"
print(llama.inspect_model_cls().supports_pp)
os.environ["VLLM_CACHE_ROOT"] = "/tmp"
llama.inspect_model_cls()
"""
    flags = ["--network=none", "--entrypoint=/opt/vllm-launch/engine/bin/python", "-e=HOME=/tmp"]
    code, out, err = run_once("-c", script, flags=flags, image=image)
    assert out.endswith("True\n"), err[-3000:]
    assert code == 1
    assert "'NoneType' object is not callable" in err


def test_every_kernel_library_of_vllm_finds_its_dependencies(image):
    """The driver's library is an exception: it comes with the GPUs of a container."""
    script = (
        "cd /opt/vllm-launch/engine/lib/python3.*/site-packages; "
        'export LD_LIBRARY_PATH=$PWD/torch/lib:$(echo nvidia/*/lib | sed "s|nvidia/|$PWD/nvidia/|g; s| |:|g"); '
        "ldd vllm/*.so vllm/*/*.so | grep 'not found' | sort -u; true"
    )
    assert [line.split()[0] for line in output_lines(image, script)] in ([], ["libcuda.so.1"])
