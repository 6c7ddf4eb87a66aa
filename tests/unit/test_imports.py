"""Modules that programs load at run time, and rules for all sources. pyproject.toml has the import contracts."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
LAUNCH, HEALTH = ROOT / "scripts" / "vllm_launch", ROOT / "healthcheck" / "vllm_health"


def modules() -> dict[str, ast.Module]:
    return {
        ".".join(path.relative_to(folder.parent).with_suffix("").parts): ast.parse(path.read_text())
        for folder in (LAUNCH, HEALTH)
        for path in sorted(folder.rglob("*.py"))
        if path.stem != "__init__"
    }


SOURCES = modules()


def test_every_third_party_library_except_msgspec_has_an_import_contract() -> None:
    graph = grimp.build_graph("vllm_launch", "vllm_health", include_external_packages=True, cache_dir=None)
    external = {name for name in graph.modules if graph.is_module_squashed(name)} - sys.stdlib_module_names
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    protected = {name for contract in settings["contracts"] for name in contract.get("protected_modules", ())}
    assert external - {"msgspec"} == {name for name in protected if not name.startswith("vllm_")}


def test_the_guard_loads_only_the_standard_library() -> None:
    loaded = {name.partition(".")[0] for name in loaded_by("import vllm_launch.inside_vllm.guard")}
    before = {name.partition(".")[0] for name in loaded_by("")}  # loaded by the environment's .pth files
    assert loaded - before <= sys.stdlib_module_names | {"vllm_launch"}


def test_architecture_md_names_each_folder_of_the_launcher_and_each_file_of_the_prober() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    folders = {path.parent.name for path in LAUNCH.glob("*/__init__.py")}
    assert set(re.findall(r"^\| `(\w+)/` \|", text, re.MULTILINE)) & folders == folders
    prober_table = text.partition("The prober, ")[2].partition("The rest:")[0]
    rows = re.findall(r"^\| ((?:`\w+` )+)\|", prober_table, re.MULTILINE)
    files = {path.stem for path in HEALTH.glob("*.py")} - {"__init__"}
    assert {name for row in rows for name in re.findall(r"\w+", row)} == files


def loaded_by(program: str) -> set[str]:
    """Return the modules that a new interpreter has loaded after ``program``."""
    source = f"{program}\nimport sys\nprint('\\n'.join(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, cwd=ROOT)
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
def test_plan_and_check_load_no_heavy_library(program: str) -> None:
    loaded = loaded_by(program)
    assert "vllm_launch.plan.plan" in loaded
    assert not HEAVY & loaded


# ---- versions


def pinned() -> str:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    versions = {
        match[1] for extra in extras.values() for line in extra if (match := re.match(r"vllm(?:-cpu)?==(.+)", line))
    }
    (version,) = versions
    return version


GENERATED = (
    "pyproject.toml",
    "requirements/",
    "scripts/vllm_launch/engine/options.json",
    "scripts/vllm_launch/engine/architectures.json",
    "docs/models.md",
    "scripts/vllm_launch/engine/towers.json",
)
RECORDS = ("tests/data/", "benchmarks/gpu/", "docs/performance.md", "CHANGELOG.md")
"""Files that record results of one vLLM version. They keep its number when the pinned version changes."""


def comment_lines(source: str) -> set[int]:
    """Return the numbers of the lines of ``source`` with a comment or a docstring. These lines may name a vLLM version."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines.add(token.start[0])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines |= {*range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    return lines


def test_only_pins_generated_files_records_and_comments_name_the_vllm_version() -> None:
    version = pinned()
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split(
        "\n"
    )
    misplaced = []
    for name in tracked:
        path = ROOT / name
        if not name or name.startswith((*GENERATED, *RECORDS)) or not path.is_file():
            continue
        text = path.read_bytes().decode(errors="replace")
        lines = [number for number, line in enumerate(text.splitlines(), 1) if version in line]
        allowed = comment_lines(text) if lines and path.suffix == ".py" else set()
        misplaced += [f"{name}:{number}" for number in lines if number not in allowed]
    assert not misplaced


def test_generated_files_are_of_the_pinned_version() -> None:
    for name in ("options", "architectures"):
        assert f'"vllm": "{pinned()}"' in (LAUNCH / "engine" / f"{name}.json").read_text()
    for name in ("cpu", "cuda"):
        assert f"=={pinned()}" in (ROOT / "requirements" / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", SOURCES)
def test_no_source_reads_the_wall_clock(name: str) -> None:
    """The wall clock can be set back. Durations need a monotonic clock."""
    called = {ast.unparse(node.func) for node in ast.walk(SOURCES[name]) if isinstance(node, ast.Call)}
    assert not called & {"time.time", "time.time_ns", "datetime.now", "datetime.datetime.now", "datetime.utcnow"}
