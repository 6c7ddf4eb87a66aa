"""Run the prober with simulated GPUs that get faults. NVML is simulated at its Python binding.

usage: simulated_gpus.py FLAGS_OF_VLLM_HEALTH…

The GPUs are healthy until the file named by the environment variable FAULTS exists.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import pynvml

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from simulated_nvml import LOST, FakePynvml

from vllm_health.__main__ import main

fake = FakePynvml()
sys.modules["pynvml"] = fake


def break_gpus():
    """Wait for the file, then give each simulated GPU its faults."""
    while not Path(os.environ["FAULTS"]).exists():
        time.sleep(0.1)
    fake.xids.append((0, 79))
    fake.rows = {1: (0, 1, 0, 1)}
    fake.ecc[1, pynvml.NVML_VOLATILE_ECC] = 3
    fake.slow = {0: 0x40, 1: 0x40}
    fake.broken["handle", 2] = LOST


threading.Thread(target=break_gpus, daemon=True).start()
sys.exit(main())
