"""The table of declared cases is itself checked: nothing hides behind a wrong declaration."""

import cases
import conftest
import pytest
import test_determinism as determinism
import test_fa2_interface as fa2
import test_hard_cases as hard
import test_sanitize
import test_serving as serving
import test_serving_gpu as serving_gpu
from harness import build, met

import flash_attn
from flash_attn import _dispatch

EVERY_FEATURE_BUT = {"num_splits", "combine", "attn_probs", "out", "backward"}  # options of a call, not of a case


# harness.on_path takes a refusal for an answer, so what the SM80 kernels must not refuse is said here.
SM80_SERVES = [
    hard.DECODE, *hard.ZERO_LENGTHS, *hard.LOUD, *hard.STRIDED,
    *(case for case in cases.DROPOUT if case.dtype is not cases.FP64),
    *test_sanitize.BUCKETS, *test_sanitize.EVERYTHING, test_sanitize.PACKED_QUERIES, *test_sanitize.DECLARED,
    *test_sanitize.DECODE, *test_sanitize.RACES, *serving.PAGED, *serving.PAGED_DECODE, *serving.DECODE, *serving.MIXED,
    *serving.SPECULATIVE_APPEND, *hard.UNUSED_CACHE, *(case for case, _ in serving_gpu.GRAPHS), *serving_gpu.CALLS,
    *determinism.MULTIHEAD, *determinism.GROUPED, *(case for case in cases.KVCACHE if case.dtype is not cases.FP32),
    *(case for case in (*fa2.CASES, *fa2.FORWARD_ONLY) if case.dtype is cases.BF16),
]  # fmt: skip


def test_ids_are_unique_and_reasons_given():
    ids = [case.id for case in cases.ALL]
    assert len(set(ids)) == len(ids)
    assert all(case.reason for case in cases.ALL)


def test_every_feature_has_a_case():
    declared = frozenset().union(*(case.features for case in cases.ALL))
    assert declared == set(_dispatch.FEATURES) - EVERY_FEATURE_BUT


DECLARED = [case for case in cases.ALL if not case.large]


@pytest.mark.parametrize("case", DECLARED, ids=lambda case: case.id)
def test_declared_features_are_what_the_dispatcher_is_told(case, monkeypatch):
    """harness.on_path expects a refusal from the features that a case declares."""
    told = []

    def choose_path(q, head_dims, features):
        told.append((head_dims, features))
        return "cpu"

    monkeypatch.setattr(flash_attn._dispatch, "choose_path", choose_path)
    build(case).call()
    assert told == [(case.dims, case.features)]


@pytest.mark.parametrize("case", DECLARED, ids=lambda case: case.id)
def test_memory_that_a_call_must_not_use_is_poisoned(case):
    """All of q, k and v but the rows that the case counts as used; there is some past the last sequence, too."""
    inputs = build(case)
    stored = case.lens_k if case.seqused_k is None else case.seqused_k
    used_q = sum(case.lens_q if case.seqused_q is None else case.seqused_q)
    used_k = sum(last - case.first_key(entry) for entry, last in enumerate(stored))
    for tensor, rows in ((inputs.q, used_q), (inputs.k, used_k), (inputs.v, used_k)):
        assert int(tensor.isfinite().sum()) == rows * tensor.shape[-2] * tensor.shape[-1]
        assert int(tensor.isnan().sum()) == tensor.numel() - int(tensor.isfinite().sum())
    if case.layout == "varlen" and case.page is None and case.seqused_k is not None:
        assert len(inputs.k) == len(inputs.v) == sum(case.lens_k) + 3


PAGED = [case for case in DECLARED if case.page is not None]


@pytest.mark.parametrize("case", PAGED, ids=lambda case: case.id)
def test_slots_of_pages_that_a_call_must_not_use_are_stale(case):
    """They name no page, or, one of five, a page of garbage; so do those that a server gave away."""
    inputs = build(case)
    stored = case.lens_k if case.seqused_k is None else case.seqused_k
    rows = range(len(stored)) if case.cache_rows is None else case.cache_rows
    for entry, row in enumerate(rows):
        ids = inputs.layout["block_table"][row].tolist()
        last = stored[entry] + (0 if case.new is None else case.new[entry])
        num_used = -(-last // case.page)
        num_given_away = min(case.first_key(entry) // case.page, num_used) if case.recycled else 0
        assert len(ids) >= num_used + 2
        for stale in (ids[:num_given_away], ids[num_used:]):
            pages = [page for page in stale if 0 <= page < len(inputs.k)]
            assert len(pages) <= -(-len(stale) // 5) and inputs.k[pages].isnan().all()


@pytest.mark.parametrize("case", SM80_SERVES, ids=lambda case: case.id)
def test_sm80_serves(case, monkeypatch):
    monkeypatch.setattr(_dispatch._extension, "is_loaded", lambda: False)  # whatever is left out of this build
    assert not _dispatch.plan_objections(_dispatch.PATHS["sm80"], case.dtype, *case.dims, case.features)


def test_sanitize_finds_what_it_names():
    assert {case.id for case in test_sanitize.DECLARED} == set(test_sanitize._IDS)


@pytest.mark.parametrize(
    "served, drawn, skips", [(0, False, True), (1, False, True), (0, True, True), (1, True, False)]
)
def test_refused_calls_are_reported_as_skipped(served, drawn, skips):
    class Item:
        def get_closest_marker(self, name):
            return drawn and name == "drawn"

    running = conftest.pytest_pyfunc_call(Item())
    next(running)
    met.served = served
    met.refused["sm80: backward"] = None
    try:
        with pytest.raises(pytest.skip.Exception if skips else StopIteration) as ended:
            running.send(True)
    finally:
        met.refused.clear()
    assert not skips or "sm80: backward" in str(ended.value)
