"""python -m flash_attn info | explain | check | support | bench"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import torch

import flash_attn
from flash_attn import _dispatch, _self_check
from flash_attn.bench import command as bench
from flash_attn.bench.suites import DTYPES


def _size(text: str) -> int:
    try:
        size = int(text)
    except ValueError:
        size = -1
    if size < 0:
        raise argparse.ArgumentTypeError(f"must be an int of at least 0, got {text!r}")
    return size


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flash_attn", description="Exact attention: what is installed.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, kernels that were built, GPUs")
    commands.add_parser("support", help="the table of paths and features")
    check = commands.add_parser("check", help="run attention on every path here and compare it with a float64 result")
    check.add_argument("--path", choices=tuple(_dispatch.PATHS), help="one path only; fails where it is not here")
    bench.add_arguments(commands.add_parser("bench", help="speed, memory and error beside torch's attention"))
    explain = commands.add_parser("explain", help="which kernel a flash_attn_func call would run, and why")
    explain.add_argument("--batch", type=_size, default=1)
    explain.add_argument("--seqlen-q", type=_size, default=4096)
    explain.add_argument("--seqlen-k", type=_size, help="default: as --seqlen-q")
    explain.add_argument("--heads", type=_size, default=16)
    explain.add_argument("--heads-k", type=_size, help="default: as --heads")
    explain.add_argument("--head-dim", type=_size, default=128)
    explain.add_argument("--head-dim-v", type=_size, help="default: as --head-dim")
    explain.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    explain.add_argument("--causal", action="store_true")
    explain.add_argument("--window", type=int, nargs=2, default=(-1, -1), metavar=("LEFT", "RIGHT"))
    explain.add_argument("--softcap", type=float, default=0.0)
    explain.add_argument("--dropout", type=float, default=0.0)
    explain.add_argument("--backward", action="store_true", help="the inputs need gradients")
    return parser


def _explain(args: argparse.Namespace) -> int:
    seqlen_k = args.seqlen_q if args.seqlen_k is None else args.seqlen_k
    heads_k = args.heads if args.heads_k is None else args.heads_k
    head_dim_v = args.head_dim if args.head_dim_v is None else args.head_dim_v
    # On the device that a call here would use, and with memory, though nothing touches it: a tensor that was expanded
    # to its size has strides of 0, which kernels want copied.
    empty = partial(torch.empty, dtype=DTYPES[args.dtype], device="cuda" if torch.cuda.is_available() else "cpu")
    try:
        q = empty(args.batch, args.seqlen_q, args.heads, args.head_dim)
        k = empty(args.batch, seqlen_k, heads_k, args.head_dim)
        v = empty(args.batch, seqlen_k, heads_k, head_dim_v)
    except (RuntimeError, TypeError) as error:  # no memory for so many elements, or no number of them
        print(f"the tensors of this call can't be made here: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    try:
        explanation = flash_attn.explain(
            flash_attn.flash_attn_func,
            q.requires_grad_() if args.backward else q,
            k,
            v,
            causal=args.causal,
            window_size=tuple(args.window),
            softcap=args.softcap,
            dropout_p=args.dropout,
        )
    except (ValueError, NotImplementedError) as error:  # the call is refused, whatever the machine
        print(error, file=sys.stderr)
        return 2
    print(explanation)
    return 0


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    if args.command == "info":
        print(flash_attn.info())
    elif args.command == "support":
        print(_dispatch.support_table())
    elif args.command == "explain":
        return _explain(args)
    elif args.command == "check":
        return _self_check.run(args.path)
    elif args.command == "bench":
        return bench.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
