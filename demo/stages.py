"""The stages of the demo: train, check the attention, generate, evaluate, compare."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from attention import dense, explain, flash, path_for, sdpa
from model import Attend, LanguageModel, Window, generate
from paged_cache import PagedKVCache
from report import Checks, Progress, median_seconds, peak_bytes, table
from torch import Tensor

PROMPTS = (
    "Anne ",
    "Sir Walter Elliot was ",
    "The party from Uppercross had ",
    '"My dear Captain," said she, ',
)
# Part of the steps in which the learning rate rises. With 0.1 OneCycleLR divides by zero at 10 steps.
WARM_UP = 0.11
WAYS: dict[str, Attend] = {"flash_attn": flash, "torch SDPA": sdpa, "torch dense": dense}


@dataclass(frozen=True)
class Setup:
    device: torch.device
    dtype: torch.dtype  # of attention and matrix products; weights stay float32
    context: int
    batch_size: int

    @property
    def words(self) -> str:
        where = f"CPU, {torch.get_num_threads()} threads"
        if self.device.type == "cuda":
            where = torch.cuda.get_device_name(self.device)
        return f"{str(self.dtype).removeprefix('torch.')}, {where}"

    def precision(self, dtype: torch.dtype | None = None) -> torch.autocast:
        dtype = dtype or self.dtype
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)


def train(model: LanguageModel, text: Tensor, held_out: Tensor, num_steps: int, setup: Setup, checks: Checks) -> None:
    """AdamW on random pieces of the text, until the model beats counting pairs of bytes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=num_steps, pct_start=WARM_UP)
    progress = Progress("train", num_steps)
    for _ in range(num_steps):
        with setup.precision(), path_for("training"):
            loss = model.loss(random_pieces(text, setup), flash)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.step(f"loss {loss.item():.3f}")
    reached = held_out_loss(model, held_out, dense, setup, torch.float32)
    counted = bigram_loss(text, held_out, model.config.vocab)
    checks(
        reached < counted,
        f"held-out loss {reached:.3f} nats per byte; counting pairs of bytes reaches {counted:.3f}",
    )


def random_pieces(text: Tensor, setup: Setup) -> Tensor:
    """(batch_size, context + 1) bytes from random places."""
    starts = torch.randint(0, len(text) - setup.context, (setup.batch_size, 1)).to(text.device)
    return text[starts + torch.arange(setup.context + 1, device=text.device)]


def whole_pieces(text: Tensor, length: int) -> Tensor:
    """(N, length + 1): the text cut into pieces that overlap by the byte that is only predicted."""
    return text.unfold(0, length + 1, length)


def bigram_loss(text: Tensor, held_out: Tensor, vocab: int) -> float:
    """What a table of byte pairs, counted in the training text, scores on the held-out text."""
    counts = torch.bincount(text[:-1] * vocab + text[1:], minlength=vocab**2).view(vocab, vocab) + 0.1
    log_p = (counts / counts.sum(dim=1, keepdim=True)).log()
    return -log_p[held_out[:-1], held_out[1:]].mean().item()


@torch.no_grad()
def held_out_loss(model: LanguageModel, held_out: Tensor, attend: Attend, setup: Setup, dtype: torch.dtype) -> float:
    with setup.precision(dtype):
        return model.loss(whole_pieces(held_out, setup.context), attend).item()


@dataclass
class Recorder:
    """Attends, and keeps every layer's inputs and its output, whose gradient backward() then leaves there."""

    attend: Attend
    calls: list[tuple[Tensor, Tensor, Tensor, Window, Tensor]]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window_size: Window) -> Tensor:
        out = self.attend(q, k, v, window_size)
        if out.requires_grad:
            out.retain_grad()
        self.calls.append((q.detach(), k.detach(), v.detach(), window_size, out))
        return out


def check_attention(model: LanguageModel, held_out: Tensor, setup: Setup, checks: Checks) -> None:
    """Every layer's output and gradients, on the trained model's activations and gradients."""
    recorder = Recorder(flash, [])
    with setup.precision(), path_for("training"):
        model.loss(whole_pieces(held_out, setup.context)[:4], recorder).backward()
    model.zero_grad()
    errors = Errors(("O", "dQ", "dK", "dV"))
    for q, k, v, window_size, out in recorder.calls:
        inputs = (q, k, v, window_size, out.grad)
        exact = output_and_gradients(dense, *inputs, dtype=torch.float64)
        with path_for("training"):
            path = explain(q, k, v, window_size).path
            results = [output_and_gradients(attend, *inputs, dtype=q.dtype) for attend in WAYS.values()]
        errors.add(window_size, path, results, exact)
    errors.report(checks)


def output_and_gradients(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, window_size: Window, dout: Tensor, *, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    out = attend(q, k, v, window_size)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), dout.to(dtype)))


@dataclass
class Errors:
    """Each way's largest error against float64, layer by layer, relative to the largest exact value."""

    names: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    ok: bool = True

    def add(
        self,
        window_size: Window,
        path: str | None,
        results: list[tuple[Tensor, ...]],
        exact: tuple[Tensor, ...],
    ) -> None:
        cells = []
        for truth, (ours, *others) in zip(exact, zip(*results, strict=True), strict=True):
            # float32 is the dtype of the sums too, whose order differs; 16-bit inputs are summed in float32.
            floor = torch.finfo(ours.dtype).eps * (8 if ours.dtype == torch.float32 else 1)
            error, *other_errors = [relative_error(x, truth) for x in (ours, *others)]
            self.ok &= error <= 2 * max(other_errors) + floor
            cells.append(" / ".join(f"{x:.0e}" for x in (error, *other_errors)))
        self.rows.append((str(len(self.rows)), str(window_size), str(path), *cells))

    def report(self, checks: Checks) -> None:
        print(f"  Largest errors: {' / '.join(WAYS)}\n")
        table(("layer", "window", "path", *self.names), self.rows)
        checks(self.ok, "each of flash_attn's errors is at most twice the larger of PyTorch's, plus rounding")


def relative_error(x: Tensor, truth: Tensor) -> float:
    return ((x.double() - truth).abs().max() / truth.abs().max()).item()


def check_generation(model: LanguageModel, num_new: int, setup: Setup, checks: Checks) -> None:
    """Continues four prompts and computes every token again from the whole text, without a cache."""
    prompts = [torch.tensor(list(prompt.encode()), device=setup.device) for prompt in PROMPTS]
    cache = PagedKVCache(
        model.config,
        batch_size=len(prompts),
        max_length=max(map(len, prompts)) + num_new,
        page_size=16,
        device=setup.device,
        dtype=setup.dtype,
    )
    progress = Progress("generate", num_new)
    with setup.precision(), path_for("generation"):
        texts = generate(model, prompts, num_new, cache, progress.step)
    print(f"  {cache.pages_in_use} pages of {cache.page_size} tokens in use; one sample:\n")
    print("    " + bytes(texts[1].tolist()).decode().replace("\n", "\n    ") + "\n")

    same, close = 0, 0
    tie = 8 * torch.finfo(setup.dtype).eps  # logits this near, relative to the largest, may swap by rounding
    for prompt, tokens in zip(prompts, texts, strict=True):
        with torch.no_grad(), setup.precision():
            logits = model(tokens[None, :-1], dense)[0, len(prompt) - 1 :].float()
        chosen = tokens[len(prompt) :]
        behind = logits.max(dim=-1).values - logits.gather(1, chosen[:, None])[:, 0]
        same += (logits.argmax(dim=-1) == chosen).sum().item()
        close += (behind <= tie * logits.abs().max()).sum().item()
    total = num_new * len(prompts)
    words = f"{same} of {total} tokens as by full re-computation; {total - close} wrong by more than rounding"
    checks(close == total, words)


@torch.no_grad()
def check_evaluation(model: LanguageModel, held_out: Tensor, setup: Setup, checks: Checks) -> None:
    """The forward pass in 16 bits."""
    recorder = Recorder(flash, [])
    with path_for("evaluation"):
        ours = held_out_loss(model, held_out, recorder, setup, torch.bfloat16)
    exact = held_out_loss(model, held_out, dense, setup, torch.float32)
    checks(abs(ours - exact) < 0.01, f"loss {ours:.4f}; the plain formula in float32: {exact:.4f}")
    errors = Errors(("O",))
    for q, k, v, window_size, out in recorder.calls:
        truth = dense(q.double(), k.double(), v.double(), window_size)
        others = [(attend(q, k, v, window_size),) for attend in (sdpa, dense)]
        with path_for("evaluation"):
            path = explain(q, k, v, window_size).path
        errors.add(window_size, path, [(out,), *others], (truth,))
    errors.report(checks)


def compare(model: LanguageModel, text: Tensor, long_context: int, setup: Setup) -> None:
    """A table: training speed, one long sequence's time and memory, and the error of the logits."""
    pieces = random_pieces(text, setup)
    long_piece = text[None, : long_context + 1]
    with torch.no_grad():
        exact = model.double()(pieces[:2, :-1], dense)
    model.float()
    rows, progress = [], Progress("measure", len(WAYS))
    for name, attend in WAYS.items():

        def step(tokens: Tensor, attend: Attend = attend) -> None:
            with setup.precision(), path_for("training"):
                loss = model.loss(tokens, attend)
            loss.backward()
            model.zero_grad()

        short = median_seconds(partial(step, pieces), 5, setup.device)
        long = median_seconds(partial(step, long_piece), 1, setup.device)
        memory = peak_bytes(partial(step, long_piece), setup.device)
        with torch.no_grad(), setup.precision(), path_for("training"):
            error = (model(pieces[:2, :-1], attend).double() - exact).abs().max().item()
        speed = f"{pieces[:, 1:].numel() / short:,.0f} tokens/s"
        rows.append((name, speed, f"{long:.2f} s", mebibytes(memory), f"{error:.1e}"))
        progress.step(name)
    print(f"\n  Forward and backward of the whole model, {setup.words}:\n")
    lengths = (f"{setup.batch_size} x {setup.context} tokens", f"1 x {long_context} tokens")
    table(("attention", *lengths, "its peak memory", "max error of logits"), rows)


@torch.no_grad()
def compare_one_layer(model: LanguageModel, text: Tensor, long_context: int, setup: Setup) -> None:
    """A table for attention alone: the forward pass of layer 1, which has no window, on one long sequence."""
    recorder = Recorder(flash, [])
    with setup.precision(), path_for("evaluation"):
        model(text[None, :long_context], recorder)
        q, k, v, window_size, _ = recorder.calls[1]
        path = explain(q, k, v, window_size).path
    exact = dense(q.double(), k.double(), v.double(), window_size)
    rows = []
    for name, attend in WAYS.items():
        run = partial(attend, q, k, v, window_size)
        with path_for("evaluation"):
            seconds, memory = median_seconds(run, 5, setup.device), peak_bytes(run, setup.device)
            error = (run().double() - exact).abs().max().item()
        rows.append((name, f"{seconds * 1e3:.2f} ms", mebibytes(memory), f"{error:.1e}"))
    print(f"\n  Attention alone, forward, layer 1 on 1 x {long_context} tokens, flash_attn on path {path}:\n")
    table(("attention", "time", "peak memory", "max error"), rows)


def mebibytes(count: int | None) -> str:
    return "not measured" if count is None else f"{count / 2**20:,.0f} MiB"
