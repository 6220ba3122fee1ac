"""PTX instructions in C++, in terms of csrc/dev/emulator/ptx.h: a row of a table for each, where a row can say it.

In a row {0}, {1}, ... are the operands as values of the type that ends the instruction's name, and {i0}, {u0}, {f0},
{p0} as int32_t, uint32_t, float, bool; {s0} and {g0} are pointers to [operand] in shared and in global
memory, {in0} is the address itself; {v0} is a std::array of the registers between braces, {r0} the register to assign
to; {map0} and {box0} are the two parts of [descriptor, {coordinates}], {label} is where to go.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

HALVES = {"f16": "cutlass::half_t", "bf16": "cutlass::bfloat16_t"}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
SPECIAL_REGISTERS = {
    "%tid.x": "thread_idx.x",
    "%ctaid.x": "block_idx.x",
    "%nctaid.x": "grid_dim.x",
    "%cluster_ctarank": "block_of_cluster()",
}

SPACES = {"shared": "s", "global": "g", "param": "g", "generic": "g"}  # how a row names [operand] in them

# Results of operands that have the type of the result, by the name without this type. Integers wrap around (-fwrapv).
OF_INTEGERS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul.lo": "{0} * {1}",
    "mad.lo": "{0} * {1} + {2}",
    "mul.hi": "multiply_high({0}, {1})",
    "div": "divide({0}, {1})",
    "rem": "remainder({0}, {1})",
    "min": "{0} < {1} ? {0} : {1}",
    "max": "{0} > {1} ? {0} : {1}",
    "neg": "-{0}",
    "abs": "{0} < 0 ? -{0} : {0}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "xor": "{0} ^ {1}",
    "not": "~{0}",
    "shl": "shift_left({0}, {1})",
    "shr": "shift_right({0}, {1})",
    "bfi": "insert_bits({0}, {1}, {2}, {3})",
    "bfind.shiftamt": "shift_of_highest_bit({0})",
    "brev": "reverse_bits({0})",
    "mapa.shared::cluster": "cluster_address({0}, {1})",
    "mov": "{0}",
    "cvta.to.global": "{0}",
    "cvta.param": "{0}",
}
OF_FLOATS = {
    "add": "{0} + {1}",
    "add.rn": "{0} + {1}",
    "add.rz": "round_to_zero(static_cast<double>({0}) + {1})",
    "sub": "{0} - {1}",
    "sub.rn": "{0} - {1}",
    "mul": "{0} * {1}",
    "mul.rn": "{0} * {1}",
    "div.rn": "{0} / {1}",
    "fma.rn": "std::fma({0}, {1}, {2})",
    "fma.rm": "round_down(std::fma(static_cast<double>({0}), {1}, {2}))",
    "min": "fminf({0}, {1})",
    "max": "fmaxf({0}, {1})",
    "max.NaN": "max_or_nan({0}, {1})",
    "neg": "-{0}",
    "abs": "std::fabs({0})",
    "copysign": "std::copysign({1}, {0})",
    "ex2.approx": "std::exp2({0})",
    "ex2.approx.ftz": "fast_exp2({0})",
    "rcp.approx.ftz": "reciprocal_flushing({0})",
    "mov": "{0}",
}
OF_PREDICATES = {"and": "{0} && {1}", "or": "{0} || {1}", "xor": "{0} != {1}", "not": "!{0}", "mov": "{0}"}

_TMA_LOAD = "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
_MMA = "mma.sync.aligned.m16n8k16.row.col.f32"
# Statements, by the whole name.
STATEMENTS = {
    "bra": "goto {label};",
    "bra.uni": "goto {label};",
    "ret": "return;",
    "nanosleep.u32": "",
    "prefetch.tensormap": "",
    "fence.proxy.async.shared::cta": "ordering::fence();",
    "fence.mbarrier_init.release.cluster": "fence_mbarrier_init();",
    "bar.warp.sync": "sync_warp({u0});",
    "bar.arrive": "arrive_at_named_barrier({i0}, {i1});",
    "barrier.cluster.arrive.release": "arrive_at_cluster_barrier();",
    "barrier.cluster.wait.acquire": "wait_at_cluster_barrier();",
    "mbarrier.init.shared::cta.b64": "init_mbarrier({s0}, {i1});",
    "mbarrier.arrive.shared::cta.b64": "arrive_at_mbarrier({s1});",
    "mbarrier.arrive.shared::cluster.b64": "arrive_in_cluster({in1});",
    "mbarrier.arrive.expect_tx.shared::cta.b64": "arrive_and_expect_bytes({s1}, {i2});",
    "mbarrier.try_wait.parity.shared::cta.b64": "wait_at_mbarrier({s1}, {u2}); {r0} = true;",
    "setmaxnreg.inc.sync.aligned.u32": "take_registers_up_to({i0});",
    "setmaxnreg.dec.sync.aligned.u32": "give_up_registers_to({i0});",
    "red.relaxed.gpu.global.add.f32": "memory::add_to_global(static_cast<float*>({g0}), {f1});",
    "atom.relaxed.gpu.global.add.s32": "{r0} = fetch_and_add({g1}, {i2});",
    "ld.acquire.gpu.global.b32": "poll(); {r0} = memory::load_from_global(static_cast<int*>({g1}));",
    "st.release.gpu.global.b32": "memory::store_to_global(static_cast<int*>({g0}), {i1});",
    "cp.async.cg.shared.global.L2::128B": "copy_async({s0}, {g1}, {u2}, {u3});",
    "cp.async.commit_group": "commit_async_copies();",
    "cp.async.wait_group": "wait_for_async_copies({i0});",
    "cp.async.wait_all": "wait_for_all_async_copies();",
    f"{_TMA_LOAD}.L2::cache_hint": "start_box_load(tensor_map({map1}), {s2}, {s0}, {box1});",
    f"{_TMA_LOAD}.multicast::cluster.L2::cache_hint": (
        "start_box_multicast(tensor_map({map1}), {s2}, {s0}, {u3}, {box1});"
    ),
    "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group": "start_box_store(tensor_map({map0}), {s1}, {box0});",
    "cp.async.bulk.commit_group": "commit_box_stores();",
    "cp.async.bulk.wait_group.read": "wait_until_stores_left({i0});",
    "stmatrix.sync.aligned.x4.m8n8.shared.b16": "store_four_matrices({v1}, {s0});",
    # A product is done when it is started (ptx.h).
    "wgmma.fence.sync.aligned": "",
    "wgmma.commit_group.sync.aligned": "",
    "wgmma.wait_group.sync.aligned": "",
}
# Results that are assigned to one register after the other, by the whole name.
ARRAYS = {
    "ldmatrix.sync.aligned.x4.m8n8.shared.b16": "load_four_matrices<MatrixOrder::kRows>({s1})",
    "ldmatrix.sync.aligned.x4.trans.m8n8.shared.b16": "load_four_matrices<MatrixOrder::kTransposed>({s1})",
    f"{_MMA}.f16.f16.f32": "multiply_accumulate<cutlass::half_t>({v1}, {v2}, {v3})",
    f"{_MMA}.bf16.bf16.f32": "multiply_accumulate<cutlass::bfloat16_t>({v1}, {v2}, {v3})",
    "shfl.sync.up.b32": "shuffle(Shuffle::kUp, {u1}, {u2}, {u3}, {u4})",
    "shfl.sync.bfly.b32": "shuffle(Shuffle::kXor, {u1}, {u2}, {u3}, {u4})",
    "shfl.sync.idx.b32": "shuffle(Shuffle::kIdx, {u1}, {u2}, {u3}, {u4})",
    "vote.sync.ballot.b32": "std::array{{ballot({u2}, {p1})}}",
    "elect.sync": "elect({u1})",
}


@dataclass
class Instruction:
    guard: str  # a C++ condition, or nothing
    name: str
    operands: str


@dataclass
class Kernel:
    symbol: str
    params: list[str]
    statements: list[str | Instruction] = field(default_factory=list)  # labels are C++ already
    registers: dict[str, str] = field(default_factory=dict)  # C++ types
    static_smem: dict[str, int] = field(default_factory=dict)  # where arrays of known size begin in shared memory
    static_smem_bytes: int = 0

    def place_in_smem(self, name: str, align: int, size: int) -> None:
        self.static_smem[name] = -(-self.static_smem_bytes // align) * align
        self.static_smem_bytes = self.static_smem[name] + size


def variable(register: str) -> str:
    return "r_" + register.removeprefix("%").replace("$", "_")


def type_of(kind: str) -> str:
    """Of PTX's s32, b64, f32, pred."""
    named = {"f32": "float", "f64": "double", "pred": "bool"}
    return named.get(kind) or f"{'int' if kind[0] == 's' else 'uint'}{kind[1:]}_t"


def split(operands: str) -> list[str]:
    """At the commas that no bracket encloses."""
    parts, depth = [""], 0
    for character in operands:
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def members(operand: str) -> list[str]:
    """The registers of {a, b}, of a|b, or of a."""
    return split(operand[1:-1]) if operand.startswith("{") else operand.split("|")


def translate_instruction(kernel: Kernel, instruction: Instruction) -> str:
    code = _Translation(kernel, instruction).code()
    return f"if ({instruction.guard}) {{ {code} }}" if instruction.guard else code


class _Translation:
    def __init__(self, kernel: Kernel, instruction: Instruction) -> None:
        self.kernel = kernel
        self.name = instruction.name
        self.parts = instruction.name.split(".")
        self.kind = self.parts[-1]
        self.operands = split(instruction.operands)

    def code(self) -> str:
        if self.name in STATEMENTS:
            return STATEMENTS[self.name].format_map(self)
        if self.name in ARRAYS:
            return self.assign_each(members(self.operands[0]), ARRAYS[self.name].format_map(self))
        own = getattr(self, f"_{self.parts[0]}", None)
        code = own() if own else None
        return self._operation() if code is None else code

    def _operation(self) -> str:
        forms = {"f": OF_FLOATS, "p": OF_PREDICATES}.get(self.kind[0], OF_INTEGERS)
        form = forms.get(self.name.removesuffix(f".{self.kind}"))
        if form is None:
            raise ValueError(f"no translation of {self.name} {', '.join(self.operands)}")
        values = [self.value(operand, self.kind) for operand in self.operands[1:]]
        return self.assign(self.operands[0], f"static_cast<{type_of(self.kind)}>({form.format(*values)})")

    # -- operands

    def __getitem__(self, key: str) -> str:
        """What a row's {key} stands for."""
        if key == "label":
            return self.operands[0]
        view, number = re.fullmatch(r"([a-z]+)(\d)", key).groups()
        operand = self.operands[int(number)]
        kinds = {"i": "s32", "u": "u32", "f": "f32", "p": "pred"}
        if view in kinds:
            return self.value(operand, kinds[view])
        if view in ("map", "box"):  # [descriptor, {coordinates}]
            descriptor, origin = split(operand[1:-1])
            at = ", ".join(self.value(coordinate, "s32") for coordinate in members(origin))
            return self.value(descriptor, "u64") if view == "map" else f"BoxOrigin{{{{{at}}}}}"
        return {
            "s": lambda: f"shared({self.address(operand)})",
            "g": lambda: f"global({self.address(operand)})",
            "in": lambda: self.address(operand),
            "v": lambda: self.array(members(operand)),
            "r": lambda: variable(operand),
        }[view]()

    def value(self, operand: str, kind: str) -> str:
        wanted = type_of(kind)
        if operand.startswith("!"):
            return f"!{self.value(operand[1:], kind)}"
        if variable(operand) in self.kernel.registers:
            return variable(operand) if kind == "pred" else f"as<{wanted}>({variable(operand)})"
        if operand in SPECIAL_REGISTERS:
            return f"static_cast<{wanted}>({SPECIAL_REGISTERS[operand]})"
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", operand):
            return f"as<{wanted}>(0x{operand[2:]}u)"
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
            return f"static_cast<{wanted}>({operand.rstrip('U')}{'ll' if operand.startswith('-') else 'ull'})"
        return f"static_cast<{wanted}>({self.symbol(operand)})"

    def symbol(self, name: str) -> str:
        """Its address."""
        if name in self.kernel.params:
            return f"address_of(params[{self.kernel.params.index(name)}])"
        if name in self.kernel.static_smem:
            return str(self.kernel.static_smem[name])
        if name.endswith("dynamic_smem_bytesE") and not self.kernel.static_smem:
            return "0"
        raise ValueError(f"no translation of {name} in {self.name} {', '.join(self.operands)}")

    def address(self, operand: str) -> str:
        """Of [register + number]."""
        base, sign, offset = re.fullmatch(r"\[\s*(%?[\w$]+)\s*(?:([+-])\s*(-?\d+))?\s*\]", operand).groups()
        address = variable(base) if variable(base) in self.kernel.registers else self.symbol(base)
        return f"{address} {sign} ({offset})" if sign else address

    def array(self, registers: list[str], kind: str = "u32") -> str:
        values = ", ".join(self.value(register, kind) for register in registers)
        return f"std::array<{type_of(kind)}, {len(registers)}>{{{values}}}"

    def assign(self, register: str, value: str) -> str:
        return f"{variable(register)} = bits_of({value});"

    def assign_each(self, registers: list[str], values: str) -> str:
        code = " ".join(self.assign(register, f"values[{i}]") for i, register in enumerate(registers))
        return f"{{ const auto values = {values}; {code} }}"

    # -- what no row can say, by the first part of the name

    def _mov(self) -> str | None:
        """Of the parts of a register."""
        target, source = self.operands
        if target.startswith("{"):
            parts = members(target)
            return self.assign_each(parts, f"parts_of<{len(parts)}>({self.value(source, self.kind)})")
        if source.startswith("{"):
            parts = members(source)
            width = int(self.kind[1:]) // len(parts)
            return self.assign(target, f"whole_of({self.array(parts, f'u{width}')})")
        return None

    def _selp(self) -> str:
        a, b = (self.value(operand, self.kind) for operand in self.operands[1:3])
        return self.assign(self.operands[0], f"{self.value(self.operands[3], 'pred')} ? {a} : {b}")

    def _setp(self) -> str | None:
        comparison = self.parts[1]
        a, b = (self.value(operand, self.kind) for operand in self.operands[1:3])
        result = f"{a} {COMPARISONS[comparison.removesuffix('u')]} {b}"
        if self.kind[0] == "f" and comparison.endswith("u"):
            result += f" || std::isnan({a}) || std::isnan({b})"
        elif self.kind[0] == "f" and comparison == "ne":
            return None  # false where C++'s is true
        if len(self.parts) == 4:
            combine = {"and": "&&", "or": "||", "xor": "!="}[self.parts[2]]
            result = f"({result}) {combine} {self.value(self.operands[3], 'pred')}"
        return self.assign(self.operands[0], result)

    def _cvt(self) -> str | None:
        *modes, into, source = self.parts[1:]
        values = ", ".join(self.value(operand, "u16" if source in HALVES else source) for operand in self.operands[1:])
        if into in HALVES:
            result, expected = f"to_half<{HALVES[into]}>({values})", ["rn"]
        elif into.endswith("x2"):
            result, expected = f"to_halves<{HALVES[into.removesuffix('x2')]}>({values})", ["rn"]
        elif source in HALVES:
            result, expected = f"from_half<{HALVES[source]}>({values})", []
        elif source[0] == "f":
            result, expected = f"saturated({values})", ["sat"]
        else:
            result, expected = f"static_cast<{type_of(into)}>({values})", ["rn"] if into[0] == "f" else []
        known = modes == expected and "8" not in (into[1:], source[1:])
        return self.assign(self.operands[0], result) if known else None

    def _mul(self) -> str | None:
        if self.parts[1] != "wide":
            return None
        wide = type_of(f"{self.kind[0]}{2 * int(self.kind[1:])}")
        a, b = (self.value(operand, self.kind) for operand in self.operands[1:])
        return self.assign(self.operands[0], f"static_cast<{wide}>({a}) * {b}")

    def _ld(self) -> str | None:
        space = self._space()
        if self.kind in ("s8", "s16"):
            return None  # whose registers are wider, and filled by the sign
        targets = members(self.operands[0])
        function = f"{'load_param' if space == 'param' else 'load'}<{type_of(self.kind)}, {len(targets)}>"
        return self.assign_each(targets, f"{function}({self[f'{SPACES[space]}1']})") if space else None

    def _st(self) -> str | None:
        space = self._space()
        values = self.array(members(self.operands[1]), self.kind)
        return f"store({self[f'{SPACES[space]}0']}, {values});" if space else None

    def _space(self) -> str | None:
        space, *more = [part for part in self.parts[1:-1] if part not in ("v2", "v4", "nc")] or ["generic"]
        return space if space in SPACES and not more else None

    def _bar(self) -> str | None:
        if self.name != "bar.sync":
            return None
        return "sync_block();" if self.operands == ["0"] else "wait_at_named_barrier({i0}, {i1});".format_map(self)

    def _wgmma(self) -> str | None:
        form = r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(b?f16)\.\2"
        sums, a, b, accumulates, scale_a, scale_b, *major = self.operands
        in_registers = a.startswith("{")
        match = re.fullmatch(form, self.name)
        registers = members(sums)
        if match is None or int(match[1]) != 2 * len(registers) or (scale_a, scale_b) != ("1", "1"):
            return None
        if not in_registers and major[0] != "0":
            return None
        given = ", ".join(
            (
                {"f16": "ProductElement::kFp16", "bf16": "ProductElement::kBf16"}[match[2]],
                self.array(members(a)) if in_registers else self.value(a, "u64"),
                self.value(b, "u64"),
                f"Major::{'kMN' if major[-1] == '1' else 'kK'}",
                self.value(accumulates, "pred"),
                self.array(registers),
            )
        )
        return self.assign_each(registers, f"multiply_group({given})")
