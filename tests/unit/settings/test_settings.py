import re
from pathlib import Path

import pytest
from builders import model
from hypothesis import given
from hypothesis import strategies as st

from vllm_launch.decide import plan_request
from vllm_launch.engine import values
from vllm_launch.engine.options import flags
from vllm_launch.errors import UsageError
from vllm_launch.machine.generation import Generation
from vllm_launch.plan.request import run_of
from vllm_launch.settings import config_file
from vllm_launch.settings.api_keys import read_api_keys
from vllm_launch.settings.flags import parse_flags
from vllm_launch.settings.read import read_settings
from vllm_launch.settings.settings import Drain, LauncherSettings, redacted


def read(words="m", environ=None, yaml=None):
    def read_file(path: Path) -> str:
        assert path == Path("c.yaml")
        return yaml

    argv = [*words.split(), *(["--config", "c.yaml"] if yaml is not None else [])]
    return read_settings(parse_flags(argv), environ or {}, read_file=read_file)


def refused(words="m", environ=None, yaml=None):
    with pytest.raises(UsageError) as error:
        read(words, environ, yaml)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("field", LauncherSettings.__struct_fields__)
def test_every_setting_is_a_flag_over_the_environment_over_the_file(field):
    first, second, third = {
        "objective": ("latency", "throughput", "latency"), "p2p_check": ("off", "disable", "auto"),
        "quality": ("fp8-kv", "lossless", "fp8-kv"), "nvlink_multicast": ("off", "auto", "off"),
        "parsers": ("off", "auto", "off"),
        "greet": ("true", "false", "true"), "log_format": ("json", "text", "json"), "gpu_fault_kills": ("true", "false", "true"),
        "allowed_routes": ("/a", "/b,/c", "/d"),
    }.get(field, ("11", "12", "13"))  # fmt: skip
    yaml = f"model: m\nlaunch:\n  {field}: '{first}'"
    variable, flag = f"LAUNCH_{field.upper()}", f"--launch-{field.replace('_', '-')}"

    def words(value):
        return {"true": flag, "false": flag.replace("--", "--no-", 1)}.get(value, f"{flag}={value}")

    expected = read("m", {variable: third}).launch
    from_file = read("", {}, yaml)
    assert from_file.origin[f"launch.{field}"] == "c.yaml line 3"
    assert from_file.launch == read(f"m {words(first)}").launch != read(f"m {words(second)}").launch
    both = read("", {variable: second}, yaml)
    assert both.launch == read("m", {variable: second}).launch
    assert both.origin[f"launch.{field}"] == f"environment {variable}"
    all_three = read(words(third), {variable: second}, yaml)
    assert all_three.launch == expected
    assert all_three.origin[f"launch.{field}"] == f"flag {flag}"


@pytest.mark.parametrize("field", ["nvlink_multicast", "p2p_check"])
def test_off_needs_no_quotes_although_yaml_reads_it_as_false(field):
    settings = read("m", {}, f"launch:\n  {field}: off\n")
    assert getattr(settings.launch, field) == "off"
    assert read("m", {}, "launch: {nvlink_multicast: off}").no_multicast == "c.yaml line 1"
    assert "give auto or off" in refused("m", {}, f"launch:\n  {field}: on\n")
    assert "cannot be False" in refused("m", {}, "launch:\n  objective: off\n")


def test_flags_override_vllms_options_in_the_file():
    settings = read("--port 9000", {}, "model: m\ntensor-parallel-size: 2\nport: 9001\nenforce_eager: true\n")
    assert settings.model == "m"
    assert settings.engine == {"tensor_parallel_size": 2, "port": 9000, "enforce_eager": True}
    assert settings.origin == {
        "model": "c.yaml line 1", "tensor_parallel_size": "c.yaml line 2", "port": "flag --port",
        "enforce_eager": "c.yaml line 4",
    }  # fmt: skip


def test_the_tilde_is_expanded_because_neither_a_shell_nor_vllm_does_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    settings = read("", {"LAUNCH_STATE_DIR": "~/run"}, "model: ~/m\nlaunch: {cache_dir: ~/cache, objective: latency}")
    assert (settings.model, settings.launch.cache_dir) == ("/home/me/m", "/home/me/cache")
    assert settings.launch.state_dir == "/home/me/run"
    assert read("~no-such-user/m").model == "~no-such-user/m"


def test_the_model_of_the_command_line_overrides_the_files():
    assert read("other", {}, "model: m").model == "other"


def test_a_variable_that_overrides_the_file_is_warned_of():
    settings = read(environ={"LAUNCH_DRAIN_SECONDS": "30"}, yaml="launch:\n  drain_seconds: 60\n")
    assert settings.launch.drain_seconds == 30
    assert settings.warnings == ("environment LAUNCH_DRAIN_SECONDS: 30 overrides c.yaml line 2",)
    assert read(environ={"LAUNCH_DRAIN_SECONDS": "30"}, yaml="seed: 1\n").warnings == ()


def test_the_flag_overrides_the_config_file_of_the_environment():
    def read_file(path):
        return f"model: {path}"

    assert read_settings(parse_flags([]), {"LAUNCH_CONFIG": "a.yaml"}, read_file=read_file).model == "a.yaml"
    assert (
        read_settings(parse_flags(["--config=b.yaml"]), {"LAUNCH_CONFIG": "a.yaml"}, read_file=read_file).model
        == "b.yaml"
    )


@pytest.mark.parametrize("yaml", ["", "# nothing\n", "launch:\n", "served-model-name: []\n", "---\n"])
def test_a_file_without_values_is_valid(yaml):
    assert read("m", {}, yaml).engine == {}


def test_only_our_flags_are_taken_and_all_other_words_stay_in_order():
    between = ["--launch-health-port", "1", "--no-launch-greet", "--config=c.yaml"]
    for flag in {*flags()} - {"--config"}:
        given = parse_flags([flag, "a", *between, f"{flag}=b", "--", "-c"])
        assert given.engine_argv == [flag, "a", f"{flag}=b", "--", "-c"]
        assert given.launch == {"health_port": ("--launch-health-port", "1"), "greet": ("--no-launch-greet", "false")}
        assert given.config == "c.yaml"


def test_a_boolean_setting_may_be_said_alone_or_denied():
    assert read("m --launch-greet").launch.greet
    assert not read("m --no-launch-greet", {"LAUNCH_GREET": "true"}).launch.greet


@pytest.mark.parametrize(
    ("yaml", "line", "message"),
    [
        ("prot: 1", 1, "did you mean port?"),
        ("swap-space: 4", 1, "kv-offloading-size"),
        ("launch:\n  helth_port: 1", 2, "did you mean health_port?"),
        ("launch:\n  health_port: 0", 2, "give a whole number from 1 to 65535"),
        ("launch:\n  health_port: 70000", 2, "from 1 to 65535"),
        ("launch:\n  health_port: x", 2, "health_port cannot be 'x'"),
        ("launch:\n  health_port: 1.5", 2, "whole number"),
        ("launch:\n  health_port: true", 2, "whole number"),
        ("launch:\n  health_port:", 2, "has no value"),
        ("launch:\n  drain_seconds: -1", 2, "from 0 to 86400"),
        ("launch:\n  drain_seconds: .inf", 2, "from 0 to 86400"),
        ("launch:\n  drain_seconds: 1000000", 2, "from 0 to 86400"),
        ("launch:\n  objective: fast", 2, "objective cannot be 'fast'"),
        ("launch:\n  allowed_routes: [v1]", 2, "does not begin with /"),
        ("launch:\n  allowed_routes: {a: 1}", 2, "allowed_routes cannot be"),
        ("launch:\n  greet: maybe", 2, "greet cannot be 'maybe'"),
        ("launch:\n  cache_dir: ''", 2, "give text"),
        ("launch: 3", 1, "not a mapping"),
        ("launch: [a]", 1, "not a mapping"),
        ("launch:\n  greet: true\n  greet: true", 3, "second time (first on line 2)"),
        ("port: 1\nport: 2", 2, "second time (first on line 1)"),
        ("max-model-len: 1\nmax_model_len: 2", 2, "set twice"),
        ("model: m\nmodel_tag: n", 2, "set twice"),
        ("compilation-config:\n  mode: 1\n  mode: 2", 3, "second time"),
        ("lora-modules:\n  - {name: a, name: b}", 2, "second time"),
        ("port: x", 1, "not a whole number"),
        ("port:", 1, "its value is missing"),
        ("model: 3.5", 1, "in quotes"),
        ("model: ''\nport: 1", 0, "no model"),
        ("config: other.yaml", 1, "cannot name another"),
        ("a: &x [1]\nb: *x", 2, "aliases (*x)"),
        ("port: !!int 3", 1, "tags"),
        ("port: !!python/object:os.system 3", 1, "tags"),
        ("<<: {port: 1}", 1, "not plain text"),
        ("? [a]\n: 1", 1, "not plain text"),
        ("port: 1\n\tx: 1", 2, "\\t"),
        ("port: [1", 1, "expected"),
        ("port: 1\n---\nport: 2", 2, "but found another document"),
        ("revision: 1.10", 1, "in quotes"),
        ("revision: 2026-01-01", 1, "in quotes"),
        ("yes: 1", 1, "no option yes"),
        ("1: 1", 1, "no option 1"),
    ],
)
def test_a_mistake_in_the_file_is_an_error_with_its_line(yaml, line, message):
    text = refused("m" if line else "", {}, yaml)
    assert message in text
    assert not line or text.startswith(f"c.yaml line {line}:")


@pytest.mark.parametrize(
    ("yaml", "message"),
    [("- a", "not a mapping"), ("word", "not a mapping"), ("seed: 2026-99-99", "month"), ("a: \x01", "not YAML"),
     ("a: " + "[" * 3000, "nested too deep"), ("seed: " + "9" * 5000, "not YAML")],
)  # fmt: skip
def test_a_file_that_is_not_a_mapping_is_an_error_with_its_name(yaml, message):
    text = refused("m", {}, yaml)
    assert text.startswith("c.yaml")
    assert message in text


def test_nested_aliases_are_not_expanded():
    yaml = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [*{chr(97 + n)}, *{chr(97 + n)}]\n" for n in range(24)
    )
    assert "aliases" in refused("m", {}, yaml)


@pytest.mark.parametrize(
    ("error", "message"),
    [(FileNotFoundError(2, "No such file or directory"), "No such file"), (IsADirectoryError(21, "Is a directory"), "directory"),
     (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), "not UTF-8 text"), (ValueError("embedded null byte"), "UTF-8")],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_an_error_with_its_name(error, message):
    def read_file(_):
        raise error

    with pytest.raises(UsageError, match=message) as refusal:
        read_settings(parse_flags(["m", "--config", "c.yaml"]), {}, read_file=read_file)
    assert refusal.value.where == "c.yaml"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"LAUNCH_HELTH_PORT": "1"}, "did you mean LAUNCH_HEALTH_PORT?"),
        ({"LAUNCH_API_KEY": "s3cret"}, "LAUNCH_API_KEY_FILE"),
        ({"LAUNCH_HEALTH_PORT": "x"}, "environment LAUNCH_HEALTH_PORT: health_port cannot be 'x'"),
        ({"LAUNCH_HEALTH_PORT": ""}, "health_port cannot be ''"),
        ({"LAUNCH_HEALTH_PORT": "tcp://10.0.0.1:80"}, "enableServiceLinks: false"),
        ({"LAUNCH_PORT": "tcp://10.0.0.1:80"}, "enableServiceLinks: false"),
        ({"LAUNCH_SERVICE_HOST": "10.0.0.1"}, "enableServiceLinks: false"),
        ({"LAUNCH_WEB_SERVICE_PORT_HTTP": "80"}, "enableServiceLinks: false"),
        ({"LAUNCH_PORT_80_TCP_ADDR": "10.0.0.1"}, "enableServiceLinks: false"),
        ({"VLLM_PORT": "tcp://10.0.0.1:80"}, "enableServiceLinks: false"),
        ({"LAUNCH_GREET": "maybe"}, "greet cannot be 'maybe'"),
    ],
)
def test_a_mistake_in_the_environment_is_an_error_with_its_name(environ, message):
    text = refused("m", environ)
    assert message in text
    assert "s3cret" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "no model is given"),
        ("--launch-health-port 1", "no model is given"),
        ("m --launch-helth-port 1", "did you mean --launch-health-port?"),
        ("m --launch-health-port", "its value is missing"),
        ("m --launch-health-port=", "its value is missing"),
        ("m --launch-health-port 1 --launch_health_port 2", "given twice"),
        ("m --no-launch-objective", "has no --no- form"),
        ("m --launch-objective fast", "flag --launch-objective: objective cannot be 'fast'"),
        ("m --config", "its value is missing"),
        ("m --config a.yaml --config b.yaml", "given twice"),
        ("m --port 8001", "both use port 8001"),
        ("m --launch-health-port 8000", "flag --launch-health-port: the API and the health"),
        ("m --port 0", "port is 0"),
        ("m --port 65536", "port is 65536"),
        ("m -tp 0", "tensor_parallel_size is 0"),
        ("m -pp=-1", "pipeline_parallel_size is -1"),
        ("m -dp 0", "data_parallel_size is 0"),
        ("m --max-num-seqs 0", "max_num_seqs is 0"),
        ("m --kv-cache-memory-bytes 0", "kv_cache_memory_bytes is 0"),
        ("m --gpu-memory-utilization 0", "gpu_memory_utilization is 0.0"),
        ("m --gpu-memory-utilization 1.01", "gpu_memory_utilization is 1.01"),
        ("m --gpu-memory-utilization nan", "gpu_memory_utilization is nan"),
        ("m --max-model-len 0", "max_model_len is 0"),
        ("m --max-model-len=-2", "max_model_len is -2"),
        ("m --shutdown-timeout=-1", "shutdown_timeout is -1"),
        ("m --headless", "no API at all"),
        ("m --grpc", "gRPC"),
        ("m --uds /a", "Unix socket"),
        ("m --ssl-keyfile k", "set ssl_certfile"),
        ("m --ssl-certfile c --ssl-keyfile k --ssl-cert-reqs 2", "the launcher's prober has none"),
        ("m -dp 2 -dpl 2 --data-parallel-multi-port-external-lb", "the launcher watches one port"),
        ("m --api-key=", "a key is empty"),
        ("m --tensor-paralel-size 2", "did you mean --tensor-parallel-size?"),
    ],
)
def test_a_mistake_on_the_command_line_is_an_error(words, message):
    assert message in refused(words)


def test_a_server_that_the_launcher_cannot_watch_is_refused_in_one_line_with_what_to_do():
    tls, ports = "m --ssl-certfile c --ssl-cert-reqs 2", "m -dp 2 -dpl 2 --data-parallel-multi-port-external-lb"
    assert refused(tls) == (
        "flag --ssl-cert-reqs: vLLM would demand a client certificate, and the launcher's prober has none; give 0 or 1, "
        "and let a proxy in front of vLLM demand certificates, or run vllm serve without the launcher"
    )
    assert refused(ports) == (
        "flag --data-parallel-multi-port-external-lb: with it vLLM starts one server on a port of its own for each "
        "replica, but the launcher watches one port; remove it: vLLM then balances the load of its replicas behind "
        "one port"
    )
    for optional in ("0", "1"):
        assert read(f"m --ssl-certfile c --ssl-cert-reqs {optional}").url.startswith("https:")


@pytest.mark.parametrize("total", [0, 1, 5, 30, 90, 600])
def test_drain_seconds_are_the_sum_of_their_parts(total):
    drain = Drain(total)
    assert drain.delay + drain.shutdown_timeout + drain.margin == pytest.approx(total)
    assert min(drain.delay, drain.shutdown_timeout, drain.margin) >= 0
    assert drain.delay <= 15
    assert drain.margin >= drain.delay - 1e-9


def test_the_default_drain_gives_streams_a_minute():
    assert (
        LauncherSettings().drain.delay,
        LauncherSettings().drain.shutdown_timeout,
        LauncherSettings().drain.margin,
    ) == (15, 60, 15)


def test_a_shutdown_timeout_longer_than_the_drain_is_warned_of():
    assert (
        "80 s plus the first drain step of 15 s exceed drain_seconds (90 s)"
        in read("m --shutdown-timeout 80").warnings[0]
    )
    assert read("m --shutdown-timeout 75").warnings == ()


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("--speculative-config.method mtp", "extra layers"),
        ("--speculative-config.model small", "the draft model"),
        ("--speculative-config.method extract_hidden_states", "hidden states"),
        ("--speculative-config.method custom_class --speculative-config.model a.B", "your own class"),
    ],
)
def test_speculative_decoding_warns_of_the_memory_that_the_plan_does_not_count(words, what):
    [warning] = read(f"m {words} --speculative-config.num-speculative-tokens 1").warnings
    assert warning.startswith("flag --speculative-config: the plan does not consider")
    assert what in warning
    assert "smaller than planned" in warning


@pytest.mark.parametrize("method", ["ngram", "ngram_gpu", "suffix"])
def test_speculative_decoding_without_a_draft_model_warns_of_none(method):
    words = f"m --speculative-config.method {method} --speculative-config.num-speculative-tokens 4"
    settings = read(words)
    assert not any("the plan does not consider" in warning for warning in settings.warnings)
    assert plan_request(settings).num_speculative_tokens == 4
    by_flags = read(f"m --spec-method {method} --spec-tokens 4")
    assert not any("the plan does not consider" in warning for warning in by_flags.warnings)
    for warnings in (settings.warnings, by_flags.warnings):
        assert any("arctic-inference" in warning for warning in warnings) is (method == "suffix")


def test_an_option_that_changes_memory_and_is_not_planned_is_warned_of_with_its_place():
    [warning] = read("m", {}, "model: m\nattention-config:\n  backend: FLASHINFER\n").warnings
    assert warning.startswith("c.yaml line 2: backend: the plan does not consider the workspaces")
    assert "and a GPU can run out of memory" in warning
    [warning] = read("m --enable-eplb --enable-expert-parallel").warnings
    assert warning.startswith("flag --enable-eplb: the plan does not consider")
    [warning] = read("m", {"VLLM_MLA_DISABLE": "1"}).warnings
    assert warning.startswith("environment VLLM_MLA_DISABLE=1: the plan does not consider")


@pytest.mark.parametrize(
    ("words", "environ"),
    [
        ("--max-logprobs 5 --no-enable-eplb --load-format safetensors", {}),
        ("--attention-backend auto", {}),
        ("--enable-lora --max-loras 4 --num-gpu-blocks-override 100 -O0", {}),
        ("--served-model-name a --structured-outputs-config.backend xgrammar", {}),
        ("", {"VLLM_MLA_DISABLE": "0", "VLLM_USE_V2_MODEL_RUNNER": "1"}),
    ],
)
def test_values_without_an_effect_on_memory_are_not_warned_of(words, environ):
    assert read(f"m {words}", environ).warnings == ()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num-gpu-blocks-override 0", "num_gpu_blocks_override is 0"),
        ("--cpu-offload-gb=-1", "cpu_offload_gb is -1.0"),
        ("--cpu-offload-gb inf", "cpu_offload_gb is inf"),
        ("--offload-group-size=-1", "offload_group_size is -1"),
        ("--offload-group-size 2 --offload-num-in-group 3", "offload_num_in_group 3 is more than offload_group_size 2"),
        ("--offload-backend prefetch", "offload_num_in_group 1 is more than offload_group_size 0"),
        ("--offload-group-size 2 --offload-num-in-group 0", "offload_num_in_group is 0"),
        ("--offload-group-size 2 --offload-prefetch-step 0", "offload_prefetch_step is 0"),
        ("--enable-eplb", "needs expert parallelism"),
        ("--eplb-config.num_redundant_experts 8", "num_redundant_experts has an effect only with --enable-eplb"),
        (
            "--spec-method ngram --speculative-config.method ngram",
            "method is also a key of speculative_config",
        ),
        (
            "--enable-lora --spec-method ngram --spec-tokens 4 --max-num-seqs 10 --max-num-batched-tokens 49",
            "10 requests need 50 tokens in a batch, not 49",
        ),
        ("--compilation-config.cudagraph_capture_sizes 8", "cudagraph_capture_sizes is 8"),
        ("--cudagraph-capture-sizes 4 0", "cudagraph_capture_sizes is [4, 0]"),
        ("--compilation-config.max_cudagraph_capture_size x", "max_cudagraph_capture_size is 'x'"),
        ("--max-cudagraph-capture-size=-1", "max_cudagraph_capture_size is -1"),
        ("--compilation-config.cudagraph_capture_sizes []", "cudagraph_capture_sizes is empty"),
        (
            "--cudagraph-capture-sizes 1 2 --max-cudagraph-capture-size 4",
            "the largest of cudagraph_capture_sizes is 2, and max_cudagraph_capture_size is 4",
        ),
        (
            "--max-cudagraph-capture-size 4 --compilation-config.max_cudagraph_capture_size 4",
            "is also a key of compilation_config",
        ),
    ],
)
def test_sizes_that_vllm_refuses_are_refused_before_the_start(words, message):
    assert message in refused(f"m {words}")


def test_the_plan_request_has_the_users_values():
    settings = read("m --max-model-len auto --kv-cache-memory-bytes 2G -tp 2 --port 1 --launch-objective latency")
    request = plan_request(settings)
    assert (request.max_model_len, request.kv_cache_memory_bytes, request.tensor_parallel_size) == (-1, 2 << 30, 2)
    assert (request.objective, request.long_max_model_len, request.enforce_eager) == ("latency", False, False)
    assert [plan_request(read(f"m --dtype {name}")).dtype for name in ("auto", "half")] == [None, "half"]


@pytest.mark.parametrize(
    ("words", "environ", "place"),
    [
        ("m", {}, None),
        ("m", {"NCCL_NVLS_ENABLE": "1", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "0"}, None),
        ("m", {"NCCL_NVLS_ENABLE": "0"}, "environment NCCL_NVLS_ENABLE=0"),
        ("m", {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}, "environment TORCH_SYMM_MEM_DISABLE_MULTICAST=1"),
        ("m", {"NVSHMEM_DISABLE_NVLS": "1"}, "environment NVSHMEM_DISABLE_NVLS=1"),
        ("m --launch-nvlink-multicast off", {}, "flag --launch-nvlink-multicast"),
        ("m", {"LAUNCH_NVLINK_MULTICAST": "off", "NCCL_NVLS_ENABLE": "0"}, "environment LAUNCH_NVLINK_MULTICAST"),
    ],
)
def test_multicast_is_forbidden_by_the_setting_or_by_a_librarys_variable(words, environ, place):
    settings = read(words, environ)
    assert settings.no_multicast == place
    assert plan_request(settings).fuse_allreduce_rms is (place is None)


def test_the_plan_counts_a_fused_all_reduce_only_if_the_user_does_not_turn_it_off():
    words = "m --compilation-config.pass_config.fuse_allreduce_rms {}"
    for text, fused in (("false", False), ("true", True)):
        request = plan_request(read(words.format(text)))
        assert run_of(request, model(), (8192, 1024), Generation.HOPPER).fuse_allreduce_rms is fused


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("--compilation-config.pass_config.fuse_allreduce_rms true", "flag --compilation-config: fuse_allreduce_rms"),
        ("--all2all-backend flashinfer_nvlink_one_sided", "flag --all2all-backend: flashinfer_nvlink_one_sided"),
    ],
)
def test_options_that_use_multicast_are_refused_if_it_is_forbidden(words, names):
    assert read(f"m {words}").no_multicast is None
    why = refused(f"m {words} --launch-nvlink-multicast off")
    assert why.startswith(f"{names} uses NVLink multicast, which flag --launch-nvlink-multicast forbids; ")


def test_the_kv_cache_is_fp8_only_if_the_user_allows_it():
    assert plan_request(read("m")).fp8_kv is False
    assert plan_request(read("m --launch-quality fp8-kv")).fp8_kv is True


@pytest.mark.parametrize(
    ("words", "environ", "expected"),
    [("m", {}, False), ("m", {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}, True), ("m --hf-overrides.a 1", {}, True),
     ("m", {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "0"}, False)],
)  # fmt: skip
def test_a_longer_context_is_allowed_as_in_vllm(words, environ, expected):
    assert plan_request(read(words, environ)).long_max_model_len is expected


@pytest.mark.parametrize(("value", "expected"), [("0", False), ("1", True), ("", None)])
def test_the_estimate_of_cuda_graphs_is_read_as_in_vllm(value, expected):
    environ = {"VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS": value}
    assert plan_request(read("m", environ)).estimate_cudagraphs is expected
    assert plan_request(read("m")).estimate_cudagraphs is None


@pytest.mark.parametrize(
    ("words", "environ", "expected"),
    [
        ("m", {}, None),
        ("m", {"PYTORCH_CUDA_ALLOC_CONF": ""}, None),
        ("m", {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, True),
        ("m", {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64, expandable_segments: True"}, True),
        ("m", {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, False),
        ("m", {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, False),
        (
            "m",
            {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
            False,
        ),
        ("m --kv-offloading-size 4", {}, False),
        ("m --enable-sleep-mode", {}, False),
        ('m --kv-transfer-config {"kv_connector":"NixlConnector","kv_role":"kv_both"}', {}, False),
    ],
)
def test_expandable_segments_are_the_users_choice_or_forbidden_by_an_option(words, environ, expected):
    assert plan_request(read(words, environ)).expandable_segments is expected


def test_expandable_segments_with_a_kv_connector_are_refused_as_vllm_does():
    environ = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    text = str(refused("m --kv-offloading-size 4", environ))
    assert text.startswith("environment PYTORCH_CUDA_ALLOC_CONF: has expandable_segments:True")
    assert "flag --kv-offloading-size" in text
    read("m --kv-offloading-size 4 --enable-sleep-mode", environ)


@pytest.mark.parametrize(
    ("words", "url"),
    [("m", "http://127.0.0.1:8000"), ("m --host 0.0.0.0 --port 1", "http://127.0.0.1:1"), ("m --host ::", "http://[::1]:8000"),
     ("m --host 10.0.0.1 --ssl-certfile c", "https://10.0.0.1:8000"), ("m --host fe80::1", "http://[fe80::1]:8000")],
)  # fmt: skip
def test_the_url_is_the_servers_url_on_this_machine(words, url):
    assert read(words).url == url


@pytest.mark.parametrize("option", ["origins", "methods", "headers"])
@pytest.mark.parametrize("value", ['"*"', "null", "1", '["*",1]', '{"*":1}', '["https://a\\nb"]', '["https://ä"]'])
def test_options_for_cors_that_are_not_lists_of_texts_are_refused(option, value):
    text = str(refused(f"m --allowed-{option} {value}"))
    assert text.startswith(f"flag --allowed-{option}")
    assert "write a list" in text
    read(f"""m --allowed-{option} ["*"]""")


def keys(words, environ, text=None):
    return read_api_keys(read(words), environ, read_file=lambda _: text)


def test_keys_come_from_the_file_and_the_flag_or_else_the_environment():
    file = "m --launch-api-key-file f"
    assert keys("m", {}) == ()
    assert keys("m", {"VLLM_API_KEY": "e"}) == ("e",)
    assert keys("m", {"VLLM_API_KEY": "e\n"}) == ("e",)
    assert keys("m --api-key a b", {"VLLM_API_KEY": "e"}) == ("a", "b")
    assert keys(file, {"VLLM_API_KEY": "e"}, " x \n\ny\r\nx\n") == ("e", "x", "y")


@pytest.mark.parametrize("text", ["", "\n \n", "two words", "schlüssel", "a\x00b"])
def test_a_key_file_without_a_usable_key_is_refused_and_its_text_is_not_shown(text):
    with pytest.raises(UsageError) as error:
        keys("m --launch-api-key-file f", {}, text)
    assert not text.strip() or text not in str(error.value)


def test_redacted_settings_contain_no_secret():
    settings = read("m --api-key s3cret --hf-token s3cret")
    assert "s3cret" in repr(settings)
    assert "s3cret" not in repr(redacted(settings))


@given(
    st.text(max_size=60)
    | st.lists(
        st.sampled_from(
            [
                "a",
                "port",
                ": ",
                "\n",
                "  ",
                "- ",
                "{",
                "}",
                "[",
                "]",
                "&x ",
                "*x",
                "!",
                "'",
                '"',
                "|",
                ">",
                "? ",
                "launch:",
                "\t",
                "1",
                "~",
                "<<",
                "---",
                ",",
                "#",
                "=",
                ".inf",
                "0b_",
                "%YAML 1.1",
            ]
        ),
        max_size=12,
    ).map("".join)
)
def test_any_text_is_a_config_file_or_a_usage_error(text):
    try:
        config_file.read("c.yaml", lambda _: text)
        read("m", {}, text)
    except UsageError as error:
        assert "\n" not in str(error)  # noqa: PT017 - it may also not be raised


@given(
    st.dictionaries(
        st.sampled_from([f"LAUNCH_{field.upper()}" for field in LauncherSettings.__struct_fields__]),
        st.text(max_size=8),
    )
)
def test_any_environment_is_read_or_a_usage_error(environ):
    try:
        read("m", environ)
    except UsageError as error:
        assert error.where.startswith(("environment", "port", "--"))  # noqa: PT017 - as above


def test_the_example_config_file_has_the_defaults_and_names_every_setting():
    path = Path(__file__).parents[3] / "docs" / "config.example.yaml"
    settings = read_settings(parse_flags(["--config", str(path)]), {})
    assert settings.launch == LauncherSettings()
    text = path.read_text()
    assert not [field for field in LauncherSettings.__struct_fields__ if f"{field}:" not in text]
    commented = re.findall(r"^# ([a-z-]+):", text, re.MULTILINE)
    assert commented
    assert all(values.find_option(name, "example") for name in commented)


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ("-tp 2 --nnodes 2", "--nnodes"),
        ("-tp 4 -n 2 --node-rank 0", "--nnodes"),
        ("--node-rank 1", "--node-rank"),
        ("--master-addr 10.0.0.1", "--master-addr"),
        ("--data-parallel-size 16 --data-parallel-size-local 8", "--data-parallel-size-local"),
        ("-dp 4 --data-parallel-address 10.0.0.1", "--data-parallel-address"),
        ("-dp 4 --data-parallel-start-rank 2", "--data-parallel-start-rank"),
        ("-dp 4 --data-parallel-rank 0", "--data-parallel-rank"),
        ("-dp 4 --data-parallel-backend ray", "--data-parallel-backend"),
        ("-dp 4 --data-parallel-hybrid-lb --data-parallel-size-local 2", "--data-parallel-size-local"),
        ("-dp 4 --data-parallel-external-lb --data-parallel-rank 1", "--data-parallel-rank"),
    ],
)
def test_options_for_several_machines_warn_that_the_plan_is_for_one(words, flag):
    [warning] = [text for text in read(f"m {words}").warnings if "this one machine" in text]
    assert warning.startswith(f"flag {flag}")


def test_the_warning_about_several_machines_names_the_line_of_the_file():
    [warning] = read("m", yaml="nnodes: 4\ntensor-parallel-size: 4").warnings
    assert warning.startswith("c.yaml line 1: the plan is for this one machine")


@pytest.mark.parametrize(
    "words",
    [
        "--nnodes 1 --node-rank 0 --master-addr 127.0.0.1",
        "--data-parallel-size 8 --data-parallel-size-local 8",
        "--data-parallel-size-local 1",
        "-dp 4 --data-parallel-backend mp --no-data-parallel-hybrid-lb",
    ],
)
def test_the_same_options_with_the_values_of_one_machine_do_not_warn(words):
    assert read(f"m {words}").warnings == ()


def test_all_options_for_several_machines_give_one_warning():
    [warning] = read("m -tp 2 --nnodes 2 --node-rank 1 --master-addr 10.0.0.1").warnings
    assert warning.startswith("flag --nnodes, flag --node-rank, flag --master-addr: ")
