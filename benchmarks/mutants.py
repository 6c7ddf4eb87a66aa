#!/usr/bin/env python3
"""How many mistakes in the deciding modules their tests notice: `make mutants`, or this file with names of modules.

mutmut changes one place at a time and runs the tests that reach it (settings: pyproject.toml, tool.mutmut). It works
in a copy, where the packages lie in src/, the only layout besides the root that it imports from. Survivors that
mutants-survivors.toml does not explain are listed; explained or not, all of them count as not killed.
"""

from __future__ import annotations

import collections
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEAST = 0.85
KILLED = {"killed", "timeout", "segfault"}  # a timeout is a loop that no longer ends
MUTMUT = Path(sysconfig.get_path("scripts")) / "mutmut"


def main() -> int:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutmut"]
    modules = sys.argv[1:] or [Path(path).stem for path in settings["only_mutate"]]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder)
        for package in ("scripts/vllm_launch", "healthcheck/vllm_health"):
            shutil.copytree(ROOT / package, copy / "src" / Path(package).name)
        shutil.copytree(ROOT / "tests", copy / "tests")
        shutil.copy(ROOT / "pyproject.toml", copy)
        with (copy / "run.log").open("w+b") as log:
            # A test of the copy that fails, or no mutant where names say there are some, ends mutmut with an error.
            names = [f"vllm_launch.{module}.*" for module in modules]
            if subprocess.run([MUTMUT, "run", *names], cwd=copy, stdout=log, stderr=log, check=False).returncode:
                log.seek(0)
                print(log.read().decode().replace("\r", "\n")[-4000:])
                return 2
        return _report(copy, modules)


def _report(copy: Path, modules: list[str]) -> int:
    listed = re.findall(r"^ +(\S+): (.+)$", _mutmut(copy, "results", "--all", "true"), re.MULTILINE)
    found = [(name.split(".")[1], name, status) for name, status in listed if name.split(".")[1] in modules]
    survivors = [name for _, name, status in found if status not in KILLED]
    explained = _explained()
    for name in survivors:
        function = re.sub(r"^vllm_launch\.|(?<=\.)x[_ǁ]|__mutmut_\d+$", "", name).replace("ǁ", ".")
        was, becomes = (
            "\n".join(re.findall(rf"^{sign}(?!{sign}) *(.*)$", _mutmut(copy, "show", name), re.MULTILINE))
            for sign in ("-", r"\+")
        )
        if (function, was, becomes) in explained:
            explained[function, was, becomes] = True
        else:
            print(f"survived in {function}:\n  - {was}\n  + {becomes}")
    for (function, was, becomes), used in explained.items():
        if not used and function.split(".")[0] in modules:
            print(f"explained but killed, or gone, in {function}:\n  - {was}\n  + {becomes}")
    total = collections.Counter(module for module, *_ in found)
    killed = collections.Counter(module for module, _, status in found if status in KILLED)
    for module in modules:
        print(f"{module}: {killed[module]} of {total[module]} mutants killed, {killed[module] / total[module]:.1%}")
    return int(any(killed[module] < LEAST * total[module] for module in modules))


def _mutmut(copy: Path, *arguments: str) -> str:
    return subprocess.run([MUTMUT, *arguments], cwd=copy, capture_output=True, text=True, check=True).stdout


def _explained() -> dict[tuple[str, str, str], bool]:
    """(function, line, the line as mutated) of each mutant that is known to be harmless."""
    entries = tomllib.loads(Path(__file__).with_name("mutants-survivors.toml").read_text())["harmless"]
    return {(entry["of"], entry["was"], becomes): False for entry in entries for becomes in entry["becomes"]}


if __name__ == "__main__":
    sys.exit(main())
