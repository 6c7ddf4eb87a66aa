"""Ask the pinned vLLM whether it accepts command lines: ``verdicts.py h200|cpu COMMANDS VERDICTS``.

COMMANDS has one JSON list of words per line, the words after ``vllm serve``. VERDICTS gets one JSON value per line:
null, or why vLLM refuses the words. vLLM's own parser reads them, and its own config classes check them, as in
vllm/entrypoints/launchers/api_server/entry.py:run_server. No engine is started.
"""

# ruff: noqa: PLC0415, TID251 - vLLM may only be imported after the platform is chosen

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

GPUS = 8


def judge() -> Callable[[Sequence[str]], str | None]:
    """Return a function from words to vLLM's refusal, or None if vLLM accepts them."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.launchers.launcher import validate_api_server_args
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())

    def verdict(words: Sequence[str]) -> str | None:
        errors = io.StringIO()
        environment = dict(os.environ)
        try:
            with contextlib.redirect_stderr(errors):
                arguments = copy.deepcopy(parser.parse_args(list(words)))  # vLLM changes the parser's default objects
            validate_parsed_serve_args(arguments)
            validate_api_server_args(arguments)
            arguments.model = arguments.model_tag or arguments.model
            engine = AsyncEngineArgs.from_cli_args(arguments)
            engine.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        except SystemExit:
            return errors.getvalue()[-1000:]
        except Exception as error:  # noqa: BLE001 - whatever vLLM raises is a refusal
            return f"{type(error).__name__}: {error}"
        finally:
            os.environ.clear()
            os.environ |= environment
        return None

    return verdict


def main(platform: str, commands: Path, verdicts: Path) -> None:
    """Write one verdict for each line of ``commands``."""
    if platform == "cpu":
        os.environ |= {"VLLM_TARGET_DEVICE": "cpu", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    else:
        from paper_gpu import pretend_h200

        pretend_h200(GPUS)
    verdict = judge()
    with verdicts.open("w") as file:
        for line in commands.read_text().splitlines():
            file.write(json.dumps(verdict(json.loads(line))) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
