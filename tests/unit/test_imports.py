"""ARCHITECTURE.md's arrows, read from the sources: who imports whom, and what a plan never loads."""

from __future__ import annotations

import ast
import graphlib
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH, HEALTH = ROOT / "scripts" / "vllm_launch", ROOT / "healthcheck" / "vllm_health"

LIBRARIES = {
    "aiohttp": {"vllm_health.prober", "vllm_health.scrape", "vllm_health.server"},
    "openai": {"vllm_health.smoke"},
    "prometheus_client": {"vllm_health.metrics", "vllm_health.scrape"},
    "pynvml": {"vllm_health.nvml"},
    "huggingface_hub": {"vllm_launch.model.hub"},
    "yaml": {"vllm_launch.settings.config_file", "vllm_launch.report.plan_table", "vllm_launch.report.helm_values"},
    "torch": {"vllm_launch.machine.p2p_probe"},
    "vllm": {"vllm_launch.inside_vllm.vllm_cli"},
}
"""Who may import a library that is not everybody's: one owner for each thing outside."""
EVERYBODYS = {*sys.stdlib_module_names, "msgspec", "vllm_launch", "vllm_health"}


def modules() -> dict[str, ast.Module]:
    return {
        ".".join(path.relative_to(folder.parent).with_suffix("").parts): ast.parse(path.read_text())
        for folder in (LAUNCH, HEALTH)
        for path in sorted(folder.rglob("*.py"))
        if path.stem != "__init__"
    }


def imported(tree: ast.Module) -> Iterator[str]:
    """The modules that a source names in its imports, wherever in it, as "vllm_launch.machine.gpus"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = str(node.module)
            yield from {module, *(f"{module}.{alias.name}" for alias in node.names)}


SOURCES = modules()


def test_no_files_import_each_other_in_a_circle() -> None:
    """Imports inside of functions count too: what such a circle ties can only be understood together."""
    ours = {name: {one for one in imported(tree) if one in SOURCES} for name, tree in SOURCES.items()}
    graphlib.TopologicalSorter(ours).prepare()  # it raises, and names them


def test_only_serving_supervises_and_only_the_command_line_serves() -> None:
    importers = {
        target: [name for name, tree in SOURCES.items() if f"vllm_launch.{target}" in imported(tree)]
        for target in ("serve.supervisor", "serve.serving", "__main__")
    }
    assert importers == {
        "serve.supervisor": ["vllm_launch.serve.serving"],
        "serve.serving": ["vllm_launch.commands"],
        "__main__": [],
    }


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("vllm_health")])
def test_the_prober_imports_nothing_of_the_launcher(name: str) -> None:
    assert not [one for one in imported(SOURCES[name]) if one.startswith("vllm_launch")]


def test_what_vllm_loads_imports_the_standard_library_alone() -> None:
    assert {
        one.partition(".")[0] for one in imported(SOURCES["vllm_launch.inside_vllm.guard"])
    } <= sys.stdlib_module_names


def test_a_library_is_imported_by_its_owner_alone() -> None:
    importers: dict[str, set[str]] = {}
    for name, tree in SOURCES.items():
        for library in {one.partition(".")[0] for one in imported(tree)} - EVERYBODYS:
            importers.setdefault(library, set()).add(name)
    assert importers == LIBRARIES


def loaded_by(program: str) -> set[str]:
    """The modules that a fresh interpreter has after ``program``."""
    after = f"{program}\nimport sys\nprint('\\n'.join(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", after], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stderr.split())


MAIN = "from vllm_launch.__main__ import main"
HEAVY = {"aiohttp", "openai", "torch", "vllm", "transformers", "huggingface_hub", "numpy", "prometheus_client", "httpx"}


@pytest.mark.parametrize(
    "program",
    [
        "import vllm_launch.__main__",
        f"{MAIN}; assert main(['plan', 'tests/data/models/meta-llama--Meta-Llama-3-8B', '--hardware', 'H100:8']) == 0",
        f"{MAIN}; assert main(['check', 'docs/config.example.yaml', 'm']) == 0",
    ],
)
def test_planning_loads_neither_an_engine_nor_a_client_nor_the_hub(program: str) -> None:
    loaded = loaded_by(program)
    assert "vllm_launch.plan.plan" in loaded
    assert not HEAVY & loaded


# ---- versions


def pinned() -> str:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    versions = {
        found[1] for extra in extras.values() for line in extra if (found := re.match(r"vllm(?:-cpu)?==(.+)", line))
    }
    (version,) = versions
    return version


MADE_FROM_IT = (
    "pyproject.toml",
    "requirements/",
    "scripts/vllm_launch/engine/options.json",
    "scripts/vllm_launch/engine/architectures.json",
)
RECORDS = ("tests/data/", "benchmarks/gpu/", "docs/performance.md", "CHANGELOG.md")
"""What was captured or written of one version, and stays true of it."""


def spoken(source: str) -> set[int]:
    """The lines of a Python source that are comments or docstrings: there a version says what a fact was taken from."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines.add(token.start[0])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines |= {*range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    return lines


def test_vllms_version_is_chosen_in_one_place() -> None:
    version = pinned()
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split(
        "\n"
    )
    found = []
    for name in listed:
        path = ROOT / name
        if not name or name.startswith((*MADE_FROM_IT, *RECORDS)) or not path.is_file():
            continue
        text = path.read_bytes().decode(errors="replace")
        lines = [number for number, line in enumerate(text.splitlines(), 1) if version in line]
        said = spoken(text) if lines and path.suffix == ".py" else set()
        found += [f"{name}:{number}" for number in lines if number not in said]
    assert not found


def test_what_is_generated_is_of_the_version_that_is_chosen() -> None:
    for name in ("options", "architectures"):
        assert f'"vllm": "{pinned()}"' in (LAUNCH / "engine" / f"{name}.json").read_text()
    for name in ("cpu", "cuda"):
        assert f"=={pinned()}" in (ROOT / "requirements" / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", SOURCES)
def test_nobody_reads_the_wall_clock(name: str) -> None:
    """It is set back and forth; whoever needs a time takes a monotonic clock's."""
    called = {ast.unparse(node.func) for node in ast.walk(SOURCES[name]) if isinstance(node, ast.Call)}
    assert not called & {"time.time", "time.time_ns", "datetime.now", "datetime.datetime.now", "datetime.utcnow"}
