#!/usr/bin/env python3
"""Build FlashInfer's kernels into the image: ``kernels.py "8.0 9.0a …"`` or ``kernels.py none``. It needs no GPU.

Without prebuilt kernels, FlashInfer compiles them with nvcc at the first start. This delays the first token by about
two minutes. FlashInfer looks first in the package ``flashinfer_jit_cache`` (flashinfer/jit/env.py). PyPI has no wheels
of that package for the pinned version. This script writes the package for the given GPU architectures. For all others,
FlashInfer still compiles at the first start.
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
    sys.exit()  # FlashInfer then compiles all its kernels at the first start
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

# Top-k and top-p sampling, which every model needs, and the fused all-reduce that vLLM uses from Hopper on.
specs = [gen_sampling_module(), gen_trtllm_comm_module()]
build_jit_specs(specs, verbose=False)
for spec in specs:
    (PACKAGE / spec.name).mkdir(parents=True)
    shutil.copy2(env.FLASHINFER_JIT_DIR / spec.name / f"{spec.name}.so", PACKAGE / spec.name)
names = sorted("sm" + architecture.replace(".", "") for architecture in ARCHITECTURES.split())
init_text = INIT.format(version=__version__, architectures=names, modules=[spec.name for spec in specs])
(PACKAGE / "__init__.py").write_text(init_text)
# vLLM looks for this distribution before it warns of missing kernels.
metadata = PACKAGE.with_name(f"flashinfer_jit_cache-{__version__}.dist-info")
metadata.mkdir()
(metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flashinfer-jit-cache\nVersion: {__version__}\n")
