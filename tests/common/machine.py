"""Helpers of all kinds of tests for the machine that they run on."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_distribution(folder, name, version):
    """Write to ``folder`` a distribution that has a name and a version and nothing else."""
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def generate_tiny_model(folder):
    """Write a model of four layers to ``folder`` that every user can read, also users of containers without a name."""
    script = ROOT / "scripts/generators/tiny_model.py"
    subprocess.run([sys.executable, str(script), str(folder)], check=True, timeout=300)
    let_anybody_read(folder)
    return folder


def let_anybody_read(folder):
    """Let every user read all files below ``folder``, and enter the folders above it that pytest made private."""
    parents = [path for path in folder.parents if path.name.startswith("pytest-") or "pytest-" in str(path.parent)]
    for path in (folder, *parents, *folder.rglob("*")):
        path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))
