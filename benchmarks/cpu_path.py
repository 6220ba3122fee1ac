"""The CPU path against torch.nn.functional.scaled_dot_product_attention on the same inputs.

    python benchmarks/cpu_path.py [--quick] [--only SUBSTRING] [--threads N] [--json FILE]

Both run in one process, call by call in turn, so that a busy machine slows both; the best of the repeats counts. SDPA's
masks are made ahead of the timing, which favours SDPA. Peak memory is what one call adds to the resident set, measured
after the timing. The error is the largest absolute one against float64 math on the same inputs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.bench.report import environment

BAR_SAME_CALL = 1.2  # SDPA has the call itself
BAR_WITH_MASK = 1.5  # SDPA needs an explicit mask
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    name: str
    bar: float
    ours: Callable[[], Outputs]
    sdpa: Callable[[], Outputs]
    exact: Callable[[], Outputs]


@dataclass
class Result:
    name: str
    bar: float
    ours_ms: float
    sdpa_ms: float
    ratio: float
    ours_median_ms: float
    sdpa_median_ms: float
    repeats: int
    ours_peak_mib: float = 0.0
    sdpa_peak_mib: float = 0.0
    ours_error: float = 0.0
    sdpa_error: float = 0.0


# ---- One call ---------------------------------------------------------------------------------------------------


def exact_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """(B, S, H, D) attention in float64, head by head; bias broadcasts to (B, H, Sq, Sk)."""
    group = q.shape[2] // k.shape[2]
    outs = []
    for h in range(q.shape[2]):
        head_q, head_k, head_v = (x[:, :, i].double() for x, i in ((q, h), (k, h // group), (v, h // group)))
        scores = head_q @ head_k.transpose(1, 2) * q.shape[-1] ** -0.5
        if bias is not None:
            scores = scores + (bias[:, h] if bias.shape[1] > 1 else bias[:, 0])
        outs.append(torch.softmax(scores, dim=-1) @ head_v)
    return torch.stack(outs, dim=2)


def visible_bias(num_rows: int, num_keys: int, left: int, right: int) -> Tensor:
    delta = torch.arange(num_keys) - torch.arange(num_rows)[:, None] - (num_keys - num_rows)
    hidden = ((delta < -left) if left >= 0 else False) | ((delta > right) if right >= 0 else False)
    return torch.zeros(1, 1, num_rows, num_keys).masked_fill(torch.as_tensor(hidden), -torch.inf)


def with_gradients(function: Callable[..., Tensor], tensors: tuple[Tensor, ...], dout: Tensor | None):
    """The function's output on the tensors, then their gradients if dout is given."""

    def run() -> Outputs:
        if dout is None:
            with torch.no_grad():
                return (function(*tensors),)
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = function(*leaves)
        return (out, *torch.autograd.grad(out, leaves, dout.to(out.dtype)))

    return run


def dense_case(
    name: str,
    shape: tuple[int, int, int, int, int, int],
    dtype: torch.dtype,
    backward: bool,
    window: tuple[int, int] = (-1, -1),
    alibi: bool = False,
) -> Case:
    """shape is (B, Sq, Sk, H, Hk, D). SDPA gets is_causal where it means the same, else a mask."""
    batch, num_rows, num_keys, heads, heads_kv, head_dim = shape
    q = torch.randn(batch, num_rows, heads, head_dim).to(dtype)
    k, v = (torch.randn(batch, num_keys, heads_kv, head_dim).to(dtype) for _ in range(2))
    dout = torch.randn(batch, num_rows, heads, head_dim).to(dtype) if backward else None
    causal = window == (-1, 0) and num_rows == num_keys
    plain = not alibi and (causal or window == (-1, -1))
    bias, slopes = None, None
    if causal or not plain:
        bias = visible_bias(num_rows, num_keys, *window)
    if alibi:
        slopes = torch.pow(2.0, -8.0 * (torch.arange(heads) + 1) / heads)
        delta = torch.arange(num_keys) - torch.arange(num_rows)[:, None] - (num_keys - num_rows)
        bias = bias - slopes[:, None, None] * delta.abs()
    mask = None if plain else bias.to(dtype)

    def ours(q, k, v):
        return flash_attn_func(q, k, v, window_size=window, alibi_slopes=slopes)

    def sdpa(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=plain and causal, enable_gqa=heads != heads_kv
        )
        return out.transpose(1, 2)

    def exact(q, k, v):
        return exact_attention(q, k, v, None if bias is None else bias.double())

    runs = (with_gradients(function, (q, k, v), dout) for function in (ours, sdpa, exact))
    label = f"{name} {str(dtype)[6:]} {'fwd+bwd' if backward else 'fwd'}"
    return Case(label, BAR_SAME_CALL if plain else BAR_WITH_MASK, *runs)


def varlen_case(dtype: torch.dtype, backward: bool, lengths: list[int], heads: int, head_dim: int) -> Case:
    """Packed sequences, causal, against SDPA on the padded batch with a mask."""
    total, longest = sum(lengths), max(lengths)
    q, k, v = (torch.randn(total, heads, head_dim).to(dtype) for _ in range(3))
    dout = torch.randn(total, heads, head_dim).to(dtype) if backward else None
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    rows = torch.arange(longest)
    used = rows < torch.tensor(lengths)[:, None]
    hidden = (rows > rows[:, None]) | ~used[:, None, None, :]
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -torch.inf)
    padded = [q.new_zeros(len(lengths), longest, heads, head_dim).index_put((used,), x) for x in (q, k, v)]
    padded_dout = None if dout is None else torch.zeros_like(padded[0]).index_put((used,), dout)

    def ours(q, k, v):
        return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True)

    def sdpa(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    def exact(q, k, v):
        return exact_attention(q, k, v, mask.double())

    def packed(run):
        return lambda: tuple(x[used] for x in run())

    label = f"varlen causal {len(lengths)} x {min(lengths)}..{longest} {str(dtype)[6:]}"
    return Case(
        f"{label} {'fwd+bwd' if backward else 'fwd'}",
        BAR_WITH_MASK,
        with_gradients(ours, (q, k, v), dout),
        with_gradients(sdpa, tuple(padded), padded_dout),
        packed(with_gradients(exact, tuple(padded), padded_dout)),
    )


def kvcache_case(dtype: torch.dtype, num_rows: int, lengths: list[int], heads: int, heads_kv: int, page: int) -> Case:
    """A cache of which entry b uses lengths[b] tokens, dense (page 0) or paged, against SDPA with a mask."""
    head_dim, capacity, batch = 64, 2048, len(lengths)
    q = torch.randn(batch, num_rows, heads, head_dim).to(dtype)
    k, v = (torch.randn(batch, capacity, heads_kv, head_dim).to(dtype) for _ in range(2))
    used = torch.tensor(lengths, dtype=torch.int32)
    steps = torch.arange(capacity)
    last = used[:, None, None] - num_rows + torch.arange(num_rows)[:, None]
    mask = torch.zeros(batch, 1, num_rows, capacity, dtype=dtype).masked_fill((steps > last).unsqueeze(1), -torch.inf)
    ours_k, ours_v, table = k, v, None
    if page:
        ours_k, ours_v = (x.reshape(-1, page, heads_kv, head_dim) for x in (k, v))
        table = torch.arange(ours_k.shape[0], dtype=torch.int32).view(batch, -1)

    def ours(q, k, v):
        return flash_attn_with_kvcache(q, ours_k, ours_v, cache_seqlens=used, causal=True, block_table=table)

    def sdpa(q, k, v):
        if table is not None:  # SDPA cannot read pages
            k, v = (x[table].flatten(1, 2) for x in (ours_k, ours_v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    def exact(q, k, v):
        return exact_attention(q, k, v, mask.double())

    runs = (with_gradients(function, (q, k, v), None) for function in (ours, sdpa, exact))
    layout = f"page {page}" if page else "dense"
    label = f"kvcache {layout} B{batch} Sq{num_rows} H{heads}/{heads_kv} {min(lengths)}..{max(lengths)} of {capacity}"
    return Case(f"{label} {str(dtype)[6:]} fwd", BAR_WITH_MASK, *runs)


def cases(quick: bool) -> Iterator[Case]:
    both = (torch.float32, torch.bfloat16)
    shapes = [(1, 256, 256, 8, 8, 64), (1, 1024, 1024, 8, 8, 64)]
    if not quick:
        shapes += [(16, 256, 256, 8, 8, 64), (1, 1024, 1024, 8, 2, 64), (1, 1024, 1024, 4, 4, 128)]
        shapes += [(1, 4096, 4096, 4, 4, 64)]
    causal, full = (-1, 0), (-1, -1)
    for shape in shapes:
        batch, rows, _, heads, heads_kv, head_dim = shape
        for dtype in both:
            for backward in (False, True):
                for window, mask in ((full, "full"), (causal, "causal")):
                    name = f"{mask} B{batch} S{rows} H{heads}/{heads_kv} D{head_dim}"
                    yield dense_case(name, shape, dtype, backward, window)
    masked = [
        ("window 256 S1024 H8", (1, 1024, 1024, 8, 8, 64), (255, 0), False),
        ("window 64 S256 B8 H8", (8, 256, 256, 8, 8, 64), (63, 0), False),
        ("window 512 S4096 H4", (1, 4096, 4096, 4, 4, 64), (511, 0), False),
        ("alibi causal S1024 H8", (1, 1024, 1024, 8, 8, 64), causal, True),
        ("alibi full S1024 H8", (1, 1024, 1024, 8, 8, 64), full, True),
        ("bottom-right Sq512 Sk2048 H8", (1, 512, 2048, 8, 8, 64), causal, False),
        ("bottom-right Sq64 Sk320 B8 H8", (8, 64, 320, 8, 8, 64), causal, False),
    ]
    for name, shape, window, alibi in masked[:1] + masked[3:4] if quick else masked:
        for dtype in both:
            for backward in (False, True):
                yield dense_case(name, shape, dtype, backward, window, alibi)
    lengths = [37, 512, 130, 256, 411, 64, 300, 222]
    few, many = [2048, 1500, 700, 33], [64 + 61 * i for i in range(32)]
    for dtype in both:
        yield varlen_case(dtype, False, lengths, 8, 64)
        yield varlen_case(dtype, True, lengths, 8, 64)
        yield kvcache_case(dtype, 1, few, 8, 2, 0)
        yield kvcache_case(dtype, 1, many, 8, 8, 0)
        yield kvcache_case(dtype, 16, few, 8, 2, 0)
        yield kvcache_case(dtype, 1, few, 8, 2, 16)


# ---- Measuring --------------------------------------------------------------------------------------------------


def interleaved(functions: list[Callable[[], object]], seconds: float, most: int = 100) -> list[list[float]]:
    """Milliseconds of each function's repeats; the functions take turns."""
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    start = time.perf_counter()
    while len(times[0]) < 3 or (len(times[0]) < most and time.perf_counter() - start < seconds):
        for function, taken in zip(functions, times, strict=True):
            before = time.perf_counter()
            function()
            taken.append((time.perf_counter() - before) * 1e3)
    return times


def measure(case: Case, seconds: float) -> Result:
    ours, sdpa = interleaved([case.ours, case.sdpa], seconds)
    result = Result(
        case.name,
        case.bar,
        min(ours),
        min(sdpa),
        min(ours) / min(sdpa),
        statistics.median(ours),
        statistics.median(sdpa),
        len(ours),
    )
    exact = case.exact()
    result.ours_error = worst_error(case.ours(), exact)
    result.sdpa_error = worst_error(case.sdpa(), exact)
    return result


def worst_error(outputs: Outputs, exact: Outputs) -> float:
    if outputs[0].shape != exact[0].shape:  # SDPA on a padded batch
        return float("nan")
    largest = [(a.double() - b).abs().max() for a, b in zip(outputs, exact, strict=True)]
    return torch.stack(largest).max().item()  # NaN if one is, which Python's max may not see


def status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_mib(function: Callable[[], object]) -> float:
    """MiB that one call adds to the resident set at its highest."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = status_kib("VmRSS")
    function()
    return (status_kib("VmHWM") - before) / 1024


def measures_memory() -> bool:
    if platform.system() != "Linux" or not os.access("/proc/self/clear_refs", os.W_OK):
        return False
    # Freed memory must leave the process, or a later call would seem to need none.
    m_mmap_threshold = -3
    return ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 16) == 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cases only")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for the repeats of one case")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own choice)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    selected = [case for case in cases(options.quick) if options.only in case.name]
    print(f"{'case':62} {'ours ms':>9} {'SDPA ms':>9} {'ratio':>6} {'bar':>5}")
    results = []
    for case in selected:
        result = measure(case, options.seconds)
        results.append(result)
        over = "  over" if result.ratio > result.bar else ""
        print(f"{result.name:62} {result.ours_ms:9.2f} {result.sdpa_ms:9.2f} {result.ratio:6.2f} {result.bar:5}{over}")
    if measures_memory():
        for case, result in zip(selected, results, strict=True):
            result.ours_peak_mib, result.sdpa_peak_mib = peak_mib(case.ours), peak_mib(case.sdpa)
    print(f"\n{'case':62} {'ours MiB':>9} {'SDPA MiB':>9} {'ours error':>11} {'SDPA error':>11}")
    for r in results:
        print(f"{r.name:62} {r.ours_peak_mib:9.1f} {r.sdpa_peak_mib:9.1f} {r.ours_error:11.1e} {r.sdpa_error:11.1e}")
    if options.json:
        # JSON has no NaN.
        made_on = environment("cpu") | {"load_average": os.getloadavg()}
        rows = [{k: None if v != v else v for k, v in asdict(result).items()} for result in results]
        options.json.write_text(json.dumps({"environment": made_on, "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
