"""Every invalid input gives one line on stderr with the problem and the remedy, and exit code 2. Nothing is started."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_launch.__main__ import main
from vllm_launch.engine.options import options
from vllm_launch.settings.settings import LauncherSettings

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 320, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip
LARGE = CONFIG | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 128_256,
}  # fmt: skip
GPU: dict[str, Any] = {
    "index": 0, "uuid": "GPU-0", "name": "NVIDIA L4", "memory_total": 23_000_000_000, "memory_free": 22_000_000_000,
    "compute_capability": [8, 9],
}  # fmt: skip
RECORD: dict[str, Any] = {
    "name": "NVIDIA L4", "uuid": "GPU-0", "cc": [8, 9], "mem_v2": {"total": 24_000_000_000, "free": 22_000_000_000},
}  # fmt: skip

Content = bytes | str | dict[str, Any] | list[Any]
"""Content of a file. Objects and lists are written as JSON."""


class Row(NamedTuple):
    """One invalid input. ``words``: the command line. The error line must contain ``names`` and, after it, ``remedy``."""

    id: str
    words: str
    names: str
    remedy: str
    files: Mapping[str, Content] = {}
    environ: Mapping[str, str] = {}


def model(label: str, names: str, remedy: str, config: Content | None = None, /, **keys: Any) -> Row:
    """Return a row with a model folder, whose config.json has ``keys`` changed (None: removed), or is ``config``."""
    changed = {key: value for key, value in {**CONFIG, **keys}.items() if value is not None}
    files = {"m/config.json": changed if config is None else config}
    return Row(f"config.json {label}", "plan m --hardware H100:8", names, remedy, files)


def safetensors(entries: Any, data: int = 0, *, length: int | None = None) -> bytes:
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + bytes(data)


def tensor(**changes: Any) -> dict[str, Any]:
    """Return an entry of 2 x 3 elements of two bytes. None removes a key."""
    entry = {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12], **changes}
    return {key: value for key, value in entry.items() if value is not None}


def header(label: str, names: str, content: bytes, remedy: str = "hf download") -> Row:
    return Row(f"safetensors {label}", "plan m --hardware H100:8", names, remedy, {"m/model.safetensors": content})


def shards(label: str, names: str, remedy: str, index: Content, **files: Content) -> Row:
    named = {f"m/{name}.safetensors": content for name, content in files.items()}
    return Row(
        f"index {label}", "plan m --hardware H100:8", names, remedy, {"m/model.safetensors.index.json": index, **named}
    )


def yaml(label: str, text: Content, names: str, remedy: str) -> Row:
    return Row(f"config.yaml {label}", "check config.yaml", names, remedy, {"config.yaml": text})


def hardware(label: str, names: str, content: Content, remedy: str = "vllm-launch gpus --format json") -> Row:
    return Row(f"hardware file {label}", "plan m --hardware h.json", names, remedy, {"h.json": content})


def variable(name: str, value: str, names: str, remedy: str, words: str = "plan m --hardware H100:8") -> Row:
    return Row(f"environment {name}={value}", words, names, remedy, environ={name: value})


def flags(words: str, names: str, remedy: str) -> Row:
    return Row(f"flags {words}", f"plan m --hardware H100:8 {words}", names, remedy)


def quantized(method: str, remedy: str, **keys: Any) -> Row:
    return model(f"quantised by {method}", method, remedy, quantization_config={"quant_method": method, **keys})


COMMANDS = [
    Row("command that does not exist", "frobnicate", "'frobnicate'", "serve, plan, gpus, check or download"),
    Row("command misspelt", "sevre m", "'sevre'", "did you mean serve?"),
    Row("command in capitals", "Plan m", "'Plan'", "did you mean plan?"),
    Row("model without a command", "Qwen/Qwen3-8B", "'Qwen/Qwen3-8B'", "vllm-launch serve Qwen/Qwen3-8B"),
    Row("folder without a command", "m --port 8000", "'m'", "vllm-launch serve m"),
    Row("flag before the command", "--port 8000 serve m", "--port", "serve, plan, gpus, check or download"),
    Row("command of vLLM's that we lack", "bench m", "'bench'", "serve, plan, gpus, check or download"),
    Row("plan without a model", "plan", "no model", "give a folder or a name on the hub"),
    Row("plan of an empty name", "plan ''", "model", "give a folder or a name on the hub"),
    Row("plan of two models", "plan m other", "'other'", "quote"),
    Row("plan of a name that is not UTF-8", "plan m\udcff", "word 2", "UTF-8"),
    Row("key that is not UTF-8", "plan m --api-key k\udcff", "word 4", "UTF-8"),
    Row("plan in an unknown format", "plan m --format xml", "--format xml", "table, json, yaml"),
    Row("plan without the format", "plan m --format", "--format", "--format VALUE"),
    Row("plan with the format twice", "plan m --format json --format yaml", "--format", "keep one"),
    Row("plan without the hardware", "plan m --hardware", "--hardware", "--hardware VALUE"),
    Row("plan with a flag for hardware", "plan m --hardware --format json", "--hardware", "--hardware VALUE"),
    Row("plan with empty hardware", "plan m --hardware=", "--hardware", "--hardware VALUE"),
    Row("plan with the hardware twice", "plan m --hardware L4 --hardware H100", "--hardware", "keep one"),
    Row("serve for other hardware", "serve m --hardware H100:8", "--hardware", "vllm-launch plan"),
    Row("serve in a format", "serve m --format json", "--format", "vllm-launch plan"),
    Row("gpus with a word", "gpus all", "'all'", "--format table or json"),
    Row("gpus of other hardware", "gpus --hardware H100", "'--hardware'", "--format table or json"),
    Row("gpus in yaml", "gpus --format yaml", "--format yaml", "table, json"),
    Row("check without a file", "check", "no config file", "vllm-launch check config.yaml"),
    Row(
        "check with a flag for an absent file",
        "check --config absent.yaml",
        "absent.yaml",
        "give an existing YAML file",
    ),
    Row("check with a flag of vLLM alone", "check --port 1", "no config file", "check config.yaml"),
    Row("check of a file that is not there", "check absent.yaml", "absent.yaml", "give an existing YAML file"),
    Row("check of a file without an end", "check /dev/zero", "File too large", "give an existing YAML file"),
    Row("check of a folder", "check m", "m: ", "give an existing YAML file"),
    Row(
        "check of a file without a model",
        "check config.yaml",
        "no model",
        "model: in config.yaml",
        {"config.yaml": "port: 1"},
    ),
    Row(
        "check in a format",
        "check config.yaml --format json",
        "--format",
        "vllm-launch plan",
        {"config.yaml": "model: m"},
    ),
]

FLAGS = [
    flags("--tensor-paralel-size 2", "--tensor-paralel-size", "did you mean --tensor-parallel-size?"),
    flags("--max_modellen 8k", "--max-modellen", "did you mean --max-model-len?"),
    flags("--gpu-memory-utilisation 0.9", "--gpu-memory-utilisation", "did you mean --gpu-memory-utilization?"),
    flags("--nothing-like-this", "--nothing-like-this", "docs/config.example.yaml"),
    flags("--MAX_MODEL_LEN 8k", "--MAX-MODEL-LEN", "did you mean --max-model-len?"),
    flags("--health-port 9000", "--health-port", "write --launch-health-port"),
    flags("--drain-seconds 30", "--drain-seconds", "write --launch-drain-seconds"),
    flags("--max 5", "--max", "in full"),
    flags("--swap-space 4", "--swap-space", "--kv-offloading-size"),
    flags("--device cuda", "--device", "remove it"),
    flags("--num-scheduler-steps 8", "--num-scheduler-steps", "--async-scheduling"),
    flags("--speculative-model other", "--speculative-model", "--speculative-config.model"),
    flags("--disable-log-requests", "--disable-log-requests", "--enable-log-requests"),
    flags("--port", "--port", "--port=VALUE"),
    flags("--port abc", "'abc'", "whole number"),
    flags("--port 0", "port is 0", "1 to 65535"),
    flags("--port 70000", "port is 70000", "1 to 65535"),
    flags("--port 8001", "port 8001", "change one of them"),
    flags("--port 8000 --port 9000", "--port", "keep one"),
    flags("-tp 2 --tensor-parallel-size 4", "--tensor-parallel-size", "keep one"),
    flags("--tensor-parallel-size 0", "tensor_parallel_size is 0", "1 or more"),
    flags("--tensor-parallel-size=-2", "tensor_parallel_size is -2", "1 or more"),
    flags("--tensor-parallel-size 2.0", "'2.0'", "whole number"),
    flags("--tensor-parallel-size two", "'two'", "whole number"),
    flags("--max-model-len 8Q", "'8Q'", "8k (8000) or 8K (8192)"),
    flags("--max-model-len 1.5K", "'1.5K'", "decimal point"),
    flags("--max-model-len 0", "max_model_len is 0", "1 or more, or auto"),
    flags("--max-num-seqs 100 --max-num-batched-tokens 10", "max_num_seqs 100", "lower max_num_seqs"),
    flags("--gpu-memory-utilization 90", "gpu_memory_utilization is 90", "above 0, at most 1"),
    flags("--gpu-memory-utilization nan", "gpu_memory_utilization is nan", "above 0, at most 1"),
    flags("--gpu-memory-utilization 90%", "'90%'", "number"),
    flags("--gpu-memory-utilization -0.5", "-0.5", "--gpu-memory-utilization=-0.5"),
    flags("--dtype bfloat17", "'bfloat17'", "bfloat16"),
    flags("--kv-cache-dtype fp9", "'fp9'", "fp8"),
    flags("--quantization squeezellm", "'squeezellm'", "AWQ"),
    flags("--quantization bitsandbytes", "'bitsandbytes'", "--quantization fp8"),
    flags("--distributed-executor-backend rai", "'rai'", "ray"),
    flags("--enforce-eager=true", "--enforce-eager", "alone"),
    flags("--enforce-eager yes", "'yes'", "quote"),
    flags("--hf-overrides {bad", "--hf-overrides", "an object in single quotes"),
    flags("--allowed-origins '*'", "'*' is not JSON", """'["word"]'"""),
    flags("--limit-mm-per-prompt image=2,video=1", "'image=2,video=1' is not JSON", """'{"image": 2, "video": 1}'"""),
    flags("--hf-overrides '[1]'", "--hf-overrides", "an object in single quotes"),
    flags(
        '--limit-mm-per-prompt \'{"image": "x"}\'', "flag --limit-mm-per-prompt: a value has the wrong type", "--help"
    ),
    flags("--limit-mm-per-prompt '{\"image\": [1]}'", "expected int or object, got array", "--help"),
    flags('--limit-mm-per-prompt \'{"video": {"width": 1.5}}\'', "flag --limit-mm-per-prompt", "--help"),
    flags("--compilation-config '{\"mode\": }'", "not JSON", "JSON in single quotes"),
    flags("--speculative-config 5", "--speculative-config", "an object in single quotes"),
    flags("--compilation-config.mode", "--compilation-config.mode", "=VALUE"),
    flags("--compilation-config.mode 1 --compilation-config.mode 2", "--compilation-config.mode", "keep one"),
    flags("--compilation-config.cudagraf_mode FULL", "'cudagraf_mode'", "did you mean cudagraph_mode?"),
    flags("--compilation-config '{\"level\": 3}'", "'level'", "use mode"),
    flags('--speculative-config \'{"metod": "mtp"}\'', "'metod'", "did you mean method?"),
    flags("--structured-outputs-config.colour red", "'colour'", "known keys are backend,"),
    Row("flags behind two dashes", "plan -- m --port 80", "--port: comes after --", "remove the --"),
    flags("--lora-modules sql", "'sql'", "NAME=PATH"),
    flags("--api-key=", "a key is empty", "give a key"),
    flags("--shutdown-timeout=-1", "shutdown_timeout is -1", "0 or more seconds"),
    flags("--headless", "no API at all", "run vllm serve without the launcher"),
    flags("--uds /run/vllm.sock", "Unix socket", "run vllm serve without the launcher"),
    flags("--device-ids 2,3", "--device-ids", "CUDA_VISIBLE_DEVICES=2,3"),
    flags("--ssl-keyfile k.pem", "without a certificate", "ssl_certfile"),
    flags("--config", "--config", "--config VALUE"),
    flags("--config absent.yaml", "absent.yaml", "give an existing YAML file"),
    flags("--config m", "m: ", "give an existing YAML file"),
    flags("--config m/config.json/x", "m/config.json/x", "give an existing YAML file"),
    flags("--config a.yaml --config b.yaml", "--config", "keep one"),
    flags("--conf a.yaml", "--config, --config-format", "in full"),
    flags("--launch-helth-port 1", "helth", "did you mean --launch-health-port?"),
    flags("--launch-health-port", "--launch-health-port", "VALUE"),
    flags("--launch-health-port 99999", "'99999'", "1 to 65535"),
    flags("--launch-health-port 8000", "port 8000", "change one of them"),
    flags("--launch-drain-seconds soon", "'soon'", "0 to 86400"),
    flags("--launch-drain-seconds -1", "'-1'", "0 to 86400"),
    flags("--launch-objective fast", "'fast'", "latency"),
    flags("--launch-quality best", "'best'", "lossless or fp8-kv"),
    flags("--launch-nvlink-multicast on", "'on'", "auto or off"),
    flags("--launch-nvlink-multicast off -cc.pass_config.fuse_allreduce_rms true", "--compilation-config", "leave"),
    flags("--launch-p2p-check maybe", "'maybe'", "auto"),
    flags("--launch-greet=true", "--launch-greet", "--no-launch-greet"),
    flags("--help=all", "-h", "write -h or --help"),
    Row("greet that is no boolean", "serve m", "LAUNCH_GREET", "true or false", environ={"LAUNCH_GREET": "maybe"}),
    flags("--launch-allowed-routes v1/chat", "'v1/chat'", "/v1/chat"),
    flags("--launch-cache-dir=", "--launch-cache-dir", "VALUE"),
    flags("--no-launch-health-port", "--no-launch-health-port", "--launch-health-port"),
]

YAML = [
    yaml("key misspelt", "model: m\ntensor_paralel_size: 2", "line 2", "did you mean tensor_parallel_size?"),
    yaml("key that vLLM dropped", "model: m\nswap-space: 4", "swap-space", "kv-offloading-size"),
    yaml("key of ours at the top", "model: m\nhealth_port: 8001", "health_port", "launch:"),
    yaml(
        "key of vLLM's under launch",
        "model: m\nlaunch:\n  max_model_len: 8k",
        "max_model_len is an option of vLLM",
        "outside launch:",
    ),
    yaml("key in capitals", "model: m\nMAX_MODEL_LEN: 8k", "MAX_MODEL_LEN", "did you mean max_model_len?"),
    yaml("key that is a short flag", "model: m\ntp: 2", "option tp", "did you mean tensor_parallel_size?"),
    yaml("key with the dash of a short flag", "model: m\n-cc: {mode: 3}", "-cc", "did you mean compilation_config?"),
    yaml("key of ours with its prefix", "model: m\nlaunch-health-port: 8001", "line 2", "launch:"),
    yaml("key of ours with a dot", "model: m\nlaunch.health_port: 8001", "line 2", "launch:"),
    yaml("section of ours in capitals", "model: m\nLaunch: {}", "Launch", "did you mean launch?"),
    yaml("key misspelt within JSON", "model: m\ncompilation-config:\n  mod: 3", "line 2", "did you mean mode?"),
    yaml("key misspelt under launch", "model: m\nlaunch:\n  helth_port: 1", "line 3", "did you mean health_port?"),
    yaml("key twice", "model: m\nport: 1\nport: 2", "line 3", "first on line 2"),
    yaml("key in two spellings", "model: m\nmax-model-len: 1k\nmax_model_len: 2k", "line 3", "keep one of them"),
    yaml("key that moves the cursor", 'model: m\n"\\e[2Jport": 1', "option \\x1b[2Jport", "did you mean port?"),
    yaml("key that is a number", "model: m\n1: 2", "line 2", "docs/config.example.yaml"),
    yaml("key that is a list", "model: m\n? [a]\n: 1", "line 2", "plain text"),
    yaml("merge key", "model: m\n<<: {port: 1}", "line 2", "plain text"),
    yaml("number as a word", "model: m\nport: eight", "line 2", "whole number"),
    yaml("number as true", "model: m\nport: true", "line 2", "whole number"),
    yaml("number with a point", "model: m\nport: 1.5", "line 2", "whole number"),
    yaml("number out of range", "model: m\nmax_model_len: -5", "line 2", "1 or more"),
    yaml("switch as a word", "model: m\nenforce_eager: 'yes'", "line 2", "true nor false"),
    yaml("value missing", "model: m\nport:", "line 2", "leave the key out"),
    yaml("text as a mapping", "model: m\ntokenizer: {a: b}", "line 2", "text"),
    yaml("text as a date", "model: m\nrevision: 2026-01-01", "line 2", "in quotes"),
    yaml("date within JSON", "model: m\nhf_overrides: {a: 2026-01-01}", "line 2", "in quotes"),
    yaml("model as a number", "model: 5.5", "line 1", "in quotes"),
    yaml("model as a list", "model: [m]", "line 1", "text"),
    yaml("model as null", "model: null", "line 1", "leave the key out"),
    yaml("launch as a number", "model: m\nlaunch: 5", "line 2", "setting: value"),
    yaml("launch as a list", "model: m\nlaunch: [health_port]", "line 2", "setting: value"),
    yaml("setting missing", "model: m\nlaunch:\n  health_port:", "line 3", "give a value"),
    yaml("setting out of range", "model: m\nlaunch:\n  health_port: 0", "line 3", "1 to 65535"),
    yaml("setting of the wrong kind", "model: m\nlaunch:\n  greet: 3", "line 3", "true or false"),
    yaml("setting that is a secret", "model: m\nlaunch:\n  api_key: k", "line 3", "api_key_file"),
    yaml("port taken by ourselves", "model: m\nport: 8001", "line 2", "change one of them"),
    yaml("another config file", "model: m\nconfig: other.yaml", "line 2", "in one file"),
    yaml("alias", "model: &m m\ntokenizer: *m", "line 2", "aliases"),
    yaml("tag", "model: m\nport: !!python/object:os.system 3", "line 2", "tags"),
    yaml("tab", "model: m\n\tport: 1", "line 2", "indent with spaces"),
    yaml("open bracket", "model: [m", "line 1", "correct the line"),
    yaml("open quote", "model: 'm", "line 1", "correct the line"),
    yaml("two documents", "model: m\n---\nport: 1", "line 2", "correct the line"),
    yaml("list at the top", "- model: m", "config.yaml", "option: value"),
    yaml("word at the top", "serve", "config.yaml", "option: value"),
    yaml("JSON cut off", '{"model": "m"', "config.yaml", "correct"),
    yaml("not text", b"\xff\xfe\x00m", "config.yaml", "UTF-8"),
    yaml("control characters", b"model: \x01", "config.yaml", "correct"),
    yaml("nested a thousand deep", "model: " + "[" * 3000, "config.yaml", "flatten it"),
    yaml("setting without a name", "model: m\nlaunch:\n  null: 1", "line 2: launch has the key None", "setting: value"),
    yaml("setting that YAML takes for true", "model: m\nlaunch: {on: 1}", "launch has the key True", "setting: value"),
    yaml(
        "setting in two spellings",
        "model: m\nlaunch:\n  health-port: 1\n  health_port: 2",
        "line 4",
        "keep one of them",
    ),
    yaml("half of a character", 'model: "\\ud800"', "line 1", "the character itself"),
    yaml("empty", "", "no model", "model: in config.yaml"),
    yaml("API key that is empty", "model: m\napi_key: ''", "line 2", "give a key"),
]

ENVIRONMENT = [
    variable("LAUNCH_HELTH_PORT", "1", "LAUNCH_HELTH_PORT", "did you mean LAUNCH_HEALTH_PORT?"),
    variable("LAUNCH_API_KEY", "k", "LAUNCH_API_KEY", "LAUNCH_API_KEY_FILE"),
    variable("LAUNCH_HEALTH_PORT", "abc", "LAUNCH_HEALTH_PORT", "1 to 65535"),
    variable("LAUNCH_HEALTH_PORT", "", "LAUNCH_HEALTH_PORT", "1 to 65535"),
    variable("LAUNCH_HEALTH_PORT", "0", "LAUNCH_HEALTH_PORT", "1 to 65535"),
    variable("LAUNCH_HEALTH_PORT", "8000", "LAUNCH_HEALTH_PORT", "change one of them"),
    variable("LAUNCH_DRAIN_SECONDS", "90s", "LAUNCH_DRAIN_SECONDS", "0 to 86400"),
    variable("LAUNCH_GREET", "maybe", "LAUNCH_GREET", "true or false"),
    variable("LAUNCH_OBJECTIVE", "speed", "LAUNCH_OBJECTIVE", "throughput"),
    variable("LAUNCH_ALLOWED_ROUTES", "v1", "LAUNCH_ALLOWED_ROUTES", "/v1"),
    variable("LAUNCH_MAX_MODEL_LEN", "8k", "LAUNCH_MAX_MODEL_LEN", "--max-model-len"),
    variable("LAUNCH_CONFIG", "absent.yaml", "absent.yaml", "LAUNCH_CONFIG"),
    variable("LAUNCH_PORT", "tcp://10.0.0.1:80", "LAUNCH_PORT", "enableServiceLinks: false"),
    variable("LAUNCH_SERVICE_HOST", "10.0.0.1", "LAUNCH_SERVICE_HOST", "enableServiceLinks: false"),
    variable("LAUNCH_WEB_SERVICE_PORT_HTTP", "80", "LAUNCH_WEB_SERVICE_PORT_HTTP", "enableServiceLinks: false"),
    variable("VLLM_PORT", "tcp://10.0.0.1:8000", "VLLM_PORT", "enableServiceLinks: false"),
    variable("VLLM_PORT", "eight", "VLLM_PORT", "whole number"),
    variable("VLLM_CPU_KVCACHE_SPACE", "lots", "VLLM_CPU_KVCACHE_SPACE", "4 for 4 GiB"),
    variable("CUDA_VISIBLE_DEVICES", "99", "'99'", "this machine", "gpus"),
    variable("CUDA_VISIBLE_DEVICES", "all", "'all'", "this machine", "plan m"),
    variable("CUDA_VISIBLE_DEVICES", "0;1", "'0;1'", "this machine", "gpus"),
    variable("CUDA_VISIBLE_DEVICES", "GPU-ffffffff-0000", "'GPU-ffffffff-0000'", "this machine", "gpus --format json"),
    variable("CUDA_VISIBLE_DEVICES", "MIG-ffffffff-0000", "'MIG-ffffffff-0000'", "this machine", "serve m"),
]

HARDWARE = [
    Row("hardware that does not exist", "plan m --hardware H1000:8", "H1000", "H100"),
    Row("hardware without a name", "plan m --hardware :8", "''", "H100"),
    Row("hardware of several kinds", "plan m --hardware A100", "'A100'", "A100-80GB"),
    Row("hardware that nobody knows", "plan m --hardware Voodoo2", "'Voodoo2'", "vllm-launch gpus --format json"),
    Row("hardware of no GPUs", "plan m --hardware H100:0", "'0'", "1 to 64"),
    Row("hardware of too many GPUs", "plan m --hardware H100:65", "'65'", "1 to 64"),
    Row("hardware of minus one GPU", "plan m --hardware H100:-1", "'-1'", "1 to 64"),
    Row("hardware of some GPUs", "plan m --hardware H100:some", "'some'", "H100:8"),
    Row("hardware counted twice", "plan m --hardware H100:8:2", "'8:2'", "H100:8"),
    Row("hardware file that is not there", "plan m --hardware absent.json", "absent.json", "vllm-launch gpus --format json"),
    Row("hardware file that is a folder", "plan m --hardware m/", "directory", "vllm-launch gpus --format json"),
    hardware("empty", "h.json", ""),
    hardware("not JSON", "h.json", "gpus: 8"),
    hardware("not text", "h.json", b'{"gpus": "\xff"}'),
    hardware("that is a list", "h.json", [GPU]),
    hardware("that is a number", "h.json", "8"),
    hardware("nested deep", "h.json", "[" * 100_000),
    hardware("without gpus", "gpus", {}),
    hardware("with gpus that are a number", "$.gpus", {"gpus": 8}),
    hardware("with an unknown key", "colour", {"gpus": [GPU], "colour": "red"}),
    hardware("with a GPU's key misspelt", "memory_totl", {"gpus": [{**GPU, "memory_totl": 1}]}),
    hardware("with memory as text", "$.gpus[0].memory_total", {"gpus": [{**GPU, "memory_total": "80 GiB"}]}),
    hardware("with no memory", "$.gpus[0].memory_total", {"gpus": [{**GPU, "memory_total": 0}]}),
    hardware("with too much memory", "$.gpus[0].memory_total", {"gpus": [{**GPU, "memory_total": 1 << 60}]}),
    hardware("with memory in MiB", "81559 bytes", {"gpus": [{**GPU, "memory_total": 81559, "memory_free": 81000}]}),
    hardware("with an index twice", "$.gpus[1].index", {"gpus": [GPU, {**GPU, "uuid": "GPU-1"}]}),
    hardware("with a name of two lines", "$.gpus[0].name", {"gpus": [{**GPU, "name": "NVIDIA\nL4"}]}),
    hardware("with a CPU of more free memory than there is", "$.cpu.memory_available", {"gpus": [], "cpu": {"cores": 1, "numa_nodes": [], "memory_total": 1, "memory_limit": None, "memory_available": 2}}),
    hardware("with more free than there is", "$.gpus[0].memory_free", {"gpus": [{**GPU, "memory_free": 24_000_000_000}]}),
    hardware("with a negative index", "$.gpus[0]: index", {"gpus": [{**GPU, "index": -1}]}),
    hardware("with one capability number", "$.gpus[0].compute_capability", {"gpus": [{**GPU, "compute_capability": [9]}]}),
    hardware("with a UUID twice", "$.gpus[1].uuid", {"gpus": [GPU, GPU]}),
    hardware("with a matrix of another size", "$.nvlink", {"gpus": [GPU], "nvlink": [[False, True]]}),
    hardware("with a CPU of no cores", "$.cpu", {"gpus": [], "cpu": {"cores": 0, "numa_nodes": [], "memory_total": 1, "memory_limit": None, "memory_available": 1}}),
    hardware("with neither GPU nor CPU", "neither GPUs nor a CPU", {"gpus": []}, "--hardware"),
    hardware("of a GPU that is too old", "compute capability 7.0", {"gpus": [{**GPU, "compute_capability": [7, 0]}]}, "newer GPUs"),
    hardware("recorded with MIG", "mig", {"gpus": [{**RECORD, "mig": [1, 1]}]}),
    hardware("recorded without memory", "mem_v2", {"gpus": [{**RECORD, "mem_v2": "ERR:NotSupported"}]}),
]  # fmt: skip

MODELS = [
    Row("model that is not there", "plan ./absent --hardware H100", "./absent", "a folder that exists"),
    Row("model with an absolute path that is not there", "plan /no/such/model --hardware H100", "/no/such/model", "a folder that exists"),
    Row("model that is a file", "plan m/config.json --hardware H100", "m/config.json", "the folder that holds config.json"),
    Row("model that is a GGUF file", "plan m/q4.gguf --hardware H100", "m/q4.gguf", "safetensors checkpoint", {"m/q4.gguf": b"GGUF"}),
    Row("model of three words", "plan a/b/c --hardware H100", "a/b/c", "a folder that exists"),
    Row("model with a space", "plan 'my model' --hardware H100", "my model", "Qwen/Qwen3-8B"),
    Row("model of an URL", "plan https://huggingface.co/Qwen/Qwen3-8B --hardware H100", "https://huggingface.co/Qwen/Qwen3-8B", "hub id alone: Qwen/Qwen3-8B"),
    Row("model offline", "plan Qwen/Qwen3-8B --hardware H100", "HF_HUB_OFFLINE", "hf download Qwen/Qwen3-8B"),
    Row("gated model offline", "plan meta-llama/Llama-3.1-70B-Instruct --hardware H100:8", "meta-llama/Llama-3.1-70B-Instruct", "hf download"),
    Row("model offline at a revision", "plan Qwen/Qwen3-8B --revision v9 --hardware H100", "'v9'", "hf download"),
    Row("folder without config.json", "plan e --hardware H100", "config.json", "Hugging Face format", {"e/readme.md": "hello"}),
    Row("folder of Mistral's own format", "plan e --hardware H100", "params.json", "Hugging Face format", {"e/params.json": "{}"}),
    Row("folder whose config.json is a folder", "plan e --hardware H100", "config.json", "Hugging Face format", {"e/config.json/x": ""}),
    Row("folder of pickles", "plan m --hardware H100", "PyTorch pickles", "convert it to safetensors", {"m/pytorch_model.bin": bytes(70_000)}),
    Row("folder of GGUF", "plan m --hardware H100", "GGUF", "safetensors", {"m/model.gguf": bytes(70_000)}),
    Row("tokenizer's config that is a list", "plan m --hardware H100", "holds a list", "the tokenizer_config.json of the model's repository", {"m/tokenizer_config.json": []}),
    model("that is null", "holds null", "the config.json of the model's repository", "null"),
    Row("tokenizer's config that is not JSON", "plan m --hardware H100", "tokenizer_config.json", "download", {"m/tokenizer_config.json": "{"}),
    model("empty", "config.json", "download it again", ""),
    model("cut off", "not JSON", "download it again", '{"architectures": ['),
    model("not text", "not UTF-8", "download it again", b"\xff\xfe{}"),
    model("that is a list", "a list, not an object", "config.json", [1]),
    model("that is a page of HTML", "not JSON", "download it again", "<!DOCTYPE html>"),
    model("of Git LFS", "Git LFS pointer", "git lfs pull", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    model("nested deep", "not JSON", "download it again", "[" * 100_000),
    model("without architectures", "'architectures'", "add it", architectures=None),
    model("with architectures as text", "'architectures'", "correct it", architectures="LlamaForCausalLM"),
    model("of an unknown architecture", "LamaForCausalLM", "LlamaForCausalLM", architectures=["LamaForCausalLM"]),
    model("of an architecture that nobody knows", "Xyzzy", "supported models", architectures=["Xyzzy"]),
    model("without hidden_size", "'hidden_size'", "download the file again", hidden_size=None),
    model("with hidden_size as text", "'hidden_size'", "correct it", hidden_size="64"),
    model("with hidden_size negative", "'hidden_size'", "correct it", hidden_size=-64),
    model("with hidden_size of half", "'hidden_size'", "correct it", hidden_size=64.5),
    model("with hidden_size astronomic", "'hidden_size'", "correct it", hidden_size=10**30),
    model("without vocab_size", "'vocab_size'", "download the file again", vocab_size=None),
    model("without layers", "'num_hidden_layers'", "download the file again", num_hidden_layers=None),
    model("with layers as true", "'num_hidden_layers'", "correct it", num_hidden_layers=True),
    model("with a billion layers", "'num_hidden_layers'", "correct it", num_hidden_layers=10**9),
    model("with a billion experts", "1,000,000 tensors", "correct it", num_hidden_layers=10_000, num_experts=100_000),
    model("with a billion layers in its eyes", "1,000,000 tensors", "correct it", {**CONFIG, "architectures": ["Gemma3ForConditionalGeneration"], "text_config": CONFIG, "vision_config": {"num_hidden_layers": 10**9}}),
    model("with heads that KV heads do not divide", "'num_key_value_heads'", "correct it", num_key_value_heads=3),
    model("with no heads", "'num_attention_heads'", "correct it", num_attention_heads=0),
    model("with a length as text", "'max_position_embeddings'", "correct it", max_position_embeddings="8k"),
    model("with scaling as a list", "'rope_scaling'", "correct it", rope_scaling=[8]),
    model("with a scaling of no type", "rope_scaling", "correct it", rope_scaling={"rope_type": 3, "factor": 2}),
    model("with a nested config as a number", "'text_config'", "download the file again", text_config=5),
    model("with tied embeddings as text", "'tie_word_embeddings'", "correct it", tie_word_embeddings="yes"),
    model("with layer types as a number", "'layer_types'", "correct it", layer_types=3),
    model("quantised as a list", "'quantization_config'", "correct it", quantization_config=["awq"]),
    model("quantised by a number", "'quant_method'", "correct it", quantization_config={"quant_method": 4}),
    quantized("squeezellm", "AWQ"),
    quantized("aqlm", "AWQ"),
    quantized("hqq", "AWQ"),
    quantized("eetq", "--quantization fp8"),
    quantized("marlin", "GPTQ checkpoint"),
    quantized("bitsandbytes", "--quantization fp8"),
    quantized("ptpc_fp8", "fp8_per_channel"),
    quantized("magic", "AWQ"),
    model("quantised by MLX", "MLX", "AWQ", quantization_config={"group_size": 64, "bits": 4}),
    model("quantised to five bits", "'bits'", "correct it", quantization_config={"quant_method": "awq", "bits": 5}),
    model("quantised in blocks of one size", "'weight_block_size'", "correct it", quantization_config={"quant_method": "fp8", "weight_block_size": [128]}),
]  # fmt: skip

HEADERS = [
    header("empty", "cut off", b""),
    header("of seven bytes", "7 bytes", bytes(7)),
    header("longer than the file", "1000000 bytes", safetensors({}, length=10**6)),
    header("longer than any file", "18446744073709551615 bytes", safetensors({}, length=2**64 - 1)),
    header("of no length", "not JSON", safetensors(b"")),
    header("not JSON", "not JSON", safetensors(b"tensors")),
    header("not text", "not JSON", safetensors(b'{"\xff": 1}')),
    header("nested deep", "not JSON", safetensors(b"[" * 100_000)),
    header("that is a list", "not an object", safetensors([])),
    header("of Git LFS", "Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    header("with a tensor that is a list", "'w'", safetensors({"w": [1]})),
    header("with a tensor twice", "twice", safetensors(b'{"w": {}, "w": {}}')),
    header("with an unknown dtype", "'BF17'", safetensors({"w": tensor(dtype="BF17")}, 12)),
    header("without a dtype", "dtype", safetensors({"w": tensor(dtype=None)}, 12)),
    header("with another dtype's size", "does not match", safetensors({"w": tensor(dtype="F32")}, 12)),
    header("with a shape that does not match", "does not match", safetensors({"w": tensor(shape=[2, 4])}, 12)),
    header("with a negative shape", "shape", safetensors({"w": tensor(shape=[-2, -3])}, 12)),
    header("with a shape that overflows", "does not match", safetensors({"w": tensor(shape=[2**62] * 9)}, 12)),
    header("without a shape", "shape", safetensors({"w": tensor(shape=None)}, 12)),
    header("without offsets", "offsets", safetensors({"w": tensor(data_offsets=None)}, 12)),
    header("with one offset", "offsets", safetensors({"w": tensor(data_offsets=[12])}, 12)),
    header("with negative offsets", "offsets", safetensors({"w": tensor(data_offsets=[-12, 0])}, 12)),
    header("with reversed offsets", "does not match", safetensors({"w": tensor(data_offsets=[12, 0])}, 12)),
    header("with overlapping tensors", "overlaps", safetensors({"w": tensor(), "v": tensor(data_offsets=[6, 18])}, 18)),
    header("with a gap", "gap", safetensors({"w": tensor(), "v": tensor(data_offsets=[20, 32])}, 32)),
    header("with offsets beyond the file", "12 bytes, but the file holds 6", safetensors({"w": tensor()}, 6)),
    header("with more data than tensors", "12 bytes, but the file holds 90", safetensors({"w": tensor()}, 90)),
    shards("with a shard missing", "two.safetensors", "hf download", {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}, one=safetensors({"a": tensor()}, 12)),
    Row("shards without an index, one missing", "plan m --hardware H100:8", "1 of its 3 shards", "hf download", {"m/model-00001-of-00003.safetensors": safetensors({"a": tensor()}, 12), "m/model-00003-of-00003.safetensors": safetensors({"b": tensor()}, 12)}),
    shards("with every shard missing", "2 of its 2 shards", "hf download", {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}),
    shards("with a tensor in two shards", "one.safetensors", "keep one set", {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}, one=safetensors({"a": tensor()}, 12), two=safetensors({"a": tensor()}, 12)),
    shards("not JSON", "model.safetensors.index.json", "download it again", "{"),
    shards("without a map", "'weight_map'", "hf download", {"metadata": {}}),
    shards("with an empty map", "'weight_map'", "hf download", {"weight_map": {}}),
    shards("with a map that is a list", "'weight_map'", "hf download", {"weight_map": ["one.safetensors"]}),
    shards("naming a file elsewhere", "/etc/x.safetensors", "hf download", {"weight_map": {"a": "/etc/x.safetensors"}}),
    shards("naming a file above", "../x.safetensors", "hf download", {"weight_map": {"a": "../x.safetensors"}}),
    shards("naming a number", "7", "hf download", {"weight_map": {"a": 7}}),
    shards("naming a pickle", "a.bin", "hf download", {"weight_map": {"a": "a.bin"}}),
]  # fmt: skip

SERVING = [
    Row("serve without a model", "serve", "no model", "give a folder"),
    Row("serve a model that is not there", "serve ./absent", "./absent", "a folder that exists"),
    Row("serve with a flag misspelt", "serve m --max-modellen 8", "--max-modellen", "did you mean --max-model-len?"),
    Row("key file that is not there", "serve m --launch-api-key-file absent", "absent", "one key per line"),
    Row("key file that is a folder", "serve m --launch-api-key-file m", "(m)", "one key per line"),
    Row("key file that is empty", "serve m --launch-api-key-file k", "holds no key", "one key per line", {"k": "\n \n"}),
    Row("key file that is not text", "serve m --launch-api-key-file k", "UTF-8", "one key per line", {"k": b"\xff\xfe"}),
    Row("key with a space", "serve m --launch-api-key-file k", "space", "make another", {"k": "two words"}),
    Row("key beyond ASCII", "serve m --api-key schlüssel", "ASCII", "make another"),
    Row("key of the environment beyond ASCII", "serve m", "ASCII", "make another", environ={"VLLM_API_KEY": "clé"}),
    Row("certificate that is not there", "serve m --ssl-certfile c.pem", "c.pem", "an existing file"),
    Row("TLS key that is a folder", "serve m --ssl-certfile k --ssl-keyfile m", "--ssl-keyfile", "an existing file", {"k": ""}),
    Row("chat template that is not there", "serve m --chat-template ./chat.jinja", "./chat.jinja", "an existing file"),
    Row("state folder that is a file", "serve m --launch-state-dir k", "--launch-state-dir", "another folder", {"k": ""}),
    Row("state folder below a file", "serve m", "LAUNCH_STATE_DIR", "another folder", {"k": ""}, {"LAUNCH_STATE_DIR": "k/x"}),
    Row("cache folder that is a file", "serve m --launch-cache-dir k", "--launch-cache-dir", "another folder", {"k": ""}),
    Row("cache folder below a file", "serve m --launch-cache-dir k/x/y", "--launch-cache-dir", "another folder", {"k": ""}),
]  # fmt: skip

PLANS = [
    flags("--tensor-parallel-size 3", "TP=3", "remove the parallel sizes"),
    flags("--tensor-parallel-size 16", "more GPUs", "plan"),
    flags("--pipeline-parallel-size 2", "PP=2", "remove the parallel sizes"),
    flags("--max-model-len 4096", "max_model_len 4096", "lower it"),
    flags("--gpu-memory-utilization 0.001", "lacks", "remove --gpu-memory-utilization"),
    flags("--kv-cache-memory-bytes 1T", "1024.00 GiB", "remove --kv-cache-memory-bytes"),
    flags("--enable-expert-parallel", "expert parallelism", "plan"),
    flags('--hf-overrides \'{"num_attention_heads": "x"}\'', "'num_attention_heads'", "correct it"),
    Row("plan of bfloat16 on a T4", "plan m --hardware T4 --dtype bfloat16", "bfloat16", "--dtype half"),
    Row(
        "plan of a split over MIG slices",
        "plan m --hardware A100-80GB-3g.40gb:2 -tp 2",
        "MIG",
        "remove the parallel sizes",
    ),
    Row(
        "plan of 70B on a T4",
        "plan large --hardware T4",
        "lacks",
        "changes makes it fit: ",
        {"large/config.json": LARGE},
    ),
]

ROWS = [*COMMANDS, *FLAGS, *YAML, *ENVIRONMENT, *HARDWARE, *MODELS, *HEADERS, *SERVING, *PLANS]

FORBIDDEN_EVENTS = {"subprocess.Popen", "os.posix_spawn", "os.fork", "os.exec", "socket.connect", "socket.getaddrinfo"}
"""Audit events of a process start or a network access."""

recorded: list[str] | None = None
"""Events that the audit hook has recorded, or None outside of a test. An audit hook cannot be removed."""


def audit(event: str, _: object) -> None:
    if recorded is not None and event in FORBIDDEN_EVENTS:
        recorded.append(event)
        raise PermissionError(event)


sys.addaudithook(audit)


@pytest.fixture
def events() -> Iterator[list[str]]:
    """Yield the list of attempted process starts and network accesses. The hook blocks them."""
    global recorded  # noqa: PLW0603 - the hook outlives the test
    recorded = []
    yield recorded
    recorded = None


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield an empty folder: working directory and HOME. The hub is offline, LAUNCH_* and VLLM_* are not set."""
    handler = signal.getsignal(signal.SIGTERM)  # `serve` replaces it
    for name in ("CUDA_VISIBLE_DEVICES", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name in list(os.environ):
        if name.startswith(("LAUNCH_", "VLLM_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))  # otherwise `serve` sets it
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)


def write(folder: Path, files: Mapping[str, Content]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
def test_bad_input_gives_one_line_and_changes_nothing(
    row: Row, workdir: Path, events: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(workdir, {"m/config.json": CONFIG, **row.files})
    for name, value in row.environ.items():
        monkeypatch.setenv(name, value)
    before = contents(workdir)
    code = main(shlex.split(row.words))
    out, err = capsys.readouterr()
    assert (code, out, events) == (2, "", [])
    assert err.startswith("vllm-launch: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    _, name, rest = err.partition(row.names)
    assert name, err
    assert row.remedy in rest, err
    assert contents(workdir) == before


VALID_COMMANDS = [
    # Typical arguments of `vllm serve`, plus --hardware.
    "meta-llama--Meta-Llama-3-8B --tensor-parallel-size 2 --gpu-memory-utilization 0.90 --max-model-len 8192 --hardware H100:8",
    "meta-llama--Meta-Llama-3-70B -tp 4 --max_num_seqs=256 --port=9000 --host 0.0.0.0 --api-key one two --hardware H100:8",
    "Qwen--Qwen2.5-7B-Instruct --max-model-len 32k --dtype half --enforce-eager --trust-remote-code --hardware T4:4",
    "Qwen--Qwen3-30B-A3B --enable-expert-parallel --reasoning-parser qwen3 -dp 2 -O3 --hardware H200:4",
    "deepseek-ai--DeepSeek-V3 -tp=8 --enable-auto-tool-choice --tool-call-parser deepseek_v3 --hardware H200:8",
    "openai--gpt-oss-20b --async-scheduling --no-enable-prefix-caching --served-model-name gpt other --hardware H100",
    'google--gemma-3-27b-it --limit-mm-per-prompt \'{"image": 2}\' --kv-cache-dtype fp8 --hardware H100:2',
    'google--gemma-2-9b --hf-overrides \'{"max_position_embeddings": 4096}\' --seed 7 --hardware L40S:2',
    "mistralai--Mixtral-8x7B-v0.1 --pipeline-parallel-size 2 --distributed-executor-backend mp --hardware A100-80GB:4",
    "casperhansen--llama-3-70b-instruct-awq --quantization awq_marlin --max-model-len auto --hardware A100-80GB",
    "RedHatAI--Meta-Llama-3.1-8B-Instruct-FP8 --compilation-config.mode 3 --compilation-config.cudagraph_mode FULL --hardware L4",
    "mistralai--Mistral-7B-v0.1 --enable-lora --lora-modules sql=/adapters/sql --max-lora-rank 64 --hardware 'NVIDIA L4:2'",
    "BAAI--bge-large-en-v1.5 --runner pooling --convert embed --disable-log-stats --hardware L4",
    'Qwen--Qwen3-Next-80B-A3B-Instruct -tp 4 --speculative-config \'{"method": "mtp", "num_speculative_tokens": 1}\' --hardware H100:4',
    "meta-llama--Llama-3.1-8B-Instruct --chat-template '{{ messages }}' --ssl-certfile c --ssl-keyfile k --hardware h.json",
]  # fmt: skip
MODEL_FOLDERS = Path(__file__).parents[1] / "data" / "models"


@pytest.mark.parametrize("words", VALID_COMMANDS)
def test_typical_vllm_serve_arguments_give_a_plan(
    words: str, workdir: Path, events: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write(workdir, {"h.json": {"gpus": [GPU]}})
    name, *flag_words = shlex.split(words)
    code = main(["plan", str(MODEL_FOLDERS / name), *flag_words, "--format", "json"])
    out, err = capsys.readouterr()
    assert (code, err, events) == (0, "", [])
    assert json.loads(out)["argv"]


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("model: m\nlaunch: {health_port: 9001, allowed_routes: [/v1, /health]}", ""),
        (
            "model: m\ntensor-parallel-size: 2\nmax_model_len: 32k\nhf_overrides: {rope_scaling: {factor: 2}}",
            "--port 9000",
        ),
        (
            "served_model_name: [a, b]\napi_key: k\nenable-lora: true\nlora-modules: [{name: a, path: /b}]",
            "m --launch-greet",
        ),
        ('{"model": "m", "port": 8080}', "--launch-drain-seconds=0"),
        ("# only words\n", "m"),
    ],
)
def test_a_valid_config_file_is_accepted(
    file: str, words: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(workdir, {"config.yaml": file})
    assert main(["check", "config.yaml", *shlex.split(words)]) == 0
    assert capsys.readouterr().out.startswith("config.yaml is valid: it serves m")


def assert_result_or_one_line(words: list[str]) -> None:
    """Run arbitrary ``words``, and check that they give a result or are refused in one line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    if code == 0:
        assert (bool(out.getvalue()), err.getvalue()) == (True, "")
    else:
        assert (code, out.getvalue(), err.getvalue().count("\n")) == (2, "", 1)


PLAIN = st.none() | st.booleans() | st.integers(-2, 2**40) | st.floats() | st.text(max_size=6)
ANYTHING = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
VALUES = st.sampled_from(["0", "1", "2", "-1", "8k", "auto", "fp8", "{}", '{"a": 1}', "None", "", "0.5", "a=b", "[1]"])
FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(
    st.lists(
        st.tuples(st.sampled_from([option.flags[0] for option in options().values()]), VALUES | st.text(max_size=5))
        | st.tuples(st.sampled_from([f"--launch-{field}" for field in LauncherSettings.__struct_fields__]), VALUES),
        max_size=4,
    )
)
def test_any_words_are_planned_or_refused_in_one_line(workdir: Path, words: list[tuple[str, str]]) -> None:
    write(workdir, {"m/config.json": CONFIG})
    assert_result_or_one_line(["plan", "m", "--hardware", "H100:2", *(f"{flag}={value}" for flag, value in words)])


@FUZZ
@given(
    st.dictionaries(st.sampled_from(list(options())), ANYTHING, max_size=4),
    st.dictionaries(st.sampled_from(LauncherSettings.__struct_fields__), ANYTHING, max_size=2) | ANYTHING,
)
def test_any_config_file_is_checked_or_refused_in_one_line(workdir: Path, engine: dict[str, Any], launch: Any) -> None:
    write(workdir, {"config.yaml": json.dumps({**engine, "launch": launch})})
    assert_result_or_one_line(["check", "config.yaml"])
    assert_result_or_one_line(["check", "config.yaml", "m"])


SECTIONS = ("quantization_config", "rope_scaling", "text_config", "vision_config", "auto_map")
KEYS = (*CONFIG, *SECTIONS, "head_dim", "sliding_window", "layer_types", "num_experts", "num_local_experts")


@FUZZ
@given(st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=2))
def test_any_config_json_is_planned_or_refused_in_one_line(workdir: Path, keys: dict[str, Any]) -> None:
    write(workdir, {"m/config.json": CONFIG | keys})
    assert_result_or_one_line(["plan", "m", "--hardware", "H100:2", "--format", "json"])


@FUZZ
@given(
    st.binary(max_size=40)
    | st.builds(
        safetensors,
        st.dictionaries(
            st.sampled_from(["a", "model.norm.weight", "__metadata__"]),
            ANYTHING
            | st.builds(tensor)
            | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), ANYTHING).map(
                lambda keys: tensor(**keys)
            ),
            max_size=2,
        ),
        st.sampled_from([0, 12]) | st.integers(0, 30),
    )
)
def test_any_safetensors_file_is_planned_or_refused_in_one_line(workdir: Path, content: bytes) -> None:
    write(workdir, {"m/config.json": CONFIG, "m/model.safetensors": content})
    assert_result_or_one_line(["plan", "m", "--hardware", "H100:2", "--format", "yaml"])
