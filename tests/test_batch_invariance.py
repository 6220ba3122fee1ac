"""With num_splits=1 a row's bits don't depend on what stands beside it in its batch (test_hard_cases.py, 12)."""

from dataclasses import replace

import pytest
import torch
from cases import BF16, FP16, FP32, Case
from harness import build, cumulative, device_of, on_path
from tolerance import assert_same_bits

# An entry that is looked at: its queries, its keys and how many of those are in use, with room for several tiles.
CASES = [
    Case("packed", "queries and keys packed", "varlen", (9,), (300,), heads=(6, 2), causal=True),
    Case("packed-long", "several tiles of rows", "varlen", (150,), (300,), heads=(2, 1), dtype=FP16),
    Case("packed-window", "a window as wide as this entry's keys, not as wide as all keys", "varlen", (40,), (40,),
         heads=(4, 2), window=(45, 0)),
    Case("packed-scores", "every score feature", "varlen", (9,), (200,), heads=(4, 2), softcap=3.0, alibi="batch",
         sinks=FP32, window=(150, 20), seqused_k=(170,)),
    Case("pages", "one query, keys in pages", "varlen", (1,), (300,), heads=(14, 2), seqused_k=(290,), page=16,
         causal=True),
    Case("pages-chunk", "a chunk of a prompt, keys in pages", "varlen", (33,), (300,), heads=(5, 1), seqused_k=(290,),
         page=5, causal=True, leftpad=(7,), sinks=BF16),
    Case("pages-by-offsets", "lengths of pages from cu_seqlens_k", "varlen", (5,), (300,), heads=(4, 2), page=16,
         lengths_by_cu_seqlens_k=True, causal=True),
    Case("cache", "one query each", "kvcache", (1,), (300,), heads=(14, 2), seqused_k=(290,), causal=True),
    Case("cache-drafted", "more rows than one instruction's", "kvcache", (5,), (300,), heads=(8, 2), seqused_k=(290,),
         causal=True, dtype=FP16),
    Case("cache-packed", "packed queries over a cache", "kvcache", (5,), (300,), heads=(8, 2), seqused_k=(290,),
         varlen_q=True, window=(200, 0)),
    Case("cache-pages", "a paged cache", "kvcache", (1,), (300,), heads=(4, 1), seqused_k=(290,), page=64,
         softcap=5.0),
]  # fmt: skip
LENGTHS_OF_OTHERS = ((1, 17), (9, 0), (70, 130), (0, 40), (3, 300))  # queries, keys
# Entries before it and after it.
PLACES = ((0, 1), (1, 0), (2, 3), (30, 11))


def _other(case, number, device):
    """An entry to stand beside the one of `case`, in tensors of the same shapes where those have no lengths."""
    length_q, length_k = LENGTHS_OF_OTHERS[number % len(LENGTHS_OF_OTHERS)]
    has_room = case.layout == "kvcache" or case.seqused_k is not None
    options = {"seqused_k": (min(length_k, *case.lens_k),)} if has_room else {"lens_k": (length_k,)}
    if case.layout == "varlen" or case.varlen_q:
        options["lens_q"] = (length_q,)
    if case.leftpad is not None:
        options["leftpad"] = (length_k // 2,)
    return build(replace(case, id=f"{case.id} {number}", **options), device)


def _table_of_all(entries):
    """The entries' rows of page ids, for the pool that holds their pools one after another."""
    tables = [entry.layout["block_table"] for entry in entries]
    width, first = max(table.shape[1] for table in tables), 0
    rows = []
    for entry, table in zip(entries, tables, strict=True):
        num_pages = entry.k.shape[0]
        moved = torch.where((table >= 0) & (table < num_pages), table + first, table)
        rows.append(torch.nn.functional.pad(moved, (0, width - table.shape[1]), value=-1))
        first += num_pages
    return torch.cat(rows)


def _used(entry, name):
    """A packed tensor without the rows past its last sequence; any other whole."""
    tensor = getattr(entry, name)
    is_packed = entry.case.layout == "varlen" and entry.case.page is None and name != "q"
    return tensor[: entry.case.lens_k[0]] if is_packed else tensor


def _batch(entries):
    """Inputs of one call for entries that have one each."""
    one = entries[0]
    layout = {}
    for name, value in one.layout.items():
        values = [entry.layout[name] for entry in entries]
        if name == "block_table":
            layout[name] = _table_of_all(entries)
        elif name.startswith("cu_seqlens"):
            layout[name] = cumulative([int(offsets[1]) for offsets in values], value.device)
        else:
            layout[name] = torch.cat(values)
    score = dict(one.score)
    if one.case.alibi == "batch":
        score["alibi_slopes"] = torch.cat([entry.score["alibi_slopes"] for entry in entries])
    lengths = {name: sum((getattr(entry.case, name) for entry in entries), ()) for name in ("lens_q", "lens_k")}
    tensors = {name: torch.cat([_used(entry, name) for entry in entries]) for name in "qkv"}
    return replace(one, case=replace(one.case, **lengths), score=score, layout=layout, **tensors)


def _rows_of(result, case, num_before, rows_before):
    """(out, lse) of one entry."""
    out, lse = result
    if case.layout == "varlen" or case.varlen_q:
        rows = slice(rows_before, rows_before + case.lens_q[0])
        return out[rows], lse[:, rows]
    return out[num_before], lse[num_before]


@pytest.mark.parametrize("pack_gqa", [None, True, False])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_12_rows_do_not_depend_on_their_batch(path, case, pack_gqa):
    device = device_of(path)
    entry = build(case, device)
    expected = None
    for num_before, num_after in ((0, 0), *PLACES):
        others = [_other(case, number, device) for number in range(num_before + num_after)]
        inputs = _batch([*others[:num_before], entry, *others[num_before:]])
        # s_aux, and slopes that all entries share, are the entry's wherever it stands.
        inputs.score |= {name: value for name, value in entry.score.items() if name != "alibi_slopes"}
        result = on_path(
            path, case.features, inputs, lambda inputs=inputs: inputs.call(num_splits=1, pack_gqa=pack_gqa)
        )
        if result is None:
            return
        rows_before = sum(other.case.lens_q[0] for other in others[:num_before])
        ours = _rows_of(result, case, num_before, rows_before)
        expected = expected or ours
        for name, *pair in zip(("out", "lse"), ours, expected, strict=True):
            assert_same_bits(f"{name} behind {num_before} and before {num_after} others", *pair)


@pytest.mark.parametrize("length_q", [1, 40])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_12_an_entry_of_a_dense_batch(path, length_q, softcap, dtype):
    for length_k in range(5, 65, 4):
        case = Case(f"dense-{length_q}-{length_k}", "four entries", "dense", (length_q,) * 4, (length_k,) * 4,
                    heads=(4, 2), softcap=softcap, dtype=dtype)  # fmt: skip
        inputs = build(case, device_of(path))
        alone = replace(inputs, q=inputs.q[:1], k=inputs.k[:1], v=inputs.v[:1])
        ours, expected = (on_path(path, case.features, x, lambda x=x: x.call(num_splits=1)) for x in (inputs, alone))
        if ours is not None:
            for name, batch, one in zip(("out", "lse"), ours, expected, strict=True):
                assert_same_bits(name, batch[:1], one)
