"""The translation of PTX into C++. What its instructions compute is tested by kernels (test_emulated_kernels.py)."""

import pytest
import repository  # noqa: F401  (makes build_support importable)

from build_support import ptx

KERNEL = """
.visible .entry _Z6kernelPi(
	.param .u64 _Z6kernelPi_param_0
)
{{
	.reg .pred %p<2>;
	.reg .b16 %rs<2>;
	.reg .f32 %f<3>;
	.reg .b32 %r<4>;
	.reg .b64 %rd<3>;
{body}
}}
"""
PRODUCT = "wgmma.mma_async.sync.aligned.m64n8k16"
WAIT = """{{
.reg .pred done;
again:
mbarrier.try_wait.parity.shared::cta.b64 done, [%r{barrier}], %r2;
@done bra over;
bra again;
over:
}}"""


def translated(body):
    """The function's lines that come of this, a statement each."""
    lines = ptx.translate(KERNEL.format(body=body)).splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("void kernel_0"))
    end = lines.index("}", begin)
    return [line.strip() for line in lines[begin + 1 : end]]


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("add.s32 %r1, %r2, -7;", "r_r1 = bits_of(static_cast<int32_t>(as<int32_t>(r_r2) + static_cast<int32_t>(-7"),
        ("@!%p1 bra $L__BB0_2;", "if (!r_p1) { goto L__BB0_2; }"),
        ("setp.ltu.f32 %p1, %f1, 0f3F800000;", "as<float>(r_f1) < as<float>(0x3F800000u) || std::isnan"),
        ("setp.lt.and.s32 %p1, %r1, %r2, !%p0;", "(as<int32_t>(r_r1) < as<int32_t>(r_r2)) && !r_p0"),
        ("ld.param.u64 %rd1, [_Z6kernelPi_param_0];", "load_param<uint64_t, 1>(global(address_of(params[0])))"),
        ("st.shared.v2.f32 [%r1+-16], {%f1, %f2};", "store(shared(r_r1 + (-16)), std::array<float, 2>{"),
        ("cvt.rn.bf16x2.f32 %r1, %f1, %f2;", "to_halves<cutlass::bfloat16_t>(as<float>(r_f1), as<float>(r_f2))"),
        ("mov.b64 {%r1, %r2}, %rd1;", "parts_of<2>(as<uint64_t>(r_rd1)); r_r1 = bits_of(values[0]);"),
        ("bar.sync 0;", "sync_block();"),
        ("bar.sync %r1, %r2;", "wait_at_named_barrier(as<int32_t>(r_r1), as<int32_t>(r_r2));"),
        ("mov.u32 %r1, %tid.x;", "static_cast<uint32_t>(thread_idx.x)"),
    ],
)  # fmt: skip
def test_a_statement(statement, expected):
    assert expected in translated(statement)[-1]


def test_what_asm_statements_declare_is_their_own():
    code = "\n".join(translated(WAIT.format(barrier=1) + WAIT.format(barrier=3)))
    for number in (1, 2):
        assert f"bool r_done_{number};" in code
        assert f"again_{number}:;" in code
        assert f"if (r_done_{number}) {{ goto over_{number}; }}" in code
        assert f"goto again_{number};" in code
    assert "wait_at_mbarrier(shared(r_r3), as<uint32_t>(r_r2)); r_done_2 = true;" in code


def test_a_kernel_is_known_by_its_symbol_and_its_shared_memory():
    code = ptx.translate(
        KERNEL.format(body=".shared .align 4 .b8 a[6];\n.shared .align 8 .b8 b[16];\nmov.u32 %r1, b;\nret;")
    )
    assert 'translation_of_kernel_0("_Z6kernelPi", {&kernel_0, 24});' in code
    assert "static_cast<uint32_t>(8)" in code


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("sin.approx.f32 %f1, %f2;", "sin.approx.f32 %f1, %f2"),
        ("add.ftz.f32 %f1, %f1, %f2;", "add.ftz.f32"),
        ("setp.ne.f32 %p1, %f1, %f2;", "setp.ne.f32"),
        ("cvt.rz.bf16.f32 %rs1, %f1;", "cvt.rz.bf16.f32"),
        ("ld.global.s8 %rs1, [%rd1];", "ld.global.s8"),
        ("ld.volatile.global.u32 %r1, [%rd1];", "ld.volatile.global.u32"),
        ("bar.red.popc.u32 %r1, 0, %p1;", "bar.red.popc.u32"),
        ("mov.u32 %r1, somewhere;", "somewhere"),
        (".local .align 8 .b8 depot[16];", ".local"),
        (f"{PRODUCT}.f32.f16.f16 {{%f1, %f2}}, %rd1, %rd2, %p1, 1, 1, 0, 0;", PRODUCT),
        (f"{PRODUCT}.f16.f16.f16 {{%r1, %r2}}, %rd1, %rd2, %p1, 1, 1, 0, 0;", PRODUCT),
        (f"{PRODUCT}.f32.f16.f16 {{%f0, %f1, %f2, %f0}}, %rd1, %rd2, %p1, -1, 1, 0, 0;", PRODUCT),
        (f"{PRODUCT}.f32.f16.f16 {{%f0, %f1, %f2, %f0}}, %rd1, %rd2, %p1, 1, 1, 1, 0;", PRODUCT),
    ],
)  # fmt: skip
def test_what_is_unknown_is_refused(statement, named):
    with pytest.raises(ValueError, match=r"has? no translation|no translation of") as refusal:
        ptx.translate(KERNEL.format(body=statement))
    assert named in str(refusal.value)


def test_a_statement_without_end_is_refused():
    with pytest.raises(ValueError, match=r"a statement that does not end: mov.u32 %r1, 1$"):
        ptx.translate(KERNEL.format(body="mov.u32 %r2, 1;\nmov.u32 %r1, 1"))


def test_functions_are_refused():
    with pytest.raises(ValueError, match=r"functions have no translation: .func helper"):
        ptx.translate(".visible .func helper()\n{\nret;\n}\n")
