"""Prints what vLLM's config classes make of command lines, as on an H200: one JSON list in, one JSON list out.

An item of the input is [folder of a model, words after ``vllm serve``]. It runs in a process of its own, because it
changes vLLM's platform.
"""

# ruff: noqa: PLC0415, TID251 - vLLM may only be imported after the preparations

import contextlib
import json
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts/generators"))
from paper_gpu import pretend_h200


def main():
    pretend_h200()
    warnings.simplefilter("ignore")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.model_executor.offloader.base import create_offloader
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())

    def facts(folder, words):
        args = parser.parse_args(["--model", folder, "--skip-tokenizer-init", *words])
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER)
        compilation = config.compilation_config
        return {
            "compiled": compilation.mode.name == "VLLM_COMPILE",
            "cudagraph_mode": compilation.cudagraph_mode.name,
            "sizes": compilation.cudagraph_capture_sizes,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "max_model_len": config.model_config.max_model_len,
            "async_scheduling": config.scheduler_config.async_scheduling,
            "prefix_caching": config.cache_config.enable_prefix_caching,
            "mamba_cache_mode": config.cache_config.mamba_cache_mode,
            "disable_hybrid": config.scheduler_config.disable_hybrid_kv_cache_manager,
            "num_speculative_tokens": config.num_speculative_tokens,
            "runner_v2": config.use_v2_model_runner,
            "offloader": type(create_offloader(config.offload_config)).__name__,
        }

    def answer(folder, words):
        try:
            return facts(folder, words)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - what vLLM raises is the answer
            return {"error": f"{type(error).__name__}: {error}"}

    items = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        answers = [answer(folder, words) for folder, words in items]
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
