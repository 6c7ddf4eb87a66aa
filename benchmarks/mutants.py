#!/usr/bin/env python3
"""Measure how many mutants of the deciding modules the tests kill: `make mutants`, or this file with module names.

mutmut changes one place at a time and runs the tests that reach it. It uses only the tests that are named after a
module of pyproject.toml's ``tool.mutmut``. It works in a copy with the packages in src/, because it imports only from
there or from the root. This command lists the survivors that mutants-survivors.toml does not explain. All survivors,
explained or not, count as not killed.
"""

from __future__ import annotations

import collections
import contextlib
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DECIDING = {
    "plan": 0.85, "choose": 0.85, "alternatives": 0.85, "memory": 0.85, "activations": 0.85, "parallel": 0.85,
    "state": 0.9,
}  # fmt: skip
"""Module: smallest share of its mutants that the tests must kill. The default for other modules is 0.85."""
PACKAGES = ("scripts/vllm_launch", "healthcheck/vllm_health")
KILLED = {"killed", "timeout", "segfault"}  # a timeout means that the mutant loops forever
MUTMUT = Path(sysconfig.get_path("scripts")) / "mutmut"


def main() -> int:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutmut"]
    modules = sys.argv[1:] or list(DECIDING)
    shared = [
        "conftest.py",
        "builders.py",
        "simulated_nvml.py",
        *(f"{Path(path).parent.name}/test_{Path(path).stem}.py" for path in settings["only_mutate"]),
    ]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder)
        for package in PACKAGES:
            shutil.copytree(ROOT / package, copy / "src" / Path(package).name)
        shutil.copytree(ROOT / "tests/data", copy / "tests/data")
        for file in shared:
            if (ROOT / "tests/unit" / file).exists():
                (copy / "tests/unit" / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / "tests/unit" / file, copy / "tests/unit" / file)
        shutil.copy(ROOT / "pyproject.toml", copy)
        with (copy / "run.log").open("w+b") as log:
            # mutmut ends with an error if a test fails without mutants, or if a module has no mutants.
            names = [f"{_module(settings, module)}.*" for module in modules]
            if subprocess.run([MUTMUT, "run", *names], cwd=copy, stdout=log, stderr=log, check=False).returncode:
                log.seek(0)
                print(log.read().decode().replace("\r", "\n")[-4000:])
                return 2
        return _report(copy, {module: _module(settings, module) for module in modules})


def _report(copy: Path, modules: dict[str, str]) -> int:
    with contextlib.chdir(copy):
        # mutmut reads its settings on import. Its own `results` and `show` take two seconds per mutant.
        from mutmut.mutation.diff_apply import get_diff_for_mutant  # noqa: PLC0415
        from mutmut.stats import status_by_exit_code  # noqa: PLC0415

        explained, good = _explained(), True
        for module, dotted in modules.items():
            meta = json.loads(Path(f"mutants/src/{dotted.replace('.', '/')}.py.meta").read_text())
            results = {name: status_by_exit_code[code] for name, code in meta["exit_code_by_key"].items()}
            survivors = [name for name, status in results.items() if status not in KILLED]
            unreached = collections.Counter(_function(name) for name in survivors if results[name] == "no tests")
            for function, count in unreached.items():
                print(f"no test reaches {function}: {count} mutants")
            for name in survivors:
                function = _function(name)
                if function in unreached:
                    continue
                diff = get_diff_for_mutant(name)
                original, mutated = (
                    "\n".join(re.findall(rf"^{sign}(?!{sign}) *(.*)$", diff, re.MULTILINE)) for sign in ("-", r"\+")
                )
                if explained.pop((function, original, mutated), None) is None:
                    print(f"{results[name]}: {function}\n  - {original}\n  + {mutated}")
            killed = 1 - len(survivors) / len(results)
            good = good and killed >= DECIDING.get(module, 0.85)
            print(f"{module}: {len(results) - len(survivors)} of {len(results)} mutants killed, {killed:.1%}")
    for function, original, mutated in explained:
        if function.split(".")[0] in modules:
            print(
                f"remove from mutants-survivors.toml, it no longer survives: {function}\n  - {original}\n  + {mutated}"
            )
    return 0 if good else 1


def _module(settings: dict[str, list[str]], name: str) -> str:
    """Return the dotted name of a module that mutmut may mutate: "vllm_launch.plan.plan" for "plan"."""
    file = next(path for path in settings["only_mutate"] if Path(path).stem == name)
    return file.removeprefix("src/").removesuffix(".py").replace("/", ".")


def _function(mutant: str) -> str:
    """Return the function of a mutant: "memory.gib" of "vllm_launch.sizing.memory.x_gib__mutmut_7".

    mutmut writes a method as "xǁClassǁname".
    """
    return re.sub(r"^vllm_launch\.\w+\.|^vllm_health\.|(?<=\.)x[_ǁ]|__mutmut_\d+$", "", mutant).replace("ǁ", ".")


def _explained() -> dict[tuple[str, str, str], str]:
    """Return the reasons why mutants are harmless, by function, original line and mutated line."""
    entries = tomllib.loads(Path(__file__).with_name("mutants-survivors.toml").read_text())["harmless"]
    return {(entry["of"], entry["was"], becomes): entry["why"] for entry in entries for becomes in entry["becomes"]}


if __name__ == "__main__":
    sys.exit(main())
