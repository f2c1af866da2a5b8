"""The CUDA kernels as nvcc compiles them (PTX), run on the CPU: what a GPU would execute but for ptxas' translation.

tests/cuda_sim/ptx.py turns PTX into C++; the simulator's own tests and the bodies that every backend shares then run on
it. It takes minutes and nvcc: done with TOKENPOOL_EXT_REQUIRE_CUDA_BUILD=1, or where it has been built before. The
translation itself is tested everywhere, on handmade PTX.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "cuda_sim"))
import count
import ptx
import simulator
from helpers import assert_identical, positive_weights, spread_indices

pytestmark = pytest.mark.skipif(simulator.compiler() is None, reason="no C++ compiler on PATH")
REQUIRED = os.environ.get("TOKENPOOL_EXT_REQUIRE_CUDA_BUILD") == "1"

ENTRY = """.visible .entry _ZN9tokenpool4cuda11some_kernelENS0_4ArgsE(
	.param .align 8 .b8 some_param_0[8]
)
.maxntid 64, 1, 1
{
	.reg .pred 	%p<4>;
	.reg .b16 	%rs<9>;
	.reg .f32 	%f<9>;
	.reg .b32 	%r<20>;
	.reg .b64 	%rd<9>;
	.shared .align 4 .b8 scratch[20];

	ld.param.u64 	%rd1, [some_param_0];
	cvta.to.global.u64 	%rd2, %rd1;
	mov.u32 	%r1, %tid.x;
	mul.wide.s32 	%rd3, %r1, 4;
	add.s64 	%rd4, %rd2, %rd3; // out[threadIdx.x]
	mov.u32 	%r0, 0;
	BODY
	st.global.u32 	[%rd4], %r0;
	ret;

}

"""
MAIN = """
#include <cstdio>
#include <vector>
#include "ptx_ops.h"
extern const ptx::Kernel some;
int main() {
  std::vector<unsigned> out(64);
  for (unsigned i = 0; i < 64; ++i) out[i] = i * 2654435761u;
  const unsigned* data = out.data();
  cuda_sim::launch([&] { some.run(&data); }, 1, 64, some.static_shared + 64);
  for (unsigned v : out) std::printf("%08x\\n", v);
}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs instructions in 64 threads with 64 bytes of dynamic shared memory; what they leave in r0, or the error."""
    folder = tmp_path_factory.mktemp("ptx")

    def of(body):
        (kernel,) = ptx.kernels(ENTRY.replace("BODY", body))
        assert kernel.name == "some"
        source, program = folder / "some.cpp", folder / "some"
        source.write_text(f'#include "ptx_ops.h"\nusing namespace ptx;\n{kernel.text}\n{MAIN}')
        done = subprocess.run(
            [simulator.compiler(), "-std=c++17", "-O0", f"-I{simulator.HERE}", str(source), "-o", str(program)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
        return (
            done.stderr
            if done.returncode
            else np.array([int(line, 16) for line in done.stdout.split()], dtype=np.uint32)
        )

    return of


THREADS = np.arange(64, dtype=np.uint32)


@pytest.mark.parametrize(
    "body,expected",
    [
        ("add.s32 %r0, %r1, -3;", THREADS - np.uint32(3)),
        (
            "shl.b32 %r0, %r1, %r1;",
            np.where(THREADS < 32, THREADS.astype(np.uint64) << (THREADS.astype(np.uint64) % 32), 0).astype(np.uint32),
        ),
        ("shfl.sync.up.b32 %r0|%p1, %r1, 3, 0, -1;", np.where(THREADS % 32 < 3, THREADS, THREADS - 3)),
        ("shfl.sync.bfly.b32 %r0|%p1, %r1, 5, 31, -1;", THREADS ^ 5),
        ("shfl.sync.idx.b32 %r0, %r1, 7, 31, -1;", THREADS // 32 * 32 + 7),
        ("and.b32 %r2, %r1, 3;\nmatch.any.sync.b32 %r0, %r2, -1;", np.uint32(0x11111111) << (THREADS % 4)),
        (
            "sub.s32 %r2, 5, %r1;\nredux.sync.min.s32 %r0, %r2, -1;",
            np.where(THREADS < 32, 5 - 31, 5 - 63).astype(np.int64).astype(np.uint32),
        ),
        (
            "{ .reg .pred %p1; .reg .pred %p2; setp.ne.u32 %p1, %r1, 64; "
            "bar.red.or.pred %p2, 0, %p1; selp.u32 %r0, 1, 0, %p2; }",
            THREADS * 0 + 1,
        ),
        (
            "mov.f32 %f1, 0fBF800000;\ncvt.rn.f32.s32 %f2, %r1;\nfma.rn.f32 %f3, %f2, %f1, "
            "0f40000000;\nmov.b32 %r0, %f3;",
            (2 - np.arange(64, dtype=np.float32)).view(np.uint32),
        ),
        (
            "cvt.rn.f32.s32 %f1, %r1;\n{ cvt.rn.bf16.f32 %rs1, %f1;}\nmov.b32 %r0, {%rs1, %rs1};",
            (np.arange(64, dtype=np.float32).view(np.uint32) >> 16) * np.uint32(0x10001),
        ),
        ("setp.gt.s32 %p1, %r1, 40;\n@%p1 bra $L__BB0_2;\nmov.u32 %r0, 7;\n$L__BB0_2:", np.where(THREADS > 40, 0, 7)),
        (
            "shl.b32 %r2, %r1, 2;\nand.b32 %r2, %r2, 63;\nmov.u32 %r3, "
            "_ZN9tokenpool4cuda6memoryE;\nadd.s32 %r4, %r3, %r2;\nst.shared.u32 [%r4], %r1;\n"
            "bar.sync 0;\nld.shared.v4.u32 {%r5, %r6, %r7, %r0}, [_ZN9tokenpool4cuda6memoryE+16];",
            THREADS * 0 + 55,
        ),
        (
            "mov.u32 %r2, 2147483647;\nst.shared.u32 [scratch+16], %r2;\nbar.sync 0;\natom.shared.min.s32 "
            "%r3, [scratch+16], %r1;\nbar.sync 0;\n"
            "ld.shared.u32 %r0, [scratch+16];",
            THREADS * 0,
        ),
    ],
)
def test_instructions(run, body, expected):
    got = run(body)
    assert isinstance(got, np.ndarray), got
    np.testing.assert_array_equal(got, np.asarray(expected).astype(np.uint32))


def test_the_tensor_core_multiplies_matrices(run):
    """Fragments are filled and read by the manual's formulas, here through a matrix whose entries say where they
    stand."""
    lane = np.arange(32)
    group, inside = lane // 4, lane % 4
    a, b = np.arange(256).reshape(16, 16) % 13 - 6.0, np.arange(128).reshape(16, 8) % 7 - 3.0
    words = []
    for matrix, places in (
        (a, [(group + 8 * (i % 4 // 2), 2 * inside + i % 2 + 8 * (i // 4)) for i in range(8)]),
        (b, [(2 * inside + i % 2 + 8 * (i // 2), group) for i in range(4)]),
    ):
        halves = [
            matrix[rows, columns].astype(np.float16).view(np.uint16).astype(np.uint32) for rows, columns in places
        ]
        words += [low | high << 16 for low, high in zip(halves[::2], halves[1::2])]
    # Each lane finds its six words by a chain of comparisons: slow, but made of instructions tested above.
    body = ["and.b32 %r19, %r1, 31;"] + [f"mov.u32 %r{10 + w}, 0;" for w in range(6)]
    for w, values in enumerate(words):
        for l, value in enumerate(values):
            body.append(f"setp.eq.s32 %p1, %r19, {l};\nselp.b32 %r{10 + w}, {int(value)}, %r{10 + w}, %p1;")
    body += [f"mov.f32 %f{i}, 0f3F800000;" for i in range(1, 5)]
    body.append(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f1,%f2,%f3,%f4}, {%r10,%r11,%r12,%r13}, "
        "{%r14,%r15}, {%f1,%f2,%f3,%f4};"
    )
    want = a @ b + 1
    for e in range(4):
        got = run("\n".join(body + [f"mov.b32 %r0, %f{e + 1};"]))
        assert isinstance(got, np.ndarray), got
        np.testing.assert_array_equal(
            got.view(np.float32)[:32], want[group + 8 * (e // 2), 2 * inside + e % 2].astype(np.float32)
        )


@pytest.mark.parametrize(
    "body,message",
    [
        ("ld.shared.v4.u32 {%r5, %r6, %r7, %r0}, [_ZN9tokenpool4cuda6memoryE+8];", "misaligned access to shared"),
        ("ld.shared.u32 %r0, [_ZN9tokenpool4cuda6memoryE+64];", "past the block's shared memory"),
        ("ld.global.u32 %r0, [%rd4+2];", "misaligned access to global"),
        (
            "mov.u32 %r2, _ZN9tokenpool4cuda6memoryE;\ncp.async.cg.shared.global [%r2], [%rd2], 16;",
            "without waiting for its copies",
        ),
        ("setp.eq.s32 %p1, %r1, 9;\n@%p1 ret;\nbar.sync 0;", "left the kernel while others wait"),
        ("setp.lt.s32 %p1, %r1, 9;\n@%p1 shfl.sync.bfly.b32 %r0|%p2, %r1, 5, 31, -1;", "deadlock"),
        ("shfl.sync.bfly.b32 %r0|%p2, %r1, 5, 31, 255;", "without all 32 lanes"),
        ("bar.sync 1;", "only barrier 0"),
    ],
)
def test_faults_are_found(run, body, message):
    said = run(body)
    assert isinstance(said, str) and message in said, said


COUNTED = """
.loc 1 10 1
	setp.lt.s32 %p1, %r1, 40;
	@%p1 bra $L__BB0_2;
.loc 1 3 1, function_name $L__info_string0, inlined_at 1 20 5
	add.s32 %r0, %r0, 1;
	add.s32 %r0, %r0, 2;
$L__BB0_2:
.loc 1 30 1
	shl.b32 %r2, %r1, 7;
	and.b32 %r2, %r2, 4095;
	mov.u32 %r3, _ZN9tokenpool4cuda6memoryE;
	add.s32 %r4, %r3, %r2;
.loc 1 31 1
	st.shared.u32 [%r4], %r1;
.loc 1 32 1
	shl.b32 %r5, %r1, 4;
	and.b32 %r5, %r5, 511;
	add.s32 %r4, %r3, %r5;
.loc 1 33 1
	ld.shared.v4.u32 {%r5, %r6, %r7, %r8}, [%r4];
	ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r5, %r6, %r7, %r8}, [%r4];
.loc 1 34 1
	ld.shared.u32 %r5, [%r3];
.loc 1 35 1
	ld.global.u32 %r5, [%rd2];
.loc 1 36 1
	mul.wide.s32 %rd5, %r1, 32;
	add.s64 %rd6, %rd2, %rd5;
.loc 1 37 1
	ld.global.u32 %r5, [%rd6];
.loc 1 38 1
"""


def test_counts(tmp_path):
    listing = ptx.Listing()
    (kernel,) = ptx.kernels('.file 1 "some.cuh"\n' + ENTRY.replace("BODY", COUNTED), listing)
    source, program = tmp_path / "some.cpp", tmp_path / "some"
    source.write_text(f"""
#include "ptx_ops.h"
#include "count.h"
using namespace ptx;
{kernel.text}
int main() {{
  alignas(64) static unsigned out[512];
  static int64_t blocks[{listing.blocks}], accesses[{len(listing.instructions)}][3];
  const unsigned* data = out;
  cuda_sim::launch([&] {{ some.run(&data); }}, 1, 64, some.static_shared + 4096);
  fold_counts();
  take_counts(blocks, accesses);
  for (int64_t v : blocks) std::printf("%ld ", static_cast<long>(v));
  for (auto& a : accesses) std::printf("%ld %ld %ld ", static_cast<long>(a[0]), static_cast<long>(a[1]),
  static_cast<long>(a[2]));
}}""")
    subprocess.run(
        [simulator.compiler(), "-std=c++17", f"-I{simulator.HERE}", str(source), "-o", str(program)], check=True
    )
    numbers = np.array(
        [int(v) for v in subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.split()]
    )
    lines = count.by_place(listing.instructions, numbers[: listing.blocks], numbers[listing.blocks :].reshape(-1, 3))
    at = {place[-1]: line for place, line in lines.items()}
    assert at["some.cuh:10"].instructions == 2 * 2  # two warps
    assert at["some.cuh:20"].instructions == at["some.cuh:3"].instructions == 2  # only the second warp's upper lanes
    assert ("some", "some.cuh:20", "some.cuh:3") in lines
    passes = {number: (at[f"some.cuh:{number}"].passes, at[f"some.cuh:{number}"].conflicts) for number in (31, 33, 34)}
    assert passes == {31: (64, 62), 33: (16, 0), 34: (2, 0)}  # one bank; 16 bytes a lane, twice; one word for all
    sectors = {number: (at[f"some.cuh:{number}"].sectors, at[f"some.cuh:{number}"].wasted) for number in (35, 37, 38)}
    assert sectors == {35: (2, 0), 37: (64, 56), 38: (8, 0)}
    assert at["some"].kinds["shared"] == 4 * 2 and at["some"].kinds["global"] == 3 * 2
    assert at["some"].instructions == sum(line.instructions for place, line in lines.items() if len(place) == 2) + 6 * 2
    shown = "\n".join(count.table(lines, 0.0))
    assert "some.cuh:31" in shown and "some" in shown


@pytest.mark.parametrize("body", ["ld.shared.s8 %r0, [%r1];", "mov.u32 %r0, %clock;", "mov.u32 %r0, unknown;"])
def test_what_is_not_translated_is_said(body):
    with pytest.raises(NotImplementedError):
        list(ptx.kernels(ENTRY.replace("BODY", body)))


@pytest.fixture(scope="module")
def compiled():
    """The simulator of the compiled kernels, or a skip."""
    library = simulator.built("ptx")
    if library.exists():
        return library
    if simulator.nvcc() is None:
        if REQUIRED:
            pytest.fail("nvcc was not found")
        pytest.skip("no nvcc on PATH or in CUDA_HOME")
    if not REQUIRED:
        pytest.skip("takes minutes: set TOKENPOOL_EXT_REQUIRE_CUDA_BUILD=1")
    return simulator.build("ptx")


@pytest.mark.parametrize("path", simulator.PATHS)
@pytest.mark.parametrize("algorithm", ["kmeans", "kmedoids"])
def test_float32_has_the_bits_of_the_source(compiled, path, algorithm):
    """No result rests on what nvcc contracts to multiply-adds: the source compiled by g++ without them gives the same
    bits."""
    source = simulator.Simulator(simulator.build(""), path=path)
    for seed, (b, n, d, k, scale) in enumerate([(2, 100, 48, 17, 1.0), (1, 64, 130, 32, 100.0), (3, 33, 7, 33, 1e-3)]):
        x, w = (
            scale * torch.randn(b, n, d, generator=torch.Generator().manual_seed(seed)) + seed,
            positive_weights(b, n),
        )
        for init in (spread_indices(b, n, k), torch.empty(b, 0, dtype=torch.int64)):
            want = getattr(source, algorithm)(x, w, None, None, init, k, 5, False)
            got = getattr(simulator.Simulator(compiled, path=path), algorithm)(x, w, None, None, init, k, 5, False)
            assert_identical(want, got)


def test_a_call_is_counted(compiled, capsys):
    """3 tiles of 32 x 32 of the triangle, 8 steps of a tensor core for every 16 of 64 features."""
    count.main(["--shape", "1x64x64", "--clusters", "16", "--path", "resident"])
    kernel = next(line.split() for line in capsys.readouterr().out.splitlines() if "resident___nv_bfloat16" in line)
    assert int(kernel[2]) == 3 * 8 * 4 and int(kernel[0]) > 5000


def test_the_simulators_tests_pass_on_the_compiled_kernels(compiled, tmp_path):
    passed = simulator.passed_in_a_process(tmp_path, "ptx", str(Path(__file__).parent / "test_cuda_simulator.py"))
    assert len(passed) >= 375, len(passed)


def test_the_bodies_every_backend_shares_pass_on_the_compiled_kernels(compiled, tmp_path):
    simulator.shared_bodies_pass(tmp_path, "ptx")
