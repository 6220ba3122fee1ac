"""torch.compile without graph breaks, for sizes that change, and torch.export: the same bits as eager calls."""

import numpy as np
import pytest
import torch
from valid_calls import VALID, Q, grad, i32, rand

from flash_attn import (
    flash_attn_func,
    flash_attn_interface,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

SLOPES, SINKS = rand(4).abs(), rand(4)


def compiled(function, backend="aot_eager"):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend)


def dense_inputs(batch, length_q, length_k):
    return [grad(rand(batch, length, heads, dim)) for length, heads, dim in
            ((length_q, 4, 32), (length_k, 2, 32), (length_k, 2, 8))]  # fmt: skip


def check_gradients(function, other, inputs):
    """Outputs and gradients of two functions are the same bits."""
    results = []
    for run in (function, other):
        outputs = run(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = torch.autograd.grad(sum(x.square().sum() for x in outputs), inputs)
        results.append((*outputs, *grads))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_dense(backend):
    def attention(q, k, v):
        return flash_attn_func(q, k, v, causal=True, window_size=(4, 0), return_softmax_lse=True)

    fast = compiled(attention, backend)
    for sizes in ((3, 5, 7), (6, 9, 11)):
        check_gradients(fast, attention, dense_inputs(*sizes))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compile_with_everything():
    def attention(q, k, v, slopes, s_aux):
        return flash_attn_func(q, k, v, softmax_scale=0.3, softcap=3.0, alibi_slopes=slopes, s_aux=s_aux)

    q, k, v = dense_inputs(2, 5, 7)
    check_gradients(
        lambda *x: compiled(attention)(*x[:3], SLOPES, x[3]),
        lambda *x: attention(*x[:3], SLOPES, x[3]),
        [q, k, v, grad(SINKS)],
    )


@pytest.mark.parametrize("shape", [(4,), (2, 4)], ids=["H", "BH"])
def test_compile_slopes_that_a_module_holds(shape):
    """Their sizes are constants, and those of q are symbols."""
    module = torch.nn.Module()
    module.register_buffer("slopes", torch.ones(shape))
    module.forward = lambda q, k, v: flash_attn_func(q, k, v, alibi_slopes=module.slopes)
    check_gradients(compiled(module), module, dense_inputs(2, 5, 7))


def test_compile_qkvpacked():
    fast = compiled(lambda qkv: flash_attn_qkvpacked_func(qkv, causal=True))
    for batch, length in ((2, 5), (3, 9)):
        check_gradients(
            fast, lambda x: flash_attn_qkvpacked_func(x, causal=True), [grad(rand(batch, length, 3, 4, 16))]
        )


def test_compile_varlen():
    def attention(q, k, v, cu_q, cu_k, longest):
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, longest, longest, causal=True)

    fast = compiled(attention)
    for lengths_q, lengths_k in (((2, 3), (3, 4)), ((4, 0, 2), (5, 1, 6)), ((1, 2, 3, 4), (4, 3, 2, 9))):
        q, k, v = (x[0] for x in dense_inputs(1, sum(lengths_q), sum(lengths_k)))
        inputs = [grad(x.detach()) for x in (q, k, v)]
        cu_q, cu_k = i32(0, *lengths_q).cumsum(0).int(), i32(0, *lengths_k).cumsum(0).int()
        for longest in (None, 10, torch.tensor(10, dtype=torch.int32)):
            check_gradients(
                lambda *x, a=(cu_q, cu_k, longest): fast(*x, *a),
                lambda *x, a=(cu_q, cu_k, longest): attention(*x, *a),
                inputs,
            )


@pytest.mark.parametrize("packed", [False, True], ids=["varlen", "qkvpacked"])
def test_compile_longest_length_from_a_tensor(packed):
    """transformers calls .item() on longest lengths where it is traced: an int that nobody knows yet."""

    def attention(q, cu):
        longest = cu.diff().max().item()
        if packed:
            return flash_attn_varlen_qkvpacked_func(torch.stack((q, q, q), 1), cu, longest, causal=True)
        return flash_attn_varlen_func(q, q, q, cu, cu, longest, longest, causal=True)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        fast = compiled(attention)
        for lengths in ((2, 3), (7, 0, 2)):
            cu = i32(0, *lengths).cumsum(0).int()
            check_gradients(lambda q, cu=cu: fast(q, cu), lambda q, cu=cu: attention(q, cu), [
                grad(rand(sum(lengths), 4, 16))
            ])  # fmt: skip


def test_compile_refuses_a_negative_longest_length():
    with pytest.raises(Exception, match="max_seqlen_q must be at least 0, got -3"):
        compiled(lambda q, cu: flash_attn_varlen_func(q, q, q, cu, cu, -3, 5))(Q[0], i32(0, 5))


def test_compile_dropout_uses_the_same_random_numbers():
    def attention(q, k, v):
        return flash_attn_func(q, k, v, dropout_p=0.4)

    fast, inputs, results = compiled(attention), dense_inputs(2, 5, 7), []
    for function in (fast, attention):
        torch.manual_seed(11)
        out = function(*inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("rotary", [False, True])
def test_compile_kvcache(rotary):
    angles = {"rotary_cos": rand(16, 8), "rotary_sin": rand(16, 8)} if rotary else {}

    def decode(q, k_cache, v_cache, k, v, lengths):
        return flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True, **angles)

    fast = compiled(decode)
    for batch, new in ((3, 5), (5, 7)):
        q, k, v = rand(batch, new, 4, 32), rand(batch, new, 2, 32), rand(batch, new, 2, 8)
        results = []
        for function in (fast, decode):
            caches = torch.ones(batch, 16, 2, 32), torch.ones(batch, 16, 2, 8)
            out = function(q, *caches, k, v, torch.arange(batch, dtype=torch.int32))
            results.append((out, *caches))
        torch.testing.assert_close(*results, rtol=0, atol=0)


def test_compile_paged_decode_into_out():
    def decode(q, k_cache, v_cache, lengths, table, out):
        return flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=lengths, block_table=table, out=out, return_softmax_lse=True
        )

    fast = compiled(decode)
    for batch in (2, 3):
        arguments = (rand(batch, 1, 4, 32), rand(8, 4, 2, 32), rand(8, 4, 2, 8))
        lengths, table = torch.arange(batch, dtype=torch.int32), torch.arange(2 * batch, dtype=torch.int32).view(-1, 2)
        results = []
        for function in (fast, decode):
            out = torch.full((batch, 1, 4, 8), float("nan"))
            results.append((*function(*arguments, lengths, table, out), out))
        torch.testing.assert_close(*results, rtol=0, atol=0)


def test_compile_single_passes():
    def both(q, k, v, dout):
        out, lse, _, rng_state = flash_attn_interface._flash_attn_forward(
            q, k, v, 0.2, 0.3, True, -1, -1, 0.0, None, False
        )
        dq, dk = torch.empty_like(q), torch.empty_like(k)
        softmax_d = flash_attn_interface._flash_attn_backward(
            dout, q, k, v, out, lse, dq, dk, None, 0.2, 0.3, True, -1, -1, 0.0, None, False, rng_state
        )
        return out, lse, dq, dk, softmax_d

    fast = compiled(both)
    for batch, length in ((2, 5), (3, 9)):
        inputs = [grad(rand(batch, length, heads, 16)) for heads in (4, 2, 2)]
        results = []
        for function in (fast, both):
            torch.manual_seed(5)
            results.append(function(*inputs, torch.ones(batch, length, 4, 16)))
        torch.testing.assert_close(*results, rtol=0, atol=0)


def test_compile_refuses_what_it_would_have_to_read():
    with pytest.raises(Exception, match="window_size must be a pair of ints"):
        compiled(lambda q, window: flash_attn_func(q, q, q, window_size=window))(Q, torch.tensor([1, 1]))


def test_export():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return flash_attn_func(q, k, v, causal=True)

    length = torch.export.Dim("length", min=2, max=64)
    shapes = {name: {1: length} for name in "qkv"}
    q, k, v = (x.detach() for x in dense_inputs(2, 5, 5))
    program = torch.export.export(Attention(), (q, k, v), dynamic_shapes=shapes)
    assert "flash_attn.cpu_forward.default" in program.graph_module.code or any(
        "cpu_forward" in str(node.target) for node in program.graph.nodes
    )
    q, k, v = (x.detach() for x in dense_inputs(2, 9, 9))
    torch.testing.assert_close(program.module()(q, k, v), flash_attn_func(q, k, v, causal=True), rtol=0, atol=0)


# Views that a graph makes of its inputs: a cache of layers or of K beside V, and one buffer for outputs.
VIEWS = {
    "layers": lambda batch, length: ((2, batch, length, 2, 16), lambda pool: (pool[0], pool[1])),
    "keys-beside-values": lambda batch, length: ((batch, 2, length, 2, 16), lambda pool: (pool[:, 0], pool[:, 1])),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", VIEWS)
def test_a_compiled_append_writes_into_views(name, dynamic):
    take = VIEWS[name](2, 8)[1]

    def step(q, pool, k, v, lengths):
        return flash_attn_with_kvcache(q, *take(pool), k, v, cache_seqlens=lengths, causal=True)

    torch._dynamo.reset()
    fast = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for batch, length in ((2, 8), (3, 8), (4, 9)):
        pool = rand(*VIEWS[name](batch, length)[0])
        ours, expected = pool.clone(), pool.clone()
        inputs = [rand(batch, 1, 2, 16) for _ in range(3)]
        lengths = i32(*range(3, 3 + batch))
        out = fast(inputs[0], ours, *inputs[1:], lengths)
        torch.testing.assert_close(out, step(inputs[0], expected, *inputs[1:], lengths), rtol=0, atol=0)
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    "view",
    [
        lambda buffer: buffer[1],
        lambda buffer: buffer[:2].flatten(0, 1)[:2],
        lambda buffer: buffer[..., 16:].flatten(0, 1)[2:4],
        lambda buffer: buffer.flatten(0, 1)[3:5, ..., :16],
        lambda buffer: buffer[1:2, :2, ..., 16:].squeeze(0),
    ],
    ids=["one-of-some", "first-rows", "other-columns", "last-rows", "corner"],
)
def test_a_compiled_call_writes_out_into_a_view(view, dynamic):
    def attention(q, k, v, buffer):
        flash_attn_func(q, k, v, out=view(buffer)[..., :16])
        return buffer + 0

    torch._dynamo.reset()
    fast = torch.compile(attention, fullgraph=True, dynamic=dynamic)
    for length in (5, 6, 7):
        q, k, v = (rand(2, length, 2, 16) for _ in range(3))
        buffer = rand(3, 2, length, 2, 32)
        expected = attention(q, k, v, buffer.clone())
        torch.testing.assert_close(fast(q, k, v, buffer), expected, rtol=0, atol=0)
        torch.testing.assert_close(buffer, expected, rtol=0, atol=0)


def test_a_compiled_call_writes_out_into_a_slice_of_any_length():
    def attention(q, k, v, buffer):
        flash_attn_func(q, k, v, out=buffer[1 : 1 + q.shape[0]])
        return buffer + 0

    fast = compiled(attention, "inductor")
    for batch in (3, 4, 6):
        q, k, v = (rand(batch, 5, 2, 16) for _ in range(3))
        buffer = rand(8, 5, 2, 16)
        expected = attention(q, k, v, buffer.clone())
        torch.testing.assert_close(fast(q, k, v, buffer), expected, rtol=0, atol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_call_writes_out_into_a_slice_of_two_dimensions(dynamic):
    def attention(q, k, v, buffer):
        flash_attn_func(q, k, v, out=buffer[1:3, ..., 16:])
        return buffer + 0

    torch._dynamo.reset()
    fast = torch.compile(attention, fullgraph=True, dynamic=dynamic)
    for length in (5, 6, 7):
        q, k, v = (rand(2, length, 3, 16) for _ in range(3))
        buffer = rand(4, length, 3, 32)
        expected = attention(q, k, v, buffer.clone())
        torch.testing.assert_close(fast(q, k, v, buffer), expected, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1, 0.5, np.float64(0.5), None], ids=repr)
def test_compile_with_a_number_of_any_type(scale):
    def attention(q, scale):
        return flash_attn_func(q, q, q, softmax_scale=scale) + flash_attn_func(q, q, q, softcap=np.float32(2.5))

    torch.testing.assert_close(compiled(attention)(Q, scale), attention(Q, scale), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes are the example's; lengths are what changes
@pytest.mark.parametrize("name", ["dense", "varlen", "paged", "append", "packed_append", "rotary", "paged_cache"])
def test_jit_trace_records_the_ops(name):
    """Not what they do for the lengths at hand: the trace is right for others too."""
    function, arguments = VALID[name]
    tensors = {key: value for key, value in arguments.items() if isinstance(value, torch.Tensor)}
    others = {key: value for key, value in arguments.items() if key not in tensors}

    def attention(*values):
        return function(**dict(zip(tensors, values, strict=True)), **others)

    def with_lengths(lengths):
        own = {key: value.clone() for key, value in tensors.items()}
        for key in own.keys() & {"cu_seqlens_q", "cu_seqlens_k", "seqused_k", "cache_seqlens"}:
            own[key] = lengths if own[key].numel() == 2 else i32(0, lengths[0] - 1, own[key][-1])
        return list(own.values())

    traced = torch.jit.trace(attention, with_lengths(i32(3, 6)), check_trace=False)
    ours, expected = with_lengths(i32(2, 5)), with_lengths(i32(2, 5))
    torch.testing.assert_close(traced(*ours), attention(*expected), rtol=0, atol=0)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
