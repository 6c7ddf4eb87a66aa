#!/usr/bin/env python3
"""Measure the disk space that `plan`, `gpus` and `check` need: less than 30 MB, without torch or vLLM. Needs uv."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "tests/data/models/meta-llama--Meta-Llama-3-70B"
LIMIT_MB = 30


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "venv"
        uv = [str(local_uv) if (local_uv := Path(sys.executable).with_name("uv")).exists() else "uv"]
        python = str(environment / "bin/python")
        subprocess.run([*uv, "venv", "-q", "--python", sys.executable, str(environment)], check=True)
        install = [*uv, "pip", "install", "-q", "--python", python]
        subprocess.run([*install, "-r", str(ROOT / "requirements/base.txt")], check=True)
        subprocess.run([*install, "--no-deps", str(ROOT)], check=True)
        packages = next(environment.glob("lib/python*/site-packages"))
        size = sum(path.stat().st_size for path in packages.rglob("*") if path.is_file() and not path.is_symlink())
        launcher = [str(environment / "bin/vllm-launch")]
        environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        for words in (["plan", str(MODEL), "--hardware", "H100:8"], ["gpus"], ["check", "docs/config.example.yaml"]):
            subprocess.run([*launcher, *words], cwd=ROOT, env=environ, check=True, stdout=subprocess.DEVNULL)
        refused = subprocess.run(
            [*launcher, "serve", str(MODEL)], cwd=ROOT, env=environ, capture_output=True, text=True, check=False
        )
        heavy = [name for name in ("torch", "vllm", "transformers") if (packages / name).exists()]
    print(f"light install: {size / 1e6:.1f} MB (limit {LIMIT_MB}); plan, gpus and check work in it")
    print(f"heavy packages: {', '.join(heavy) or 'none'}; serve prints: {refused.stderr.strip()}")
    return int(size > LIMIT_MB * 1e6 or bool(heavy) or refused.returncode != 2)  # noqa: PLR2004 - the exit code of a user error


if __name__ == "__main__":
    sys.exit(main())
