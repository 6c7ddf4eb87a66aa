#!/usr/bin/env python3
"""FlashInfer's kernels, built ahead while the image is built: ``kernels.py "8.0 9.0a …"`` or ``none``, no GPU needed.

At the first start FlashInfer compiles what it needs with nvcc: about two minutes before a model can sample its first
token. It looks first in the package ``flashinfer_jit_cache`` (flashinfer/jit/env.py), whose wheels the pinned version
does not have on PyPI. This writes that package, for the GPU generations named; for any other FlashInfer still compiles.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

ARCHITECTURES = sys.argv[1]
if ARCHITECTURES == "none":
    sys.exit()  # FlashInfer compiles all that it needs, then
os.environ |= {"FLASHINFER_CUDA_ARCH_LIST": ARCHITECTURES, "FLASHINFER_WORKSPACE_BASE": tempfile.mkdtemp()}

from flashinfer.jit import build_jit_specs, env  # noqa: E402  (reads the variables above)
from flashinfer.jit.comm import gen_trtllm_comm_module  # noqa: E402
from flashinfer.jit.sampling import gen_sampling_module  # noqa: E402
from flashinfer.version import __version__  # noqa: E402

PACKAGE = Path(sysconfig.get_path("purelib")) / "flashinfer_jit_cache"
INIT = '''"""Kernels built for this image by docker/kernels.py; read by flashinfer/jit/env.py."""
from pathlib import Path
from types import SimpleNamespace

__version__ = {version!r}


def get_jit_cache_providers():
    return [SimpleNamespace(
        provider_id="vllm-launch", distribution="flashinfer-jit-cache", version=__version__,
        jit_cache_dir=Path(__file__).parent, cuda_architectures={architectures!r}, modules={modules!r},
    )]
'''

# What every model needs (top-k and top-p sampling), and what vLLM fuses between GPUs from Hopper on.
specs = [gen_sampling_module(), gen_trtllm_comm_module()]
build_jit_specs(specs, verbose=False)
for spec in specs:
    (PACKAGE / spec.name).mkdir(parents=True)
    shutil.copy2(env.FLASHINFER_JIT_DIR / spec.name / f"{spec.name}.so", PACKAGE / spec.name)
names = sorted("sm" + one.replace(".", "") for one in ARCHITECTURES.split())
built = INIT.format(version=__version__, architectures=names, modules=[spec.name for spec in specs])
(PACKAGE / "__init__.py").write_text(built)
# vLLM asks for the distribution before it says that kernels are missing.
metadata = PACKAGE.with_name(f"flashinfer_jit_cache-{__version__}.dist-info")
metadata.mkdir()
(metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flashinfer-jit-cache\nVersion: {__version__}\n")
