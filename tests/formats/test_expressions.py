"""Expressions matched in linear time, beside Python's own engine."""

import contextlib
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllama.formats.expressions import Expression

UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
)
PATHS = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.up_proj", "lm_head", "", "a_b"]
PATHS += ["model.embed_tokens", "xmodel.layers.1.mlp.up_proj", "model.layers.x.mlp.up_proj"]


@pytest.mark.parametrize(
    "pattern",
    [
        UNSLOTH,
        r".*\.(q_proj|down_proj)",
        r".*",
        r"",
        r"model\.layers\.(?:0|1[0-9])\..*_proj$",
        r"^model.*[^x]$",
        r"[a-z_.0-9]+",
        r"(model|lm)[._](layers|head)?.*",
        r"\w+(\.\w+){3,5}",
        r"\D+\d\D+",
        r"(a|b|_)*?",
        r"(?P<name>.)+b",
        r"\Amodel\b.*\Z",
        r"model\B.*",
        r"[^\W_]+_\S+",
    ],
)
def test_what_matches_is_what_python_matches(pattern):
    for path in PATHS:
        assert Expression(pattern).matches(path) == bool(re.fullmatch(pattern, path)), path


PARTS = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", "a|b", "\\b", "^", "$", "\\w", "\\."])
PATTERNS = st.recursive(
    PARTS,
    lambda inner: st.builds(
        lambda one, two, more: f"(?:{one}){more}{two}",
        inner,
        inner,
        st.sampled_from(["", "*", "+", "?", "{2}", "{1,3}", "*?", "{,2}"]),
    ),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(PATTERNS, st.text("ab._", max_size=6))
def test_random_expressions_match_what_python_matches(pattern, text):
    assert Expression(pattern).matches(text) == bool(re.fullmatch(pattern, text))


@pytest.mark.parametrize(
    "pattern", [r"([a-z_.0-9]+)+!", r"(a|a)*b", r"(.*)*x", r"((a?){30}){30}b", r"(.*.*.*.*)=.*"]
)
def test_expressions_that_take_python_for_ever_take_no_time(pattern):
    start = time.perf_counter()
    for _ in range(20):
        assert not Expression(pattern).matches("model.layers.31.self_attn.q_proj")
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("depth", [10, 100, 300, 600, 1000, 2000])
def test_deep_nesting_is_computed_or_refused(depth):
    """Python's limit of recursion decides, which the one who calls may have raised."""
    with contextlib.suppress(ValueError):
        assert Expression("(" * depth + "a" + ")" * depth).matches("a")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "is no regular expression: missing"),
        ("x" * 5000, "is longer than 4096 characters"),
        (r"(a)\1", "groupref is not supported"),
        ("(?=a)a", "assert is not supported"),
        ("(?i)a", "has flags"),
        ("(?i:a)", "subpattern is not supported"),
        ("((a{100}){100}){100}", "repeats too much"),
        ("a{4000000000}", "is no regular expression|repeats too much"),
    ],
)
def test_expressions_that_need_more_are_refused(pattern, message):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        Expression(pattern)
    assert time.perf_counter() - start < 1
