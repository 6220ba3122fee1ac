"""The checks that every path goes through fail where a result is wrong."""

import math

import checks
import pytest
import torch
from cases import FP32, Case

import flash_attn

DENSE = Case("checks-dense", "grouped heads", "dense", (9, 9), (17, 17), heads=(4, 2), lse_grad=True, causal=True)
SINKS = Case("checks-sinks", "all four gradients", "dense", (9, 9), (17, 17), dtype=FP32, sinks=FP32)
VARLEN = Case(
    "checks-varlen", "rows that are not used", "varlen", (9, 4), (17, 20), seqused_q=(5, 4), seqused_k=(9, 20)
)
APPEND = Case("checks-append", "rows beside the new ones", "kvcache", (2, 2), (33, 33), seqused_k=(20, 7), new=(2, 2))


@pytest.fixture
def damaged(monkeypatch):
    """Has the public functions pass their results, or the caches, through a function."""

    def through(damage, function):
        return lambda *arguments, **options: damage(function(*arguments, **options), arguments, options)

    def install(damage):
        for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):
            monkeypatch.setattr(flash_attn, name, through(damage, getattr(flash_attn, name)))

    return install


def not_into_out(result, arguments, options):
    if options.get("out") is None:
        return result
    options["out"].fill_(math.nan)
    return result


def into_other_memory(result, arguments, options):
    return result[0].clone(), result[1]


def lse_of_out_differs(result, arguments, options):
    return (result[0], result[1] + 1e-6) if options.get("out") is not None else result


FORWARD = {
    "out": lambda result, *_: (result[0] * 1.02, result[1]),
    "one value": lambda result, *_: (result[0].index_fill(0, torch.tensor([0]), 0.0), result[1]),
    "lse": lambda result, *_: (result[0], result[1] + 1e-3),
    "dtype of out": lambda result, *_: (result[0].float(), result[1]),
    "dtype of lse": lambda result, *_: (result[0], result[1].double()),
    "strides": lambda result, *_: (result[0].transpose(1, 2).contiguous().transpose(1, 2), result[1]),
    "out= is not written": not_into_out,
    "out= is not returned": into_other_memory,
    "lse with out=": lse_of_out_differs,
}


@pytest.mark.parametrize("damage", FORWARD.values(), ids=FORWARD)
def test_wrong_forward_passes_fail(damaged, damage):
    checks.check_forward("cpu", DENSE)
    damaged(damage)
    with pytest.raises(AssertionError):
        checks.check_forward("cpu", DENSE)


def test_the_oracle_is_not_rounded():
    exact, low, _ = checks.declared_gradients(DENSE, "cpu")
    assert {x.dtype for x in exact.values()} == {torch.float64} and {x.dtype for x in low.values()} == {DENSE.dtype}


def in_cache(name, row):
    """Changes the first entry's row of a cache, of which 20 and 21 are new."""

    def damage(result, arguments, options):
        cache = arguments[1 if name == "k" else 2]
        cache[0, row] = 0.75
        return result

    return damage


@pytest.mark.parametrize("row", [0, 19, 20, 21, 22, 32])
@pytest.mark.parametrize("name", ["k", "v"])
def test_wrong_caches_fail(damaged, name, row):
    checks.check_forward("cpu", APPEND)
    damaged(in_cache(name, row))
    with pytest.raises(AssertionError, match=f"appended {name}" if row in (20, 21) else f"rest of {name} cache"):
        checks.check_forward("cpu", APPEND)


def test_inputs_that_change_fail(damaged):
    def damage(result, arguments, options):
        arguments[1][0, 0, 0, 0] += 1
        return result

    damaged(damage)
    with pytest.raises(AssertionError, match="^k: .* bytes differ"):
        checks.check_forward("cpu", DENSE)


@pytest.mark.parametrize("name", ["q", "k", "v", "s_aux"])
def test_wrong_gradients_fail(damaged, name):
    checks.check_backward("cpu", SINKS)

    def damage(result, arguments, options):
        tensor = options["s_aux"] if name == "s_aux" else arguments["qkv".index(name)]
        # 0, with a gradient of 1e-2 of each element.
        return result[0] + 1e-2 * (tensor - tensor.detach()).sum(), result[1]

    damaged(damage)
    with pytest.raises(AssertionError, match=f"d{name}: error"):
        checks.check_backward("cpu", SINKS)


@pytest.mark.parametrize("sized", ["q", "k", "v"])
def test_use_of_garbage_fails(damaged, sized):
    checks.check_garbage("cpu", VARLEN, math.nan)

    def damage(result, arguments, options):
        unused = arguments["qkv".index(sized)].isnan().any()
        return torch.where(unused, result[0] + 1, result[0]), result[1]

    damaged(damage)
    with pytest.raises(AssertionError, match="out: .* bytes differ"):
        checks.check_garbage("cpu", VARLEN, math.nan)


def test_gradients_that_garbage_changes_fail(damaged):
    def damage(result, arguments, options):
        q = arguments[0]
        return (result[0] + (q[0] - q[0].detach()).sum() * arguments[1].isnan().any(), result[1])

    damaged(damage)
    with pytest.raises(AssertionError, match="dq: .* bytes differ"):
        checks.check_garbage("cpu", VARLEN, math.nan)
