import pytest

from vllm_health.api_keys import is_usable, keys_in


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("", []),
        ("\n \n\t\n", []),
        ("one", ["one"]),
        ("  one \r\n\ntwo\n", ["one", "two"]),
        ("one two\n", ["one two"]),
    ],
)
def test_each_line_that_is_not_empty_is_a_key(text, keys):
    assert keys_in(text) == keys


@pytest.mark.parametrize(
    ("key", "usable"), [("sk-1_2.3~4+5/6=", True), ("one two", False), ("schlüssel", False), ("one\ttwo", False)]
)
def test_a_key_is_usable_if_an_http_header_can_carry_it(key, usable):
    assert is_usable(key) is usable
