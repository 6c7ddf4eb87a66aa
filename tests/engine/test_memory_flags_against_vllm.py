"""Compares the options that change memory with the pinned vLLM's code: graphs, draft tokens, offloading, variables."""

# ruff: noqa: TID251 - the engine is what these tests compare with

import json
import random
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest

from vllm_launch.decide import plan_request
from vllm_launch.engine import speculative
from vllm_launch.engine.uncounted import UNCOUNTED_VARIABLES
from vllm_launch.machine.generation import Generation
from vllm_launch.machine.gpus import Gpu
from vllm_launch.model.read import read_model
from vllm_launch.plan.request import run_of, without_windows
from vllm_launch.settings.flags import parse_flags
from vllm_launch.settings.read import read_settings
from vllm_launch.sizing import margin
from vllm_launch.sizing.cuda_graphs import capture_sizes, full_graph_sizes
from vllm_launch.sizing.kv_layers import layer_specs
from vllm_launch.sizing.offload import LayerTensor, Offload, offloaded
from vllm_launch.sizing.parallel import Layout
from vllm_launch.sizing.placement import Placement
from vllm_launch.sizing.run_config import CudaGraphMode, RunConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch deprecates what its own import uses
    import torch
    from vllm import envs
    from vllm.config import compilation as their_compilation
    from vllm.config import speculative as their_speculative
    from vllm.model_executor.offloader import prefetch, uva
    from vllm.v1.worker.gpu import cudagraph_utils
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler

BASE = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4,
    "num_hidden_layers": 4, "vocab_size": 1024, "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
}  # fmt: skip
MODELS = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 1024},
    "bert": {"architectures": ["BertModel"], "model_type": "bert", "max_position_embeddings": 512},
    "jamba": {
        "architectures": ["JambaForCausalLM"], "model_type": "jamba", "attn_layer_period": 2, "attn_layer_offset": 1,
        "num_experts": 4, "num_experts_per_tok": 2, "mamba_d_conv": 4, "mamba_d_state": 16, "mamba_expand": 2,
    },
    "mamba": {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "state_size": 16, "conv_kernel": 4, "expand": 2},
    "whisper": {
        "architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper", "d_model": 256,
        "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 8, "decoder_attention_heads": 8,
        "encoder_ffn_dim": 512, "decoder_ffn_dim": 512, "max_target_positions": 448, "vocab_size": 1024,
    },
}  # fmt: skip
"""Small configurations of our own: what each kind of model changes of the options' effects."""

GRAPHS = [
    "", "-O0", "-O1", "-O2", "-O3", "--enforce-eager", "--enforce-eager -O3", "-cc.cudagraph_mode NONE",
    "-cc.cudagraph_mode none", "-cc.cudagraph_mode PIECEWISE", "-cc.cudagraph_mode FULL",
    "-cc.cudagraph_mode FULL_DECODE_ONLY", "-cc.mode 0", "-cc.mode 1", "-cc.mode 3 -O0",
    "-cc.mode none -cc.cudagraph_mode piecewise", "-O0 -cc.cudagraph_mode FULL_DECODE_ONLY",
    "-O1 -cc.cudagraph_mode FULL_AND_PIECEWISE",
]  # fmt: skip
SIZES = [
    "--cudagraph-capture-sizes 1 2 4", "--cudagraph-capture-sizes 8 8 4096 20000", "--max-cudagraph-capture-size 100",
    "-cc.max_cudagraph_capture_size 48", "-cc.cudagraph_capture_sizes [1,16]", "--performance-mode interactivity",
    "--max-num-seqs 20", "--max-num-seqs 700", "--max-num-seqs 20 --performance-mode interactivity",
    "--spec-method ngram --spec-tokens 4", "--spec-method ngram --spec-tokens 16 --max-num-seqs 700",
    "--spec-method ngram_gpu --spec-tokens 3 --max-num-seqs 20",
    "--spec-method ngram --spec-tokens 2 --cudagraph-capture-sizes 4 8",
    '--speculative-config {"method":"ngram","num-speculative-tokens":5}',
]  # fmt: skip
CACHES = [
    "--no-async-scheduling", "--no-enable-prefix-caching", "--disable-hybrid-kv-cache-manager",
    "--disable-sliding-window", "--mamba-cache-mode align", "--no-enable-prefix-caching --mamba-cache-mode align",
]  # fmt: skip
OFFLOADS = [
    "--cpu-offload-gb 1", "--offload-group-size 2", "--cpu-offload-gb 1 --offload-group-size 2",
    "--cpu-offload-gb 1 --offload-group-size 2 --offload-backend uva", "--offload-backend auto",
]  # fmt: skip
CASES = [
    *[("llama", words) for words in [*GRAPHS, *SIZES, *OFFLOADS, "--no-async-scheduling"]],
    *[(model, words) for model in ("bert", "whisper") for words in GRAPHS],
    *[(model, words) for model in ("mistral", "jamba") for words in ["", *CACHES]],
    ("llama", "--enable-lora --spec-method ngram --spec-tokens 7 --max-num-seqs 1024 --max-num-batched-tokens 8192"),
    *[("mamba", words) for words in ("", "--enable-prefix-caching", "--no-enable-prefix-caching")],
]
GPU = Gpu(
    index=0, uuid="GPU-0", name="NVIDIA H200", memory_total=1 << 37, memory_free=1 << 37, compute_capability=(9, 0)
)
OFFLOADERS = {"uva": "UVAOffloader", "prefetch": "PrefetchOffloader", None: "NoopOffloader"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    paths = {}
    for name, config in MODELS.items():
        paths[name] = tmp_path_factory.mktemp(name)
        (paths[name] / "config.json").write_text(json.dumps(BASE | config))
    return paths


@pytest.fixture(scope="module")
def answers(folders):
    items = [[str(folders[name]), words.split()] for name, words in CASES]
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("config_on_h200.py"))],
        input=json.dumps(items), capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return dict(zip(CASES, json.loads(result.stdout), strict=True))


@pytest.mark.parametrize(("name", "words"), CASES)
def test_what_an_option_does_equals_what_vllms_config_classes_make_of_it(name, words, folders, answers):
    theirs = answers[name, words]
    assert "error" not in theirs
    settings = read_settings(parse_flags([str(folders[name]), *words.split()]), {})
    request = plan_request(settings)
    model = read_model(str(folders[name]))
    model = without_windows(model) if request.disable_sliding_window else model
    run = run_of(request, model, (theirs["max_num_batched_tokens"], theirs["max_num_seqs"]), Generation.HOPPER)
    assert (run.compiled, run.cudagraph_mode) == (theirs["compiled"], theirs["cudagraph_mode"])
    assert capture_sizes(run, Generation.HOPPER) == theirs["sizes"]
    assert run.num_speculative_tokens == theirs["num_speculative_tokens"]
    assert run.verifies_in_chunks or not theirs["runner_v2"]
    assert run.max_model_len == theirs["max_model_len"]
    assert run.disable_hybrid_kv_cache_manager == theirs["disable_hybrid"]
    assert run.async_scheduling or not theirs["async_scheduling"]  # without it a request never needs more blocks
    assert OFFLOADERS[run.offload and run.offload.backend] == theirs["offloader"]
    if any(layer.state_shapes for layer in model.layers):
        [states] = {spec.states for specs in layer_specs(Placement(model, run, Layout(), GPU)) for spec in specs} - {0}
        assert states == (2 if theirs["mamba_cache_mode"] == "align" else 1)


@pytest.mark.parametrize("seed", range(60))
def test_full_and_piecewise_graphs_equal_those_that_vllm_captures(seed):
    rng = random.Random(seed)
    mode = rng.choice(["PIECEWISE", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"])
    seqs, drafts = rng.randint(1, 600), rng.choice([0, 0, 1, 3, 4, 16])
    run = RunConfig(
        max_model_len=8192, max_num_seqs=seqs, max_num_batched_tokens=8192, dtype="bfloat16",
        cudagraph_mode=mode, num_speculative_tokens=drafts,
    )  # fmt: skip
    sizes = capture_sizes(run, Generation.HOPPER)
    manager = SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=max(sizes)),
        cudagraph_mode=their_compilation.CUDAGraphMode[mode], max_num_reqs=seqs, decode_query_len=1 + drafts,
        varlen_decode=False, lora_capture_cases=[0], ubatch_runner=None, _capture_descs={}, _candidates={},
        vllm_config=SimpleNamespace(
            speculative_config=None, cache_config=SimpleNamespace(use_kda_recoverssm=False)
        ),
    )  # fmt: skip
    manager._maybe_ubatch_twin = lambda _: None
    cudagraph_utils.CudaGraphManager._init_candidates(manager)
    captured = {
        key.name: sorted(graph.num_tokens for graph in graphs) for key, graphs in manager._capture_descs.items()
    }
    assert full_graph_sizes(run, sizes) == captured.get("FULL", [])
    assert captured.get("PIECEWISE", []) == ([] if mode == "FULL_DECODE_ONLY" else sizes)


def test_the_modes_of_cuda_graphs_are_vllms():
    assert set(get_args(CudaGraphMode)) == set(their_compilation.CUDAGraphMode.__members__)


def test_the_methods_of_speculative_decoding_use_a_draft_as_in_vllm():
    methods = set(get_args(their_speculative.SpeculativeMethod))
    assert set(get_args(their_speculative.MTPModelTypes)) == speculative.CHECKPOINT_LAYERS
    for method in methods - speculative.CHECKPOINT_LAYERS:
        config = SimpleNamespace(method=method)
        for name in ("use_eagle", "uses_draft_model", "uses_extract_hidden_states", "use_ngram"):
            setattr(config, name, getattr(their_speculative.SpeculativeConfig, name).__get__(config))
        has_cache = their_speculative.SpeculativeConfig.uses_draft_kv_cache(config)
        if method in speculative.WITHOUT_DRAFT:
            assert not has_cache
        if has_cache:
            assert method in speculative.DRAFT_MODEL | speculative.HIDDEN_STATES
    assert their_speculative.SpeculativeConfig.suffix_decoding_max_tree_depth == speculative.SUFFIX_TOKENS
    assert rejection_sampler.MAX_CHUNK_BYTES == margin.VERIFIED_BYTES


def test_the_variables_of_which_the_plan_warns_are_vllms():
    assert set(UNCOUNTED_VARIABLES) - set(envs.environment_variables) == set()


# ---- offloading: vLLM's offloaders run on parameters without memory


class Parameter:
    """A parameter on a GPU, as vLLM's offloader for UVA sees it."""

    def __init__(self, size):
        self.device = torch.device("cuda")
        self.data = SimpleNamespace(
            to=lambda **_: self.data, pin_memory=lambda: self.data, numel=lambda: size, element_size=lambda: 1
        )


class Module:
    """A decoder layer with parameters by name."""

    def __init__(self, sizes, kind):
        self.named = [(name, kind(size)) for name, size in sizes.items()]

    def parameters(self):
        return (parameter for _, parameter in self.named)

    def named_parameters(self):
        return iter(self.named)

    forward = None


def random_layers(rng):
    """Return the sizes of the parameters of each layer. Some layers differ from the others."""
    names = ["self_attn.qkv_proj.weight", "mlp.experts.w13_weight", "mlp.experts.w2_weight", "input_layernorm.weight"]
    shared = {name: rng.randint(1, 100) for name in names}
    return [
        shared if rng.random() < 0.8 else {name: rng.randint(1, 100) for name in names}
        for _ in range(rng.randint(1, 12))
    ]


def tensors_of(layers):
    return [LayerTensor(index, name, size) for index, sizes in enumerate(layers) for name, size in sizes.items()]


PARAMS = [(), (), ("experts",), ("mlp.experts.w2_weight",), ("w2",), ("self_attn", "w13_weight")]


@pytest.mark.parametrize("seed", range(100))
def test_uva_moves_the_tensors_that_vllms_offloader_moves(monkeypatch, seed):
    rng = random.Random(seed)
    monkeypatch.setattr(uva, "should_pin_memory", lambda: True)
    monkeypatch.setattr(uva, "is_uva_available", lambda: True)
    monkeypatch.setattr(uva, "get_accelerator_view_from_cpu_tensor", lambda data: data)
    layers, params = random_layers(rng), rng.choice(PARAMS)
    limit = rng.randint(1, 1500)
    theirs = uva.UVAOffloader(limit, set(params))
    theirs.wrap_modules(Module(sizes, Parameter) for sizes in layers)
    ours = offloaded(Offload(backend="uva", limit=limit, params=params), tensors_of(layers))
    assert ours.host == theirs.cpu_offload_bytes
    assert ours.saved == min(limit, theirs.cpu_offload_bytes)


@pytest.mark.parametrize("seed", range(100))
def test_prefetch_moves_the_layers_and_keeps_the_buffers_of_vllms_offloader(monkeypatch, seed):
    rng = random.Random(seed)
    moved = []

    def module_offloader(module, whitelist_param_names, **_):
        sizes = {name: size for name, size in module.named if name in whitelist_param_names}
        moved.append(sizes)

    monkeypatch.setattr(prefetch.torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(prefetch, "_ModuleOffloader", module_offloader)
    layers, params = random_layers(rng), rng.choice(PARAMS)
    group = rng.randint(1, 5)
    options = {"group_size": group, "num_in_group": rng.randint(1, group), "prefetch_step": rng.randint(1, 3)}
    theirs = prefetch.PrefetchOffloader(**options, offload_params=set(params))
    theirs.wrap_modules(Module(sizes, int) for sizes in layers)
    infos = [
        prefetch.ParamInfo(name=name, shape=(size,), stride=(1,), dtype=torch.uint8)
        for sizes in moved
        for name, size in sizes.items()
    ]
    pool = prefetch.StaticBufferPool(infos, options["prefetch_step"], torch.device("cpu"))
    ours = offloaded(Offload(backend="prefetch", params=params, **options), tensors_of(layers))
    assert ours.host == sum(info.num_bytes for info in infos)
    assert ours.host - ours.saved == pool.total_bytes
