"""What a run of fuzz.py says: features and kernels that its calls used, and a script that repeats a failure."""

from collections import Counter, defaultdict
from dataclasses import MISSING, dataclass, field, fields, is_dataclass

from emulated_kernels import built_kernels, key_of, name_of
from emulation import IS_EMULATED, SMEM_BYTES
from strategies import HEAD_DIMS, Call

_MANY_SPLITS = 17


@dataclass(frozen=True)
class Failure:
    path: str
    call: Call
    error: str
    seed: int


@dataclass
class Tally:
    """What a run did."""

    calls: int = 0  # each on every path
    served: int = 0  # answers that were compared
    counts: Counter = field(default_factory=Counter)  # of the served calls, per feature
    kernels: Counter = field(default_factory=Counter)  # of the emulated ones, by emulated_kernels.launched_keys
    seconds: float = 0.0
    running: tuple | None = None  # (path, call, when it started)
    failure: Failure | None = None


def bucket_of(dims):
    return next(bucket for bucket in HEAD_DIMS if max(dims) <= bucket)


def _page_size(page):
    return "page 1" if page == 1 else "pages under 16" if page < 16 else "pages of 16 and more"


def _lengths(case):
    """What is special about a case's lengths and the places of its keys."""
    used_q = case.lens_q if case.seqused_q is None else case.seqused_q
    used_k = case.lens_k if case.seqused_k is None else case.seqused_k
    yield from ["no queries"] * (0 in used_q) + ["no keys"] * (0 in used_k)
    yield from ["over 300 keys"] * (max(case.lens_k) > 300) + ["over 128 queries"] * (max(case.lens_q) > 128)
    if case.window[0] >= 0 and any((k - q - case.window[0]) > 0 for q, k in zip(used_q, used_k, strict=True)):
        yield "a window's start inside the keys"
    if case.recycled:
        yield "keys before the window recycled"
    if case.page is not None:
        yield _page_size(case.page)
    if case.new is not None:
        yield "append of several tokens" if max(case.new) > 1 else "append of a token" if max(case.new) else "no append"
    if case.rotary is not None:
        style = "interleaved" if case.rotary[1] else "in halves"
        yield f"rotary {style}, {'some' if case.rotary[0] < case.dims[0] else 'all'} dims"
    if case.varlen_q:
        yield "packed queries with a cache"


def traits(call):
    """What is counted of a call."""
    case = call.case
    strided = [name for name in "qkv" if getattr(call, name) is not None]
    found = [*call.features, *_lengths(case), case.layout, f"head_dim to {bucket_of(case.dims)}", str(case.dtype)]
    found += ["unequal head dims"] * (case.dims[0] != case.dims[1]) + ["odd strides"] * bool(strided)
    found += ["odd head dims"] * (case.dims[0] % 8 != 0 or case.dims[1] % 8 != 0)
    found += ["strided out"] * (call.out is not None) + ["strided dout"] * (call.dout is not None)
    found += [f"K and V share: {call.shared_kv}"] * (call.shared_kv is not None)
    found += [f"metadata: {call.metadata}"] * (call.metadata is not None)
    found += ["deterministic"] * call.deterministic + ["scale <= 0"] * (case.scale is not None and case.scale <= 0)
    found += ["gradient of LSE"] * case.lse_grad + ["rows after the last sequence"] * (call.spare_rows > 0)
    num_splits = f"{_MANY_SPLITS} or more" if call.num_splits >= _MANY_SPLITS else call.num_splits
    found += [f"num_splits {num_splits}", f"pack_gqa {call.pack_gqa}"]
    return {*found}


def summary(tally):
    """Lines that say how many calls used each feature and each kernel; kernels that none used have a 0."""
    lines = [f"{count:8d}  {name}" for name, count in sorted(tally.counts.items())]
    if not IS_EMULATED:
        return lines
    groups, smem = defaultdict(list), SMEM_BYTES // 1024
    for kernel in built_kernels():
        group, dtype, options = kernel
        count = tally.kernels[key_of(kernel)]
        short = name_of((group, dtype, options)).rsplit(f"-{dtype}-")[1]
        groups[group.name].append((f"{dtype} {short}", count))
    lines.append(f"Kernels, of those for up to {smem} KB of shared memory:")
    for name, counts in groups.items():
        lines.append(f"{sum(count for _, count in counts):8d}  {name}: {', '.join(f'{n} {c}' for n, c in counts)}")
    others = [(name, count) for name, count in tally.kernels.items() if isinstance(name, str)]
    return [*lines, *(f"{count:8d}  {name}" for name, count in sorted(others))]


def source_of(value):
    """Python that makes the value; fields that have their defaults are left out."""
    if is_dataclass(value):
        given = [(f.name, getattr(value, f.name)) for f in fields(value)]
        defaults = {f.name: f.default for f in fields(value) if f.default is not MISSING}
        changed = [(n, x) for n, x in given if n not in defaults or not (x is defaults[n] or x == defaults[n])]
        parts = [f"{name}={source_of(x)}" for name, x in changed]
        return f"{type(value).__name__}({', '.join(parts)})"
    return repr(value)


def reproducer(path, call):
    """A script that repeats one call."""
    return (
        "cd tests && python - <<'END'\n"
        "import torch; from math import inf, nan; from cases import Case; from memory import Memory\n"
        "from strategies import Call; from fuzz import check\n"
        f"print(check({path!r}, {source_of(call)}))\n"
        "END"
    )


def describe(failure):
    emulated = f" with FLASH_ATTN_EMULATOR_SEED={failure.seed} and {SMEM_BYTES // 1024} KB" if IS_EMULATED else ""
    return f"FAILED on {failure.path}{emulated}: {failure.error}\n\n{reproducer(failure.path, failure.call)}"
