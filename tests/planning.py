"""Calls of the planner (csrc/plan), through the development module that build_support/plan_module.py builds."""

import pytest
import repository  # noqa: F401  (makes build_support importable)

from build_support.plan_module import load_plan_module

try:
    planner = load_plan_module()
except ImportError as reason:
    pytest.skip(str(reason), allow_module_level=True)


def problem(**changes):
    values = {
        "layout": planner.Layout.DENSE,
        "layout_k": planner.Layout.DENSE,
        "dtype": planner.Dtype.BF16,
        "batch": 2,
        "num_heads": 8,
        "num_heads_k": 2,
        "head_dim": 64,
        "head_dim_v": 64,
        "rows_q": 1000,
        "rows_k": 1000,
        "has_pages": False,
        "pages_suit_tma": False,
        "window_left": -1,
        "window_right": -1,
        "has_softcap": False,
        "has_alibi": False,
        "has_dropout": False,
        "num_splits": 0,
        "pack_gqa": planner.PackGqa.AUTO,
        "allows_few_rows": True,
    }
    made = planner.Problem()
    for name, value in {**values, **changes}.items():
        setattr(made, name, value)
    return made


LARGEST_SMEM = 227 * 1024
NUM_SMS = 132


def plan(smem=LARGEST_SMEM, arch=planner.Arch.SM80, **changes):
    return planner.make_plan(problem(**changes), arch, smem, NUM_SMS)
