"""docs/plan.svg, the README's picture, shows the present output of `vllm-launch plan`."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_picture_is_up_to_date():
    script = ROOT / "scripts/generators/plan_picture.py"
    generated = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert generated == (ROOT / "docs/plan.svg").read_text(), "run `make generate`"
