"""The readers: SASS listings, resource reports, launch bounds, demangled names, promises."""

from __future__ import annotations

import pathlib

import pytest

import cuda_static
import promises
import sass

LISTING = """
	code for sm_90
		Function : first
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;       /* 0x00000a00ff017b82 */
                                                                /* 0x000e220000000800 */
        /*0010*/                   LDG.E R2, desc[UR4][R14.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.128 [R7], desc[UR4][R2.64] ;
        /*0030*/                   LDGDEPBAR ;
        /*0040*/                   LDG.E.128.CONSTANT R4, desc[UR4][R14.64+0x10] ;
        /*0050*/              @!P1 STG.E.U16 desc[UR4][R8.64], R4 ;
        /*0060*/               @P1 BRA 0x40 ;
        /*0070*/                   LDG.E.64 R4, desc[UR4][R14.64] ;
        /*0080*/              @!P2 BRA P1, 0x20 ;
        /*0090*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   BRA 0xb0;
		Function : second
        /*0000*/                   ATOMG.E.ADD.F64.RN.STRONG.GPU P0, R4, desc[UR4][R2.64], R4 ;
"""


def test_a_listing_is_read() -> None:
    code = sass.parse(LISTING)
    assert [len(code[name]) for name in ("first", "second")] == [12, 1]
    first = code["first"]
    assert first[5].predicate == "@!P1" and first[5].bits == 16
    assert dict(sass.accesses(first)) == {
        "LDG.32": 1, "LDGSTS.128": 1, "LDG.128": 1, "STG.16": 1, "LDG.64": 1,
    }  # fmt: skip
    hmma = first[9]
    assert hmma.belongs("HMMA") and hmma.belongs("HMMA.16816") and hmma.belongs("HMMA.BF16.F32")
    assert not hmma.belongs("HMMA.1688") and not hmma.belongs("DFMA")
    assert first[2].belongs("LDGSTS.128") and first[2].belongs("LDGSTS.BYPASS.128")
    assert not first[1].belongs("LDG.128") and first[1].belongs("LDG.32")


def test_loops_are_innermost_and_hot_ones_are_judged_alone() -> None:
    first = sass.parse(LISTING)["first"]
    (inner,) = sass.loops(first)  # 0x20 … 0x80 holds it; the jump to itself behind EXIT is none
    assert [i.address for i in inner] == [0x40, 0x50, 0x60]
    assert sass.hot(first) == [inner] and sass.narrowest_hot(first) == 16
    assert sass.narrowest_hot(first[:4]) == 0


REPORT = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'one' for 'sm_80'
ptxas info    : Function properties for one
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Function properties for called_by_one
    4 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 24 bytes cumulative stack size, 1024 bytes smem, 416 bytes cmem[0]
ptxas info    : Compiling entry function 'two' for 'sm_80'
ptxas info    : Function properties for two
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 34 registers
"""


def test_a_resource_report_is_read() -> None:
    found = cuda_static.resources(REPORT)
    assert found["one"] == {
        "registers": 255, "shared": 1024, "stack": 24, "spill_stores": 16, "spill_loads": 12, "barriers": 1,
    }  # fmt: skip
    assert found["two"] == dict.fromkeys(found["one"], 0) | {"registers": 34}


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (
            "void marquardt::held<float, 4, (marquardt::V)1, false>(marquardt::P<2>)",
            ("held", "float, 4, 1, 0"),
        ),
        ("marquardt::spill(float*, int)", ("spill", "")),
        ("void marquardt::(anonymous namespace)::f<(unsigned char)3>(int)", ("f", "3")),
        ("void a::g<b::S<int, (b::E)2> >(void (*)(int))", ("g", "S<int, 2> ")),
    ],
    ids=["template", "plain", "anonymous", "nested"],
)
def test_names_are_taken_apart(text: str, want: tuple[str, str]) -> None:
    assert cuda_static.split_name(text) == want


SOURCE = """
// promise: held threads=256 shared=64K ctas>=3 registers<=80 wide=LDGSTS.128|LDG.128,STG.128 has=DFMA
// promise: held ctas>=2@80 has=UCGABAR_ARV@90+ none=LDL@100,STL@90 narrow=0@100
  // promise: held<double, *> ctas>=1 none=HMMA,LDG.32
// promise: small threads=32 ctas>=32 wide=-
// an honest promise: is not meant here
"""


def lines_of(text: str, folder: pathlib.Path) -> list[promises.Line]:
    (folder / "kernels.cuh").write_text(text)
    return promises.read([folder / "kernels.cuh"], folder)


def test_promises_are_merged(tmp_path: pathlib.Path) -> None:
    lines = lines_of(SOURCE, tmp_path)
    held = promises.promise(lines, "held", "float, 4", "sm_90")
    wide = (("LDGSTS.128", "LDG.128"), ("STG.128",))
    assert held == promises.Promise(
        256, 3, 65536, 80, wide=wide, has=(("DFMA",), ("UCGABAR_ARV",)), none=("STL",)
    )
    assert held.where == ("kernels.cuh:2", "kernels.cuh:3")
    old, new = (promises.promise(lines, "held", "float, 4", t) for t in ("sm_80", "sm_100"))
    assert (held.none, old.none, new.none) == (("STL",), (), ("LDL",))
    assert (old.ctas, old.has, old.narrow) == (2, (("DFMA",),), 64)
    assert (new.ctas, new.has, new.narrow) == (3, held.has, 0)
    double = promises.promise(lines, "held", "double, 2", "sm_80")
    assert (double.ctas, double.none) == (1, ("HMMA", "LDG.32"))
    assert promises.promise(lines, "small", "", "sm_80").wide == ()
    assert promises.promise(lines, "other", "", "sm_80") is None
    (line,) = lines_of("// promise: held<*, true> ctas>=1\n", tmp_path)
    assert line.matches("held", "2, 1") and not line.matches("held", "2, 0")
    assert promises.unused(lines, [("held", "float, 4")]) == [
        "kernels.cuh:4: held<double, *>",
        "kernels.cuh:5: small",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("held threads=256 ctas=3 wide=-", "no clause of a promise: 'ctas=3'"),
        ("held threads=many ctas>=3 wide=-", "threads must be a number"),
        ("held speed=9", "no clause of a promise: 'speed=9'"),
        ("held", "held promises nothing"),
        ("<double>", "starts with a kernel's name"),
    ],
    ids=["sign", "number", "key", "empty", "nameless"],
)
def test_what_cannot_be_read_is_named(text: str, words: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(promises.PromiseError, match=f"kernels.cuh:1: .*{words}"):
        lines_of(f"// promise: {text}\n", tmp_path)


def test_a_promise_must_be_whole(tmp_path: pathlib.Path) -> None:
    lines = lines_of("// promise: held threads=256 ctas>=3@90\n", tmp_path)
    with pytest.raises(promises.PromiseError, match="held on sm_80 promises no ctas, wide"):
        promises.promise(lines, "held", "", "sm_80")


def test_the_flags_are_those_of_the_build() -> None:
    flags = cuda_static.flags()
    assert {"-std=c++20", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "--Werror=all-warnings"} <= set(
        flags
    )
