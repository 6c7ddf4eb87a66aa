"""Asks vLLM again for changed rows of tests/data/model_facts.jsonl, and for a sample of the others that changes daily."""

import subprocess
import sys
from pathlib import Path

from sample import day

SCRIPT = Path(__file__).parents[2] / "scripts/generators/model_table.py"


def test_vllm_gives_the_facts_that_the_table_has(capsys):
    """JUDGE_DAY repeats the sample of another day (common/sample.py)."""
    ran = subprocess.run(
        [sys.executable, SCRIPT, "--check", day().isoformat()], capture_output=True, text=True, check=False, timeout=800
    )
    with capsys.disabled():
        print(f"\n{ran.stdout.strip()}")
    assert ran.returncode == 0, ran.stderr[-4000:]
