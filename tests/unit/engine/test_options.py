import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_launch.engine.options import options, redacted_values
from vllm_launch.engine.parse import parse
from vllm_launch.engine.removed import REMOVED_FLAGS, REMOVED_KEYS
from vllm_launch.engine.spell import spell
from vllm_launch.engine.values import find_option, validate_value
from vllm_launch.errors import UsageError

FLAGS = [flag for option in options().values() for flag in option.flags]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("m -tp 2", {"tensor_parallel_size": 2}),
        ("--port=9000 m", {"port": 9000}),
        ("--model m --tensor_parallel_size=4", {"tensor_parallel_size": 4}),
        ("m --model m", {}),
        ("m --max-model-len 8k", {"max_model_len": 8000}),
        ("m --max-model-len 8K", {"max_model_len": 8192}),
        ("m --max-model-len auto", {"max_model_len": -1}),
        ("m --kv-cache-memory-bytes 25.6k", {"kv_cache_memory_bytes": 25600}),
        ("m --no-enable-prefix-caching", {"enable_prefix_caching": False}),
        ("m -ep", {"enable_expert_parallel": True}),
        ("m -O3", {"optimization_level": "3"}),
        ("m -O 1", {"optimization_level": "1"}),
        ("m -O=0", {"optimization_level": "0"}),
        ("m --compilation-config.pass_config.x true", {"compilation_config": {"pass_config": {"x": True}}}),
        ("m --hf-overrides.a+ x,y --hf-overrides.a+=z", {"hf_overrides": {"a": ["x", "y", "z"]}}),
        ("m --hf-overrides.size 80g", {"hf_overrides": {"size": 80_000_000_000}}),
        ("m --hf-token", {"hf_token": True}),
        ("m --served-model-name a b", {"served_model_name": ["a", "b"]}),
        ("m --middleware a.b --middleware c.d", {"middleware": ["a.b", "c.d"]}),
        ("m --host None", {"host": None}),
        ("m --moe-backend Flashinfer-Cutlass", {"moe_backend": "flashinfer_cutlass"}),
        ("m --device-ids 0,GPU-a", {"device_ids": [0, "GPU-a"]}),
        ("m --gpu-mem 0.5", {"gpu_memory_utilization": 0.5}),
        ('m --eplb-config {"window_size":1k}', {"eplb_config": {"window_size": 1000}}),
    ],
)
def test_words_become_values(words, expected):
    assert parse(words.split()) == {"model": "m"} | expected


@pytest.mark.parametrize(
    ("words", "where", "message"),
    [
        ("m --tensor-paralel-size 2", "--tensor-paralel-size", "did you mean --tensor-parallel-size?"),
        ("m --prot=1", "--prot", "did you mean --port?"),
        ("m --xyzzy", "--xyzzy", "see docs"),
        ("m --port x", "--port", "'x' is not a whole number"),
        ("m --port=1 -0.5", "the value -0.5", "write --flag=-0.5"),
        ("m --port 1.5", "--port", "'1.5' is not a whole number"),
        ("m --port", "--port", "its value is missing"),
        ("m --api-key", "--api-key", "its value is missing"),
        ("m --cpu-offload-gb much", "--cpu-offload-gb", "is not a number"),
        ("m --max-model-len 8q", "--max-model-len", "is not a whole number; give one such as 8192"),
        ("m --max-model-len 1.5K", "--max-model-len", "decimal point"),
        ("m --dtype fp4", "--dtype", "is not among the choices; give auto, bfloat16"),
        ("m --max-lora-rank 3", "--max-lora-rank", "is not among the choices; give 1, 8"),
        ("m --max-n 3", "--max-n", "short for several flags: --max-num-batched-tokens"),
        ("m --enforce-eager=true", "--enforce-eager", "takes no value"),
        ("m --headless=1", "--headless", "takes no value"),
        ("m -tp 2 --tensor-parallel-size 4", "--tensor-parallel-size", "given twice"),
        ("m --enforce-eager --no-enforce-eager", "--no-enforce-eager", "given twice"),
        ('m --hf-overrides {"a":1} --hf-overrides.b 2', "--hf-overrides", "given twice"),
        ("m --compilation-config.mode 3 -cc.mode 2", "-cc", "given twice"),
        ("m --hf-overrides.a 1 --hf-overrides.a 2", "--hf-overrides.a", "given twice"),
        ("m --hf-overrides.a 1 --hf-overrides.a.b 2", "--hf-overrides.a.b", "both a value and nested keys"),
        ("m --hf-overrides.a", "--hf-overrides.a", "its value is missing"),
        ("m --port.x 3", "--port", "is not a whole number"),
        ("m --nope.x 3", "--nope", "vLLM has no such flag"),
        ("m --compilation-config 3", "--compilation-config", "is not a JSON object"),
        ("m --compilation-config {", "--compilation-config", "is not JSON"),
        ("m --limit-mm-per-prompt image", "--limit-mm-per-prompt", "is not JSON"),
        ("m --lora-modules x", "--lora-modules", "write NAME=PATH"),
        ("m --lora-modules {}", "--lora-modules", "NAME=PATH"),
        ("m --watermark -0.5", "the value -0.5", "write --watermark=-0.5"),
        ("m -O", "-O", "no such flag"),
        ("m -z", "-z", "no such flag"),
        ("m n", "command line", "'n' is neither the value of a flag nor the model"),
        ("m --model n", "command line", "'m' is neither the value of a flag nor the model"),
        ("m -- --port", "--port", "comes after --"),
        ("m -- --prot", "--prot", "no such flag"),
    ],
)
def test_words_that_vllm_refuses_are_refused_with_a_remedy(words, where, message):
    with pytest.raises(UsageError) as error:
        parse(words.split())
    assert error.value.where == where
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flag", REMOVED_FLAGS)
def test_a_removed_flag_is_refused_with_its_replacement(flag):
    assert flag not in FLAGS
    for words in ([flag, "1"], [f"{flag}=1"], [flag.replace("-", "_").replace("__", "--", 1)]):
        with pytest.raises(UsageError) as error:
            parse(["m", *words])
        assert error.value.remedy == REMOVED_FLAGS[flag]


@pytest.mark.parametrize(
    "flag", [word for remedy in REMOVED_FLAGS.values() for word in remedy.split() if word.startswith("--")]
)
def test_the_replacement_of_a_removed_flag_exists(flag):
    name, _, key = flag.strip(",").partition(".")
    assert name in FLAGS
    assert not key or key in options()[name.removeprefix("--").replace("-", "_")].keys


@pytest.mark.parametrize("dotted_key", REMOVED_KEYS)
def test_a_removed_key_is_refused_with_its_replacement(dotted_key):
    dest, _, key = dotted_key.partition(".")
    assert key not in options()[dest].keys
    with pytest.raises(UsageError) as error:
        parse(["m", f"--{dest.replace('_', '-')}.{key}=1"])
    assert error.value.remedy == REMOVED_KEYS[dotted_key]
    assert error.value.remedy.split()[1].strip(":") in options()[dest].keys


@pytest.mark.parametrize(
    "words", [["--api-key", "s3cret", "-z"], ["--hf-token=s3cret", "m", "stray"], ["--api-key=s3cret", "m", "s3cret"]]
)
def test_an_error_never_contains_a_secret(words):
    with pytest.raises(UsageError) as error:
        parse(words)
    assert "s3cret" not in str(error.value)


def test_an_empty_model_is_refused():
    with pytest.raises(UsageError, match="empty"):
        parse([""])


@pytest.mark.parametrize(
    ("dest", "value", "expected"),
    [
        ("port", 9000, 9000),
        ("port", "9000", 9000),
        ("max_model_len", "8k", 8000),
        ("max_model_len", 8192, 8192),
        ("gpu_memory_utilization", 1, 1.0),
        ("revision", 7, "7"),
        ("host", None, None),
        ("enforce_eager", False, False),
        ("hf_token", True, True),
        ("served_model_name", "a", ["a"]),
        ("served_model_name", ["a", "b"], ["a", "b"]),
        ("middleware", "a.b", ["a.b"]),
        ("compilation_config", {"mode": 3}, {"mode": 3}),
        ("compilation_config", '{"mode": 3}', {"mode": 3}),
        ("hf_overrides", {"a": [1]}, {"a": [1]}),
        ("hf_overrides", "word", "word"),
        ("allowed_origins", ["*"], ["*"]),
        ("device_ids", [0, 1], [0, 1]),
        ("lora_modules", [{"name": "a", "path": "b"}], ['{"name": "a", "path": "b"}']),
        ("cudagraph_capture_sizes", [1, 2], [1, 2]),
    ],
)
def test_a_value_of_a_config_file_gets_the_same_type_as_on_the_command_line(dest, value, expected):
    typed = validate_value(options()[dest], value, "c.yaml line 1")
    assert typed == expected
    assert type(typed) is type(expected)


@pytest.mark.parametrize(
    ("dest", "value", "message"),
    [
        ("port", True, "not a whole number"),
        ("port", 1.0, "not a whole number"),
        ("port", [1], "not a whole number"),
        ("port", None, "leave the key out"),
        ("gpu_memory_utilization", {}, "not a number"),
        ("enforce_eager", "yes", "neither true nor false"),
        ("enforce_eager", 1, "neither true nor false"),
        ("revision", 1.1, "in quotes"),
        ("revision", True, "in quotes"),
        ("compilation_config", [1], "not a JSON object"),
        ("compilation_config", 3, "not a JSON object"),
        ("hf_overrides", {"a": object()}, "JSON does not have"),
        ("served_model_name", [{}], "give one word"),
        ("dtype", "f4", "give auto, bfloat16"),
    ],
)
def test_a_value_of_the_wrong_type_in_a_config_file_is_refused(dest, value, message):
    with pytest.raises(UsageError, match=message) as error:
        validate_value(options()[dest], value, "c.yaml line 1")
    assert error.value.where == "c.yaml line 1"


def test_a_secret_of_the_wrong_type_is_not_printed():
    with pytest.raises(UsageError) as error:
        validate_value(options()["api_key"], {"s3cret": 1}, "c.yaml line 1")
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize(("name", "message"), [("prot", "did you mean port"), ("swap-space", "kv-offloading-size")])
def test_an_unknown_key_of_a_config_file_is_refused(name, message):
    with pytest.raises(UsageError, match=message):
        find_option(name, "c.yaml line 1")


def test_spell_gives_one_word_for_each_option_in_vllms_order():
    values = {
        "tensor_parallel_size": 2,
        "port": 1,
        "served_model_name": ["a", "b"],
        "model": "m",
        "hf_overrides": {"a": 1},
    }
    assert spell(values) == [
        "--port=1", "--served-model-name", "a", "b", '--hf-overrides={"a": 1}', "--tensor-parallel-size=2",
    ]  # fmt: skip


def test_a_list_item_that_vllm_would_read_as_a_flag_is_refused():
    assert spell({"served_model_name": ["-x"]}) == ["--served-model-name=-x"]
    with pytest.raises(UsageError, match="-x"):
        spell({"served_model_name": ["a", "-x"]})
    with pytest.raises(UsageError) as error:
        spell({"api_key": ["a", "-s3cret"]})
    assert "s3cret" not in str(error.value)


def test_a_false_flag_without_a_negated_form_is_left_out():
    assert spell({"headless": False, "enforce_eager": False, "middleware": []}) == ["--no-enforce-eager"]


def test_secrets_are_redacted():
    values = {"api_key": ["k"], "hf_token": None, "port": 1}
    assert redacted_values(values) == {"api_key": "***", "hf_token": None, "port": 1}


WORD = st.one_of(
    st.sampled_from(FLAGS),
    st.builds("{}={}".format, st.sampled_from(FLAGS), st.text(max_size=8)),
    st.builds("{}.{} {}".format, st.sampled_from(FLAGS), st.text(max_size=5), st.text(max_size=5)),
    st.builds("{}.{}={}".format, st.sampled_from(FLAGS), st.text(max_size=5), st.text(max_size=5)),
    st.text(max_size=8),
    st.sampled_from(
        ["-", "--", "-O", "-O3", "{}", "[", "1", "1e400", "9" * 400 + "k", "²", "-1.5", "=", "--=", "-.", "--."]
    ),
)


@given(st.lists(WORD, max_size=6))
def test_any_words_give_values_or_a_usage_error(words):
    try:
        values = parse(words)
    except UsageError as error:
        assert "\n" not in str(error)  # noqa: PT017 - parse need not raise
        return
    try:
        spelt_words = spell(values)
    except UsageError:
        return
    parsed_again = parse(spelt_words)
    assert json.dumps(parsed_again) == json.dumps(
        {dest: values[dest] for dest in options() if dest in values and dest != "model"}
    )


@given(
    st.sampled_from(list(options())),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    ),
)
def test_any_value_of_a_config_file_gives_a_typed_value_or_a_usage_error(dest, value):
    try:
        validate_value(options()[dest], value, "c.yaml line 1")
    except UsageError as error:
        assert error.where == "c.yaml line 1"  # noqa: PT017 - as above
