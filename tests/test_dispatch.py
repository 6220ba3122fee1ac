"""Which path a call takes, what is said about it, and what the compiled module registers. Needs no GPU."""

import dataclasses
import json
import os
import re
from types import SimpleNamespace

import pytest
import torch

import flash_attn
from flash_attn import _dispatch, _extension

built = pytest.mark.skipif(not _extension.is_loaded(), reason=f"no extension: {_extension.load_error()}")
without_kernels = pytest.mark.skipif(_extension.is_loaded(), reason="the build decides, too")


# Whose queries are too many for the kernels for few rows, which not every build gives all calls that they can serve.
MANY_ROWS = (100, 120)


def _qkv(heads=4, heads_k=4, head_dim=64, dtype=torch.bfloat16, device="cpu", lengths=(40, 50)):
    shapes = ((2, lengths[0], heads, head_dim), *((2, lengths[1], heads_k, head_dim) for _ in "kv"))
    return [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]


def test_cpu_tensors_take_the_cpu_path():
    explanation = flash_attn.explain(flash_attn.flash_attn_func, *_qkv(), causal=True)
    assert explanation.path == "cpu" and not explanation.objections["cpu"]
    assert "needs CUDA tensors" in str(explanation)


@pytest.mark.parametrize("path", ["sm80", "sm90"])
def test_forced_kernels_refuse_cpu_tensors(path):
    with flash_attn.use_path(path), pytest.raises(NotImplementedError, match=f"{path}: .*use_path\\('cpu'\\)"):
        flash_attn.flash_attn_func(*_qkv())


@pytest.mark.parametrize("name", ["sm75", None, ["cpu"]], ids=str)
def test_use_path_names_the_paths(name):
    with pytest.raises(ValueError, match=re.escape(f"'sm90', 'sm80', 'cpu', got {name!r}")):
        with flash_attn.use_path(name):
            pass


@pytest.mark.parametrize(
    "function", [len, None, [], flash_attn.flash_attn_combine], ids=["len", "None", "list", "combine"]
)
def test_explain_takes_attention_alone(function):
    with pytest.raises(ValueError, match="function must be an attention function of flash_attn, got"):
        flash_attn.explain(function)


def test_use_path_ends_with_its_block():
    with flash_attn.use_path("sm80"):
        with flash_attn.use_path("cpu"):
            flash_attn.flash_attn_func(*_qkv())
        with pytest.raises(NotImplementedError):
            flash_attn.flash_attn_func(*_qkv())
    flash_attn.flash_attn_func(*_qkv())


@pytest.mark.parametrize("feature", _dispatch.FEATURES)
def test_refusal_names_the_missing_feature(feature, monkeypatch):
    sm80 = _dispatch.PATHS["sm80"]
    monkeypatch.setitem(_dispatch.PATHS, "sm80", dataclasses.replace(sm80, features=sm80.features - {feature}))
    with flash_attn.use_path("sm80"), pytest.raises(NotImplementedError) as refusal:
        _dispatch.choose_path(_qkv()[0], (64, 64), frozenset({"dense", feature}))
    assert _dispatch.FEATURES[feature] in str(refusal.value)


def test_refusal_names_dtype_and_head_dim():
    narrow = dataclasses.replace(_dispatch.PATHS["sm80"], max_head_dims=(128, 128))
    reasons = " ".join(_dispatch.plan_objections(narrow, torch.float32, 192, 64, frozenset({"dense"})))
    assert "fp32" in reasons and "192/64" in reasons and "up to 128/128" in reasons


def test_refusal_of_a_feature_names_no_empty_set_of_dtypes():
    reasons = _dispatch.plan_objections(_dispatch.PATHS["sm90"], torch.float32, 64, 64, frozenset({"combine"}))
    assert reasons == ["flash_attn_combine"]


@built
def test_refusal_names_the_shared_memory_that_is_short():
    sm80 = _dispatch.PATHS["sm80"]
    for smem_kb, served in ((227, True), (163, True), (99, False)):
        reasons = _dispatch.plan_objections(sm80, torch.float16, 512, 64, frozenset({"dense"}), smem_kb * 1024)
        assert bool(reasons) != served
    assert "512/64 needs more shared memory than the 99 KB here" in reasons[0]


@built
@pytest.mark.parametrize("path", ["sm80", "sm90"])
def test_refusal_names_the_head_dims_that_have_gradients(path):
    features = frozenset({"dense", "wide_heads"})
    spec = _dispatch.PATHS[path]
    assert _dispatch.plan_objections(spec, torch.bfloat16, 576, 512, features) == []
    reasons = _dispatch.plan_objections(spec, torch.bfloat16, 576, 512, features | {"backward"})
    assert reasons == ["backward at head_dim 576/512 (it takes up to 512/512)"]


@pytest.mark.parametrize(
    "path, capability, said",
    [
        ("sm90", (9, 0), None),
        ("sm90", (8, 0), "needs compute capability 9.0, and cuda:0 has 8.0"),
        ("sm90", (10, 0), "needs compute capability 9.0, and cuda:0 has 10.0"),
        ("sm80", (8, 9), None),
        ("sm80", (12, 0), None),
        ("sm80", (7, 5), "needs compute capability 8.0 or later, and cuda:0 has 7.5"),
    ],
)
def test_refusal_names_the_compute_capability(path, capability, said):
    found = _dispatch._capability_objections(_dispatch.PATHS[path], capability, "cuda:0")
    assert found == ([] if said is None else [said])
    several = dataclasses.replace(_dispatch.PATHS["sm80"], capability=((8, 0), (8, 9)))
    (reason,) = _dispatch._capability_objections(several, (9, 0), "cuda:0")
    assert reason == "needs compute capability 8.0 to 8.9, and cuda:0 has 9.0"


def test_every_path_serves_only_known_features():
    for path in _dispatch.PATHS.values():
        assert path.unproven <= path.features <= set(_dispatch.FEATURES)


@built
def test_kernels_for_another_gpu_are_not_said_to_need_shared_memory(monkeypatch):
    monkeypatch.setattr(_dispatch, "_device_facts", lambda device: ((8, 6), 99 * 1024))
    q = SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"), dtype=torch.bfloat16, shape=(1, 1, 1, 512))
    (reason,) = _dispatch.objections("sm90", q, 512, frozenset({"dense"}))
    assert reason == "needs compute capability 9.0, and cuda:0 has 8.6"
    (reason,) = _dispatch.objections("sm80", q, 512, frozenset({"dense"}))
    assert reason == "forward at head_dim 512/512 needs more shared memory than the 99 KB here"


@pytest.fixture
def gpu(monkeypatch):
    """q on a GPU that has all that the kernels need."""
    monkeypatch.setattr(_dispatch, "_device_objections", lambda path, q: [])
    monkeypatch.setattr(_dispatch, "_chosen", {})
    return _qkv(device="meta")[0]


@pytest.fixture
def ampere(gpu, monkeypatch):
    """The same, for SM80's kernels."""
    monkeypatch.setattr(_extension, "is_loaded", lambda: False)  # whatever this build lacks
    with flash_attn.use_path("sm80"):
        yield gpu


@pytest.mark.parametrize("feature", sorted(_dispatch.PATHS["sm80"].unproven))
def test_kernels_that_no_gpu_has_run_warn_once(ampere, feature):
    with pytest.warns(UserWarning) as warned:
        for _ in range(2):
            _dispatch.choose_path(ampere, (64, 64), frozenset({"dense", feature}))
    (message,) = (str(warning.message) for warning in warned)
    assert "SM80 kernels" in message and _dispatch.FEATURES[feature] in message and "no GPU" in message


def test_explaining_a_call_leaves_its_warning(ampere, recwarn):
    features = frozenset({"dense", "backward"})
    assert _dispatch.path_of_explained(ampere, (64, 64), features) == "sm80"
    assert not recwarn.list
    with pytest.warns(UserWarning, match="no GPU"):
        _dispatch.choose_path(ampere, (64, 64), features)


def test_proven_kernels_do_not_warn(ampere, recwarn):
    _dispatch.choose_path(ampere, (64, 64), _dispatch.PATHS["sm80"].features - _dispatch.PATHS["sm80"].unproven)
    with flash_attn.use_path("cpu"):
        _dispatch.choose_path(ampere, (64, 64), frozenset({"dense", "backward"}))
    assert not recwarn.list


@built
@pytest.mark.parametrize("name", ["forward", "forward_out", "backward", "attn_probs", "append_kv", "rotary", "combine"])
def test_kernel_op_takes_the_cpu_ops_arguments(name):
    """One list stands in C++ beside the code that reads it, one in Python: they may not drift apart."""
    kernel = getattr(torch.ops.flash_attn, name).default._schema
    cpu = getattr(torch.ops.flash_attn, f"cpu_{name}").default._schema
    arguments = [(a.name, str(a.type), a.is_write) for a in kernel.arguments if a.name != "arch"]
    assert arguments == [(a.name, str(a.type), a.is_write) for a in cpu.arguments]
    assert [str(r.type) for r in kernel.returns] == [str(r.type) for r in cpu.returns]


@built
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_explain_plans_for_other_machines(device):
    explanation = flash_attn.explain(
        flash_attn.flash_attn_func, *_qkv(heads_k=2, device=device, lengths=MANY_ROWS), causal=True
    )
    plan = explanation.plans["sm80"]
    assert (plan["head_dim"], plan["head_dim_v"], plan["mask"], plan["dtype"]) == (64, 64, "causal", "bf16")
    assert plan["num_blocks"] == 2 * 4 and plan["num_splits"] == 1
    assert f"tile {plan['tile_m']} x {plan['tile_n']}" in str(explanation)


@built
def test_plan_op_checks_its_tensors():
    q, k, v = _qkv()
    call = flash_attn.interface.build_call(flash_attn.flash_attn_func, q, k, v)
    arguments = list(call.op_arguments())
    explain = torch.ops.flash_attn.explain_forward
    assert json.loads(explain(*arguments, 80))["arch"] == 80
    for index, bad, message in (
        (1, k[:, :, :3], r"heads must be a multiple of k's, got 4 and 3|v must have shape"),
        (1, k.float(), "k must have q's dtype"),
        (2, v[:1], r"v must have shape \(2, 50, 4, 64\), got \(1, 50, 4, 64\)"),
        (0, q.double(), "q must be float16 or bfloat16|k must have q's dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            explain(*arguments[:index], bad, *arguments[index + 1 :], 80)
    with pytest.raises(RuntimeError, match="arch must be 80 or 90, got 70"):
        explain(*arguments, 70)


@built
def test_a_kernel_left_out_of_the_build_names_the_variable(monkeypatch):
    kernels = dataclasses.replace(_extension.kernels, built=frozenset())
    monkeypatch.setattr(_extension, "kernels", kernels)
    reasons = " ".join(_dispatch.objections("sm80", _qkv()[0], 64, frozenset({"dense"})))
    assert "FLASH_ATTN_HEAD_DIMS=" in reasons and "bf16 and head_dim 64/64" in reasons


# ---- SM90

SM90_FEATURES = _dispatch.PATHS["sm90"].features


@pytest.fixture
def hopper(gpu, monkeypatch):
    """The same, with both paths proven."""
    for name in ("sm90", "sm80"):
        proven = dataclasses.replace(_dispatch.PATHS[name], unproven=frozenset())
        monkeypatch.setitem(_dispatch.PATHS, name, proven)
    return gpu


@without_kernels
@pytest.mark.parametrize("features", [{"dense"}, {"varlen", "causal"}, {"dense", "backward"}, {"dense", "leftpad"}])
def test_proven_kernels_come_before_unproven_ones(hopper, monkeypatch, features):
    features = frozenset(features)
    assert _dispatch._best_that_serves(None, hopper, 64, features) == "sm90"
    unproven = dataclasses.replace(_dispatch.PATHS["sm90"], unproven=SM90_FEATURES)
    monkeypatch.setitem(_dispatch.PATHS, "sm90", unproven)
    assert _dispatch._best_that_serves(None, hopper, 64, features) == "sm80"
    assert _dispatch._best_that_serves("sm90", hopper, 64, features) == "sm90"
    # What is as new on either: SM80 has less of it.
    unproven = dataclasses.replace(_dispatch.PATHS["sm80"], unproven=features - {"dense", "varlen"})
    monkeypatch.setitem(_dispatch.PATHS, "sm80", unproven)
    assert _dispatch._best_that_serves(None, hopper, 64, features) == "sm80"


@without_kernels
def test_sm90_comes_first(hopper):
    for features in (SM90_FEATURES - {"backward"}, SM90_FEATURES, frozenset({"dense"})):
        assert _dispatch._best_that_serves(None, hopper, 64, features) == "sm90"


@without_kernels
@pytest.mark.parametrize("feature", sorted(frozenset(_dispatch.FEATURES) - SM90_FEATURES))
def test_what_sm90_lacks_falls_to_sm80_with_the_reason(hopper, feature):
    features = frozenset({"dense", feature})
    assert _dispatch._best_that_serves(None, hopper, 64, features) == "sm80"
    assert _dispatch.objections("sm90", hopper, 64, features) == [_dispatch.FEATURES[feature]]


def test_sm90_forwards_need_sm80_backward_kernels(hopper, monkeypatch):
    """Gradients come from SM80's kernels after either forward, so both have to be in the build."""
    rows = {("forward", 90): ((64, 64, 1024),), ("forward", 80): ((64, 64, 1024),), ("backward", 80): ((64, 64, 1024),)}
    built = {("forward", 90, "bf16", (64, 64, 1024))}
    monkeypatch.setattr(_extension, "is_loaded", lambda: True)
    for gradients in (False, True):
        monkeypatch.setattr(_extension, "kernels", _extension.Kernels(rows, frozenset(built)))
        reasons = _dispatch.objections("sm90", hopper, 64, frozenset({"dense", "backward"}))
        assert (reasons == []) == gradients
        assert gradients or "no SM80 backward kernel" in reasons[0]
        assert _dispatch.objections("sm90", hopper, 64, frozenset({"dense"})) == []
        built.add(("backward", 80, "bf16", (64, 64, 1024)))


@built
@pytest.mark.parametrize("option", ["none", "paged", "batch_idx", "splits"])
def test_kernels_that_no_gpu_has_run_serve_what_no_other_does(option):
    """Those for few rows, which decoding a dense cache would be faster with."""
    q, k, v = (tensor[:, :16] for tensor in _qkv())
    options = {"cache_seqlens": torch.tensor([3, 9], dtype=torch.int32), "num_splits": 3 if option == "splits" else 0}
    if option == "paged":
        options["block_table"] = torch.tensor([[0], [1]], dtype=torch.int32)
    if option == "batch_idx":
        options["cache_batch_idx"] = torch.tensor([1, 0], dtype=torch.int32)
    call = flash_attn.interface.build_call(flash_attn.flash_attn_with_kvcache, q[:, :1], k, v, **options)
    plan = json.loads(torch.ops.flash_attn.explain_forward(*call.op_arguments(), 80))
    serve_all = os.environ.get("FEW_ROWS") == "true"  # benchmarks/on_gpu.sh, which builds the package so
    assert plan["tile_m"] == (16 if serve_all or option != "none" else 128)


@built
def test_explain_tells_what_is_copied_first():
    q, k, v = _qkv(lengths=MANY_ROWS)
    rows = k[:, :1].expand(-1, MANY_ROWS[1], -1, -1)
    shifted = torch.zeros(k.numel() + 1, dtype=k.dtype)[1:].view(k.shape)
    for arch, keys, copies in ((80, k, []), (90, k, []), (80, rows, []), (90, rows, ["k"]), (90, shifted, ["k"])):
        call = flash_attn.interface.build_call(flash_attn.flash_attn_func, q, keys, v)
        assert json.loads(torch.ops.flash_attn.explain_forward(*call.op_arguments(), arch))["copies"] == copies


@built
@pytest.mark.parametrize(
    ("page_size", "what", "arch"),
    [(16, "", 90), (48, "", 90), (8, "", 80), (20, "", 80), (16, "leftpad", 80), (16, "rows of stride 0", 80)],
)
def test_explain_tells_which_pages_sm90_kernels_take(page_size, what, arch):
    q, pages = torch.zeros(2, 100, 4, 64).bfloat16(), torch.zeros(32, page_size, 4, 64).bfloat16()
    if what == "rows of stride 0":
        pages = pages[:, :1].expand(-1, page_size, -1, -1)
    options = {"cache_leftpad": torch.zeros(2, dtype=torch.int32)} if what == "leftpad" else {}
    table = torch.zeros(2, 16, dtype=torch.int32)
    explanation = flash_attn.explain(
        flash_attn.flash_attn_with_kvcache, q, pages, pages, block_table=table, causal=True, **options
    )
    plan = explanation.plans["sm90"]
    assert plan["arch"] == arch and not plan["copies"] and ("multiple of 16 tokens" in str(explanation)) == (arch == 80)


@built
def test_explain_plans_nothing_that_the_gpu_has_no_shared_memory_for(monkeypatch):
    """As on an RTX card, where the planner refuses SM90's tiles."""
    with_227_kb = flash_attn.explain(flash_attn.flash_attn_func, *_qkv())
    monkeypatch.setattr(_dispatch, "smem_bytes_for", lambda q: 99 * 1024)
    with_99_kb = flash_attn.explain(flash_attn.flash_attn_func, *_qkv())
    assert "sm90" in with_227_kb.plans and set(with_99_kb.plans) == {"sm80"}
