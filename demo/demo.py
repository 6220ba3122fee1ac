"""A whole job: train a small language model with flash_attn, generate with it, check the results, compare.

Run by `make demo`. Training, evaluation and generation run on the CUDA kernels where there is a GPU, and each on the
CPU path where they lack what it needs. Exits with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import attention
import stages
import torch
from model import Config, LanguageModel
from report import Checks, title

import flash_attn

TEXT = Path(__file__).parent / "data" / "persuasion.txt"


def main() -> int:
    options = parse_options()
    start = time.perf_counter()
    title("What is here")
    print(flash_attn.info())
    device = choose_device()
    torch.manual_seed(0)
    setup = stages.Setup(
        device=device,
        # The kernels take 16-bit inputs; the CPU path takes any.
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        context=options.context,
        batch_size=options.batch_size,
    )
    text = torch.tensor(list(TEXT.read_bytes()), device=device)
    split = len(text) - len(text) // 10
    training_text, held_out = text[:split], text[split:]
    model = LanguageModel(Config()).to(device)
    checks = Checks()

    title(f"Training on {TEXT.name}: {len(training_text):,} bytes")
    stages.train(model, training_text, held_out, options.steps, setup, checks)

    title("Attention against the plain formula in float64, on the trained model's activations")
    stages.check_attention(model, held_out, setup, checks)

    title("Greedy generation with a paged KV cache")
    stages.check_generation(model, options.new_tokens, setup, checks)

    title("Evaluation of the held-out text in bfloat16")
    stages.check_evaluation(model, held_out, setup, checks)

    title("Time, memory and error side by side (same model, same data)")
    stages.compare(model, training_text, options.long_context, setup)
    stages.compare_one_layer(model, training_text, options.long_context, setup)

    if device.type == "cuda":
        print(f"\nOn the CPU path, for the reasons above: {', '.join(sorted(attention.ON_THE_CPU_PATH)) or 'nothing'}.")
    print(f"\n{checks.passed} checks passed, {checks.failed} failed, in {time.perf_counter() - start:.0f} s")
    return 1 if checks.failed else 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="training steps")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--context", type=int, default=256, help="tokens of a training sequence")
    parser.add_argument("--new-tokens", type=int, default=160, help="tokens to generate for each prompt")
    parser.add_argument("--long-context", type=int, default=2048, help="tokens of the memory comparison")
    return parser.parse_args()


def choose_device() -> torch.device:
    """The GPU if there is one that the kernels serve, else the CPU; prints which path each job takes, and why."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = attention.choose_paths(Config(), device, dtype)
    for job, explanation in chosen.items():
        print(f"\nThe path of {job}:")
        print(explanation)
    if chosen["evaluation"].path is None:
        print("So everything runs on the CPU.")
        return torch.device("cpu")
    return device


if __name__ == "__main__":
    sys.exit(main())
