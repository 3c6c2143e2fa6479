"""Single instructions of the emulator against PyTorch and the manual's formulas, and the rules it
enforces in small kernels.
"""

from __future__ import annotations

import ctypes
import struct

import pytest
import torch
from ptx_machine import Fault, Kernel, tensor_map
from torch import Tensor

HEAD = ".version 8.0\n.target sm_90a\n.address_size 64\n"


def apply(body: str, *inputs: Tensor, threads: int = 32, shared: int = 0) -> Tensor:
    """``body`` reads %a0, %a1, ... of its thread and writes %d, all 32 bits. Inputs [threads]."""
    assert all(one.element_size() == 4 and one.numel() == threads for one in inputs)
    out = torch.zeros(threads, dtype=torch.int32)
    loads = "".join(
        f"ld.param.u64 %at, [p{i}]; add.u64 %at, %at, %offset; ld.global.b32 %a{i}, [%at];\n" for i in range(len(inputs))
    )
    names = ", ".join(f".param .u64 p{i}" for i in range(len(inputs) + 1))
    text = f"""{HEAD}
.extern .shared .align 16 .b8 memory[];
.visible .entry one({names})
{{
.reg .b32 %a<8>; .reg .b32 %d; .reg .b32 %t<8>; .reg .b64 %at; .reg .b64 %offset; .reg .pred %p<8>; .reg .b32 %tid;
mov.u32 %tid, %tid.x;
mul.wide.u32 %offset, %tid, 4;
{loads}
{body}
ld.param.u64 %at, [p{len(inputs)}];
add.u64 %at, %at, %offset;
st.global.b32 [%at], %d;
ret;
}}"""
    tensors = [*inputs, out]
    parameters = struct.pack(f"<{len(tensors)}Q", *(one.data_ptr() for one in tensors))
    Kernel(text).run(parameters, [(one, one is out) for one in tensors], grid=1, block=threads, shared_bytes=shared)
    return out


def bits(values: list[int]) -> Tensor:
    return torch.tensor([ctypes.c_int32(v & 0xFFFFFFFF).value for v in values], dtype=torch.int32)


def hard_numbers() -> Tensor:
    """fp32 of every kind: ties of bf16 and fp16, subnormals, limits, infinities."""
    g = torch.Generator().manual_seed(0)
    any_bits = torch.randint(-(2**31), 2**31 - 1, (600,), generator=g).int().view(torch.float32)
    ties = (torch.randint(0, 2**16, (200,), generator=g).int() << 16 | 0x8000).view(torch.float32)
    half_ties = torch.randint(0, 2048, (200,), generator=g).float() * 2.0**-25 + 2.0**-26
    ends = torch.tensor(
        [0.0, -0.0, 65504.0, 65519.9, 65520.0, 1e38, float("inf"), -float("inf"), 2.0**-24, 2.0**-25, 6.1e-5, 1e-40]
    )
    x = torch.cat([any_bits, ties, half_ties, ends])
    x = x[~x.isnan()]
    return x[: x.numel() // 32 * 32]


@pytest.mark.parametrize(("type", "dtype"), [("bf16x2", torch.bfloat16), ("f16x2", torch.float16)])
def test_rounding_to_half_precision(type: str, dtype: torch.dtype) -> None:
    x = hard_numbers()
    got = torch.cat([apply(f"cvt.rn.{type}.f32 %d, %a0, %a1;", block, block.flip(0)) for block in x.split(32)])
    low, high = (got & 0xFFFF).short(), (got >> 16).short()
    reversed_ = torch.cat([block.flip(0) for block in x.split(32)])
    assert torch.equal(high, x.to(dtype).view(torch.int16)), "the first source is the upper half"
    assert torch.equal(low, reversed_.to(dtype).view(torch.int16))


@pytest.mark.parametrize("instruction", ["add", "mul", "fma"])
def test_rounding_in_every_direction(instruction: str) -> None:
    """rm and rp enclose the exact result, one ulp apart; rz is nearer to zero, rn nearer to it."""
    g = torch.Generator().manual_seed(1)
    a, b, c = (torch.randn(32, generator=g) * 10.0 ** torch.randint(-3, 4, (32,), generator=g) for _ in range(3))
    operands = "%a0, %a1, %a2" if instruction == "fma" else "%a0, %a1"
    down, up, zero, near = (
        apply(f"{instruction}.{mode}.f32 %d, {operands};", a, b, c).view(torch.float32) for mode in ("rm", "rp", "rz", "rn")
    )
    x, y, z = a.double(), b.double(), c.double()
    exact = {"add": x + y, "mul": x * y, "fma": x * y + z}[instruction]
    assert (down.double() <= exact).all()
    assert (exact <= up.double()).all()
    assert (down != up).sum() > 20
    assert (torch.nextafter(down, up) == up).all()
    assert torch.equal(zero, torch.where(exact < 0, up, down))
    assert ((near == down) | (near == up)).all()
    assert ((near.double() - exact).abs() <= torch.minimum(exact - down.double(), up.double() - exact) * (1 + 1e-6)).all()


def test_saturation() -> None:
    x = torch.tensor([-1.0, -0.0, 0.25, 1.0, 1.5, float("inf"), -float("inf"), float("nan")]).repeat(4)
    got = apply("cvt.sat.f32.f32 %d, %a0;", x).view(torch.float32)
    assert torch.equal(got, torch.tensor([0.0, 0.0, 0.25, 1.0, 1.0, 1.0, 0.0, 0.0]).repeat(4))


@pytest.mark.parametrize(("type", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_widening_from_half_precision(type: str, dtype: torch.dtype) -> None:
    every = torch.arange(0, 2**16, 61).int()[: 32 * 33]
    body = f".reg .b16 %h; cvt.u16.u32 %h, %a0; cvt.f32.{type} %d, %h;"
    got = torch.cat([apply(body, block) for block in every.split(32)]).view(torch.float32)
    torch.testing.assert_close(got, every.short().view(dtype).float(), rtol=0, atol=0, equal_nan=True)


LANE = torch.arange(32, dtype=torch.int32)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("idx.b32 %d, %a0, 5, 31", torch.full((32,), 5)),
        ("up.b32 %d, %a0, 3, 0", torch.where(LANE < 3, LANE, LANE - 3)),
        ("down.b32 %d, %a0, 3, 31", torch.where(LANE > 28, LANE, LANE + 3)),
        ("bfly.b32 %d, %a0, 9, 31", LANE ^ 9),
        ("down.b32 %d, %a0, 3, 6175", torch.where(LANE % 8 > 4, LANE, LANE + 3)),  # segments of 8: (32 - 8) << 8 | 31
    ],
)
def test_shuffles(how: str, expected: Tensor) -> None:
    assert torch.equal(apply(f"shfl.sync.{how}, 0xffffffff;", LANE), expected.int())


@pytest.mark.parametrize(
    ("body", "a", "b", "expected"),
    [
        ("prmt.b32 %d, %a0, %a1, 0x7531;", 0x44332211, 0x88776655, 0x88664422),
        ("prmt.b32 %d, %a0, %a1, 0x0008;", 0x000000F0, 0, 0xF0F0F0FF),
        ("bfe.u32 %d, %a0, 4, 8;", 0x12345678, 0, 0x67),
        ("bfe.s32 %d, %a0, 4, 4;", 0x000000F0, 0, 0xFFFFFFFF),
        ("bfi.b32 %d, %a0, %a1, 8, 4;", 0xAB, 0xFFFFFFFF, 0xFFFFFBFF),
        ("shf.l.wrap.b32 %d, %a0, %a1, 8;", 0x11223344, 0x55667788, 0x66778811),
        ("lop3.b32 %d, %a0, %a1, 0, 0x3c;", 0xF0F0F0F0, 0xFF00FF00, 0x0FF00FF0),
        ("shl.b32 %d, %a0, %a1;", 1, 32, 0),
        ("shr.s32 %d, %a0, %a1;", 0x80000000, 40, 0xFFFFFFFF),
        ("mul.hi.u32 %d, %a0, %a1;", 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFE),
        ("min.s32 %d, %a0, %a1;", 0xFFFFFFFF, 1, 0xFFFFFFFF),
        ("min.u32 %d, %a0, %a1;", 0xFFFFFFFF, 1, 1),
        ("setp.lt.f32 %p0, %a0, %a1; selp.b32 %d, 1, 0, %p0;", 0x7FC00000, 0, 0),
        ("setp.ltu.f32 %p0, %a0, %a1; selp.b32 %d, 1, 0, %p0;", 0x7FC00000, 0, 1),
        ("setp.ne.f32 %p0, %a0, %a0; selp.b32 %d, 1, 0, %p0;", 0x7FC00000, 0, 0),
        ("setp.neu.f32 %p0, %a0, %a0; selp.b32 %d, 1, 0, %p0;", 0x7FC00000, 0, 1),
        ("max.f32 %d, %a0, %a1;", 0x7FC00000, 0x3F800000, 0x3F800000),
        ("max.f32 %d, %a0, %a1, 0f40000000;", 0xBF800000, 0x3F800000, 0x40000000),
        ("add.ftz.f32 %d, %a0, %a1;", 0x00000001, 0x00000001, 0),
        ("ex2.approx.ftz.f32 %d, %a0;", 0xC2FE0000, 0, 0),
        ("cvt.rzi.s32.f32 %d, %a0;", 0xC0200000, 0, 0xFFFFFFFE),
        ("redux.sync.add.s32 %d, %a0, 0xffffffff;", 3, 0, 96),
        ("redux.sync.max.f32 %d, %a0, 0xffffffff;", 0xBF800000, 0, 0xBF800000),
        ("setp.eq.u32 %p0, %tid, 7; vote.sync.ballot.b32 %d, %p0, 0xffffffff;", 0, 0, 128),
    ],
)
def test_bits(body: str, a: int, b: int, expected: int) -> None:
    assert torch.equal(apply(body, bits([a] * 32), bits([b] * 32)), bits([expected] * 32))


def test_diverged_threads_reconverge() -> None:
    """Each lane takes as many rounds of a loop as its number; all reconverge at the shuffle."""
    body = """mov.u32 %t0, 0;
    again:
    setp.ge.u32 %p0, %t0, %a0;
    @%p0 bra done;
    add.u32 %t0, %t0, 1;
    bra again;
    done:
    shfl.sync.bfly.b32 %d, %t0, 1, 31, 0xffffffff;"""
    assert torch.equal(apply(body, LANE), LANE ^ 1)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("ld.param.u64 %at, [p1]; ld.global.b32 %d, [%at+128];", "0 bytes behind a tensor's end"),
        ("ld.param.u64 %at, [p1]; ld.global.b32 %d, [%at+2];", "aligned to 4 bytes"),
        ("ld.param.u64 %at, [p0]; st.global.b32 [%at], %a0; mov.b32 %d, 0;", "may be written"),
        ("mov.u32 %t0, memory; ld.shared.b32 %d, [%t0];", "unwritten ones"),
        ("mov.u32 %t0, memory; ld.shared.b32 %d, [%t0+64];", "within 64 bytes"),
        ("mov.b32 %d, 0; bar.sync 1, 64;", "deadlock"),
        ("mov.b32 %d, 0; bar.arrive 1, 64;", "arrivals left over"),
        ("mov.u32 %t0, memory; mbarrier.arrive.shared::cta.b64 _, [%t0]; mov.b32 %d, 0;", "expected an initialised barrier"),
        ("setp.lt.u32 %p0, %tid, 16; @%p0 bra skip; mov.b32 %d, 0; bar.sync 0; skip: mov.b32 %d, 1; bar.sync 0;", "deadlock"),
        ("trap; mov.b32 %d, 0;", "trap"),
        ("setmaxnreg.dec.sync.aligned.u32 40; setmaxnreg.dec.sync.aligned.u32 48; mov.b32 %d, 0;", "go down from 40, got 48"),
        ("mov.u32 %t0, memory; mbarrier.init.shared::cta.b64 [%t0], 1048576; mov.b32 %d, 0;", "1 to 2.20 - 1 arrivals"),
        (
            "mov.u32 %t0, memory; mbarrier.init.shared::cta.b64 [%t0], 32;"
            "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%t0], 65536; mov.b32 %d, 0;",
            "fewer than 2.20 bytes",
        ),
        ("tanh.approx.f32 %d, %a0;", "tanh.approx.f32 is not emulated"),
        ("min.s32 %d, %a0, %a0, %a0;", "not emulated with 4 operands: min.s32"),
    ],
)
def test_rules(body: str, complaint: str) -> None:
    with pytest.raises(Fault, match=complaint):
        apply(body, LANE, shared=64)


@pytest.mark.parametrize(
    ("writer", "reader", "allowed"),
    [
        ("fence.proxy.async.shared::cta; bar.sync 0;", "bar.sync 0;", True),
        ("bar.sync 0;", "bar.sync 0; fence.proxy.async.shared::cta;", True),
        ("bar.sync 0;", "fence.proxy.async.shared::cta; bar.sync 0;", False),
        ("bar.sync 0; fence.proxy.async.shared::cta;", "bar.sync 0;", False),
        ("bar.sync 0;", "bar.sync 0;", False),
    ],
)
def test_a_proxy_fence_lies_between_the_write_and_the_asynchronous_read(writer: str, reader: str, allowed: bool) -> None:
    """Warp 1 writes shared memory, warp 0 stores it by TMA; either of them may fence."""
    text = f"""{HEAD}
.visible .entry one(.param .align 64 .b8 map[128])
{{
.shared .align 128 .b8 buffer[128];
.reg .pred %p; .reg .b32 %tid; .reg .b32 %at; .reg .b32 %lane; .reg .b32 %zero; .reg .b64 %map;
mov.u32 %tid, %tid.x;
mov.u32 %at, buffer;
and.b32 %lane, %tid, 31;
mov.u32 %zero, 0;
mov.b64 %map, map;
setp.lt.u32 %p, %tid, 32;
@%p bra read;
mad.lo.u32 %at, %lane, 4, %at;
st.shared.b32 [%at], %lane;
{writer}
ret;
read:
{reader}
setp.eq.u32 %p, %tid, 0;
@%p cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%map, {{%zero, %zero}}], [%at];
cp.async.bulk.commit_group;
cp.async.bulk.wait_group 0;
ret;
}}"""
    faults = []
    for seed in range(20):
        out = torch.zeros(1, 32, dtype=torch.int32)
        parameters = bytes(tensor_map(out.data_ptr(), 4, [32, 1], [128], [32, 1], 0))
        try:
            Kernel(text).run(parameters, [(out, True)], grid=1, block=64, shared_bytes=0, seed=seed)
        except Fault as fault:
            faults.append(str(fault))
        else:
            assert torch.equal(out[0], LANE)
    assert bool(faults) != allowed
    assert all("expected fence.proxy.async" in text for text in faults)
