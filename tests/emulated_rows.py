"""Every kernel of an emulated package with cases of its own, in the shared memory that its tile row is made for.

`make emulate` builds the package with all kernels and runs this. A test fails where its kernel did not run.
"""

import checks
import emulation
import pytest
from cases import BF16, FP16, Case
from emulated_kernels import built_kernels, key_of, launched_keys, name_of

from flash_attn import _dispatch, _extension

DTYPES = {"fp16": FP16, "bf16": BF16}
# What every score feature but dropout takes; dropout and softcap exclude each other. The sinks' gradient is a number a
# head, of sums that inherit the rounding of O: sinks of O's precision are judged by that.
SCORES = {"softcap": 4.0, "alibi": "batch", "sinks": BF16}
DROPOUT = {"dropout_p": 0.3, "alibi": "heads", "lse_grad": True}

# (what the call has, its layout and lengths, more) for each kind of kernel: tiles of 128 rows and 128 keys have ends
# inside and several of them.
MANY_FULL = [("full", "dense", (150, 150), (270, 270), {"heads": (2, 1)})]
MANY_CAUSAL = [("causal", "dense", (150,), (270,), {"heads": (2, 1), "causal": True})]
MANY_GENERAL = [
    ("window", "varlen", (150, 0, 70), (270, 9, 20), {"window": (100, 17), "sinks": BF16, "heads": (3, 1)}),
    ("pages", "varlen", (150, 70), (270, 150), {"page": 48, "window": (170, 0), "seqused_k": (261, 90)}),
    ("leftpad", "varlen", (150, 70), (270, 150), {"page": 48, "causal": True, "seqused_k": (261, 90),
                                                  "leftpad": (20, 0)}),
]  # fmt: skip
# SM90's kernels for these masks take pages, too.
PAGES_SM90 = {
    ("Mask::kFull", "Score::kPlain"): ("pages", "varlen", (150, 70), (270, 150), {"page": 16, "seqused_k": (261, 90)}),
    ("Mask::kCausal", "Score::kPlain"): ("pages", "varlen", (150, 70), (270, 150), {"page": 64, "causal": True,
                                                                                    "seqused_k": (261, 90)}),
}  # fmt: skip
MANY_SCORES = [
    ("scores", "varlen", (150, 33), (270, 40), {"window": (200, 3), "seqused_q": (140, 0), **SCORES}),
    ("dropout", "dense", (150,), (270,), {"causal": True, **DROPOUT}),
]
# 40 rows of a key head; 12 rows of one.
FEW_64 = ("kvcache", (20, 20), (300, 300), {"heads": (4, 2), "seqused_k": (290, 33), "causal": True, "page": 16})
FEW_16 = ("kvcache", (3, 3), (300, 300), {"heads": (4, 1), "seqused_k": (290, 33), "window": (250, 0)})
BACKWARD = {
    ("Score::kPlain",): [
        ("full", "varlen", (150, 0), (200, 40), {"heads": (3, 1), "lse_grad": True}),
        ("causal", "dense", (140,), (270,), {"causal": True, "heads": (2, 1), "sinks": BF16}),
        ("window", "varlen", (130, 33), (200, 90), {"window": (40, 11), "seqused_k": (150, 90)}),
    ],
    ("Score::kGeneral",): [
        ("scores", "varlen", (150, 33), (200, 40), {"window": (100, 3), "lse_grad": True, "seqused_q": (140, 0),
                                                    **SCORES}),
        ("dropout", "dense", (140,), (200,), {"causal": True, "heads": (2, 1), **DROPOUT}),
    ],
}  # fmt: skip
FORWARD = {
    ("Mask::kFull", "Score::kPlain"): MANY_FULL,
    ("Mask::kCausal", "Score::kPlain"): MANY_CAUSAL,
    ("Mask::kGeneral", "Score::kPlain"): MANY_GENERAL,
    ("Mask::kGeneral", "Score::kGeneral"): MANY_SCORES,
    ("Mask::kGeneral", "Score::kPlain", "Rows::k64"): [("few", *FEW_64)],
    ("Mask::kGeneral", "Score::kGeneral", "Rows::k64"): [("few-scores", *FEW_64[:3], FEW_64[3] | SCORES)],
    ("Mask::kGeneral", "Score::kPlain", "Rows::k16"): [("few", *FEW_16)],
    ("Mask::kGeneral", "Score::kGeneral", "Rows::k16"): [("few-scores", *FEW_16[:3], FEW_16[3] | SCORES)],
}
NUM_SPLITS = (0, 1, 3)  # of kernels with few rows
NUM_SPLITS_SM90 = (0, 3)


def _cases(kernel):
    group, dtype, options = kernel
    declared = list((FORWARD if group.kind.name == "forward" else BACKWARD)[options])
    served = _dispatch.PATHS[f"sm{group.arch}"].features
    if group.arch == 90:  # pages that TMA can't take are left to SM80's kernels
        declared = [case for case in declared if case[0] != "leftpad"]
        declared += [PAGES_SM90[options]] if options in PAGES_SM90 else []
    # A package for some head dims has kernels for few rows in the bucket above them.
    qk, v = (min(dim, max(_extension.build_info.head_dims)) for dim in group.tile_row[:2])
    for what, layout, lens_q, lens_k, more in declared:
        fewer = (8, 8) if group.arch == 90 and "page" in more else (5, 7)
        for dims in ((qk, v), (qk - fewer[0], v - fewer[1])):
            name = f"{name_of(kernel)}-{what}-{dims[0]}x{dims[1]}"
            own = {"dims": dims, "dtype": DTYPES[dtype], **more}
            case = Case(name, "this kernel's rows, tiles and columns", layout, lens_q, lens_k, **own)
            if case.features <= served:  # SM90's kernels leave dropout to SM80's
                yield case


@pytest.fixture
def shared_memory(monkeypatch):
    """Sets what the emulated GPU has."""

    def set_to(smem):
        kilobytes = smem.removesuffix("KB")
        monkeypatch.setenv("FLASH_ATTN_EMULATOR_SMEM_KB", kilobytes)
        monkeypatch.setattr(emulation, "SMEM_BYTES", int(kilobytes) * 1024)
        _dispatch._chosen.clear()

    yield set_to
    _dispatch._chosen.clear()


@pytest.mark.parametrize("kernel", built_kernels(), ids=name_of)
def test_kernel(kernel, shared_memory):
    group, _, _ = kernel
    path = f"sm{group.arch}"
    shared_memory(group.tile_row[2])
    launched_keys()
    for case in _cases(kernel):
        if group.kind.name == "backward":
            checks.check_backward(path, case)
        elif group.rows or group.arch == 90:
            for num_splits in NUM_SPLITS if group.rows else NUM_SPLITS_SM90:
                features = frozenset({"num_splits"} if num_splits > 1 else ())
                checks.check_forward(path, case, features, num_splits=num_splits)
        else:
            checks.check_forward(path, case)
        assert key_of(kernel) in (launched := launched_keys()), f"{case.id} ran on {launched}"
