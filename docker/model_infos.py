#!/usr/bin/env python3
"""Record the properties of all model classes while the image is built: ``model_infos.py``.

With an empty cache, vLLM starts a process that imports the model, vLLM and PyTorch, only to read the properties of the
model class. This takes 5 to 20 s of a start. vLLM caches the result with a digest of the model's source
(model_executor/models/registry.py:_LazyRegisteredModel). This script writes the results for all models that can be
loaded here to ``share/vllm-launch/modelinfos`` of the environment. The launcher copies them from there
(vllm_launch/serve/preflight.py).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

PREBUILT = Path(sys.prefix, "share", "vllm-launch")
os.environ["VLLM_CACHE_ROOT"] = str(PREBUILT)

from vllm.model_executor.models import registry  # noqa: E402, TID251  (reads the variable above)

registry._run_in_subprocess = lambda inspect: inspect()  # noqa: SLF001 - it uses no GPU, so this process can do it
failed = []
for name, model in registry.ModelRegistry.models.items():
    try:
        model.inspect_model_cls()
    except Exception:  # noqa: BLE001 - an optional library is missing, and vLLM would fail too
        failed.append(name)
infos = list((PREBUILT / "modelinfos").glob("*.json"))
for file in infos:
    file.chmod(0o644)  # vLLM lets only the owner read them
print(f"{len(infos)} model classes recorded. These cannot be loaded here: {', '.join(failed) or 'none'}")
if not infos:
    sys.exit("vLLM has written no model infos: this version stores them elsewhere. Update model_infos.py")
