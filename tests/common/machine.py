"""What tests of every kind ask of the machine they run on."""

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


def generate_tiny_model(folder):
    """A model of four layers that anybody may read, containers' users without a name too, as far as pytest's own folder."""
    script = ROOT / "scripts/generators/tiny_model.py"
    subprocess.run([sys.executable, str(script), str(folder)], check=True, timeout=300)
    let_anybody_read(folder)
    return folder


def let_anybody_read(folder):
    """Those below ``folder`` and the folders above it that pytest has made for us alone."""
    above = [path for path in folder.parents if path.name.startswith("pytest-") or "pytest-" in str(path.parent)]
    for path in (folder, *above, *folder.rglob("*")):
        path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))
