"""The compile report: its parsers on small texts, its gates on made-up records, and what it says of two kernels."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import compile_report
from bench.compile_report import (
    AMDGCN,
    ARCHITECTURES,
    ASYNC_COPY,
    BARRIER,
    GATHER_KERNELS,
    GLOBAL_LOAD,
    LOCAL_MEMORY,
    MAIN_LOOP_KERNELS,
    MATRIX,
    SASS,
    SHARED_STORE,
    SPARSE_KERNELS,
    Code,
    max_programs,
    number_of,
    parse,
    violations,
)
from topk_ortho.kernels.launch import INTERPRETED

ROOT = Path(__file__).parents[2]


def sass(*instructions):
    """As cuobjdump prints it: 16 bytes an instruction, its bits in comments."""
    lines = ["	Function : _kernel", '	.headerflags	@"EF_CUDA_SM90"']
    for i, instruction in enumerate(instructions):
        lines.append(f"        /*{16 * i:04x}*/                   {instruction} ;   /* 0x00000a00ff017b82 */")
        lines.append("                                                          /* 0x000e220000000800 */")
    return "\n".join([*lines, "		..........", ""])


class TestSass:
    def test_loop(self):
        """The inner loop with the matrix instruction, not the one around it, nor a longer one without."""
        code = parse(
            sass(
                "LDC R1, c[0x0][0x28]",
                "S2R R0, SR_CTAID.X",  # 0x10: the outer loop
                "LDGSTS.E.BYPASS.128 [R3], desc[UR8][R4.64], P0",  # 0x20
                "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0",
                "@!P0 IADD3 R4, P1, R4, R6, RZ",
                "@P2 BRA 0x20",
                "FADD R1, R1, R2",  # 0x60
                "FADD R1, R1, R2",
                "FADD R1, R1, R2",
                "FADD R1, R1, R2",
                "@!UP0 BRA.U 0x60",
                "ISETP.GE.AND P0, PT, R0, R2, PT",
                "@P0 BRA P3, 0x10",
                "EXIT",
                "BRA 0xe0",
            ),
            SASS,
        )
        assert [(loop.start, loop.stop) for loop in code.loops] == [(2, 6), (6, 11), (1, 13)]
        assert code.main_loop == range(2, 6)
        assert code.count(MATRIX) == 1
        assert code.opcodes[3:5] == ["HGMMA.64x128x16.F32.BF16", "IADD3"]
        assert len(code.opcodes) == 15

    @pytest.mark.parametrize("name", ["HMMA.16816.F32.BF16", "HGMMA.64x128x8.F32.TF32", "UTCHMMA", "UTCHMMA.2CTA"])
    def test_matrix_instructions(self, name):
        code = parse(sass(f"{name} R4, R8, R12, R4", f"@P0 {name} R4, R8, R12, R4", "HADD2 R1, R2, R3"), SASS)
        assert code.count(MATRIX) == 2
        assert code.opcodes[:2] == [name, name]

    def test_loop_of_multiply_adds(self):
        """Without a matrix unit: not the longer loop of the epilogue."""
        fma, epilogue = ("FFMA R1, R2, R3, R1", "FFMA R4, R5, R6, R4", "@P0 BRA 0x0"), ("FADD R1, R1, R2",) * 6
        code = parse(sass(*fma, *epilogue, "@P1 BRA 0x30"), SASS)
        assert code.main_loop == range(3)

    def test_largest_loop(self):
        """With neither: the largest of those that hold no other."""
        jumps = "@P0 BRA 0x0", "IADD3 R1", "IADD3 R1", "@P0 BRA 0x20", "@P1 BRA 0x0"
        code = parse(sass("IADD3 R1", *jumps), SASS)
        assert code.main_loop == range(2, 5)

    def test_no_loop(self):
        """A jump forward is none, and the jump to itself that ends a kernel is none."""
        code = parse(sass("@P0 BRA 0x20", "FADD R1, R1, R2", "EXIT", "BRA 0x30"), SASS)
        assert code.loops == []
        assert code.main_loop is None

    @pytest.mark.parametrize(
        ("instruction", "n_spills"), [("STL [R1], R4", 2), ("LDL.LU R4, [R1+0x8]", 2), ("LDS R4, [R1]", 0)]
    )
    def test_spills(self, instruction, n_spills):
        code = parse(sass(instruction, "FADD R1, R1, R2", f"@P0 {instruction}"), SASS)
        assert code.count(LOCAL_MEMORY) == n_spills

    def test_resource_usage(self):
        text = "Resource usage:\n Function _gram_survivors_kernel:\n  REG:127 STACK:40 SHARED:0 LOCAL:0 CONSTANT[0]:636"
        assert (number_of("REG", text), number_of("STACK", text)) == (127, 40)

    def test_unknown_format(self):
        with pytest.raises(AssertionError, match="no REG"):
            number_of("REG", "REGISTERS: 12")


ASSEMBLY = """
	.text
_gram_survivors_kernel:                    ; @_gram_survivors_kernel
; %bb.0:
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	s_cbranch_scc1 .LBB0_4
.LBB0_1:                                ; %.lr.ph
                                        ; =>This Loop Header: Depth=1
	v_mov_b32_e32 v1, 0
.LBB0_2:                                ; =>  This Inner Loop Header: Depth=2
	buffer_load_dwordx4 v[4:7], v1, s[4:7], 0 offen ; 16-byte Folded Spill
	v_mfma_f32_32x32x8_bf16 v[8:23], v[4:5], v[6:7], v[8:23]
	s_cbranch_scc0 .LBB0_2
; %bb.3:
	v_mfma_f32_32x32x8_bf16 v[8:23], v[4:5], v[6:7], v[8:23]
	s_branch .LBB0_1
.LBB0_4:
	s_endpgm
.Lfunc_end0:
	.amdgpu_metadata
---
amdhsa.kernels:
  - .agpr_count:     40
    .group_segment_fixed_size: 0
    .name:           _gram_survivors_kernel
    .private_segment_fixed_size: 332
    .sgpr_spill_count: 14
    .vgpr_count:     296
    .vgpr_spill_count: 100
...
	.end_amdgpu_metadata
"""


@pytest.mark.parametrize(
    ("opcode", "pattern"),
    [
        ("LDGSTS.E.BYPASS.128", ASYNC_COPY),
        ("UTMALDG.2D", ASYNC_COPY),
        ("global_load_lds_dwordx4", ASYNC_COPY),
        ("LDG.E.128", GLOBAL_LOAD),
        ("LD.E.64", GLOBAL_LOAD),
        ("buffer_load_dwordx4", GLOBAL_LOAD),
        ("global_load_dwordx2", GLOBAL_LOAD),
        ("STS.U16", SHARED_STORE),
        ("STSM.16.MT88.4", SHARED_STORE),
        ("ds_write_b64", SHARED_STORE),
        ("BAR.SYNC.DEFER_BLOCKING", BARRIER),
        ("s_barrier", BARRIER),
        ("LDGDEPBAR", None),
        ("LDS.128", None),
        ("LDSM.16.M88.4", None),
        ("LDC.64", None),
        ("DEPBAR.LE", None),
        ("STG.E", None),
        ("ds_read_b64", None),
        ("s_load_dwordx2", None),
    ],
)
def test_what_is_counted_in_a_loop(opcode, pattern):
    code = Code([opcode], [])
    for other in (ASYNC_COPY, GLOBAL_LOAD, SHARED_STORE, BARRIER):
        assert code.count(other) == int(other is pattern)


class TestAmdgcn:
    def test_loop(self):
        code = parse(ASSEMBLY, AMDGCN)
        assert code.opcodes == [
            "s_load_dwordx2", "s_cbranch_scc1", "v_mov_b32_e32", "buffer_load_dwordx4", "v_mfma_f32_32x32x8_bf16",
            "s_cbranch_scc0", "v_mfma_f32_32x32x8_bf16", "s_branch", "s_endpgm",
        ]  # fmt: skip
        assert code.loops == [range(3, 6), range(2, 8)]
        assert code.main_loop == range(3, 6)
        assert code.count(MATRIX) == 2

    def test_no_loop(self):
        assert parse(re.sub(r"s_cbranch_scc0.*|s_branch.*", "s_nop 0", ASSEMBLY), AMDGCN).main_loop is None

    def test_metadata(self):
        """Registers, accumulators included, stack, spills; those of scalar registers go to vector registers."""
        fields = "vgpr_count", "private_segment_fixed_size", "vgpr_spill_count"
        assert [number_of(field, ASSEMBLY) for field in fields] == [296, 332, 100]


GOOD = {
    "sm_80": {"registers": 255, "num_warps": 4, "matrix_instructions": {"HMMA.16816.F32.BF16": 64}},
    "sm_90": {"registers": 127, "num_warps": 8, "matrix_instructions": {"HGMMA.64x128x16.F32.BF16": 4}},
    "sm_100": {"registers": 128, "num_warps": 8, "matrix_instructions": {"UTCHMMA": 4}, "tensor_memory_columns": 128},
    "gfx942": {"registers": 256, "num_warps": 4, "matrix_instructions": {"v_mfma_f32_32x32x8_bf16": 48}},
}


def record(architecture="sm_90", **fields):
    """One that keeps all promises, but for `fields`."""
    good = {
        "kernel": "gram_survivors", "variant": "half", "kind": "half", "programs_per_sm": 2, "max_registers": None,
        "stack_bytes": 0, "n_spills": 0, "shared_bytes": 32768, "tensor_memory_columns": 0,
        "loop_instructions": 124, "loop_async_copies": 4, "loop_loads": 0, "loop_stores": 0, "loop_barriers": 2,
        "races": [],
    }  # fmt: skip
    return good | GOOD[architecture] | fields | {"architecture": architecture}


WITHOUT_MATRIX = {
    "sm_80": {"HGMMA.64x128x16.F32.BF16": 4}, "sm_90": {"HMMA.16816.F32.BF16": 64}, "sm_100": {}, "gfx942": {},
}  # fmt: skip


class TestGates:
    @pytest.mark.parametrize("architecture", GOOD)
    def test_all_kept(self, architecture):
        assert violations([record(a) for a in GOOD]) == []
        assert violations([record(architecture, kind="ieee", matrix_instructions={})]) == []

    @pytest.mark.parametrize("kernel", sorted(MAIN_LOOP_KERNELS | SPARSE_KERNELS | GATHER_KERNELS))
    @pytest.mark.parametrize("fields", [{"stack_bytes": 8}, {"n_spills": 1}])
    def test_spill(self, kernel, fields):
        (line,) = violations([record(kernel=kernel, registers=64, **fields)])
        assert re.fullmatch(rf"{kernel} \(half\) on sm_90 has \d bytes of stack, \d spills", line)

    def test_registers_of_sparse_kernels(self):
        fields = {"kernel": "coactivation_sums", "kind": None, "programs_per_sm": None, "num_warps": 4}
        assert violations([record(registers=64, **fields)]) == []
        (line,) = violations([record(registers=65, **fields)])
        assert line == "coactivation_sums (half) on sm_90 has 65 registers, more than 64"

    def test_spill_elsewhere(self):
        """A kernel that neither multiplies tiles nor gathers may."""
        assert violations([record(kernel="begin", kind=None, stack_bytes=8, n_spills=4)]) == []

    @pytest.mark.parametrize("kind", ["half", "tf32"])
    @pytest.mark.parametrize("architecture", GOOD)
    def test_no_matrix_instruction(self, architecture, kind):
        """None, or one of an older architecture."""
        found = violations([record(architecture, kind=kind, matrix_instructions=WITHOUT_MATRIX[architecture])])
        assert len(found) == 1
        assert re.search(r"has no (HMMA|HGMMA|UTCHMMA|v_mfma)$", found[0])

    @pytest.mark.parametrize(
        ("architecture", "limit"), [("sm_80", 99), ("sm_90", 227), ("sm_100", 227), ("gfx942", 64)]
    )
    def test_shared_memory(self, architecture, limit):
        fields = {"programs_per_sm": None, "tensor_memory_columns": 0}
        assert violations([record(architecture, shared_bytes=limit * 1024, **fields)]) == []
        (line,) = violations([record(architecture, shared_bytes=limit * 1024 + 16, **fields)])
        assert "bytes of shared memory, more than" in line

    def test_registers(self):
        assert violations([record(max_registers=127)]) == []
        (line,) = violations([record(max_registers=120)])
        assert line == "gram_survivors (half) on sm_90 has 127 registers, more than 120"

    DIRECT = pytest.mark.parametrize(
        ("architecture", "kernel", "variant"),
        [
            ("sm_80", "gram_survivors", "half"),
            ("sm_80", "gram_survivors", "half, moments"),
            ("sm_90", "described_survivors", "half, ragged"),
            ("sm_90", "max_cosine", "tf32"),
            ("sm_100", "gram_histogram", "half, fp16, digit"),
            ("sm_80", "gram_survivors", "half, scaled"),
        ],
    )

    @DIRECT
    def test_no_asynchronous_copy(self, architecture, kernel, variant):
        (line,) = violations([record(architecture, kernel=kernel, variant=variant, loop_async_copies=0)])
        assert line == f"{kernel} ({variant}) on {architecture} has no asynchronous copy in its main loop"

    @DIRECT
    @pytest.mark.parametrize("fields", [{"loop_loads": 1}, {"loop_stores": 2}], ids=["load", "store"])
    def test_operands_through_registers(self, architecture, kernel, variant, fields):
        (line,) = violations([record(architecture, kernel=kernel, variant=variant, **fields)])
        n_loads, n_stores = fields.get("loop_loads", 0), fields.get("loop_stores", 0)
        assert line.endswith(f" has {n_loads} loads and {n_stores} stores in its main loop that are not asynchronous")

    @pytest.mark.parametrize(
        ("architecture", "fields"),
        [
            ("gfx942", {}),  # it has no such copies
            ("sm_90", {"variant": "tf32, scaled, digit", "kind": "tf32"}),
            ("sm_80", {"variant": "ieee, scaled", "kind": "ieee", "matrix_instructions": {}}),
            ("sm_90", {"kernel": "gram_sample", "kind": None, "programs_per_sm": None}),
        ],
    )
    def test_operands_that_may_pass_through_registers(self, architecture, fields):
        fields |= {"loop_async_copies": 0, "loop_loads": 8, "loop_stores": 8}
        assert violations([record(architecture, **fields)]) == []

    @pytest.mark.parametrize(
        ("architecture", "kernel", "variant", "most"),
        [
            ("sm_80", "gram_survivors", "half", 2),
            ("sm_80", "gram_survivors", "half, moments", 3),
            ("sm_80", "gram_survivors", "half, restarted", 3),
            ("sm_80", "gram_histogram", "half, scaled", 3),
            ("sm_90", "described_survivors", "half, restarted", 4),
            ("sm_90", "gram_survivors", "half, scaled", 2),
            ("sm_90", "described_survivors", "half, feature-major", 4),
            ("sm_90", "gram_survivors", "tf32", 2),
            ("sm_90", "gram_row_ties", "tf32, scaled", 3),
            ("sm_100", "max_cosine", "half", 3),
            ("sm_100", "max_cosine", "ieee", 2),
            ("gfx942", "max_cosine", "half", 2),
        ],
    )
    def test_barriers(self, architecture, kernel, variant, most):
        fields = {"kernel": kernel, "variant": variant, "kind": variant[:4]}
        assert violations([record(architecture, loop_barriers=most, **fields)]) == []
        (line,) = violations([record(architecture, loop_barriers=most + 1, **fields)])
        assert line.endswith(f" has {most + 1} barriers in its main loop, more than {most}")

    def test_barriers_elsewhere(self):
        assert violations([record(kernel="next_digit", kind=None, programs_per_sm=None, loop_barriers=9)]) == []

    def test_races(self):
        (line,) = violations([record(kernel="certify", kind=None, programs_per_sm=None, races=["plan_ptr", "x_ptr"])])
        assert line.endswith(" on sm_90 loads and later stores through plan_ptr, x_ptr without a barrier in between")

    @pytest.mark.parametrize("architecture", GOOD)
    def test_programs(self, architecture):
        (line,) = violations([record(architecture, programs_per_sm=3)])
        assert line.endswith("is launched with 3 programs per multiprocessor, which holds 2")

    @pytest.mark.parametrize(
        ("architecture", "fields", "expected"),
        [
            ("sm_90", {"registers": 128}, 2),
            ("sm_90", {"registers": 129}, 1),
            ("sm_90", {"registers": 32}, 6),  # by shared memory
            ("sm_90", {"registers": 32, "shared_bytes": 0}, 8),  # by warps
            ("sm_90", {"shared_bytes": 113 * 1024}, 2),
            ("sm_90", {"shared_bytes": 113 * 1024 + 16}, 1),
            ("sm_90", {"registers": 168, "num_warps": 4}, 3),
            ("sm_80", {"registers": 168, "shared_bytes": 0}, 3),
            ("sm_80", {"registers": 16, "shared_bytes": 81 * 1024}, 2),
            ("sm_80", {"registers": 16, "shared_bytes": 82 * 1024}, 1),
            ("sm_100", {"tensor_memory_columns": 256}, 2),
            ("sm_100", {"tensor_memory_columns": 512}, 1),
            ("gfx942", {"registers": 257}, 1),
            ("gfx942", {"registers": 128, "shared_bytes": 0}, 4),
            ("gfx942", {"registers": 128, "num_warps": 8, "shared_bytes": 0}, 2),
            ("gfx942", {"registers": 24, "shared_bytes": 0}, 8),  # by waves
            ("gfx942", {"registers": 24, "shared_bytes": 33 * 1024}, 1),
        ],
        ids=str,
    )
    def test_programs_that_fit(self, architecture, fields, expected):
        assert max_programs(record(architecture, **fields)) == expected


def test_table():
    header, line = compile_report._table([record(programs_per_sm=None)]).splitlines()
    columns = (
        "kernel variant architecture warps programs registers stack spills shared loop copies loads stores barriers "
        "matrix instructions"
    )
    assert header.split() == columns.split()
    assert " ".join(line.split()) == "gram_survivors half sm_90 8 127 0 0 32768 124 4 0 0 2 4 HGMMA.64x128x16.F32.BF16"


@pytest.mark.skipif(not INTERPRETED, reason="kernels are not interpreted here")
def test_interpreted_kernels_are_refused():
    with pytest.raises(SystemExit, match="TRITON_INTERPRET is set"):
        compile_report.main([])


COMPILE = """
import json
from bench.compile_report import ARCHITECTURES, AbsentDevice, compiled, variants

device, numbers = AbsentDevice("sm_90", compiles=False), []
for number, variant in enumerate(variants()):
    variant.launch()
    name = device.kernel_name, variant.label
    if name in [("described_survivors", "half"), ("coactivation_spread", "fp32")]:
        numbers.append(number)
records = [compiled((architecture, number)) for number in numbers for architecture in ARCHITECTURES]
print(json.dumps(records))
"""


@pytest.fixture(scope="module")
def records():
    """A kernel over gram tiles and one over sparse features for every architecture; the report compiles all of them."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return [SimpleNamespace(**record) for record in json.loads(result.stdout)]


class TestRecords:
    """What is said of two kernels that ship."""

    def test_promises_are_kept(self, records):
        first_pass = dict.fromkeys(ARCHITECTURES, "gram_survivors") | {"sm_90": "described_survivors"}
        assert {(r.kernel, r.architecture) for r in records} == {
            (kernel, a) for a in ARCHITECTURES for kernel in (first_pass[a], "coactivation_spread")
        }
        assert violations([vars(r) for r in records]) == []

    def test_loops(self, records):
        """That over the rows of x is found, and that over the entries of a sample."""
        for r in records:
            least, most = (16, 1000) if r.kind == "half" else (1, 200)
            assert least < r.loop_instructions < most, r

    def test_copies(self, records):
        """Those of a first pass are asynchronous, but on AMD, and each step has its barriers."""
        for r in (r for r in records if r.kind == "half"):
            has_copies = r.architecture != "gfx942"
            assert (r.loop_async_copies > 0, r.loop_loads == 0, r.loop_stores == 0) == (has_copies,) * 3, r
            assert 2 <= r.loop_barriers <= 4

    def test_launches(self, records):
        """Two programs on a multiprocessor, one of which multiplies while the other records, or one of a large tile."""
        programs = {"gram_survivors": 2, "described_survivors": 1, "coactivation_spread": None}
        for r in records:
            assert r.programs_per_sm == programs[r.kernel]
        (first,) = (r for r in records if r.kernel == "described_survivors")
        assert first.matrix_instructions["HGMMA.64x128x16.F32.BF16"] > 0
        assert (first.num_warps, first.max_registers, first.stack_bytes) == (8, 255, 0)
        assert 128 < first.registers <= 255
        assert first.shared_bytes >= 4 * (256 + 128) * 64 * 2, "four stages of two operands"
