"""The selection that `make sanitize` runs under compute-sanitizer: each kernel and each option of it once.

Under the tools a launch takes a hundred times as long, so shapes are small; most have more than one tile of rows and
of keys. The oracle runs on the CPU, where they don't see it.
"""

import cases
import pytest
import torch
from cases import BF16, FP16, Case
from checks import check_forward
from fuzz import check
from harness import GPU_PATHS
from memory import Memory
from strategies import Call

from flash_attn import _dispatch

pytestmark = [
    pytest.mark.sanitize,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PATHS = [path for path in GPU_PATHS if _dispatch.PATHS[path].features]

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
    seqused-k seqused-q cache-full cache-decode
""".split()
DECLARED = [case for case in cases.ALL if case.id in _IDS]
PLAIN_ORDER, HEADS_FIRST = (0, 1, 2, 3), (0, 2, 1, 3)
STRIDED = Case("", "strides", "dense", (70,) * 2, (90,) * 2, heads=(2, 1), dims=(64, 64), causal=True)
CALLS = {
    "heads-first": Call(STRIDED, *[Memory(HEADS_FIRST)] * 3, passes_out=True, out=Memory(HEADS_FIRST)),
    "misaligned": Call(STRIDED, *[Memory(PLAIN_ORDER, offset=1)] * 3, passes_out=True,
                       out=Memory(PLAIN_ORDER, (2, 2), offset=5)),
    "expanded": Call(STRIDED, k=Memory(PLAIN_ORDER, expanded=0), v=Memory(PLAIN_ORDER, expanded=1)),
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", [*BUCKETS, *EVERYTHING, PACKED_QUERIES, *DECLARED], ids=lambda case: case.id)
def test_case(path, case):
    check_forward(path, case)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_strides(path, call):
    assert check(path, call)
