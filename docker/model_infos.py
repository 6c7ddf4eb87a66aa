#!/usr/bin/env python3
"""What vLLM asks of each model's class before it starts, asked while the image is built: ``model_infos.py``.

With an empty cache vLLM has a process of its own import the model, and all of vLLM and PyTorch with it, to learn what
the class can do: 5 to 20 s of a start. It keeps the answer with a digest of the model's source
(model_executor/models/registry.py:_LazyRegisteredModel). This writes the answers for all models that can be loaded here
to ``share/vllm-launch/modelinfos`` of the environment, from which
the launcher takes them (vllm_launch/serve/preflight.py).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

PREBUILT = Path(sys.prefix, "share", "vllm-launch")
os.environ["VLLM_CACHE_ROOT"] = str(PREBUILT)

from vllm.model_executor.models import registry  # noqa: E402, TID251  (reads the variable above)

registry._run_in_subprocess = lambda inspect: inspect()  # noqa: SLF001 - no GPU is touched here, so this process will do
failed = []
for name, model in registry.ModelRegistry.models.items():
    try:
        model.inspect_model_cls()
    except Exception:  # noqa: BLE001 - an optional library is not here, and vLLM would fail as well
        failed.append(name)
kept = list((PREBUILT / "modelinfos").glob("*.json"))
for file in kept:
    file.chmod(0o644)  # vLLM writes them for their owner alone
print(f"{len(kept)} model classes known; these cannot be loaded here: {', '.join(failed) or 'none'}")
if not kept:
    sys.exit("vLLM has kept nothing: it does this in another way now")
