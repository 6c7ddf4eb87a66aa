"""What is in the image, and what is not."""

from __future__ import annotations

import json

import pytest
from conftest import IMAGE, LOCKED_DOWN, docker, run_once

pytestmark = pytest.mark.timeout(300)


def look(script, *flags):
    code, out, err = run_once("-c", script, flags=("--entrypoint=bash", "--network=none", *flags))
    assert code == 0, err
    return out.splitlines()


def test_no_file_is_setuid_or_writable_by_others():
    assert look(r"find / -xdev -type f \( -perm /6000 -o -perm /002 \) -print", "--user=0:0") == []


def test_nothing_can_be_written_but_the_volumes():
    found = look(
        "find / -xdev -writable -not -type l -print 2>/dev/null; true", *LOCKED_DOWN, "--tmpfs=/tmp", "-v=/cache"
    )
    assert [path for path in found if not path.startswith(("/dev/", "/proc/", "/sys/"))] == ["/tmp", "/cache"]
    assert look("touch /cache/a /tmp/a && echo both", *LOCKED_DOWN, "--tmpfs=/tmp", "-v=/cache") == ["both"]


def test_no_cache_test_or_secret_is_left():
    found = look(
        r"find / -xdev \( -path '*/vllm_launch/*test*' -o -path '*/.cache/*' -o -path '/var/lib/apt/lists/*' "
        r"-o -name '*.whl' -o -name '.git' -o -name '.netrc' \) -print 2>/dev/null; true",
        "--user=0:0",
    )
    assert found == []
    environ = json.loads(docker("image", "inspect", "--format", "{{json .Config.Env}}", IMAGE))
    history = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", IMAGE)
    assert [word for word in ("KEY=", "TOKEN=", "SECRET", "PASSWORD") if word in f"{environ} {history}".upper()] == []


def test_our_own_code_is_the_last_layer_and_small():
    layers = docker(
        "history", "--no-trunc", "--human=false", "--format", "{{.Size}}\t{{.CreatedBy}}", IMAGE
    ).splitlines()
    size, made_by = next(line.split("\t") for line in layers if not line.startswith("0\t"))
    assert "own.sh" in made_by
    assert int(size) < 5_000_000


def test_labels_say_what_it_is():
    labels = json.loads(docker("image", "inspect", "--format", "{{json .Config.Labels}}", IMAGE))
    assert labels["org.opencontainers.image.version"] == run_once("--version")[1].split()[1].rstrip(",")
    assert len(labels["org.opencontainers.image.revision"]) == 40


def test_every_command_is_there(tiny_model):
    assert (
        run_once("plan", "/model", "--hardware=H100:1", "--format=json", flags=[f"-v={tiny_model}:/model:ro"])[0] == 0
    )
    assert run_once("vllm-health", "--help")[0] == 0
    code, _, err = run_once(flags=[*LOCKED_DOWN, "--tmpfs=/tmp"])
    assert code == 2
    assert "no model is named" in err
