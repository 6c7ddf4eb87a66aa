"""Draw every dashboard from the recording of two H100s: ``pictures.py FOLDER`` (`make pictures`)."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent / "common")]
from recorded import INTERVAL_S, load  # noqa: E402 - sys.path is set above

from vllm_monitoring import draw  # noqa: E402

IDLE_S = 90
"""Seconds without requests at the end of the recording. They are not drawn."""


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        prometheus, begin, end = load(Path(folder), with_dcgm=False)
        try:
            return draw.main([
                f"--prometheus={prometheus.url}", f"--from={begin}", f"--to={end - IDLE_S}", f"--interval={INTERVAL_S}",
                f"--to-folder={sys.argv[1]}",
            ])  # fmt: skip
        finally:
            prometheus.close()


if __name__ == "__main__":
    sys.exit(main())
