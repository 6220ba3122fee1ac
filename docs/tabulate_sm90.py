"""Compiles the SM90 kernels and writes what they take into docs/sm90-schedules.md: registers, spills, shared memory.

    CUTLASS_PATH=.../cutlass/include python docs/tabulate_sm90.py [--head-dims 64/64,512/512] [--jobs 2]

Takes nvcc (NVCC) and cuobjdump (CUOBJDUMP), no GPU; some 7 minutes of one core. Rows of head dims that are left out
stay as they are. The hot loop is the smallest loop of the machine code that has matrix products and exponentials.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from build_support.options import load_variants  # noqa: E402
from build_support.plan_module import load_plan_module  # noqa: E402

PAGE = ROOT / "docs" / "sm90-schedules.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->"
HEADER = """| head dims | mask | score | tile | shared memory, KB | registers, used | spills, bytes | in hot loop |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""
MASKS = ("full", "causal", "general")
SCORES = ("plain", "general")
REGISTERS = 65536 // 128  # of an SM, for each lane of a warpgroup


def compile_group(folder: Path, group) -> tuple[str, str]:
    """(what ptxas says, machine code) of the kernels of one tile row, in bf16."""
    source = next(file for file in load_variants().write_files([group], folder / group.name) if file.suffix == ".cu")
    command = [
        os.environ.get("NVCC", "nvcc"), "-std=c++20", "--expt-relaxed-constexpr", "-O3", "-diag-suppress=177",
        "-Xptxas", "-v", f"-I{ROOT / 'csrc'}", f"-I{os.environ['CUTLASS_PATH']}",
        "-gencode=arch=compute_90a,code=sm_90a", "-cubin", str(source), "-o", str(source.with_suffix(".cubin")),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stdout + done.stderr)
    dump = [os.environ.get("CUOBJDUMP", "cuobjdump"), "-sass", str(source.with_suffix(".cubin"))]
    return done.stderr, subprocess.run(dump, capture_output=True, text=True, check=True).stdout


def kind_of(mangled: str) -> tuple[int, int]:
    """(mask, score), numbered as in C++, of a kernel by its mangled name."""
    return int(re.search(r"4MaskE(\d)", mangled)[1]), int(re.search(r"5ScoreE(\d)", mangled)[1])


def spills(ptxas: str) -> dict[tuple[int, int], int]:
    """Bytes of stack per lane; nothing else of these kernels is there."""
    found = re.findall(r"Function properties for (\S*forward_kernel\S*)\n\s+(\d+) bytes stack frame", ptxas)
    return {kind_of(name): int(size) for name, size in found}


def machine_code(sass: str) -> dict[tuple[int, int], list[tuple[int, str]]]:
    """(address, instruction) of each kernel."""
    kernels = {}
    for part in sass.split("Function : ")[1:]:
        name = part.split("\n", 1)[0]
        if "forward_kernel" in name:
            code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?) ?;", part)
            kernels[kind_of(name)] = [(int(address, 16), instruction) for address, instruction in code]
    return kernels


def hot_loop(code: list[tuple[int, str]]) -> list[str]:
    """The innermost loop that has matrix products and exponentials."""
    loops = []
    for address, instruction in code:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", instruction)
        if target and int(target[1], 16) < address:
            body = [text for at, text in code if int(target[1], 16) <= at <= address]
            if any("HGMMA" in text for text in body) and any("MUFU.EX2" in text for text in body):
                loops.append(body)
    return min(loops, key=len)


def most_registers(code: list[tuple[int, str]]) -> int:
    return max(int(number) for _, text in code for number in re.findall(r"\bR(\d+)\b", text)) + 1


def rows_of(group, ptxas: str, sass: str) -> list[str]:
    planner = load_plan_module()
    qk, v, _ = group.tile_row
    stack, kernels = spills(ptxas), machine_code(sass)
    rows = []
    for (mask, score), code in sorted(kernels.items()):
        plan = planned(planner, qk, v, mask, score)
        groups = plan.num_threads // 128 - 1
        given = (REGISTERS - (24 if groups == 2 else 32)) // groups // 8 * 8
        in_loop = sum(text.startswith(("LDL", "STL")) or " LDL" in text or " STL" in text for text in hot_loop(code))
        rows.append(
            f"| {qk}/{v} | {MASKS[mask]} | {SCORES[score]} | {plan.tile_m} x {plan.tile_n}, {groups} groups "
            f"| {(plan.smem_bytes + 1023) // 1024} | {given}, {most_registers(code)} | {stack[mask, score]} "
            f"| {f'{in_loop} instructions' if in_loop else 'none'} |"
        )
    return rows


def planned(planner, qk: int, v: int, mask: int, score: int):
    """The plan of a large call that takes this kernel."""
    problem = planner.Problem()
    problem.layout = problem.layout_k = planner.Layout.DENSE
    problem.dtype, problem.pack_gqa = planner.Dtype.BF16, planner.PackGqa.NEVER
    problem.batch, problem.num_heads, problem.num_heads_k, problem.rows_q, problem.rows_k = 1, 1, 1, 4096, 4096
    problem.head_dim, problem.head_dim_v = qk, v
    problem.window_left = 100 if MASKS[mask] == "general" else -1
    problem.window_right = -1 if MASKS[mask] == "full" else 0
    problem.has_softcap = SCORES[score] == "general"
    return planner.make_plan(problem, planner.Arch.SM90, 227 * 1024, 132)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dims", help="default: all of the tile table")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    variants = load_variants()
    groups = [group for group in variants.groups([90], variants.HEAD_DIMS, ["bf16"]) if group.kind.name == "forward"]
    if args.head_dims:
        groups = [group for group in groups if "{}/{}".format(*group.tile_row) in args.head_dims.split(",")]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        compiled = list(pool.map(lambda group: compile_group(Path(folder), group), groups))
    before, _, rest = PAGE.read_text().partition(BEGIN)
    table, _, after = rest.partition(END)
    lines = [line for line in table.splitlines() if re.match(r"\| \d", line)]
    for group, (ptxas, sass) in zip(groups, compiled, strict=True):
        if "C75" in ptxas:
            print(f"{group.name}: wgmma instructions are serialized", file=sys.stderr)
        dims = "| {}/{} |".format(*group.tile_row)
        lines = [line for line in lines if not line.startswith(dims)] + rows_of(group, ptxas, sass)
    lines.sort(key=lambda line: [int(number) for number in re.match(r"\| (\d+)/(\d+)", line).groups()])
    PAGE.write_text(before + BEGIN + HEADER + "".join(line + "\n" for line in lines) + END + after)


if __name__ == "__main__":
    main()
