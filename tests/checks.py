"""What is checked of a case: forward and backward against the oracle, caches after an append, unused memory."""

import math
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import pytest
import reference
import torch
from cases import FP32, Case
from harness import build, device_of, drawn_rng_state, generator_for, int32, on_path, seed_of
from tolerance import assert_close, assert_same_bits, lse_allowance

import flash_attn


def needs(path, case):
    """Leave out what this machine can't or shouldn't run."""
    if case.large and path == "cpu":
        pytest.skip("large cases are for the GPU paths")


def naive(inputs, dtype=None):
    """The computation at the inputs' precision; LSE, which is float32 for 16-bit inputs, at float32."""
    dtype = inputs.case.dtype if dtype is None else dtype
    low = inputs.expected(dtype)
    return low if dtype.itemsize > 2 else low._replace(lse=inputs.expected(torch.float32, stored=dtype).lse)


class Answer(NamedTuple):
    """What a call returned, beside what the oracle says in float64 and at the inputs' precision."""

    out: torch.Tensor
    lse: torch.Tensor
    exact: reference.Attention
    low: reference.Attention
    size: torch.Tensor | None  # reference.output_magnitude


def oracle_answers(inputs):
    """(exact, low, size) of an Answer. Scores are far more precise than outputs of 16 bits, which need no size."""
    dtype = inputs.case.dtype
    size = inputs.expected(dtype, attend=reference.output_magnitude) if dtype.itemsize > 2 else None
    return inputs.expected(), naive(inputs), size


def _oracle_inputs(case, device):
    """On the CPU; with dropout, the mask of a call on `device`, whose generator draws numbers of its own."""
    inputs = build(case)
    return inputs if case.dropout_p == 0 else replace(inputs, rng_state=drawn_rng_state(seed_of(case), device).cpu())


@cache
def declared_answers(case, device):
    """oracle_answers of a case as it is declared: the same for every path of a device and every option that is only a
    hint."""
    return oracle_answers(_oracle_inputs(case, device))


@cache
def declared_gradients(case, device):
    """As declared_answers: what Gradients holds beside ours."""
    inputs = _oracle_inputs(case, device)
    return oracle_gradients(inputs, *output_gradients(inputs))


def answer_of(path, features, inputs, expected=None, **options):
    """The call's answer, or None where the path refuses it. Only what an append writes may have changed.

    `expected` gives the oracle's answers, where they don't depend on more than the case.
    """
    before = {name: getattr(inputs, name).clone() for name in "qkv"}
    result = on_path(path, features, inputs, lambda: inputs.call(**options))
    if result is None:
        return None
    out, lse = result
    case = inputs.case
    assert out.dtype == case.dtype
    assert lse.dtype == (torch.float64 if case.dtype is torch.float64 else torch.float32)
    assert out.device == inputs.q.device
    if case.new is None:
        for name, value in before.items():
            assert_same_bits(name, getattr(inputs, name), value)
    else:
        check_cache(inputs, before)
    if expected is not None:
        return Answer(out, lse, *expected())
    return Answer(out, lse, *oracle_answers(replace(inputs, **before)))


def _assert_all_close(name, parts, **options):
    """The tolerance rule, applied to all of (ours, exact, low, size or None) as if one call had given them."""
    if len(parts) > 1:
        parts = [[None if x[0] is None else torch.cat([y.flatten() for y in x]) for x in zip(*parts, strict=True)]]
    assert_close(name, *parts[0], **options)


def assert_right(*answers):
    """The tolerance rule, applied to all answers as if one call had given them."""
    _assert_all_close("out", [(a.out.cpu(), a.exact.out, a.low.out, a.size) for a in answers])
    allowance = lse_allowance(answers[0].out.dtype)
    _assert_all_close("lse", [(a.lse.cpu(), a.exact.lse, a.low.lse, None) for a in answers], allowance=allowance)


def check_forward(path, case, features=frozenset(), **options):
    """One forward case: values against the oracle, then the same with a poisoned `out=`.

    `options` go to the call; `features` are those that they need beside the case's.
    """
    needs(path, case)
    device, features = device_of(path), case.features | features
    answer = answer_of(path, features, build(case, device), lambda: declared_answers(case, device), **options)
    if answer is None:
        return
    assert answer.out.is_contiguous()
    assert_right(answer)
    again = build(case, device)
    poisoned = torch.full_like(answer.out, math.nan)
    result = on_path(path, features | {"out"}, again, lambda: again.call(out=poisoned, **options))
    if result is not None:
        assert result[0].data_ptr() == poisoned.data_ptr()
        assert_same_bits("out=", poisoned, answer.out)
        assert_same_bits("lse with out=", result[1], answer.lse)


def check_cache(inputs, before):
    """After an append: the new rows are right, and not one byte of any other row has changed."""
    fresh = replace(inputs, k=before["k"], v=before["v"])
    where = fresh.where_cached()
    _, exact_k, exact_v, _ = fresh.after_append(torch.float64)
    _, low_k, low_v, _ = fresh.after_append(inputs.case.dtype)
    for name, exact, low in (("k", exact_k, low_k), ("v", exact_v, low_v)):
        ours = getattr(inputs, name).cpu()
        written = torch.zeros(ours.shape[:2], dtype=torch.bool)
        for b, start in enumerate(inputs.layout["seqused_k"].tolist()):
            for t in range(inputs.case.new[b]):
                written[reference.cache_row(ours, b, start + t, **where)] = True
        assert_close(f"appended {name}", ours[written], exact[written], low[written])
        assert_same_bits(f"rest of {name} cache", ours[~written], before[name].cpu()[~written])


def gradients(inputs, dout, dlse, attend, dtype=None):
    """(out, {name: gradient}) of attend(inputs with leaves) -> (out, lse)."""
    leafy, wanted = inputs.leaves(dtype)
    out, lse = attend(leafy)[:2]
    outputs, weights = [out], [dout.to(out.device, out.dtype)]
    if dlse is not None:
        outputs, weights = [out, lse], [*weights, dlse.to(lse.device, lse.dtype)]
    found = torch.autograd.grad(outputs, list(wanted.values()), weights)
    return out, dict(zip((f"d{name}" for name in wanted), found, strict=True))


def output_gradients(inputs):
    """(dout, dlse or None), drawn for the case."""
    case, generator = inputs.case, generator_for(inputs.case)
    shape = (*inputs.q.shape[:-1], case.dims[1])
    dout = torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)
    if not case.lse_grad:
        return dout, None
    return dout, torch.randn(inputs.q.shape[:-1], generator=generator).movedim(-1, -2).contiguous()


def poisoned(inputs, dout, dlse):
    """The same with NaN in the rows of no sequence and past seqused_q, where nothing that arrives may matter."""
    case = inputs.case
    if "cu_seqlens_q" not in inputs.layout:
        return dout, dlse
    starts = inputs.layout["cu_seqlens_q"].tolist()
    used = torch.zeros(len(dout), dtype=torch.bool)
    for start, length in zip(starts, case.seqused_q or case.lens_q, strict=False):
        used[start : start + length] = True
    return dout.masked_fill(~used[:, None, None], math.nan), None if dlse is None else dlse.masked_fill(~used, math.nan)


class Gradients(NamedTuple):
    """The gradients that a call gave, by name, beside the oracle's in float64 and at the inputs' precision."""

    ours: dict
    exact: dict
    low: dict
    sizes: dict  # reference.gradient_magnitudes


def gradients_on(path, features, inputs, dout, dlse, **options):
    """{name: gradient} of a call of `inputs` with `options`, or None where the path refuses it."""
    features = features | {"backward"}
    result = on_path(path, features, inputs, lambda: gradients(inputs, dout, dlse, lambda x: x.call(**options)))
    if result is None:
        return None
    for name, gradient in result[1].items():
        leaf = inputs.score["s_aux"] if name == "ds_aux" else getattr(inputs, name[1:])
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape and gradient.device == leaf.device
    return result[1]


def oracle_gradients(inputs, dout, dlse):
    """What Gradients holds beside ours."""
    _, exact = gradients(inputs, dout, dlse, lambda x: x.expected(), torch.float64)
    _, low = gradients(inputs, dout, dlse, lambda x: x.expected(inputs.case.dtype))
    options = inputs.score | inputs.layout | inputs.dropout
    sizes = reference.gradient_magnitudes(inputs.q, inputs.k, inputs.v, dout, dlse, **options)
    return exact, low, sizes


def assert_gradients_right(*answers):
    """The tolerance rule, applied to all answers as if one call had given them."""
    for name in answers[0].ours:
        _assert_all_close(name, [(a.ours[name].cpu(), a.exact[name], a.low[name], a.sizes.get(name)) for a in answers])


def check_backward(path, case):
    """One case through autograd: dq, dk, dv and the sinks' gradient, against the oracle's."""
    needs(path, case)
    inputs = build(case, device_of(path))
    dout, dlse = output_gradients(inputs)
    arriving = poisoned(inputs, dout, dlse)
    # The kernels add in another way where they are asked for the same bits every time; the CPU path has one way.
    for deterministic in (False,) if path == "cpu" else (False, True):
        ours = gradients_on(path, case.features, inputs, *arriving, deterministic=deterministic)
        if ours is None:
            return
        assert_gradients_right(Gradients(ours, *declared_gradients(case, device_of(path))))


def check_garbage(path, case, garbage):
    """Memory that a call must not use never matters: bitwise equal to zeros there, forward and backward."""
    clean, dirty = (build(case, device_of(path), garbage=value) for value in (0.0, garbage))
    expected = on_path(path, case.features, clean, clean.call)
    ours = on_path(path, case.features, dirty, dirty.call)
    if expected is not None:
        assert_same_bits("out", ours[0], expected[0])
        assert_same_bits("lse", ours[1], expected[1])
    if not case.differentiable:
        return
    features = case.features | {"backward"}
    expected = on_path(path, features, clean, lambda: gradients_of_a_loss(clean))
    ours = on_path(path, features, dirty, lambda: gradients_of_a_loss(dirty))
    if expected is not None:
        for name, gradient in ours.items():
            assert_same_bits(name, gradient, expected[name])


def gradients_of_a_loss(inputs, deterministic=True, **options):
    """{name: gradient}, by default with the same bits every time, for comparisons of bits."""
    leafy, wanted = inputs.leaves()
    loss = leafy.call(deterministic=deterministic, **options)[0].float().square().sum()
    found = torch.autograd.grad(loss, list(wanted.values()))
    return dict(zip((f"d{name}" for name in wanted), found, strict=True))


def check_nan_is_kept(path, num_queries, num_splits):
    """NaN in a query or a key is in O and LSE of the rows that see it, and of no others, in however many parts the keys
    are."""
    case = Case("nan", "a cache", "kvcache", (num_queries,) * 2, (300,) * 2, seqused_k=(300, 200), heads=(4, 2),
                causal=True, dims=(64, 64))  # fmt: skip
    inputs = build(case, device_of(path))
    inputs.k[0, 3, 1, 7] = math.nan
    inputs.q[1, num_queries - 1, 0, 20] = math.nan
    features = case.features | ({"num_splits"} if num_splits > 1 else set())
    answer = on_path(path, features, inputs, lambda: inputs.call(num_splits=num_splits))
    if answer is None:
        return
    out, lse = answer
    rows = torch.zeros_like(lse, dtype=torch.bool)
    rows[0, 2:] = True
    rows[1, 0, num_queries - 1] = True
    assert_same_bits("rows of O with NaN", out.isnan(), rows.transpose(1, 2)[..., None].expand_as(out))
    assert_same_bits("LSE that is NaN", lse.isnan(), rows)


def check_equal_scores(path):
    """All keys of a row have the same loud score, in dozens of tiles: a maximum that stays must not rescale.

    LSE is the score and the logarithm of the number of keys, whatever its size; O is the mean of V.
    """
    rows, keys, dim, k_value = 130, 4096, 64, 7.03125
    case = Case("equal-scores", "one score a row", "dense", (rows,), (keys,), heads=(1, 1), causal=True)
    inputs = build(case, device_of(path))
    q_values = 6 + torch.arange(rows, device=inputs.q.device) % 64 / 32  # each a bfloat16
    inputs.q.copy_(q_values.view(1, rows, 1, 1).expand_as(inputs.q))
    inputs.k.fill_(k_value)
    # In one part: what merges parts would hide part of it.
    options = {"causal": True, "num_splits": 1, "return_softmax_lse": True}
    result = on_path(
        path, case.features, inputs, lambda: flash_attn.flash_attn_func(inputs.q, inputs.k, inputs.v, **options)
    )
    if result is None:
        return
    out, lse = result
    counts = torch.arange(keys - rows + 1, keys + 1, device=inputs.q.device, dtype=torch.float64)
    scores = q_values.double() * k_value * dim**0.5
    units = (lse[0, 0].double() - scores - counts.log()).abs() / (torch.finfo(torch.float32).eps * scores)
    assert units.max() <= 2, f"LSE is wrong by {units.max():.1f} units of its last place"
    means = inputs.v.double().cumsum(1)[:, keys - rows :] / counts.view(1, rows, 1, 1)
    assert (out.double() - means).abs().max() < torch.finfo(torch.bfloat16).eps


# What the device may find in metadata: values there are not looked at by the host. The first entry's lies the closest,
# since nothing is before its rows.
WILD = (-1, 2**31 - 1, -(2**31), 5000, 0)


def _call_with_wild(path, case, what, **options):
    inputs = build(case, device_of(path))
    target = inputs.layout[what]
    wild = int32(WILD, target.device)
    target.copy_(wild[:, None].expand_as(target) if target.dim() == 2 else wild)
    features = case.features | ({"num_splits"} if options.get("num_splits", 0) > 1 else set())
    on_path(path, features, inputs, lambda: inputs.call(**options))
    if device_of(path) == "cuda":
        torch.cuda.synchronize()


def check_lying_cache(path, what, num_queries, num_splits):
    """Whatever a cache's metadata says, no foreign memory is touched: compute-sanitizer and the emulator look for
    that."""
    case = Case(f"lies-{what}", "wild values", "kvcache", (num_queries,) * 5, (40,) * 5, seqused_k=(40,) * 5,
                heads=(2, 1), causal=True, page=16 if what == "block_table" else None,
                cache_rows=(4, 3, 2, 1, 0) if what == "cache_batch_idx" else None,
                leftpad=(0,) * 5 if what == "leftpad_k" else None)  # fmt: skip
    _call_with_wild(path, case, what, num_splits=num_splits)


def check_lying_append(path, what):
    """Nor is anything written at positions outside of the cache or to pages outside of the pool."""
    case = Case("lies-append", "wild values", "kvcache", (2,) * 5, (40,) * 5, seqused_k=(38,) * 5, new=(2,) * 5,
                page=8, rotary=(32, True), heads=(4, 2), causal=True)  # fmt: skip
    _call_with_wild(path, case, what)


def check_lying_offsets(path):
    """Nor by a packed batch, forward and backward. The offsets don't decrease, or two entries would have the same
    rows."""
    case = Case("lies-varlen", "wild values", "varlen", (120, 0, 150), (130, 20, 150), heads=(2, 1), causal=True,
                seqused_q=(120, 0, 150))  # fmt: skip
    inputs = build(case, device_of(path))
    lowest, highest = -(2**31), 2**31 - 1
    wild = {"cu_seqlens_q": (lowest, 120, highest, highest), "cu_seqlens_k": (-7, 130, 140, 5000)}
    for name, values in (wild | {"seqused_q": (lowest, highest, 5000)}).items():
        inputs.layout[name].copy_(int32(values))
    gradients_on(path, case.features, inputs, *output_gradients(inputs))
    if device_of(path) == "cuda":
        torch.cuda.synchronize()


def check_rows_of_no_entry(path, lens_q, num_splits):
    """Queries past the last offset get O = 0 and LSE = -inf, whatever they hold, and change nothing else."""
    case = Case("unowned", "rows of no entry", "kvcache", lens_q, (600,) * len(lens_q), seqused_k=(590, 7, 0),
                heads=(2, 1), varlen_q=True, causal=True, sinks=FP32)  # fmt: skip
    inputs = build(case, device_of(path))
    # They count in the planner's mean, which chooses the kernels for few rows or those for many.
    num_unowned = 200 if max(lens_q) > 64 else 20
    unowned = torch.full_like(inputs.q[:1].expand(num_unowned, -1, -1), math.nan)
    longer = replace(inputs, q=torch.cat((inputs.q, unowned)))
    features = case.features | ({"num_splits"} if num_splits > 1 else set())
    result = on_path(path, features, inputs, lambda: longer.call(num_splits=num_splits))
    if result is None:
        return
    out, lse = result
    total = sum(lens_q)
    assert (out[total:] == 0).all() and (lse[:, total:] == -math.inf).all()
    assert_right(Answer(out[:total], lse[:, :total], *oracle_answers(inputs)))
