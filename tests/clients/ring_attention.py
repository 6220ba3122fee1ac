"""ring-flash-attention, whose processes share a sequence, calls our forward and backward passes: on the CPU path.

Two processes, in bfloat16, for which that library is made; each compares its part of outputs and gradients with the
whole computed by one call.

usage: python tests/clients/ring_attention.py
"""

from __future__ import annotations

import os
import socket
import sys
import types

import torch
import torch.distributed as dist

import flash_attn

WORLD, HEADS, HEAD_DIM = 2, 4, 32
LENGTH, LENGTHS = 64 * WORLD, (32 * WORLD, 16 * WORLD, 8 * WORLD)
ALLOWED = 0.06  # parts are rounded to bfloat16 and added; gradients reach 4

# The rows of one sequence that a process has.
LAYOUTS = {
    "ring_": lambda x, rank: x.chunk(WORLD)[rank],
    "stripe_": lambda x, rank: x[rank::WORLD],
    "zigzag_ring_": lambda x, rank: torch.cat([x.chunk(2 * WORLD)[part] for part in (rank, 2 * WORLD - 1 - rank)]),
}


def import_ring_flash_attn():
    """Without its adapter for transformers, which imports what no release since 5 has."""
    adapters = types.ModuleType("ring_flash_attn.adapters")
    adapters.substitute_hf_flash_attn = adapters.update_ring_flash_attn_params = None
    sys.modules[adapters.__name__] = adapters
    import ring_flash_attn

    return ring_flash_attn


def largest_error(whole, call, own, expected):
    """Of a process' output and gradient. `own` picks its rows; `expected` is the call of one process."""
    leaf, mine = whole.clone().requires_grad_(), own(whole).clone().requires_grad_()
    dout = torch.randn_like(whole[..., 0, :, :])
    out, part = expected(leaf), call(mine)
    out.backward(dout)
    part.backward(own(dout))
    largest = [(part - own(out)).abs().max(), (mine.grad - own(leaf.grad)).abs().max()]
    return torch.stack(largest).max().item()  # NaN if one is, which Python's max may not see


def errors(rank):
    ring = import_ring_flash_attn()
    torch.manual_seed(0)
    dense = torch.randn(1, LENGTH, 3, HEADS, HEAD_DIM, dtype=torch.bfloat16)
    for layout, pick in LAYOUTS.items():
        name = f"{layout}flash_attn_qkvpacked_func"
        call = getattr(ring, name)
        yield (
            name,
            largest_error(
                dense,
                lambda x, call=call: call(x, causal=True),
                lambda x, pick=pick: pick(x[0], rank)[None].contiguous(),
                lambda x: flash_attn.flash_attn_qkvpacked_func(x, causal=True),
            ),
        )
    packed = torch.randn(sum(LENGTHS), 3, HEADS, HEAD_DIM, dtype=torch.bfloat16)
    cu_seqlens = torch.tensor((0, *LENGTHS)).cumsum(0).int()

    def expected(x):
        return flash_attn.flash_attn_varlen_qkvpacked_func(x, cu_seqlens, max(LENGTHS), causal=True)

    for layout in ("ring_", "zigzag_ring_"):
        name = f"{layout}flash_attn_varlen_qkvpacked_func"
        call, pick = getattr(ring, name), LAYOUTS[layout]
        yield (
            name,
            largest_error(
                packed,
                lambda x, call=call: call(x, cu_seqlens // WORLD, max(LENGTHS) // WORLD, causal=True),
                lambda x, pick=pick: torch.cat([pick(part, rank) for part in x.split(LENGTHS)]),
                expected,
            ),
        )
    cu_q, cu_k, longest_q, longest_k, rows = ring.llama3_flash_attn_prepare_cu_seqlens(cu_seqlens, True, rank, WORLD)
    yield (
        "llama3_flash_attn_varlen_qkvpacked_func",
        largest_error(
            packed,
            lambda x: ring.llama3_flash_attn_varlen_qkvpacked_func(
                x, cu_q, cu_k, longest_q, longest_k, heads_k_stride=1, local_k_slice=rows, causal=True
            ),
            lambda x: x.chunk(WORLD)[rank],
            expected,
        ),
    )


def work(rank, port):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    for name, error in errors(rank):
        print(f"process {rank}: {name}: largest error {error:.1e}", flush=True)
        assert error < ALLOWED, f"{name} is wrong"
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port,), nprocs=WORLD)
