"""Tests of docker/bases.env and `make bases` with a real registry on 127.0.0.1:5000."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tarfile
import urllib.request

import pytest
from containers import docker
from machine import ROOT

REGISTRY = "127.0.0.1:5000"
NAME = "vllm-launch-test/base"
IMAGE = f"{REGISTRY}/{NAME}:1"
SCRIPT = ROOT / "docker/pin-bases.py"


def push(content):
    """Push an image of one file under the tag. Return its digest."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        entry = tarfile.TarInfo("file")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    subprocess.run(["docker", "import", "-", IMAGE], input=packed.getvalue(), check=True, capture_output=True)
    docker("push", IMAGE)
    return registry_digest()


def registry_digest():
    docker_manifest = "application/vnd.docker.distribution.manifest"
    accept = f"{docker_manifest}.v2+json, {docker_manifest}.list.v2+json, application/vnd.oci.image.index.v1+json"
    url = f"http://{REGISTRY}/v2/{NAME}/manifests/1"
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": accept}, method="HEAD")) as answer:
        return answer.headers["Docker-Content-Digest"]


def pin(file):
    """Run pin-bases.py on ``file`` and return its exit code, stdout and stderr."""
    done = subprocess.run([sys.executable, str(SCRIPT), str(file)], check=False, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def pushed():
    yield push(b"one")
    docker("image", "rm", "-f", *docker("image", "ls", "-q", f"{REGISTRY}/{NAME}").split())


def test_a_tag_is_pinned_to_the_registrys_digest(pushed, tmp_path):
    bases = tmp_path / "bases.env"
    bases.write_text(f"# the tag is {IMAGE}\nONE={IMAGE}\n\nTWO={IMAGE}@sha256:{'0' * 64}  # older\n")
    pinned = f"# the tag is {IMAGE}\nONE={IMAGE}@{pushed}\n\nTWO={IMAGE}@{pushed}  # older\n"
    assert pin(bases) == (0, f"ONE={IMAGE}@{pushed}\nTWO={IMAGE}@{pushed}\n", "")
    assert bases.read_text() == pinned
    assert pin(bases)[0] == 0
    assert bases.read_text() == pinned


def test_an_image_for_several_platforms_is_pinned_to_its_index(pushed, tmp_path):
    other = push(b"of another platform")
    docker("buildx", "imagetools", "create", f"--tag={IMAGE}", f"{IMAGE}@{pushed}", f"{IMAGE}@{other}")
    index = registry_digest()
    assert index not in {pushed, other}
    bases = tmp_path / "bases.env"
    bases.write_text(f"ONE={IMAGE}\n")
    assert pin(bases)[0] == 0
    assert bases.read_text() == f"ONE={IMAGE}@{index}\n"


def test_a_moved_tag_gets_a_new_digest_and_the_old_digest_still_builds_the_old_image(pushed, tmp_path):
    bases = tmp_path / "bases.env"
    bases.write_text(f"BASE={IMAGE}\n")
    assert pin(bases)[0] == 0
    (old,) = re.findall("BASE=(.*)", bases.read_text())
    moved = push(b"another")
    assert moved != pushed
    assert pin(bases)[0] == 0
    assert bases.read_text() == f"BASE={IMAGE}@{moved}\n"
    for base, content in ((old, b"one"), (f"{IMAGE}@{moved}", b"another")):
        assert file_of_image_built_on(base) == content


def file_of_image_built_on(base):
    """Build an image on ``base``, which is a build argument as in our Dockerfile. Return the content of its ``file``."""
    built = f"{REGISTRY}/{NAME}:built"
    subprocess.run(
        ["docker", "build", "-q", f"-t={built}", f"--build-arg=BASE={base}", "-"],
        input=b"ARG BASE\nFROM ${BASE}\nLABEL built=yes\n", check=True, capture_output=True,
    )  # fmt: skip
    container = docker("create", built, "-")
    try:
        tar = subprocess.run(["docker", "cp", f"{container}:/file", "-"], check=True, capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
            return archive.extractfile("file").read()
    finally:
        docker("rm", container)
        docker("image", "rm", "-f", built)


@pytest.mark.usefixtures("pushed")
@pytest.mark.parametrize("unreachable", [f"{REGISTRY}/{NAME}:never-pushed", "127.0.0.1:1/no/registry:1"])
def test_the_file_is_unchanged_if_one_image_cannot_be_looked_up(unreachable, tmp_path):
    bases = tmp_path / "bases.env"
    before = f"# comment\nONE={IMAGE}\nTWO={unreachable}\n".encode()
    bases.write_bytes(before)
    code, out, err = pin(bases)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith(f"pin-bases.py: {unreachable} cannot be looked up: ")
    assert bases.read_bytes() == before


def test_a_missing_docker_is_a_one_line_error(tmp_path):
    bases = tmp_path / "bases.env"
    bases.write_text(f"ONE={IMAGE}\n")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(bases)],
        env={"PATH": str(tmp_path)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert bases.read_text() == f"ONE={IMAGE}\n"


def test_the_defaults_of_the_dockerfile_are_the_same_tags():
    """The defaults serve `docker build` without make. Only bases.env has digests."""

    def bases(path, prefix):
        return dict(re.findall(rf"^{prefix}(\w+_BASE)=([^\s@]+)", (ROOT / path).read_text(), re.MULTILINE))

    pinned_bases = bases("docker/bases.env", "")
    assert set(pinned_bases) == {"CUDA_BASE", "CPU_BASE"}
    assert bases("docker/Dockerfile", "ARG ") == pinned_bases
