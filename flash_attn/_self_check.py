"""python -m flash_attn check: a few calls on every path that this machine has, against float64.

It tells a user whether an installation works; the test suite tells whether the code is right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flash_attn import _dispatch, _extension
from flash_attn._dispatch import PATHS, use_path
from flash_attn.interface import flash_attn_func, flash_attn_varlen_func


@dataclass(frozen=True)
class _Check:
    title: str
    seqlen_q: int
    seqlen_k: int
    heads: int
    heads_k: int
    head_dim: int
    causal: bool
    varlen: bool = False


_CHECKS = (
    _Check("full, head dim 64", 300, 300, 4, 4, 64, causal=False),
    _Check("causal, head dim 128, GQA", 257, 513, 8, 2, 128, causal=True),
    _Check("full, head dim 40", 65, 129, 2, 2, 40, causal=False),
    _Check("causal, varlen, head dim 64", 200, 200, 4, 1, 64, causal=True, varlen=True),
)
_BATCH = 2


def _dense_float64(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """Attention of (batch, seqlen, heads, head_dim) tensors as its definition reads."""
    q, k, v = (tensor.double().transpose(1, 2) for tensor in (q, k, v))
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        rows, columns = scores.shape[-2:]
        visible = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
        scores = scores.masked_fill(~visible, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def _error(check: _Check, dtype: torch.dtype, device: str) -> float:
    """Relative error of one call, ||out - reference|| / ||reference||."""
    generator = torch.Generator(device).manual_seed(0)

    def random(seqlen: int, heads: int) -> torch.Tensor:
        shape = (_BATCH, seqlen, heads, check.head_dim)
        return torch.randn(shape, device=device, generator=generator, dtype=torch.float32).to(dtype)

    q, k, v = random(check.seqlen_q, check.heads), *(random(check.seqlen_k, check.heads_k) for _ in range(2))
    reference = _dense_float64(q, k, v, check.causal)
    if check.varlen:
        cu_seqlens_q, cu_seqlens_k = (
            torch.arange(_BATCH + 1, dtype=torch.int32, device=device) * seqlen
            for seqlen in (check.seqlen_q, check.seqlen_k)
        )
        packed = (tensor.flatten(0, 1) for tensor in (q, k, v))
        out = flash_attn_varlen_func(
            *packed, cu_seqlens_q, cu_seqlens_k, check.seqlen_q, check.seqlen_k, causal=check.causal
        ).view_as(reference)
    else:
        out = flash_attn_func(q, k, v, causal=check.causal)
    return float((out.double() - reference).norm() / reference.norm())


def _paths_here() -> dict[str, str]:
    """The paths of this machine, each with a device for its tensors."""
    paths = {"cpu": "cpu"}
    if _extension.is_loaded() and torch.cuda.is_available():
        q = torch.empty(1, 1, 1, 64, dtype=torch.float16, device="cuda")
        paths |= {
            name: "cuda"
            for name, path in PATHS.items()
            if path.arch is not None and not _dispatch.objections(name, q, 64, frozenset({"dense"}))
        }
    return paths


def run(only: str | None = None) -> int:
    """Prints a line per call; returns the number of failed ones, and 1 if `only` is a path that is not here."""
    paths = _paths_here()
    if only is not None and only not in paths:
        print(f"the path {only} is not available here: {_extension.load_error() or 'no device or no kernels for it'}")
        return 1
    failures = 0
    for name in (only,) if only is not None else paths:
        for dtype in (torch.float16, torch.bfloat16):
            # A rounding of P and one of O, each of at most half a unit in the last place.
            limit = 2 * torch.finfo(dtype).eps
            for check in _CHECKS:
                with use_path(name):
                    error = _error(check, dtype, paths[name])
                ok = error <= limit
                failures += not ok
                verdict = "ok" if ok else f"WRONG, the limit is {limit:.1e}"
                print(f"{name}: {check.title}, {str(dtype)[6:]}: relative error {error:.1e} {verdict}")
    print(f"{failures} wrong" if failures else "all right")
    return failures
