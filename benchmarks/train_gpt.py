"""Trains a small GPT with this package's attention and with torch's, on the same data from the same weights.

    python benchmarks/train_gpt.py --json benchmarks/results/NAME.json       # 200 steps each, bfloat16, on a GPU
    python benchmarks/train_gpt.py --tiny                                    # a few steps on any machine
    python benchmarks/plot_training.py benchmarks/results/NAME.json --out docs/images/NAME.svg

Recorded are the loss of every step, tokens per second (the median step, optimizer included) and peak memory. What
rounding alone does to a loss curve is seen from `float32`, which is torch's math attention with q, k and v in float32
where all others have bfloat16: no implementation should lie further from it than torch's own.

The text is made up: every sequence has a book of phrases, walks on one fixed graph of tokens, and repeats these at
random. The graph is learnt first (1.4 nats per token are left), the repetitions after it, through attention alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_attn
from flash_attn.bench.report import environment, heading, write_json

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # causal: (batch, seqlen, heads, head_dim) each

WARM_UP = 0.11  # part of the steps in which the learning rate rises; with 0.1 OneCycleLR divides by zero at 10 steps
UNTIMED_STEPS = 5
LAST_STEPS = 50  # over which curves are compared
MEBI = 2**20


@dataclass(frozen=True)
class Setup:
    layers: int = 4
    dim: int = 512
    vocab: int = 256
    context: int = 2048
    batch_size: int = 8
    steps: int = 200
    seed: int = 0
    lr: float = 1e-3
    dtype: str = "bfloat16"  # of matrix products and attention; weights are float32


TINY = Setup(layers=2, dim=128, vocab=16, context=64, batch_size=4, steps=16, lr=5e-3, dtype="float32")


# ---- Attention --------------------------------------------------------------------------------------------------


def _ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn.flash_attn_func(q, k, v, causal=True)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        return _sdpa(*(x.float() for x in (q, k, v))).to(q.dtype)


@dataclass(frozen=True)
class Way:
    attend: Attend
    # Entered once around the whole training: choosing a backend must not count as time of a step.
    context: Callable[[], AbstractContextManager] = nullcontext


WAYS = {
    "ours": Way(_ours),
    "ours80": Way(_ours, lambda: flash_attn.use_path("sm80")),
    "math": Way(_sdpa, lambda: sdpa_kernel([SDPBackend.MATH])),
    "flash": Way(_sdpa, lambda: sdpa_kernel([SDPBackend.FLASH_ATTENTION])),
    "cudnn": Way(_sdpa, lambda: sdpa_kernel([SDPBackend.CUDNN_ATTENTION])),
    "float32": Way(_float32, lambda: sdpa_kernel([SDPBackend.MATH])),
}
DEFAULTS = {"cuda": ("ours", "math", "flash", "cudnn", "float32"), "cpu": ("ours", "math", "flash", "float32")}


# ---- Data -------------------------------------------------------------------------------------------------------

PHRASES, PHRASE_LENGTH, SUCCESSORS = 32, 16, 4


def batches(setup: Setup) -> Tensor:
    """(steps, batch_size, context + 1) tokens, the same for a seed on every machine."""
    generator = torch.Generator().manual_seed(setup.seed)

    def below(limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=generator)

    graph = below(setup.vocab, setup.vocab, SUCCESSORS)
    sequences = setup.steps * setup.batch_size
    walk = [below(setup.vocab, sequences, PHRASES)]
    for _ in range(PHRASE_LENGTH - 1):
        walk.append(graph[walk[-1], below(SUCCESSORS, sequences, PHRASES)])
    book = torch.stack(walk, dim=-1)  # (sequences, phrases, length)
    told = below(PHRASES, sequences, setup.context // PHRASE_LENGTH + 1)
    text = book.gather(1, told[..., None].expand(-1, -1, PHRASE_LENGTH)).flatten(1)
    return text[:, : setup.context + 1].reshape(setup.steps, setup.batch_size, -1)


# ---- Model ------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        x = x + self.out(attend(q, k, v).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class Gpt(nn.Module):
    def __init__(self, setup: Setup, head_dim: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(setup.vocab, setup.dim)
        self.positions = nn.Embedding(setup.context, setup.dim)
        self.blocks = nn.ModuleList(Block(setup.dim, head_dim) for _ in range(setup.layers))
        self.norm = nn.LayerNorm(setup.dim)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def loss(self, text: Tensor, attend: Attend) -> Tensor:
        x = self.tokens(text[:, :-1]) + self.positions.weight
        for block in self.blocks:
            x = block(x, attend)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), text[:, 1:].flatten())


# ---- Training ---------------------------------------------------------------------------------------------------


def train(setup: Setup, head_dim: int, way: Way, text: Tensor, device: str) -> dict[str, Any]:
    """One run: losses, tokens per second, peak bytes (on a GPU)."""
    torch.manual_seed(setup.seed)
    model = Gpt(setup, head_dim).to(device)  # made on the CPU: the same weights everywhere
    optimizer = torch.optim.AdamW(model.parameters(), lr=setup.lr, betas=(0.9, 0.95), fused=device == "cuda")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, setup.lr, total_steps=setup.steps, pct_start=WARM_UP)
    dtype = getattr(torch, setup.dtype)
    losses, seconds = [], []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with way.context():
        for tokens in text.to(device):
            start = time.perf_counter()
            with torch.autocast(device, dtype=dtype, enabled=dtype is not torch.float32):
                loss = model.loss(tokens, way.attend)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())  # waits for the device: what is timed is whole steps
            seconds.append(time.perf_counter() - start)
    step = statistics.median(seconds[UNTIMED_STEPS:] or seconds)
    result = {"losses": losses, "ms_per_step": step * 1e3, "tokens_per_s": text[0, :, 1:].numel() / step}
    if device == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    return result


def attempt(*arguments: Any) -> dict[str, Any]:
    """The run, or why there is none: a backend that refuses the call is a recorded failure."""
    try:
        return train(*arguments)
    except (RuntimeError, NotImplementedError) as error:
        return {"failed": f"{type(error).__name__}: {str(error).strip()[:300]}"}


def distance(losses: list[float], other: list[float]) -> float:
    """Mean absolute difference of two curves over their last steps."""
    return statistics.fmean(abs(a - b) for a, b in list(zip(losses, other, strict=True))[-LAST_STEPS:])


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: a row per run, with its curve's distance from float32's."""
    lines = [
        "| head dim | attention | final loss | distance from float32 | tokens per second | peak memory |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    exact = {run["head_dim"]: run["losses"] for run in runs if run["name"] == "float32" and "losses" in run}
    for run in runs:
        start = f"| {run['head_dim']} | {run['name']} |"
        if "failed" in run:
            lines.append(f"{start} {run['failed'].splitlines()[0][:60]} | – | – | – |")
            continue
        final = statistics.fmean(run["losses"][-LAST_STEPS:])
        apart = f"{distance(run['losses'], exact[run['head_dim']]):.4f}" if run["head_dim"] in exact else "–"
        memory = f"{run['peak_bytes'] / MEBI:,.0f} MiB" if "peak_bytes" in run else "–"
        lines.append(f"{start} {final:.4f} | {apart} | {run['tokens_per_s']:,.0f} | {memory} |")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
    parser.add_argument("--tiny", action="store_true", help="a model and a number of steps for any machine")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--head-dims", default="64,128", help="comma-separated (%(default)s)")
    parser.add_argument("--ways", help=f"comma-separated, of {', '.join(WAYS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="record the runs")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.ways = options.ways.split(",") if options.ways else list(DEFAULTS[options.device])
    for name in options.ways:
        if name not in WAYS:
            parser.error(f"--ways: must be of {', '.join(WAYS)}, got {name!r}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 where this package's own run failed."""
    options = parse(arguments)
    setup = TINY if options.tiny else Setup()
    setup = replace(setup, steps=options.steps or setup.steps)
    if options.device == "cuda":  # no kernel takes float32
        setup = replace(setup, dtype="bfloat16")
    text = batches(setup)
    result: dict[str, Any] = {"environment": environment(options.device), "settings": asdict(setup), "runs": []}
    print(heading(result["environment"]), flush=True)
    for head_dim in map(int, options.head_dims.split(",")):
        for name in options.ways:
            run = {"head_dim": head_dim, "name": name}
            run |= attempt(setup, head_dim, WAYS[name], text, options.device)
            result["runs"].append(run)
            ended = run.get("failed") or f"loss {run['losses'][-1]:.3f}, {run['tokens_per_s']:,.0f} tokens/s"
            print(f"head dim {head_dim}, {name}: {ended}", flush=True)
            if options.json:
                write_json(options.json, result)
    print("\n" + table(result["runs"]))
    return int(any("failed" in run for run in result["runs"] if run["name"].startswith("ours")))


if __name__ == "__main__":
    raise SystemExit(main())
