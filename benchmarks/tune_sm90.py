"""Times tile shapes of the SM90 forward kernels on this machine's GPU, beside those that the tile table holds.

    python benchmarks/tune_sm90.py 128/128 [64/64 ...] [--mask full] [--length 1024] [--folder FOLDER [--compile-only]]

nvcc and CUTLASS's headers are found as for a build (CUDA_HOME, CUTLASS_PATH). Each tile is compiled into a program of
its own, as many at once as there are cores: about 40 s of one. Those of the same head dims and mask take turns for
several rounds as soon as they are there. --folder keeps the programs until a source changes, so that --compile-only
can make them while the GPU is busy with something else. Figures are bf16 TFLOP/s, the median of the rounds; causal
counts half. A tile whose sum of outputs differs from the first's is marked, one that fails or hangs is left out; which
are right the tests say. The winner belongs into csrc/variant/tiles.h, with the limit that it hits as the row's reason.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from build_support.toolkit import find_cuda_home, find_cutlass  # noqa: E402

PROGRAM = Path(__file__).resolve().with_name("tune_sm90.cu")
CSRC = ROOT / "csrc"
# What a kernel's launch calls, whatever its tile.
SHARED = (CSRC / "kernels" / "sm90" / "tensor_map.cpp", CSRC / "kernels" / "misc" / "merge_splits.cu")
NUM_TOKENS = 16384
ROUNDS = 5
SECONDS_OF_A_HANG = 20

# (rows, keys, warps along rows, warps along columns, stages of K and V, stages of Q, exponentials of 16 by polynomial,
# powers of two before O is rescaled, what groups take turns in, blocks of a cluster, where Q is): tiles.h says more
IN_TURNS = "Turn::kExponentials"
WITHOUT_TURNS = "Turn::kNone"
IN_PAIRS = ("Turn::kProducts", 2)
WITH_Q_IN_REGISTERS = ("Turn::kProducts", 1, "QueriesIn::kRegisters")
TILES = {
    (64, 64): (
        (192, 128, 12, 1, 2, 2, 0),
        (192, 128, 12, 1, 2, 2, 0, 8),
        (192, 128, 12, 1, 2, 2, 2, 8),
        (192, 128, 12, 1, 2, 2, 0, 8, IN_TURNS),
        (192, 128, 12, 1, 2, 2, 0, 0, IN_TURNS),
        (192, 128, 12, 1, 2, 2, 0, 0, WITHOUT_TURNS),
        (192, 128, 12, 1, 2, 2, 2),
        (192, 128, 12, 1, 2, 2, 4),
        (128, 128, 8, 1, 2, 2, 0),
        (128, 192, 8, 1, 2, 2, 0),
        (128, 192, 8, 1, 2, 2, 0, 0, *WITH_Q_IN_REGISTERS),
        (128, 128, 8, 1, 2, 2, 0, 8),
        (192, 96, 12, 1, 3, 2, 0),
    ),
    (96, 96): (
        (128, 128, 8, 1, 2, 2, 0),
        (128, 128, 8, 1, 2, 2, 0, 0, *WITH_Q_IN_REGISTERS),
        (128, 176, 8, 1, 2, 2, 0),
        (128, 160, 8, 1, 2, 2, 0),
    ),
    (128, 128): (
        (128, 128, 8, 1, 2, 2, 0),
        (128, 128, 8, 1, 2, 2, 0, 8),
        (128, 128, 8, 1, 2, 2, 0, 0, IN_TURNS),
        (128, 128, 8, 1, 2, 2, 0, 0, WITHOUT_TURNS),
        (128, 128, 8, 1, 2, 2, 0, 0, *WITH_Q_IN_REGISTERS),
        (128, 128, 8, 1, 2, 2, 0, 0, *IN_PAIRS),
        (128, 128, 8, 1, 2, 1, 0),
        (128, 160, 8, 1, 2, 2, 0),
        (128, 176, 8, 1, 2, 1, 0),
        (128, 192, 8, 1, 2, 1, 0),
    ),
    (192, 128): ((128, 128, 8, 1, 2, 1, 0), (128, 112, 8, 1, 2, 1, 0)),
    (192, 192): (
        (128, 112, 8, 1, 2, 1, 0),
        (128, 112, 8, 1, 2, 1, 0, 0, WITHOUT_TURNS),
        (128, 96, 8, 1, 2, 1, 0),
        (128, 80, 8, 1, 2, 2, 0),
    ),
    (256, 256): (
        (128, 80, 8, 1, 2, 1, 0),
        (128, 80, 8, 1, 2, 1, 0, 0, WITHOUT_TURNS),
        (128, 64, 8, 1, 2, 1, 0),
        (128, 80, 8, 1, 2, 1, 0, 8),
        (128, 80, 8, 1, 2, 1, 0, 0, *IN_PAIRS),
    ),
    (64, 512): ((64, 64, 4, 2, 2, 1, 0), (64, 64, 4, 2, 2, 1, 0, 8)),
    (512, 512): (
        (64, 64, 4, 2, 1, 1, 0),
        (64, 64, 4, 2, 1, 1, 0, 8),
        (64, 64, 4, 2, 1, 1, 0, 0, *IN_PAIRS),
        (64, 64, 4, 2, 1, 1, 0, 8, *IN_PAIRS),
    ),
    (576, 512): ((64, 64, 4, 2, 1, 1, 0), (64, 64, 4, 2, 1, 1, 0, 8)),
}


@cache
def newest_source() -> float:
    """When a file that a program is made from last changed."""
    return max(path.stat().st_mtime for path in (PROGRAM, *SHARED, *CSRC.rglob("*.h")))


@cache
def compiler() -> list[str]:
    """nvcc and its options."""
    cuda_home, looked_in = find_cuda_home(os.environ)
    if cuda_home is None:
        raise SystemExit(f"there is no CUDA toolkit; looked in {', '.join(looked_in)}")
    return [
        str(cuda_home / "bin" / "nvcc"), "-std=c++20", "--expt-relaxed-constexpr", "-O3", "-diag-suppress=177",
        f"-I{CSRC}", f"-I{find_cutlass(ROOT, os.environ)}", "-gencode=arch=compute_90a,code=sm_90a",
    ]  # fmt: skip


def nvcc(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*compiler(), *map(str, arguments)], capture_output=True, text=True, check=False)


def compile_shared(folder: Path) -> list[Path]:
    """The object files that all programs link."""
    objects = [folder / f"{source.name}.o" for source in SHARED]
    for source, target in zip(SHARED, objects, strict=True):
        if not target.exists() or target.stat().st_mtime < newest_source():
            done = nvcc("-c", source, "-o", target)
            if done.returncode != 0:
                raise SystemExit(f"{source.name} could not be compiled:\n{done.stderr}")
    return objects


def compile_program(
    folder: Path, head_dims: tuple[int, int], tile: tuple[int | str, ...], mask: str, shared: list[Path]
) -> Path | None:
    """The program for one tile; None, with the reason printed, where the compiler refuses it."""
    program = folder / "-".join(map(str, (*head_dims, mask, *tile))).replace("::", "_")
    if program.exists() and program.stat().st_mtime > newest_source():
        return program
    # nvcc takes a comma in -D for the end of a definition.
    source, unfinished = program.with_suffix(".cu"), program.with_suffix(".unfinished")
    source.write_text(
        f"#define HEAD_DIMS {head_dims[0]}, {head_dims[1]}\n"
        f"#define TILE {', '.join(map(str, tile))}\n"
        f"#define MASK k{mask.title()}\n"
        f'#include "{PROGRAM}"\n'
    )
    done = nvcc(source, *shared, "-o", unfinished)
    for line in (done.stdout + done.stderr).splitlines():
        if any(word in line for word in ("error", "serialized", "undefined")):
            print(f"{program.name}: {line[:200]}", file=sys.stderr)
    return unfinished.rename(program) if done.returncode == 0 else None


def run(program: Path, batch: int, heads: int, length: int) -> tuple[float, float] | None:
    """(milliseconds, sum of the outputs' sizes); None, with the reason printed, where the kernel fails or hangs."""
    arguments = [str(program), str(batch), str(heads), str(length)]
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=SECONDS_OF_A_HANG)
    except subprocess.CalledProcessError as error:
        print(f"{program.name}: status {error.returncode}, {error.stdout}{error.stderr}", file=sys.stderr)
        return None
    except subprocess.TimeoutExpired:
        print(f"{program.name}: no end after {SECONDS_OF_A_HANG} s", file=sys.stderr)
        return None
    milliseconds, total = done.stdout.split()
    return float(milliseconds), float(total)


def tune(
    head_dims: tuple[int, int], mask: str, lengths: list[int], programs: dict[tuple[int | str, ...], Path]
) -> None:
    """Times the programs of all tiles. One that fails is not run again: a hang costs SECONDS_OF_A_HANG each time."""
    qk, v = head_dims
    for length in lengths:
        batch, heads = max(1, NUM_TOKENS // length), max(4, 2048 // qk)
        flops = 2.0 * batch * heads * length**2 * (qk + v) * (0.5 if mask == "causal" else 1.0)
        times: dict[tuple[int | str, ...], list[float]] = {tile: [] for tile in programs}
        totals = {}
        for _ in range(ROUNDS):
            for tile in list(times):
                result = run(programs[tile], batch, heads, length)
                if result is None:
                    del times[tile], programs[tile]
                else:
                    times[tile].append(result[0])
                    totals[tile] = result[1]
        first = next(iter(totals.values()), None)
        for tile in sorted(times, key=lambda tile: statistics.median(times[tile])):
            wrong = "" if abs(totals[tile] - first) < 1e-3 * first else "  ! another sum of outputs"
            figure = flops / statistics.median(times[tile]) / 1e9
            print(f"{qk}/{v} {mask:6} {length:6}  {figure:5.0f}  {tile}{wrong}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("head_dims", nargs="+", help="head_dim/head_dim_v, as in 192/128")
    parser.add_argument("--mask", action="append", choices=("full", "causal"))
    parser.add_argument("--length", action="append", type=int)
    parser.add_argument("--folder", type=Path, help="keep programs here, and take those that are here")
    parser.add_argument("--compile-only", action="store_true", help="time nothing; needs --folder")
    args = parser.parse_args()
    if args.compile_only and args.folder is None:
        parser.error("--compile-only needs --folder")
    chosen = [tuple(int(d) for d in pair.split("/")) for pair in args.head_dims]
    for head_dims in chosen:
        if head_dims not in TILES:
            known = ", ".join("/".join(map(str, pair)) for pair in TILES)
            parser.error(f"head_dims must be of {known}, got {'/'.join(map(str, head_dims))}")
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        shared = compile_shared(folder)
        jobs = {
            (head_dims, mask): {
                tile: pool.submit(compile_program, folder, head_dims, tile, mask, shared) for tile in TILES[head_dims]
            }
            for head_dims in chosen
            for mask in args.mask or ["full", "causal"]
        }
        for (head_dims, mask), of_tiles in jobs.items():
            built = {tile: job.result() for tile, job in of_tiles.items()}
            programs = {tile: program for tile, program in built.items() if program is not None}
            if not args.compile_only:
                tune(head_dims, mask, args.length or [1024, 16384], programs)


if __name__ == "__main__":
    main()
