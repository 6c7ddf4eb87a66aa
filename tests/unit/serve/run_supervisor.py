"""Run the supervisor alone, without a plan: ``run_supervisor.py OPTIONS_JSON COMMAND...``."""

import asyncio
import os
import sys

import msgspec

from vllm_launch.errors import UsageError
from vllm_launch.serve import supervisor
from vllm_launch.serve.run_options import Options

options = msgspec.json.decode(sys.argv[1], type=Options, dec_hook=lambda kind, value: kind(value))
try:
    sys.exit(asyncio.run(supervisor.serve(sys.argv[2:], dict(os.environ), options)))
except UsageError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
