"""``python -m vllm_monitoring``: write the rules, the dashboards and the runbook index, from a file of thresholds."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vllm_monitoring import engine, gpus, health, objectives, overview, rules, runbook_index, thresholds

HERE = runbook_index.RUNBOOKS.parent
DASHBOARDS = {"overview": overview, "engine": engine, "health": health, "gpus": gpus, "slo": objectives}
RULES = "prometheus/rules/vllm.yaml"
INDEX = "runbooks/README.md"


def generate(config: thresholds.Thresholds) -> dict[str, str]:
    """Return the text of every generated file, by its path below monitoring/."""
    dashboards = {f"grafana/dashboards/vllm-{name}.json": module.build(config) for name, module in DASHBOARDS.items()}
    return {RULES: rules.as_yaml(config), INDEX: runbook_index.text(config), **dashboards}


def main(argv: list[str] | None = None) -> int:
    """Write the files and return the exit code. 2: the input is wrong, and stderr has one line about it."""
    parser = argparse.ArgumentParser(prog="python -m vllm_monitoring", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--thresholds", type=Path, default=thresholds.SHIPPED, help="a YAML file that changes some of the thresholds"
    )
    parser.add_argument("--to", type=Path, default=HERE, help="the folder to write into; default: monitoring/")
    options = parser.parse_args(argv)
    try:
        files = generate(thresholds.read(options.thresholds))
        for path, text in files.items():
            target = options.to / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    except thresholds.ThresholdError as error:
        print(f"vllm_monitoring: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"vllm_monitoring: {error.filename}: {error.strerror}; name another folder with --to", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
