"""Whether the gradients of a backward pass are right: in one batch entry and the first and last key heads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_attn.bench.check import ERROR_LIMITS, Inputs, Verdict, rows_of_blocks, wide_dtype
from flash_attn.bench.suites import DTYPES, Case

NAMES = ("dq", "dk", "dv")
# dS is a difference of products that were rounded, and is rounded itself: twice what the output is granted.
_LIMIT_FACTOR = 2


@dataclass(frozen=True)
class GradientReference:
    """What the gradients must hold in one entry: (tokens, heads, head_dim) of each."""

    case: Case
    entry: int
    heads: tuple[list[int], list[int], list[int]]  # of dq, dk and dv
    exact: tuple[Tensor, Tensor, Tensor]

    def judge(self, gradients: tuple[Tensor, ...]) -> Verdict:
        worst = 0.0
        limit = _LIMIT_FACTOR * ERROR_LIMITS[self.case.dtype]
        for name, gradient, heads, exact in zip(NAMES, gradients, self.heads, self.exact, strict=True):
            if gradient.dtype is not DTYPES[self.case.dtype]:
                return Verdict(math.nan, f"{name} is {gradient.dtype}")
            ours = self.case.rows_of(gradient, self.entry)[:, heads].to(exact.dtype)
            if ours.shape != exact.shape:
                return Verdict(math.nan, f"{name} has shape {tuple(gradient.shape)}")
            error = float((ours - exact).norm() / exact.norm())
            if not error <= limit:
                return Verdict(error, f"relative error {error:.1e} of {name} over {limit:.1e}")
            worst = max(worst, error)
        return Verdict(worst, None)


def make_gradient_reference(case: Case, inputs: Inputs) -> GradientReference:
    """Autograd through the definition, a block of rows at a time."""
    entry = case.checked_entry
    group = case.heads // case.heads_k
    heads_k = sorted({0, case.heads_k - 1})
    heads = [head_k * group + member for head_k in heads_k for member in range(group)]
    wide = wide_dtype(inputs.q)
    tensors = [
        case.rows_of(x, entry)[:, of].to(wide).transpose(0, 1)
        for x, of in ((inputs.q, heads), (inputs.k, heads_k), (inputs.v, heads_k), (inputs.dout, heads))
    ]
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    sums = [torch.zeros_like(x) for x in (q, k, v)]
    with torch.enable_grad():
        for rows, out in rows_of_blocks(case, inputs, tuple(heads), q, k, v, group):
            found = torch.autograd.grad(out, (q, k, v), tensors[3][:, rows])
            for total, part in zip(sums, found, strict=True):
                total += part
    exact = tuple(total.transpose(0, 1) for total in sums)
    return GradientReference(case, entry, (heads, heads_k, heads_k), exact)
