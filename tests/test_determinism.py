"""The same bits in every run (test_hard_cases.py, 11), and what holds of dK and dV without being asked for."""

import pytest
import torch
from cases import FP16, FP32, Case
from checks import gradients_of_a_loss, needs
from harness import GPU_PATHS, build, device_of, on_path
from tolerance import assert_same_bits

RUNS = 30  # of a GPU path; the CPU path adds in one order, so it can't differ by chance
HEAD_DIMS = (64, 128, 256, 512)


def _case(name, head_dim, layout, lens_q, lens_k, heads=(3, 3), **options):
    return Case(f"11-{name}-{head_dim}", "many key tiles add to each dq, many rows to each dk", layout, lens_q, lens_k,
                heads=heads, dims=(head_dim, head_dim), large=head_dim > 64, **options)  # fmt: skip


MULTIHEAD = [
    case
    for d in HEAD_DIMS
    for case in (
        _case("causal", d, "dense", (333, 333), (333, 333), causal=True),
        _case("window", d, "dense", (200,), (333,), window=(150, 20), dtype=FP16),
        _case("varlen", d, "varlen", (70, 0, 333), (333, 9, 150), lse_grad=True),
    )
]
GROUPED = [
    case
    for d in HEAD_DIMS
    for case in (
        _case("gqa", d, "dense", (333, 333), (333, 333), heads=(6, 2), causal=True),
        _case("gqa-varlen", d, "varlen", (70, 0, 333), (333, 9, 150), heads=(4, 1), sinks=FP32, alibi="batch"),
        _case("gqa-dropout", d, "dense", (200, 200), (200, 200), heads=(4, 2), dropout_p=0.2),
    )
]


def _runs(path):
    return RUNS if path in GPU_PATHS else 2


def _equal_in_every_run(path, inputs, names, **options):
    first = gradients_of_a_loss(inputs, **options)
    for run in range(1, _runs(path)):
        again = gradients_of_a_loss(inputs, **options)
        for name in names or first:
            assert_same_bits(f"{name} of run {run}", again[name], first[name])
    return first


@pytest.mark.parametrize("case", MULTIHEAD + GROUPED, ids=lambda case: case.id)
def test_11_deterministic(path, case):
    needs(path, case)
    inputs = build(case, device_of(path))
    on_path(path, case.features | {"backward"}, inputs, lambda: _equal_in_every_run(path, inputs, None))


@pytest.mark.parametrize("case", MULTIHEAD, ids=lambda case: case.id)
def test_dk_and_dv_without_being_asked(path, case):
    """One thread block makes a key tile's dK and dV where each head has its own keys."""
    needs(path, case)
    inputs = build(case, device_of(path))
    on_path(
        path, case.features | {"backward"}, inputs,
        lambda: _equal_in_every_run(path, inputs, ("dk", "dv"), deterministic=False),
    )  # fmt: skip


@pytest.fixture
def deterministic_torch():
    """torch then also fills what it allocates with NaN, so that nothing may be read before it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", GROUPED[:3], ids=lambda case: case.id)
def test_torchs_own_switch_is_obeyed(path, case, deterministic_torch):
    inputs = build(case, device_of(path))

    def run():
        asked = gradients_of_a_loss(inputs, deterministic=True)
        for name, gradient in _equal_in_every_run(path, inputs, None, deterministic=False).items():
            assert_same_bits(name, gradient, asked[name])
        return True

    on_path(path, case.features | {"backward"}, inputs, run)


@pytest.mark.parametrize("case", [MULTIHEAD[0], GROUPED[1]], ids=lambda case: case.id)
def test_forward_is_the_same_in_every_run(path, case):
    inputs = build(case, device_of(path))

    def run():
        out, lse = inputs.call()
        for _ in range(1, _runs(path)):
            again = inputs.call()
            assert_same_bits("out", again[0], out)
            assert_same_bits("lse", again[1], lse)
        return True

    on_path(path, case.features, inputs, run)
