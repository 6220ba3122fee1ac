"""The host's time of one eager call on tiny tensors, and where it goes; on a GPU beside torch's attention.

usage: python benchmarks/host_overhead.py [--loops N] [--only TEXT]

Microseconds: the best of many short loops, which other work on the machine disturbs least, and the median in brackets.
"whole" is the call. "python" is the call with its ops replaced by their results: checks, choice of the path, and for
gradients autograd. Without a GPU the CPU path would compute: "whole" is left out, and SDPA's time holds its products.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F

import flash_attn
from flash_attn import _checks, _dispatch, _ops, _plain

Call = Callable[[], object]
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# Few calls a loop: other work comes in between less often, and a stream takes as many launches without waiting.
CALLS_PER_LOOP = 20


def timed(call: Call, loops: int) -> str:
    synchronize = torch.cuda.synchronize if ON_GPU else lambda: None
    times = []
    for _ in range(loops + 3):
        synchronize()
        start = time.perf_counter()
        for _ in range(CALLS_PER_LOOP):
            call()
        times.append((time.perf_counter() - start) / CALLS_PER_LOOP * 1e6)
    times = times[3:]
    return f"{min(times):6.2f} ({statistics.median(times):.2f})"


# What computes: the kernels, by their op's name, and the CPU path.
OPS = (
    (_ops, "_run_kernel"),
    (_ops, "_forward_out"),
    *((_ops.cpu, name) for name in ("forward", "backward", "append_kv")),
)


@contextmanager
def without_ops(call: Call) -> Iterator[None]:
    """Runs the call once; in the `with` block its ops do nothing but return what they returned then."""
    results = {}

    def key_of(name: str, arguments: tuple) -> str:
        return arguments[0] if name == "_run_kernel" else name

    def recorder(name: str, function: Callable) -> Callable:
        def run(*arguments: object) -> object:
            return results.setdefault(key_of(name, arguments), function(*arguments))

        return run

    with ExitStack() as stack:
        for owner, name in OPS:
            stack.enter_context(patch.object(owner, name, recorder(name, getattr(owner, name))))
        call()
    with ExitStack() as stack:
        for owner, name in OPS:
            replay = lambda *arguments, name=name: results[key_of(name, arguments)]  # noqa: E731
            stack.enter_context(patch.object(owner, name, replay))
        yield


def dense_inputs() -> list[torch.Tensor]:
    return [torch.randn(1, 16, 2, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]


def calls() -> Iterator[tuple[str, Call]]:
    q, k, v = dense_inputs()
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    packed = [x[0] for x in (q, k, v)]
    offsets = torch.tensor([0, 5, 16], dtype=torch.int32, device=DEVICE)
    dense, varlen = flash_attn.flash_attn_func, flash_attn.flash_attn_varlen_func
    cached = flash_attn.flash_attn_with_kvcache

    def step() -> None:
        out = dense(*leaves)
        torch.autograd.grad(out, leaves, q)

    yield "flash_attn_func", lambda: dense(q, k, v)
    yield "  causal", lambda: dense(q, k, v, causal=True)
    yield "  forward for a gradient", lambda: dense(*leaves)
    yield "  forward and backward", step
    yield "flash_attn_varlen_func, causal", lambda: varlen(*packed, offsets, offsets, 11, 11, causal=True)
    options = {"device": DEVICE, "dtype": torch.bfloat16}
    query, new = torch.randn(4, 1, 8, 128, **options), torch.randn(4, 1, 2, 128, **options)
    k_pages, v_pages = torch.randn(2, 16, 16, 2, 128, **options)
    out = torch.empty_like(query)
    cache = {
        "cache_seqlens": torch.full((4,), 33, dtype=torch.int32, device=DEVICE),
        "block_table": torch.arange(16, dtype=torch.int32, device=DEVICE).view(4, 4),
        "causal": True,
    }
    yield "flash_attn_with_kvcache, pages", lambda: cached(query, k_pages, v_pages, **cache)
    yield "  into out", lambda: cached(query, k_pages, v_pages, out=out, **cache)
    yield "  appending", lambda: cached(query, k_pages, v_pages, new, new, **cache)


def parts() -> Iterator[tuple[str, Call]]:
    """What flash_attn_func is made of."""
    q, k, v = dense_inputs()
    call = flash_attn.interface.build_call(flash_attn.flash_attn_func, q, k, v)
    options = {"softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0, "num_splits": 0}
    options |= {"alibi_slopes": None, "s_aux": None, "out": None, "return_softmax_lse": False, "pack_gqa": None}
    shapes = _checks.dense_shapes(q, k, v)
    yield "checks of q, k, v", lambda: _checks.dense_shapes(q, k, v)
    yield "checks of the options", lambda: _checks.finish_call(q, k, v, shapes, _checks.DENSE, **options)
    yield "choice of the path", lambda: _dispatch.choose_path(q, call.head_dims, call.features)
    yield "whether nothing watches", lambda: _plain.is_plain(q, k, v)
    if ON_GPU:
        arguments = (
            *call.op_arguments(),
            _dispatch.PATHS[_dispatch.choose_path(q, call.head_dims, call.features)].arch,
        )
        yield "the op", lambda: _ops._run_kernel("forward", arguments)
    yield "an allocation through Python", lambda: torch.empty_like(q)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loops", type=int, default=1000)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if ON_GPU else "no GPU"
    print(f"flash_attn {flash_attn.__version__}, torch {torch.__version__}, {where}; microseconds, best (median)")
    gc.disable()
    torch.set_num_threads(1)
    q, k, v = (x.transpose(1, 2) for x in dense_inputs())
    rows = {"torch's SDPA": lambda: F.scaled_dot_product_attention(q, k, v)} | dict(parts())
    for name, call in rows.items():
        if options.only in name:
            print(f"{name:32}{timed(call, options.loops)}")
    for name, call in calls():
        if options.only not in name:
            continue
        try:
            with without_ops(call):
                python = timed(call, options.loops)
        except NotImplementedError:
            print(f"{name:32}no path serves it")
            continue
        whole = f"whole {timed(call, options.loops)}   " if ON_GPU else ""
        print(f"{name:32}{whole}python {python}")


if __name__ == "__main__":
    main()
