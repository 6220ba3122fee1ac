"""The CUDA ops that move tokens of a KV cache give the CPU path's bits; what its checks refuse writes nothing.

On a GPU or, without one, on the emulated kernels.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from cases import BF16, FP16
from emulation import IS_EMULATED
from harness import cumulative, device_of, int32
from tolerance import assert_same_bits

from flash_attn import _extension, _ops

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or IS_EMULATED) or not _extension.is_loaded(),
    reason="no CUDA device, or no kernels",
)
DEVICE = device_of("sm80")
ops = torch.ops.flash_attn


@dataclass(frozen=True)
class Append:
    """An append of `new` tokens an entry at positions `starts`."""

    id: str
    reason: str
    starts: tuple[int, ...] = (14, 0, 31)
    new: tuple[int, ...] = (5, 5, 5)
    dims: tuple[int, int] = (64, 64)
    heads: int = 3
    capacity: int = 48
    page: int | None = None
    rotary: tuple[int, bool] | None = None  # (rotary_dim, interleaved)
    rows: tuple[int, ...] | None = None  # cache_batch_idx
    packed: bool = False
    dtype: torch.dtype = BF16
    seed: int = 0

    @property
    def num_rows(self):
        return len(self.starts) if self.rows is None else max(self.rows) + 2


CASES = [
    Append("dense", "rows one after another"),
    Append("fp16", "the other dtype", dtype=FP16, rotary=(32, True)),
    Append("wide", "the largest heads, and V's of another size", dims=(512, 256), rotary=(128, False)),
    Append("odd", "columns that 16 bytes don't divide", dims=(111, 41), rotary=(16, False)),
    Append("odd-pairs", "neighbours in such columns", dims=(36, 20), rotary=(32, True)),
    Append("one-head", "fewer pieces than threads", heads=1, dims=(8, 8)),
    Append("many-heads", "more pieces than threads", heads=40, dims=(128, 128), rotary=(128, True)),
    Append("pages", "tokens cross page edges", page=16, rotary=(64, False)),
    Append("page-of-one", "a page per token", page=1),
    Append("odd-pages", "pages of no power of two", page=7, rotary=(32, True)),
    Append("rows", "entries live in other rows", rows=(4, 0, 2), rotary=(32, False)),
    Append("table-rows", "and in other rows of the table", rows=(4, 0, 2), page=16),
    Append("packed", "each entry has its own number of tokens", new=(4, 0, 9), packed=True, rotary=(32, True)),
    Append("packed-pages", "in pages too", new=(0, 17, 1), packed=True, page=8),
    Append("none", "no token at all", new=(0, 0, 0)),
]


def arguments(case, device):
    """The op's arguments; the cache holds NaN."""
    generator = torch.Generator().manual_seed(case.seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype).to(device)

    lead = (sum(case.new),) if case.packed else (len(case.new), case.new[0])
    table = None
    shape = (case.num_rows, case.capacity)
    if case.page is not None:
        pages = -(-case.capacity // case.page)
        table = torch.randperm(case.num_rows * pages + 2, generator=generator)[: case.num_rows * pages]
        table = table.view(case.num_rows, pages).to(torch.int32).to(device)
        shape = (case.num_rows * pages + 2, case.page)
    caches = [torch.full((*shape, case.heads, d), math.nan, dtype=case.dtype, device=device) for d in case.dims]
    new = [draw(*lead, case.heads, d) for d in case.dims]
    tables, interleaved = (None, None), True
    if case.rotary is not None:
        tables, interleaved = [draw(case.capacity, case.rotary[0] // 2) for _ in range(2)], case.rotary[1]
    return [
        *caches, *new, *tables, int32(case.starts, device), cumulative(case.new, device) if case.packed else None,
        int32(case.rows, device), table, interleaved,
    ]  # fmt: skip


def check_append(ours, expected):
    """`ours` runs on the GPU, `expected` on the CPU, both on equal arguments."""
    ops.append_kv(*ours)
    ops.cpu_append_kv(*expected)
    for index, name in enumerate(("k_cache", "v_cache")):
        assert_same_bits(name, ours[index], expected[index])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_append(case):
    check_append(arguments(case, DEVICE), arguments(case, "cpu"))


STRIDES = {
    "k-and-v-in-one-buffer": lambda k, v: torch.stack((k, v), dim=2).unbind(2),
    "heads-before-tokens": lambda k, v: [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)],
    "columns-side-by-side": lambda k, v: torch.cat((k, v), dim=-1).split(k.shape[-1], dim=-1),
    "columns-apart": lambda k, v: [x.mT.contiguous().mT for x in (k, v)],
    "odd-start": lambda k, v: [torch.cat((x[..., :1], x), dim=-1)[..., 1:] for x in (k, v)],
}


@pytest.mark.parametrize("what", ["caches", "tokens"])
@pytest.mark.parametrize("view", STRIDES.values(), ids=STRIDES)
@pytest.mark.parametrize("page", [None, 16])
def test_append_of_any_strides(page, view, what):
    case = Append("strided", "views", page=page, rotary=(32, False))
    ours = arguments(case, DEVICE)
    first = 0 if what == "caches" else 2
    ours[first : first + 2] = view(*ours[first : first + 2])
    check_append(ours, arguments(case, "cpu"))


def test_append_takes_tables_of_any_strides():
    case = Append("tables", "views", rotary=(32, False))
    ours = arguments(case, DEVICE)
    ours[4], ours[5] = ours[4].mT.contiguous().mT, torch.cat((ours[5], ours[5]), dim=1)[:, :16]
    check_append(ours, arguments(case, "cpu"))


WILD = (-(2**31), 2**31 - 1, -7, 5000)


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("rotary", [None, (32, True)])
@pytest.mark.parametrize("name, index", [("cache_seqlens", 6), ("cache_batch_idx", 8), ("block_table", 9)])
def test_what_does_not_exist_is_not_written(name, index, rotary, page):
    if name == "block_table" and page is None:
        pytest.skip("no table without pages")
    case = Append("wild", "wild metadata", starts=(3,) * 4, new=(5,) * 4, rows=(0, 1, 2, 3), page=page, rotary=rotary)
    ours = arguments(case, DEVICE)
    target = ours[index][:4]
    first_past = {"cache_seqlens": case.capacity, "cache_batch_idx": case.num_rows, "block_table": len(ours[0])}[name]
    wild = int32((*WILD[:3], first_past), DEVICE)
    target.copy_(wild[:, None].expand_as(target) if target.dim() == 2 else wild)
    ops.append_kv(*ours)
    assert ours[0].isnan().all() and ours[1].isnan().all()


def test_tokens_past_the_end_are_dropped():
    """The first tokens of an entry still fit."""
    case = Append("edge", "the cache ends within the new tokens", starts=(45, 0, 48))
    ours, expected = arguments(case, DEVICE), arguments(case, "cpu")
    ops.append_kv(*ours)
    expected[0][0, 45:], expected[1][0, 45:] = expected[2][0, :3], expected[3][0, :3]
    expected[0][1, :5], expected[1][1, :5] = expected[2][1], expected[3][1]
    for index, name in enumerate(("k_cache", "v_cache")):
        assert_same_bits(name, ours[index], expected[index])


def test_tokens_past_the_rotary_tables_are_dropped():
    case = Append("short", "tables that end within the new tokens", starts=(14, 0, 31), rotary=(32, True))
    ours, expected = arguments(case, DEVICE), arguments(case, "cpu")
    ours[4:6] = [table[:16] for table in ours[4:6]]
    ops.append_kv(*ours)
    ops.cpu_append_kv(*expected)
    for index, name in enumerate(("k_cache", "v_cache")):
        expected[index][:, 16:] = math.nan
        assert_same_bits(name, ours[index], expected[index])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("index", [(4, 5), (9,)], ids=["rotary", "block_table"])
def test_tables_without_a_place_for_any_token(index, packed):
    """An empty tensor has no address, and isn't one that was left out."""
    case = Append("empty", "no positions, or no pages", page=16, rotary=(32, True), packed=packed)
    ours = arguments(case, DEVICE)
    for i in index:
        ours[i] = ours[i][:0] if i < 9 else ours[i][:, :0]
    ops.append_kv(*ours)
    assert ours[0].isnan().all() and ours[1].isnan().all()


@pytest.mark.parametrize("cu_seqlens", [WILD, (0, 100, 2**31 - 1, 50), (9, 3, 1, 0)])
def test_wild_cu_seqlens_write_no_foreign_memory(cu_seqlens):
    case = Append("wild-cu", "wild offsets", new=(4, 0, 9), packed=True, rotary=(32, True))
    ours = arguments(case, DEVICE)
    guarded = [torch.full((x.shape[0] + 2, *x.shape[1:]), math.nan, dtype=x.dtype, device=DEVICE) for x in ours[:2]]
    ours[:2] = [x[1:-1] for x in guarded]
    ours[7].copy_(int32(cu_seqlens, DEVICE))
    ops.append_kv(*ours)
    for x in guarded:
        assert x[0].isnan().all() and x[-1].isnan().all()


def test_append_changes_versions():
    ours = arguments(CASES[0], DEVICE)
    for append in (lambda: ops.append_kv(*ours), lambda: _ops.append_kv("sm80", tuple(ours))):
        before = [x._version for x in ours[:2]]
        append()
        assert all(x._version > version for x, version in zip(ours[:2], before, strict=True))


@pytest.mark.skipif(IS_EMULATED, reason="a GPU's")
def test_append_in_a_graph():
    """Captured once, replayed with other lengths, tables and tokens."""
    case = Append("graph", "capture", page=16, rotary=(32, True))
    static = arguments(case, DEVICE)
    ops.append_kv(*static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.append_kv(*static)
    other = replace(case, starts=(2, 40, 17), seed=1)
    for target, source in zip(static, arguments(other, DEVICE), strict=True):
        if isinstance(target, torch.Tensor):
            target.copy_(source)
    graph.replay()
    expected = arguments(other, "cpu")
    ops.cpu_append_kv(*expected)
    assert_same_bits("k_cache", static[0], expected[0])
    assert_same_bits("v_cache", static[1], expected[1])


@pytest.mark.parametrize("advance", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dim, rotary_dim", [(64, 64), (64, 32), (128, 128), (512, 256), (111, 16), (36, 32)])
@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary(interleaved, dim, rotary_dim, packed, advance):
    generator = torch.Generator().manual_seed(dim)
    shape = (12, 5, dim) if packed else (3, 4, 5, dim)
    x = torch.randn(shape, generator=generator).to(BF16)
    # Tokens after the last entry stay as they are.
    cu_seqlens = int32((0, 4, 4, 10)) if packed else None
    tables = [torch.randn(40, rotary_dim // 2, generator=generator).to(BF16) for _ in range(2)]
    given = (x, *tables, int32((0, 7, 33)), cu_seqlens)
    expected = ops.cpu_rotary(*given, interleaved, advance)
    ours = ops.rotary(*(None if g is None else g.to(DEVICE) for g in given), interleaved, advance)
    assert_same_bits("out", ours, expected)
    strided = x.to(DEVICE).transpose(-3, -2).contiguous().transpose(-3, -2)
    ours = ops.rotary(strided, *(None if g is None else g.to(DEVICE) for g in given[1:]), interleaved, advance)
    assert_same_bits("out", ours, expected)


def test_rotary_at_positions_that_the_tables_lack():
    """Such tokens stay as they are, and nothing outside the tables is read."""
    x = torch.randn(4, 2, 3, 64, device=DEVICE, dtype=BF16)
    tables = [torch.randn(40, 16, device=DEVICE, dtype=BF16) for _ in range(2)]
    assert_same_bits("out", ops.rotary(x, *tables, int32(WILD, DEVICE), None, True, True), x)


def test_errors_name_the_argument():
    given = arguments(Append("errors", "bad arguments", rotary=(32, True)), DEVICE)
    for index, bad, message in (
        (1, given[1][:, :-1], "v_cache must have shape"),
        (2, given[2].half(), "k must have dtype"),
        (3, given[3][:, 1:], "v must have k's tokens"),
        (5, given[5][:, :-1], "rotary_sin must have shape"),
        (5, None, "rotary_cos and rotary_sin go together"),
        *(() if IS_EMULATED else [(6, given[6].cpu(), "cache_seqlens must be on the device")]),
        (8, given[6][:1], "cache_batch_idx must have shape"),
        (9, given[6], "block_table must have 2 dimensions"),
    ):
        wrong = list(given)
        wrong[index] = bad
        with pytest.raises(RuntimeError, match=message):
            ops.append_kv(*wrong)
    assert given[0].isnan().all()
    table = int32([[0, 1], [2, 3], [4, 5]], DEVICE)
    for case, index, bad, message in (
        (Append("packed", "", packed=True), 7, int32((0, 5, 10), DEVICE), r"cu_seqlens_k_new must have shape \(4\)"),
        (
            Append("rows", "", rows=(4, 0, 2)),
            8,
            None,
            "k_cache must have one row for each of the 3 batch entries, got 6",
        ),
        (Append("table", "", page=16), 9, table[:2], "block_table must have one row for each of the 3 batch entries"),
        (Append("stride", "", page=16), 9, table.mT.contiguous().mT, "block_table must have rows of stride 1"),
    ):
        wrong = arguments(case, DEVICE)
        wrong[index] = bad
        with pytest.raises(RuntimeError, match=message):
            ops.append_kv(*wrong)
        assert wrong[0].isnan().all()
    with pytest.raises(RuntimeError, match=r"offsets must have shape \(3\)"):
        ops.rotary(given[2], *given[4:6], given[6][:2], None, True, True)
