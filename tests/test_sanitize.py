"""The selection that `make sanitize` runs under compute-sanitizer: each kernel and each option of it once.

Under the tools a launch takes a hundred times as long, so shapes are small; most have more than one tile of rows and
of keys. What is marked `race` runs under racecheck too. The oracle runs on the CPU, where they don't see it.
"""

from dataclasses import replace

import cases
import pytest
from cases import BF16, FP16, Case
from checks import check_backward, check_forward, gradients_of_a_loss
from emulation import can_run
from fuzz import check
from harness import GPU_PATHS, build, device_of, on_path
from memory import Memory
from strategies import Call
from tolerance import assert_same_bits

PATHS = [path for path in GPU_PATHS if can_run(path)]
pytestmark = [
    pytest.mark.sanitize,
    pytest.mark.skipif(not PATHS, reason="no device here runs the kernels, and none are emulated"),
]

_DIMS = ((32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (512, 512), (1, 1), (33, 7),
         (200, 300), (511, 90))  # fmt: skip
BUCKETS = [
    Case(f"sanitize-{dims[0]}x{dims[1]}", "each kernel, several tiles", "dense", (130,), (200,), heads=(2, 1),
         dims=dims, dtype=(BF16, FP16)[index % 2], causal=index % 3 != 0)
    for index, dims in enumerate(_DIMS)
]  # fmt: skip
EVERYTHING = [
    Case(f"sanitize-everything-{d}", "all options of a kernel at once", "varlen", (0, 130, 1, 40), (3, 150, 0, 200),
         heads=(4, 2), dims=(d, d), window=(60, 9), alibi="batch", sinks=BF16, seqused_q=(0, 129, 1, 20),
         seqused_k=(2, 131, 0, 180), **option)
    for d in (64, 128, 256, 512)
    for option in ({"dropout_p": 0.2}, {"softcap": 3.0})
]  # fmt: skip
PACKED_QUERIES = Case("sanitize-cache", "packed queries, dense keys", "kvcache", (1, 70, 0), (140,) * 3, heads=(4, 2),
                      seqused_k=(50, 140, 0), varlen_q=True, causal=True)  # fmt: skip
_IDS = """
    len-1x1 len-1x200 len-129x128 len-129x128-causal mqa-decode scale-negative scale-zero
    window-right window-both window-zero window-misses causal-short-k-sinks empty-k empty-q empty-batch softcap alibi
    alibi-batch-causal sinks dropout dropout-varlen dropout-seqused varlen-many-short varlen-zeros varlen-all-empty
    seqused-k seqused-q cache-full cache-decode cache-empty cache-leftpad cache-batch-idx cache-paged cache-paged-1
    append-none append-paged append-batch-idx append-varlen rotary-interleaved rotary-halves rotary-paged-gqa
    rotary-leftpad rotary-varlen paged-5 paged-cu-seqlens-k paged-leftpad paged-empty
""".split()
DECLARED = [case for case in cases.ALL if case.id in _IDS]
BACKWARD = [case for case in [*BUCKETS, *EVERYTHING, *DECLARED] if case.differentiable]
DECODE = [
    Case(f"sanitize-decode-{d}{'-paged' * paged}", "splits that end in tiles, one without a key", "kvcache",
         (1, 3, 1), (300,) * 3, heads=(4, 1), dims=(d, d), seqused_k=(300, 131, 0), page=8 if paged else None,
         varlen_q=True, causal=True)
    for d in (64, 128, 256, 512)
    for paged in (False, True)
]  # fmt: skip
PLAIN_ORDER, HEADS_FIRST = (0, 1, 2, 3), (0, 2, 1, 3)
STRIDED = Case("", "strides", "dense", (70,) * 2, (90,) * 2, heads=(2, 1), dims=(64, 64), causal=True)
ALL_HEADS_FIRST, ALL_MISALIGNED = (dict.fromkeys("qkv", memory)
                                   for memory in (Memory(HEADS_FIRST), Memory(PLAIN_ORDER, offset=1)))  # fmt: skip
CALLS = {
    "heads-first": Call(STRIDED, **ALL_HEADS_FIRST, passes_out=True, out=Memory(HEADS_FIRST)),
    "misaligned": Call(STRIDED, **ALL_MISALIGNED, passes_out=True,
                       out=Memory(PLAIN_ORDER, (2, 2), offset=5)),
    "expanded": Call(STRIDED, k=Memory(PLAIN_ORDER, expanded=0), v=Memory(PLAIN_ORDER, expanded=1)),
    "backward-heads-first": Call(STRIDED, **ALL_HEADS_FIRST, backward=True, dout=Memory(HEADS_FIRST)),
    "backward-misaligned": Call(STRIDED, **ALL_MISALIGNED, backward=True,
                                dout=Memory(PLAIN_ORDER, (3, 2), offset=5), deterministic=True),
    "backward-expanded": Call(STRIDED, k=Memory(PLAIN_ORDER, expanded=0), v=Memory(PLAIN_ORDER, expanded=1),
                              backward=True, dout=Memory(PLAIN_ORDER, expanded=2)),
}  # fmt: skip
# Hard case 11 has 300 entries and 50 runs: test_backward_gpu.py has them, without a tool that makes each take seconds.
MANY_ROWS = Case("sanitize-many-rows", "many row tiles to each key tile", "dense", (2048,) * 3, (128,) * 3,
                 heads=(1, 1), dims=(128, 128))  # fmt: skip
RACES = [
    MANY_ROWS,
    *(replace(EVERYTHING[index], id=f"race-{index}") for index in range(0, len(EVERYTHING), 2)),
    *(Case(f"race-{d}", "shared memory is reused by tile after tile", "dense", (200,) * 2, (300,) * 2, heads=(2, 1),
           dims=(d, d), causal=True) for d in (64, 128, 192, 256, 512)),
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", [*BUCKETS, *EVERYTHING, PACKED_QUERIES, *DECLARED], ids=lambda case: case.id)
def test_case(path, case):
    check_forward(path, case)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", BACKWARD, ids=lambda case: case.id)
def test_backward(path, case):
    check_backward(path, case)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("num_splits", [0, 3])
@pytest.mark.parametrize("case", DECODE, ids=lambda case: case.id)
def test_decode(path, case, num_splits):
    check_forward(path, case, frozenset({"num_splits"} if num_splits > 1 else ()), num_splits=num_splits)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_strides(path, call):
    if not check(path, call):
        assert call.backward, "the forward kernels serve every stride"


@pytest.mark.race
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("case", RACES, ids=lambda case: case.id)
def test_races_in_the_backward_pass(path, case, deterministic):
    inputs = build(case, device_of(path))

    def run():
        first, second = (gradients_of_a_loss(inputs, deterministic=deterministic) for _ in range(2))
        for name in first if deterministic else ():
            assert_same_bits(name, second[name], first[name])
        return True

    on_path(path, case.features | {"backward"}, inputs, run)


@pytest.mark.race
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", DECODE, ids=lambda case: case.id)
def test_races_in_decoding(path, case):
    inputs = build(case, device_of(path))
    for num_splits in (0, 3):
        features = case.features | ({"num_splits"} if num_splits else set())
        on_path(path, features, inputs, lambda n=num_splits: inputs.call(num_splits=n))
