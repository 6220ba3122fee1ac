"""The CPU path with so little memory that every call, however small, is made of blocks of rows, keys and entries."""

import cases
import pytest
import test_dropout
from checks import check_backward, check_forward

from flash_attn.backends import _mask, _math, cpu


@pytest.fixture(autouse=True, params=[(16, 1 << 20, 1 << 24), (24, 4000, 5000)], ids=["rows", "rows-and-entries"])
def small_blocks(request, monkeypatch):
    rows, scores, widened = request.param
    monkeypatch.setattr(_mask, "ROWS_PER_BLOCK", rows)
    monkeypatch.setattr(_math, "ROWS_PER_BLOCK", rows)
    monkeypatch.setattr(_math, "SCORE_BUDGET", scores)
    monkeypatch.setattr(cpu, "WIDENED_ELEMENTS", widened)


def small(declared):
    return [case for case in declared if not case.large and max(case.dims) <= 128]


@pytest.mark.parametrize("case", small(cases.ALL), ids=lambda case: case.id)
def test_forward(case):
    check_forward("cpu", case)


@pytest.mark.parametrize(
    "case", small(cases.FORWARD + cases.VARLEN + cases.BACKWARD + cases.DROPOUT), ids=lambda case: case.id
)
def test_backward(case):
    check_backward("cpu", case)


@pytest.mark.parametrize("case", test_dropout.PROBS, ids=lambda case: case.id)
def test_attn_probs(case):
    test_dropout.test_attn_probs_show_the_mask("cpu", case)
