"""From a declared case to inputs, a call of the public function, and the oracle's answer."""

import math
import zlib
from dataclasses import dataclass, field, replace

import pytest
import reference
import torch
from cases import Case
from emulation import IS_EMULATED

import flash_attn

GPU_PATHS = ("sm80", "sm90")
_SPARE_PAGES = 3


def device_of(path):
    return "cuda" if path in GPU_PATHS and not IS_EMULATED else "cpu"


def seed_of(case):
    return zlib.crc32(case.id.encode())


def generator_for(case):
    return torch.Generator().manual_seed(seed_of(case))


def cumulative(lengths, device="cpu"):
    return torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def int32(values, device="cpu"):
    return None if values is None else torch.tensor(values, dtype=torch.int32, device=device)


@dataclass
class Inputs:
    """The arguments of one call. `score` and `layout` are keywords of reference.attention too."""

    case: Case
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    score: dict
    layout: dict
    new_k: torch.Tensor | None = None
    new_v: torch.Tensor | None = None
    rotary: tuple = (None, None)
    rng_state: torch.Tensor | None = None
    extra: dict = field(default_factory=dict)  # more arguments of the call

    def leaves(self, dtype=None):
        """The same inputs with gradients wanted, and the tensors to differentiate by, in `dtype` if given.

        They share the inputs' memory, so their strides are the inputs' own.
        """
        score = dict(self.score)
        wanted = {name: getattr(self, name) for name in "qkv"}
        if score["s_aux"] is not None:
            wanted["s_aux"] = score["s_aux"]
        for name, tensor in wanted.items():
            wanted[name] = tensor.detach().to(dtype or tensor.dtype).requires_grad_()
        score["s_aux"] = wanted.get("s_aux")
        return replace(self, q=wanted["q"], k=wanted["k"], v=wanted["v"], score=score), wanted

    def call(self, **options):
        """(out, lse) of the public function. With dropout, the generator will draw the right rng_state."""
        case, score = self.case, self.score
        options = dict(self.extra, return_softmax_lse=True) | options
        options |= {name: score[name] for name in ("causal", "window_size", "softmax_scale", "softcap")}
        options |= {"alibi_slopes": score["alibi_slopes"], "s_aux": score["s_aux"]}
        if case.layout == "kvcache":
            return self._call_kvcache(options)
        options["dropout_p"] = case.dropout_p
        if case.dropout_p > 0:
            torch.manual_seed(seed_of(case))
        if case.layout == "dense":
            return flash_attn.flash_attn_func(self.q, self.k, self.v, **options)
        maxima = {"max_seqlen_q": max(case.lens_q), "max_seqlen_k": max(case.lens_k)}
        return flash_attn.flash_attn_varlen_func(
            self.q, self.k, self.v, **(maxima | {"cu_seqlens_k": None} | self.layout | options)
        )

    def _call_kvcache(self, options):
        names = {"seqused_k": "cache_seqlens", "leftpad_k": "cache_leftpad"}
        layout = {names.get(name, name): value for name, value in self.layout.items()}
        if self.case.varlen_q:
            layout["max_seqlen_q"] = max(self.case.lens_q)
        if self.rotary[0] is not None:
            layout["rotary_interleaved"] = self.case.rotary[1]
        return flash_attn.flash_attn_with_kvcache(
            self.q, self.k, self.v, self.new_k, self.new_v, *self.rotary, **(layout | options)
        )

    def expected(self, dtype=torch.float64, stored=None, attend=reference.attention):
        """The oracle's answer, computed in `dtype`; what rotary and append store is rounded to `stored`."""
        q, k, v, layout = self.q, self.k, self.v, dict(self.layout)
        if self.new_k is not None:
            q, k, v, layout = self.after_append(stored or dtype)
        return attend(q, k, v, dtype=dtype, **self.score, **layout, **self.dropout)

    @property
    def dropout(self):
        return {"dropout_p": self.case.dropout_p, "rng_state": self.rng_state}

    def where_cached(self):
        return {name: self.layout[name] for name in ("block_table", "cache_batch_idx") if name in self.layout}

    def after_append(self, dtype):
        """What attention sees after the append: rotated in float32 or better, stored in dtype."""
        case, layout = self.case, dict(self.layout)
        starts = layout["seqused_k"].tolist()
        wide = dtype if dtype is torch.float64 else torch.float32
        q, k, v = (x.cpu().to(wide) for x in (self.q, self.new_k, self.new_v))
        q_rows = list(q.split(list(case.lens_q))) if case.varlen_q else list(q)
        k_rows, v_rows = (list(x.split(list(case.new))) if case.varlen_q else list(x) for x in (k, v))
        if case.rotary is not None:
            advance = case.sides != (None, None)
            tables = [table.cpu().to(wide) for table in self.rotary]
            for b, start in enumerate(starts):
                at_q = start + torch.arange(case.lens_q[b]) * int(advance)
                at_k = start + torch.arange(case.new[b])
                q_rows[b] = reference.rotate(q_rows[b], *tables, at_q, case.rotary[1])
                k_rows[b] = reference.rotate(k_rows[b], *tables, at_k, case.rotary[1])
        q = (torch.cat(q_rows) if case.varlen_q else torch.stack(q_rows)).to(dtype)
        where = self.where_cached()
        k = reference.append(self.k.cpu().to(dtype), k_rows, starts, **where)
        v = reference.append(self.v.cpu().to(dtype), v_rows, starts, **where)
        layout["seqused_k"] = layout["seqused_k"].cpu() + int32(case.new)
        return q, k, v, layout


def _paged(case, rows, used, device, garbage, generator):
    """Scatter the entries' rows into a shuffled pool; unused slots of the table hold -1 and foreign ids."""
    page = case.page
    num_used = [-(-length // page) for length in used]
    num_given_away = [case.first_key(b) // page if case.recycled else 0 for b in range(len(used))]
    num_pages = sum(num_used) + _SPARE_PAGES
    order = (torch.randperm(num_pages - 1, generator=generator) + 1).tolist()  # page 0 is all garbage
    width = max(num_used, default=0) + 2
    stale = (-1, num_pages + 1000, order[-1], -(2**31), 2**31 - 1)
    pools = [x[0].new_full((num_pages, page, *x[0].shape[1:]), garbage) for x in rows]
    table = torch.empty(len(used), width, dtype=torch.int32)
    for b, count in enumerate(num_used):
        ids = [order.pop(0) for _ in range(count)]
        table[b] = torch.tensor(ids + [stale[(b + t) % len(stale)] for t in range(width - count)])
        for t in range(min(num_given_away[b], count)):
            table[b, t] = stale[(b + t) % len(stale)]
        for pool, entries in zip(pools, rows, strict=True):
            for t, page_id in enumerate(ids):
                piece = entries[b][t * page : (t + 1) * page]
                pool[page_id, : piece.shape[0]] = piece
    return (*(pool.to(device) for pool in pools), table.to(device))


def _in_rows(table, rows):
    """A larger table that has the entries' rows in these places, and in others ids that no entry may follow."""
    larger = torch.full((max(rows) + 2, table.shape[1]), 2**31 - 1, dtype=torch.int32, device=table.device)
    larger[list(rows)] = table
    return larger


def _score(case, device, generator):
    num_heads = case.heads[0]
    slopes = None
    if case.alibi is not None:
        shape = (num_heads,) if case.alibi == "heads" else (len(case.lens_q), num_heads)
        slopes = (torch.rand(shape, generator=generator) * 0.3).to(device)
    sinks = None
    if case.sinks is not None:
        sinks = torch.randn(num_heads, generator=generator).to(case.sinks).to(device)
    return {
        "causal": case.causal, "window_size": case.window, "softmax_scale": case.scale, "softcap":
        case.softcap, "alibi_slopes": slopes, "s_aux": sinks,
    }  # fmt: skip


def _keys(case, draw, garbage):
    """Per entry k and v over the whole slot, with garbage wherever the call must not look."""
    k, v, used = [], [], []
    for b, length in enumerate(case.lens_k):
        last = length if case.seqused_k is None else case.seqused_k[b]
        first = case.first_key(b)
        used.append(last + (0 if case.new is None else case.new[b]))
        for rows, dim in ((k, case.dims[0]), (v, case.dims[1])):
            drawn = draw(length, case.heads[1], dim)
            drawn[:first] = garbage
            drawn[last:] = garbage
            rows.append(drawn)
    return k, v, used


def build(case, device="cpu", garbage=math.nan):
    """Inputs of a case, the same on every device. Memory that the call must not use holds `garbage`."""
    generator = generator_for(case)
    num_heads, dim = case.heads[0], case.dims[0]

    def draw(*shape):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * case.loudness).to(case.dtype)

    q_rows = [draw(length, num_heads, dim) for length in case.lens_q]
    for b, length in enumerate(case.seqused_q or ()):
        q_rows[b][length:] = garbage
    k_rows, v_rows, used = _keys(case, draw, garbage)
    layout = {"seqused_q": int32(case.seqused_q, device), "seqused_k": int32(case.seqused_k, device)}
    layout |= {"leftpad_k": int32(case.leftpad, device), "cache_batch_idx": int32(case.cache_rows, device)}
    is_varlen_q = case.layout == "varlen" or case.varlen_q
    if is_varlen_q:
        q = torch.cat(q_rows)
        layout["cu_seqlens_q"] = cumulative(case.lens_q, device)
    else:
        q = torch.stack(q_rows) if q_rows else draw(0, 4, num_heads, dim)
    if case.page is not None:
        k, v, table = _paged(case, (k_rows, v_rows), used, device, garbage, generator)
        layout["block_table"] = table if case.cache_rows is None else _in_rows(table, case.cache_rows)
        if case.lengths_by_cu_seqlens_k:
            layout["cu_seqlens_k"] = cumulative(case.lens_k, device)
    elif case.layout == "varlen":
        layout["cu_seqlens_k"] = cumulative(case.lens_k, device)
        if case.seqused_k is not None:  # rows past the last sequence
            k_rows, v_rows = ([*rows, torch.full_like(rows[0][:3], garbage)] for rows in (k_rows, v_rows))
        k, v = torch.cat(k_rows), torch.cat(v_rows)
    elif case.cache_rows is not None:
        unused = torch.full_like(k_rows[0], garbage), torch.full_like(v_rows[0], garbage)
        k, v = (torch.stack([one] * (max(case.cache_rows) + 2)) for one in unused)
        k[list(case.cache_rows)], v[list(case.cache_rows)] = torch.stack(k_rows), torch.stack(v_rows)
    elif k_rows:
        k, v = torch.stack(k_rows), torch.stack(v_rows)
    else:
        k, v = (draw(0, 4, case.heads[1], d) for d in case.dims)
    layout = {name: value for name, value in layout.items() if value is not None}
    inputs = Inputs(case, q.to(device), k.to(device), v.to(device), _score(case, device, generator), layout)
    if case.new is not None:
        lead = (sum(case.new),) if case.varlen_q else (len(case.new), case.new[0])
        inputs.new_k, inputs.new_v = (draw(*lead, case.heads[1], d).to(device) for d in case.dims)
        if case.varlen_q:
            inputs.extra["cu_seqlens_k_new"] = cumulative(case.new, device)
    if case.rotary is not None:
        num_positions = case.lens_k[0] + max(8, *case.lens_q)
        angle = torch.rand(num_positions, case.rotary[0] // 2, generator=generator) * 2 * math.pi
        inputs.rotary = tuple(table.to(case.dtype).to(device) for table in (angle.cos(), angle.sin()))
    if case.dropout_p > 0:
        inputs.rng_state = drawn_rng_state(seed_of(case), device)
    return inputs


def drawn_rng_state(seed, device="cpu"):
    """What the interface will draw from the device's default generator after torch.manual_seed(seed)."""
    torch.manual_seed(seed)
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device)


@dataclass
class Met:
    """What the calls of the running test met: conftest.py reports a test that was refused as skipped."""

    served: int = 0
    refused: dict = field(default_factory=dict)  # "path: reason", in order


met = Met()


def on_path(path, features, inputs, call):
    """`call()` with the path forced. Where the path has no kernel for it, the refusal is checked and None
    returned.

    Nothing is skipped in silence: the call itself must raise NotImplementedError, which has to name the way
    out, and the dispatcher's own answer for these features must agree with what the call did. The test is
    then reported as skipped, with the path's reasons.
    """
    with flash_attn.use_path(path):
        reasons = flash_attn._dispatch.objections(path, inputs.q, inputs.v.shape[-1], frozenset(features))
        assert not reasons or path != "cpu", "the CPU path has every feature"
        if not reasons:
            met.served += 1
            result = call()
            assert result is not None, "None stands for a refusal"
            return result
        with pytest.raises(NotImplementedError, match=r"use_path\(.cpu.\)"):
            call()
    met.refused[f"{path}: {'; '.join(reasons)}"] = None
    return None


def require_features(path, *features):
    """Skips a test that calls the path without on_path, where the path lacks what the test needs."""
    spec = flash_attn._dispatch.PATHS[path]
    lacks = [flash_attn._dispatch.FEATURES[name] for name in features if name not in spec.features]
    if lacks:
        pytest.skip(f"no kernel for it: {path}: {'; '.join(lacks)}")


def require_kernels(path, q, *features):
    """The same where this GPU's shared memory or this build may lack them for q's head dim and dtype."""
    reasons = flash_attn._dispatch.objections(path, q, q.shape[-1], frozenset({"dense", *features}))
    if reasons:
        pytest.skip(f"no kernel for it: {path}: {'; '.join(reasons)}")


def require_memory(gib):
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, and {free:.0f} GiB are free")
