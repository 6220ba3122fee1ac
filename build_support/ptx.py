"""Translates the PTX that nvcc makes of kernels into C++ for the emulator, which then runs what was compiled for a GPU.

usage: python build_support/ptx.py FROM.ptx TO.cpp

That is what the emulator's own compilation of the kernels doesn't have: the text of every asm statement, and the
addresses, the rounding and the order that nvcc chose. Each thread runs one C++ function whose variables are PTX's
registers and whose labels are PTX's. (Parallel Thread Execution ISA, https://docs.nvidia.com/cuda/parallel-thread-execution)
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from build_support.ptx_instructions import Instruction, Kernel, translate_instruction, type_of, variable  # noqa: E402

Scope = dict[str, str]  # new names of what is declared between two braces
_PIECE = re.compile(r"\s*(\{|\}|[\w$]+:|[^;]*;)")


def translate(text: str) -> str:
    """C++ of all kernels of a PTX module; ValueError names what has no translation."""
    lines = ['#include "dev/emulator/ptx.h"', "", "namespace flash_attn::emulator::ptx {", "namespace {", ""]
    for number, kernel in enumerate(read_kernels(text)):
        lines += [*_write_kernel(kernel, f"kernel_{number}"), ""]
    return "\n".join([*lines, "}  // namespace", "}  // namespace flash_attn::emulator::ptx", ""])


def read_kernels(text: str) -> Iterator[Kernel]:
    text = re.sub(r"//[^\n]*", "", text)
    if function := re.search(r"\.func\b[^;{]*", text):
        raise ValueError(f"functions have no translation: {function[0]}")
    for match in re.finditer(r"\.entry\s+([\w$]+)\(([^)]*)\)[^{]*\{", text):
        symbol, params = match.groups()
        kernel = Kernel(symbol, re.findall(r"([\w$]+)(?:\[\d+\])?\s*(?:,|$)", params.strip(), flags=re.M))
        _read_body(kernel, text[match.end() : _end_of_scope(text, match.end())])
        yield kernel


def _read_body(kernel: Kernel, body: str) -> None:
    """What an asm statement declares between braces is its own: it gets the number of these."""
    scopes: list[Scope] = []
    num_scopes = 0
    position = 0
    while match := _PIECE.match(body, position):
        piece, position = match[1], match.end()
        if piece == "{":
            num_scopes += 1
            scopes.append(_read_scope(body[position : _end_of_scope(body, position)], num_scopes))
        elif piece == "}":
            scopes.pop()
        elif piece.endswith(":"):
            kernel.statements.append(f"{_label(_rename(piece[:-1], scopes))}:;")
        else:
            _read_statement(kernel, _rename(" ".join(piece[:-1].split()), scopes))
    if rest := body[position:].strip():
        raise ValueError(f"a statement that does not end: {rest}")


def _read_scope(body: str, number: int) -> Scope:
    names = re.findall(r"([\w$]+):(?!:)", body)
    for declared in re.findall(r"\.reg\s+\.\w+\s+([^;]*);", body):
        names += [name.strip() for name in declared.split(",")]
    return {name: f"{name}_{number}" for name in names}


def _end_of_scope(text: str, begin: int) -> int:
    depth = 1
    for match in re.finditer(r"[{}]", text[begin:]):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return begin + match.start()
    raise ValueError("a brace is not closed")


def _rename(text: str, scopes: list[Scope]) -> str:
    for scope in reversed(scopes):
        for old, new in scope.items():
            text = re.sub(rf"(?<![\w$%.]){re.escape(old)}(?![\w$])", new, text)
    return text


def _label(name: str) -> str:
    return name.replace("$", "")


def _read_statement(kernel: Kernel, text: str) -> None:
    if not text or text.startswith(".pragma"):
        return
    if declared := re.fullmatch(r"\.reg \.(\w+) (.*)", text):
        for name in declared[2].split(","):
            stem, _, count = name.strip().rstrip(">").partition("<")
            for register in [f"{stem}{i}" for i in range(int(count))] if count else [stem]:
                kernel.registers[variable(register)] = type_of(declared[1].replace("s", "u").replace("f", "u"))
    elif declared := re.fullmatch(r"\.shared \.align (\d+) \.b8 ([\w$]+)\[(\d+)\]", text):
        kernel.place_in_smem(declared[2], int(declared[1]), int(declared[3]))
    elif text.startswith("."):
        raise ValueError(f"a directive that has no translation: {text}")
    else:
        guard = ""
        if text.startswith("@"):
            predicate, text = text[1:].split(" ", 1)
            guard = ("!" if predicate[0] == "!" else "") + variable(predicate.lstrip("!"))
        name, _, operands = text.partition(" ")
        if name in ("bra", "bra.uni"):
            operands = _label(operands)
        kernel.statements.append(Instruction(guard, name, operands))


def _write_kernel(kernel: Kernel, name: str) -> Iterator[str]:
    lines = [
        statement if isinstance(statement, str) else translate_instruction(kernel, statement)
        for statement in kernel.statements
    ]
    used = set(re.findall(r"\br_\w+", "\n".join(lines)))
    yield f"void {name}(const void* const* params) {{"
    yield from (f"  {kind} {register};" for register, kind in kernel.registers.items() if register in used)
    yield from (f"  {line}" for line in lines if line)
    yield "}"
    yield f'const Translation translation_of_{name}("{kernel.symbol}", {{&{name}, {kernel.static_smem_bytes}}});'


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(translate(Path(sys.argv[1]).read_text()))
