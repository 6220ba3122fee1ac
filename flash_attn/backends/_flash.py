"""Attention of one piece through torch's own CPU flash kernel, whole or block of rows by block of rows.

What the kernel leaves to its caller, found by test with torch 2.11: the last dimension must be contiguous
and the three head sizes equal (neither is checked); no dimension may be empty (the process dies); a row
that sees no key gets a wrong LSE; is_causal gives NaN for a scale that is not positive, since it scales the
-inf that it masks with. `trim` and `split` keep empty rows and dimensions away from here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._mask import Bias, KeyRange

# torch's C++ binding; the same op through torch.ops costs 10 us more. Its backward has no such binding.
_kernel = torch._scaled_dot_product_flash_attention_for_cpu
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def supports(q: Tensor, softcap: float, dropout_p: float) -> bool:
    return q.device.type == "cpu" and softcap == 0.0 and dropout_p == 0.0


def _fits(x: Tensor, head_dim: int) -> bool:
    strides = x.stride()
    return x.shape[-1] == head_dim and strides[3] == 1 and strides[1] >= head_dim


def _heads_first(x: Tensor, head_dim: int) -> Tensor:
    """(n, H, rows, head_dim) with strides the kernel can take, zero-padded to head_dim."""
    if x.shape[-1] < head_dim:
        x = F.pad(x, (0, head_dim - x.shape[-1]))  # keeps the order of the strides
    if not _fits(x, head_dim):
        x = x.clone(memory_format=torch.contiguous_format)
    return x.transpose(1, 2)


def _takes(keys: KeyRange, slopes: Tensor | None, scale: float) -> bool:
    """Whether the kernel's is_causal flag says all that there is to say about these keys."""
    return slopes is None and (keys.is_full or (keys.is_square_causal and scale > 0))


def _plain_mask(num_rows: int, num_keys: int, window_left: int, window_right: int, scale: float) -> bool | None:
    """The kernel's is_causal for this window, None where the window needs more than that flag."""
    if 0 <= window_left < num_keys - 1 or num_rows == 0 or num_keys == 0:
        return None
    if not 0 <= window_right < num_rows - 1:
        return False
    return True if window_right == 0 and num_rows == num_keys and scale > 0 else None


def forward_dense(
    q: Tensor, k: Tensor, v: Tensor, window_left: int, window_right: int, scale: float
) -> tuple[Tensor, Tensor] | None:
    """The short way for a call that the kernel takes as it is; None for any other."""
    num_rows, head_dim = q.shape[1], q.shape[3]
    causal = _plain_mask(num_rows, k.shape[1], window_left, window_right, scale)
    if causal is None or q.shape[0] == 0 or (num_rows == 1 and q.shape[2] > k.shape[2]):
        return None
    if not (_fits(q, head_dim) and _fits(k, head_dim) and _fits(v, head_dim)):
        return None
    out, lse = _kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, causal, scale=scale)
    return out.transpose(1, 2), lse


def backward_dense(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    window_left: int,
    window_right: int,
    scale: float,
) -> tuple[Tensor, ...] | None:
    """dq, dk, dv the short way, for a call that the kernel takes as it is; None for any other."""
    head_dim = q.shape[3]
    causal = _plain_mask(q.shape[1], k.shape[1], window_left, window_right, scale)
    # 16-bit inputs are widened first: see backward.
    if causal is None or q.shape[0] == 0 or q.dtype not in (torch.float32, torch.float64):
        return None
    tensors = (dout, q, k, v, out)
    if not all(_fits(x, head_dim) for x in tensors):
        return None
    grads = _kernel_backward(*(x.transpose(1, 2) for x in tensors), lse, 0.0, causal, scale=scale)
    return tuple(grad.transpose(1, 2).contiguous() for grad in grads)


def _reads_keys_once(q: Tensor, k: Tensor, keys: KeyRange) -> bool:
    """Whether one query per sequence becomes H/Hk rows of a KV head: if the KV heads occupy all threads."""
    heads_kv = k.shape[2]
    return keys.num_rows == 1 and q.shape[2] > heads_kv and q.shape[0] * heads_kv >= torch.get_num_threads()


def _heads_as_rows(q: Tensor, heads_kv: int) -> Tensor:
    """(n, 1, H, D) -> (n, H/Hk, Hk, D): the heads that share a KV head become its rows."""
    entries, _, heads, head_dim = q.shape
    step, _, head_step, unit = q.stride()
    group = heads // heads_kv
    return q.as_strided((entries, group, heads_kv, head_dim), (step, head_step, group * head_step, unit))


def forward(
    q: Tensor, k: Tensor, v: Tensor, keys: KeyRange, slopes: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """out (n, rows, H, Dv) in q's dtype and lse (n, H, rows), from (n, rows, heads, head_dim) views."""
    head_dim_v = v.shape[-1]
    head_dim = max(q.shape[-1], head_dim_v)
    if slopes is None and keys.is_full and _reads_keys_once(q, k, keys):
        out, lse = _whole(_heads_as_rows(q, k.shape[2]), k, v, head_dim, False, scale)
        out, lse = out.transpose(1, 2).reshape(*q.shape[:3], head_dim), lse.reshape(*q.shape[:1], -1, 1)
    elif _takes(keys, slopes, scale):
        out, lse = _whole(q, k, v, head_dim, not keys.is_full, scale)
    else:
        out, lse = _by_blocks(q, k, v, head_dim, keys, slopes, scale)
    return (out if head_dim == head_dim_v else out[..., :head_dim_v]), lse


def _whole(q, k, v, head_dim: int, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = _heads_first(q, head_dim), _heads_first(k, head_dim), _heads_first(v, head_dim)
    out, lse = _kernel(q, k, v, 0.0, causal, scale=scale)
    return out.transpose(1, 2), lse


def _by_blocks(q, k, v, head_dim: int, keys: KeyRange, slopes, scale: float) -> tuple[Tensor, Tensor]:
    """Rows run backwards in here, as Bias needs."""
    q = _heads_first(q.flip(1), head_dim)
    k, v = _heads_first(k, head_dim), _heads_first(v, head_dim)
    rows = keys.rows_per_block()
    bias = Bias(keys, rows, slopes, _bias_dtype(q), q.device)
    outs, lses = [], []
    for block in keys.blocks(rows):
        span = slice(block.j0, block.j1)
        q_block = q[:, :, keys.num_rows - block.i1 : keys.num_rows - block.i0]
        mask = bias.backward_rows(block)
        out, lse = _kernel(q_block, k[:, :, span], v[:, :, span], 0.0, False, attn_mask=mask, scale=scale)
        outs.append(out)
        lses.append(lse)
    out = outs[0] if len(outs) == 1 else torch.cat(outs[::-1], dim=2)
    lse = lses[0] if len(lses) == 1 else torch.cat(lses[::-1], dim=2)
    return out.transpose(1, 2).flip(1), lse.flip(2)


def _bias_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    keys: KeyRange,
    slopes: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in float32 or float64, (n, rows, heads, head_dim).

    16-bit inputs are widened: the kernel would sum dk and dv in 16 bits, and took 1.5 to 40 times as long
    there (bf16 and fp16, S from 256 to 1024, two AVX-512 cores).
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    head_dim_q, head_dim_v = q.shape[-1], v.shape[-1]
    head_dim = max(head_dim_q, head_dim_v)
    dout, q, k, v, out = (x.to(dtype) for x in (dout, q, k, v, out))
    if dlse is not None:
        # The kernel computes ds = p * (dp - sum(dout * out)). One more column, where v = 0, out = 1 and
        # dout = -dlse, leaves dp alone and turns the sum into sum(dout * out) - dlse.
        head_dim = max(head_dim_q, head_dim_v + 1)
        out = torch.cat((out, torch.ones_like(out[..., :1])), dim=-1)
        dout = torch.cat((dout, -dlse.to(dtype).transpose(1, 2).unsqueeze(-1)), dim=-1)
    k, v = _heads_first(k, head_dim), _heads_first(v, head_dim)
    if _takes(keys, slopes, scale):
        dout, q, out = (_heads_first(x, head_dim) for x in (dout, q, out))
        grads = _kernel_backward(dout, q, k, v, out, lse, 0.0, not keys.is_full, scale=scale)
    else:
        dout, q, out = (_heads_first(x.flip(1), head_dim) for x in (dout, q, out))
        grads = _backward_by_blocks(dout, q, k, v, out, lse.flip(2), keys, slopes, scale)
    dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
    return dq[..., :head_dim_q], dk[..., :head_dim_q], dv[..., :head_dim_v]


def _backward_by_blocks(dout, q, k, v, out, lse, keys: KeyRange, slopes, scale: float):
    rows = keys.rows_per_block()
    bias = Bias(keys, rows, slopes, _bias_dtype(q), q.device)
    dqs, dk, dv = [], None, None
    for block in keys.blocks(rows):
        span = slice(block.j0, block.j1)
        turned = slice(keys.num_rows - block.i1, keys.num_rows - block.i0)
        dq, dk_block, dv_block = _kernel_backward(
            dout[:, :, turned],
            q[:, :, turned],
            k[:, :, span],
            v[:, :, span],
            out[:, :, turned],
            lse[:, :, turned],
            0.0,
            False,
            attn_mask=bias.backward_rows(block),
            scale=scale,
        )
        dqs.append(dq)
        if block.i0 == 0 and block.i1 == keys.num_rows:
            dk, dv = dk_block, dv_block
            break
        if dk is None:
            dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k, v))
        dk[:, :, span] += dk_block
        dv[:, :, span] += dv_block
    dq = dqs[0] if len(dqs) == 1 else torch.cat(dqs[::-1], dim=2)
    return dq.flip(2), dk, dv
