"""python -m flash_attn check: a few calls on every path that this machine has, against float64.

It tells a user whether an installation works; the test suite tells whether the code is right.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from enum import Enum
from functools import partial

import torch
from torch import Tensor

from flash_attn import _dispatch, _extension
from flash_attn._dispatch import PATHS, use_path
from flash_attn.interface import flash_attn_func
from flash_attn.interface_kvcache import flash_attn_with_kvcache
from flash_attn.interface_varlen import flash_attn_varlen_func

_DTYPES = (torch.float16, torch.bfloat16)
_BATCH = 2
_PAGE_SIZE = 16

# A tensor of normally distributed numbers of this shape, in the dtype and on the device of the check.
_Random = Callable[..., Tensor]
# What a path computed, and the same in float64.
_Results = list[tuple[Tensor, Tensor]]


def _attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Attention in float64 as its definition reads; all are (batch, seqlen, heads, head_dim)."""
    q, k, v = (tensor.double().transpose(1, 2) for tensor in (q, k, v))
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        rows, columns = scores.shape[-2:]
        visible = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
        scores = scores.masked_fill(~visible, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def _qkv(
    random: _Random, lengths: tuple[int, int], heads: tuple[int, int], head_dim: int, head_dim_v: int | None = None
) -> list[Tensor]:
    """q, k and v; lengths and heads are those of q and those of k. head_dim_v is head_dim if None."""
    q = random(_BATCH, lengths[0], heads[0], head_dim)
    return [q, *(random(_BATCH, lengths[1], heads[1], dim) for dim in (head_dim, head_dim_v or head_dim))]


def _forward(
    random: _Random,
    lengths: tuple[int, int],
    heads: tuple[int, int],
    head_dim: int,
    causal: bool,
    head_dim_v: int | None = None,
) -> _Results:
    q, k, v = _qkv(random, lengths, heads, head_dim, head_dim_v)
    return [(flash_attn_func(q, k, v, causal=causal), _attention(q, k, v, causal))]


def _varlen(random: _Random, seqlen: int, head_dim: int) -> _Results:
    q, k, v = _qkv(random, (seqlen, seqlen), (4, 1), head_dim)
    cu_seqlens = torch.arange(_BATCH + 1, dtype=torch.int32, device=q.device) * seqlen
    packed = (tensor.flatten(0, 1) for tensor in (q, k, v))
    out = flash_attn_varlen_func(*packed, cu_seqlens, cu_seqlens, seqlen, seqlen, causal=True)
    return [(out.view_as(q), _attention(q, k, v, causal=True))]


def _backward(random: _Random, head_dim: int, deterministic: bool) -> _Results:
    inputs = [tensor.requires_grad_() for tensor in _qkv(random, (200, 200), (4, 2), head_dim)]
    dout = random(*inputs[0].shape)
    out = flash_attn_func(*inputs, causal=True, deterministic=deterministic)
    gradients = torch.autograd.grad(out, inputs, dout)
    expected = torch.autograd.grad(_attention(*inputs, causal=True), inputs, dout.double())
    return list(zip(gradients, expected, strict=True))


def _cached(random: _Random, num_tokens: int, lengths: tuple[int, int], head_dim: int, num_splits: int) -> _Results:
    """Tokens more for each entry of a paged cache, whose pages lie in reverse order."""
    num_pages = -(-(max(lengths) + num_tokens) // _PAGE_SIZE)
    k, v = (random(_BATCH, num_pages * _PAGE_SIZE, 2, head_dim) for _ in range(2))
    q, *new = (random(_BATCH, num_tokens, heads, head_dim) for heads in (8, 2, 2))
    new_k, new_v = new
    pages = [tensor.view(_BATCH * num_pages, _PAGE_SIZE, 2, head_dim).flip(0) for tensor in (k, v)]
    table = torch.arange(_BATCH * num_pages, dtype=torch.int32, device=q.device).flip(0).view(_BATCH, num_pages)
    cache_seqlens = torch.tensor(lengths, dtype=torch.int32, device=q.device)
    out = flash_attn_with_kvcache(
        q, *pages, new_k, new_v, cache_seqlens=cache_seqlens, block_table=table, causal=True, num_splits=num_splits
    )
    expected = []
    for entry, length in enumerate(lengths):
        of_entry = slice(entry, entry + 1)
        keys, values = (
            torch.cat((old[of_entry, :length], new[of_entry]), dim=1) for old, new in ((k, new_k), (v, new_v))
        )
        expected.append(_attention(q[of_entry], keys, values, causal=True))
    return [(out, torch.cat(expected))]


# What a line of the report says, the calls, and what the path must serve for them beside the plain forward.
_CHECKS: tuple[tuple[str, Callable[[_Random], _Results], set[str]], ...] = (
    ("full, head dim 64", partial(_forward, lengths=(300, 300), heads=(4, 4), head_dim=64, causal=False), set()),
    (
        "causal, head dim 128, GQA",
        partial(_forward, lengths=(257, 513), heads=(8, 2), head_dim=128, causal=True),
        set(),
    ),
    ("full, head dim 40", partial(_forward, lengths=(65, 129), heads=(2, 2), head_dim=40, causal=False), set()),
    (
        "causal, head dims 576 and 512",
        partial(_forward, lengths=(130, 200), heads=(4, 1), head_dim=576, causal=True, head_dim_v=512),
        set(),
    ),
    ("causal, varlen, head dim 64", partial(_varlen, seqlen=200, head_dim=64), set()),
    ("gradients, head dim 64", partial(_backward, head_dim=64, deterministic=False), {"backward"}),
    ("gradients, deterministic, head dim 128", partial(_backward, head_dim=128, deterministic=True), {"backward"}),
    (
        "paged cache, head dim 128",
        partial(_cached, num_tokens=1, lengths=(300, 17), head_dim=128, num_splits=0),
        {"paged", "append"},
    ),
    (
        "paged cache, 3 splits, head dim 64",
        partial(_cached, num_tokens=1, lengths=(300, 17), head_dim=64, num_splits=3),
        {"paged", "append", "num_splits"},
    ),
    (
        "paged cache, 130 queries, head dim 128",
        partial(_cached, num_tokens=130, lengths=(70, 0), head_dim=128, num_splits=0),
        {"paged", "append"},
    ),
)


def _error(calls: Callable[[_Random], _Results], dtype: torch.dtype, device: str) -> float:
    """The largest relative error of the results, ||result - reference|| / ||reference||."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator, dtype=torch.float32).to(dtype)

    errors = [(result.double() - reference).norm() / reference.norm() for result, reference in calls(random)]
    return float(torch.stack(errors).max())  # NaN if one is


class _Outcome(Enum):
    RIGHT = "ok"
    WRONG = "wrong"
    NOT_RUN = "not run"


def _checked(
    path: str, calls: Callable[[_Random], _Results], dtype: torch.dtype, device: str, limit: float
) -> tuple[str, _Outcome]:
    """What is said about a check, and what came of it."""
    try:
        with use_path(path), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flash_attn: .* no GPU yet")  # which is why this runs
            error = _error(calls, dtype, device)
    except NotImplementedError as refusal:
        return f"not run: {refusal}", _Outcome.NOT_RUN
    except RuntimeError as failure:
        return f"FAILED: {failure}", _Outcome.WRONG
    if error <= limit:
        return f"relative error {error:.1e} ok", _Outcome.RIGHT
    return f"relative error {error:.1e} WRONG, the limit is {limit:.1e}", _Outcome.WRONG


def _paths_here(gpu: str = "cuda") -> dict[str, str]:
    """The paths of this machine, each with a device for its tensors."""
    paths = {"cpu": "cpu"}
    if _extension.is_loaded() and torch.cuda.is_available():
        paths |= {name: gpu for name, path in PATHS.items() if path.arch is not None and _serves_a_check(name, gpu)}
    return paths


def _serves_a_check(path: str, device: str) -> bool:
    """Whether the path has a kernel for one of the checks: a build may hold one dtype or head dim alone."""
    head_dims = sorted({calls.keywords["head_dim"] for _, calls, _ in _CHECKS})
    queries = (torch.empty(1, 1, 1, dim, dtype=dtype, device=device) for dtype in _DTYPES for dim in head_dims)
    return any(not _dispatch.objections(path, q, q.shape[-1], frozenset({"dense"})) for q in queries)


def run(only: str | None = None) -> int:
    """Prints a line per call; returns 1 if a result is wrong or `only` is a path that is not here, else 0."""
    paths = _paths_here()
    if only is not None and only not in paths:
        print(f"the path {only} is not available here: {_extension.load_error() or 'no device or no kernels for it'}")
        return 1
    counts = Counter[_Outcome]()
    for name in (only,) if only is not None else paths:
        for dtype in _DTYPES:
            # A rounding of P and one of O, each of at most half a unit in the last place.
            limit = 2 * torch.finfo(dtype).eps
            for title, calls, features in _CHECKS:
                if features <= PATHS[name].features:
                    line, outcome = _checked(name, calls, dtype, paths[name], limit)
                    counts[outcome] += 1
                    print(f"{name}: {title}, {str(dtype)[6:]}: {line}")
    wrong, not_run = counts[_Outcome.WRONG], counts[_Outcome.NOT_RUN]
    print((f"{wrong} wrong" if wrong else "all right") + (f", {not_run} not run" if not_run else ""))
    return 1 if wrong else 0
