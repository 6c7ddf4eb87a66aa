"""Tests that every option of the pinned vLLM is planned with, or changes no memory, or is warned of."""

from collections.abc import Mapping

import pytest

from vllm_launch import decide
from vllm_launch.engine import speculative
from vllm_launch.engine.memory_options import NO_MEMORY, PLANNED
from vllm_launch.engine.options import options
from vllm_launch.engine.uncounted import UNCOUNTED, uncounted
from vllm_launch.settings.rules import ONE_MACHINE
from vllm_launch.settings.settings import LauncherSettings, Settings

LISTS = (PLANNED, NO_MEMORY, frozenset(UNCOUNTED), frozenset(ONE_MACHINE))
NAMES = {option.dest: [f"{option.dest}.{key}" for key in option.keys] for option in options().values()}


class Recorded(Mapping):
    """Options that a user did not set. It records the name of each option that is read."""

    def __init__(self):
        self.read = set()

    def __getitem__(self, name):
        self.read.add(name)
        raise KeyError(name)

    def __iter__(self):
        return iter(())

    def __len__(self):
        return 0


@pytest.mark.parametrize("dest", options())
def test_an_option_is_on_exactly_one_list_as_a_whole_or_with_each_of_its_keys(dest):
    whole = [names for names in LISTS if dest in names]
    keys = [[names for names in LISTS if key in names] for key in NAMES[dest]]
    if whole:
        assert (len(whole), [key for key in keys if key]) == (1, [])
    else:
        assert keys
        assert [len(key) for key in keys] == [1] * len(keys), [k for k in NAMES[dest] if not any(k in n for n in LISTS)]


def test_the_lists_have_no_other_names():
    known = set(NAMES).union(*NAMES.values())
    assert set().union(*LISTS) - known == set()


def test_the_planned_options_are_those_that_are_read_and_change_memory(monkeypatch):
    recorded = Recorded()
    settings = Settings(model="m", launch=LauncherSettings(), engine=recorded, origin={})
    monkeypatch.setattr(Settings, "chosen", property(lambda settings: settings.engine))
    read = set()

    def read_model(_, **arguments):
        read.update(arguments, {"model"})
        raise LookupError

    monkeypatch.setattr(decide, "read_model", read_model)
    with pytest.raises(LookupError):
        decide.decide(settings, None)
    decide.plan_request(settings)
    read = (read | recorded.read) & set(options())
    assert read - NO_MEMORY == {name.partition(".")[0] for name in PLANNED}


def test_the_methods_of_speculative_decoding_are_on_exactly_one_list():
    lists = (
        speculative.WITHOUT_DRAFT, speculative.CHECKPOINT_LAYERS, speculative.DRAFT_MODEL, speculative.HIDDEN_STATES,
        speculative.CUSTOM,
    )  # fmt: skip
    methods = options()["spec_method"].choices
    assert sorted(name for names in lists for name in names) == sorted(methods)
    assert set(methods) >= speculative.RUNNER_V1


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"method": "eagle3"}, "eagle3"),
        ({"method": "[ngram]"}, "ngram"),
        ({"model": "ngram"}, "ngram"),
        ({"model": "small"}, "draft_model"),
    ],
)
def test_the_method_of_speculative_decoding_follows_from_the_model_if_it_is_not_set(config, method):
    assert speculative.method_of(config) == method


@pytest.mark.parametrize(
    ("engine", "tokens"),
    [
        ({}, 0),
        ({"speculative_config": {"method": "ngram", "num-speculative-tokens": 3}}, 3),
        ({"spec_method": "ngram", "spec_tokens": 5}, 5),
        ({"spec_method": "suffix"}, 24),
        ({"speculative_config": {"method": "suffix", "suffix_decoding_max_tree_depth": 8}}, 8),
    ],
)
def test_draft_tokens_are_those_of_the_user_or_vllms_default(engine, tokens):
    assert speculative.draft_tokens(engine) == tokens


def test_a_warning_names_the_key_of_a_json_option():
    engine = {"eplb_config": {"window_size": 2000, "step_interval": 5}, "enable_dbo": False, "nnodes": 1}
    [(dest, name, row)] = uncounted(engine)
    assert (dest, name) == ("eplb_config", "eplb_config.window_size")
    assert "load balancing" in row.what
