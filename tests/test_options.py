"""What is checked in one condition passes or fails as its own check says."""

import math

import numpy as np
import pytest
import torch

from flash_attn import _arguments

FLOATS = (0.0, -0.0, 0.5, 1.0, 3.0, -1.0, 0, 1, True, None, "1", math.inf, math.nan, np.float32(0.5), torch.tensor(0.5))
FLOATS += (1e39, -1e39, 3e38, 1e-40, 2e-38, 10**400, np.complex64(1), np.bool_(True), np.array([0.5]), float)
INTS = (0, 3, 256, 257, -1, 1.0, True, None, np.int64(3), torch.tensor(3), np.array([3]))
BOOLS = (True, False, None, 0, 1)


def result_of(function, *arguments):
    try:
        return function(*arguments)
    except Exception as error:
        return type(error), str(error)


def options_one_by_one(softcap, dropout_p, num_splits, pack_gqa, *flags):
    softcap = _arguments.softcap_of(softcap)
    dropout_p = _arguments.dropout_of(dropout_p, softcap)
    num_splits = _arguments.num_splits_of(num_splits)
    _arguments.pack_gqa_of(pack_gqa)
    for name, flag in zip(("deterministic", "return_attn_probs", "return_softmax_lse"), flags, strict=True):
        _arguments.require_bool(name, flag)
    return softcap, dropout_p, num_splits


def option_sets():
    plain = (0.0, 0.0, 0, None, False, False, False)
    yield from ((softcap, dropout_p, *plain[2:]) for softcap in FLOATS for dropout_p in FLOATS)
    for index, values in ((2, INTS), (3, BOOLS), (4, BOOLS), (5, BOOLS), (6, BOOLS)):
        yield from ((*plain[:index], value, *plain[index + 1 :]) for value in values)


@pytest.mark.parametrize("options", list(option_sets()), ids=repr)
def test_options_in_one_condition(options):
    assert result_of(_arguments.options_of, *options) == result_of(options_one_by_one, *options)


@pytest.mark.parametrize("causal", BOOLS, ids=repr)
@pytest.mark.parametrize("left", [-1, -7, 0, 5, 2**31 - 2, 2**31 - 1, 2**40, True, None, 1.0, np.int64(3)], ids=repr)
def test_windows_in_one_condition(left, causal):
    """A list never takes the short way."""
    for window in ((left, -1), (-1, left), (left, left)):
        assert result_of(_arguments.window_of, window, causal) == result_of(_arguments.window_of, list(window), causal)
