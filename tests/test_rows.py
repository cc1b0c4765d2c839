"""fused_rows: programs against their definition, fused graphs against the graphs they were, and refusals."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from exported import Exporter
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from tolerances import TOLERANCES

from xexport.core.manifest import read_manifest
from xexport.exporter.passes.rows import NAMES, rewrite
from xexport.ops.fused_rows.program import Instruction, Kind, OpCode, Place, Port, Program, Shift, Tail
from xexport.ops.fused_rows.reference import run_program
from xexport.runtimes.native import find_native

ISAS = ("baseline", "avx2", "avx512")
_LEAD = {Kind.ROWS: 2, Kind.TOKENS: 1, Kind.FIXED: 0, Kind.HISTORY: 1}
_UNARY = [op for op in OpCode if op < OpCode.ADD]
_BINARY = [op for op in OpCode if OpCode.ADD <= op <= OpCode.MIN]
_POSITIVE = {OpCode.SQRT, OpCode.RECIPROCAL}


def options(isa: str = "", threads: int = 1) -> ort.SessionOptions:
    native = find_native()
    if native.path is None:
        if os.environ.get("XEXPORT_REQUIRE_NATIVE") == "1":
            pytest.fail(native.reason)
        pytest.skip(native.reason)
    made = ort.SessionOptions()
    made.intra_op_num_threads = threads
    made.log_severity_level = 4
    if isa:
        made.add_session_config_entry("xexport.isa", isa)
    try:
        made.register_custom_ops_library(str(native.path))
    except Exception as error:  # ORT's exception classes share no public base
        if "no instruction set" not in str(error):
            raise
        pytest.skip(f"this machine lacks {isa}")
    return made


def shape(port: Port, B: int, T: int) -> list[int]:
    return [*{Kind.ROWS: (B, T), Kind.TOKENS: (T,), Kind.HISTORY: (B,)}.get(port.kind, ()), *port.shape]


def values(program: Program, B: int, T: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape(p, B, T)).astype(np.float32) for p in program.inputs]


def kernel(
    numbers: Sequence[int],
    constants: Sequence[float],
    inputs: Sequence[np.ndarray],
    outputs: int,
    *,
    isa: str = "",
    threads: int = 1,
    constant: Sequence[int] = (),
) -> list[np.ndarray]:
    """One node alone, without a function body: only the kernel can run it."""
    names = [f"in{i}" for i in range(len(inputs))]
    node = helper.make_node(
        "fused_rows_3", names, [f"out{i}" for i in range(outputs)], domain="xexport", name="r0"
    )
    node.attribute.extend(
        [helper.make_attribute("program", list(numbers)), helper.make_attribute("constants", list(constants))]
    )
    feeds = {n: x for i, (n, x) in enumerate(zip(names, inputs, strict=True)) if i not in constant}
    given_ = [helper.make_tensor_value_info(n, 1, [None] * x.ndim) for n, x in feeds.items()]
    outs = [helper.make_tensor_value_info(f"out{i}", 1, None) for i in range(outputs)]
    inits = [numpy_helper.from_array(inputs[i], names[i]) for i in constant]
    graph = helper.make_graph([node], "g", given_, outs, inits)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("xexport", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), options(isa, threads))
    found: list[np.ndarray] = session.run(None, feeds)
    return found


def close(got: Sequence[np.ndarray], want: Sequence[np.ndarray], tolerance: float) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        error = np.nanmax(np.abs(a - b)) / max(1.0, float(np.nanmax(np.abs(b))))
        assert error <= tolerance, error


def unary(op: OpCode, width: int) -> Program:
    return Program(
        inputs=(Port(Kind.ROWS, (width,)),),
        outputs=(Port(Kind.OUTPUT, (width,)),),
        places=(Place(Kind.ROWS, 0, width), Place(Kind.OUTPUT, 0, width)),
        instructions=(Instruction(op, 1, 0, inner=width),),
        shifts=(),
        tails=(),
        constants=(0.0,),
        registers=0,
        depth=0,
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", _UNARY, ids=lambda op: op.name.lower())
def test_unary_instructions(op: OpCode, isa: str) -> None:
    program = unary(op, 67)
    x = np.concatenate(
        [np.linspace(-30, 30, 67 * 4), np.linspace(-1, 1, 67 * 4), 10.0 ** np.linspace(-30, 1, 67)]
    )
    x = x.astype(np.float32).reshape(1, 9, 67)
    if op in _POSITIVE:
        x = np.abs(x) + np.float32(1e-3)
    if op == OpCode.EXP:
        x = np.minimum(x, 3)
    got = kernel(program.encode(), program.constants, [x], 1, isa=isa)
    close(got, run_program(program, [x]), TOLERANCES["fused_rows"])


@pytest.mark.parametrize(
    "op", [OpCode.TANH, OpCode.SOFTPLUS, OpCode.ERF, OpCode.SIGMOID], ids=lambda op: op.name
)
def test_small_results_keep_their_relative_error(op: OpCode) -> None:
    """A step size of softplus(-12) is 6e-6, and the state depends on its digits."""
    ends = (-16.0, -8.0) if op in (OpCode.SOFTPLUS, OpCode.SIGMOID) else (1e-6, 1e-2)
    x = np.linspace(*ends, 64, dtype=np.float32).reshape(1, 1, 64)
    program = unary(op, 64)
    (got,), (want,) = kernel(program.encode(), (0.0,), [x], 1), run_program(program, [x])
    assert np.max(np.abs(got - want) / np.abs(want)) <= TOLERANCES["fused_rows_relative"]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", _UNARY, ids=lambda op: op.name.lower())
def test_nan_and_infinity(op: OpCode, isa: str) -> None:
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, 89.0, -104.0, 1e30] * 3, np.float32).reshape(
        1, 1, 27
    )
    program = unary(op, 27)
    with np.errstate(all="ignore"):
        (want,) = run_program(program, [x])
        want = want.astype(np.float32)
    (got,) = kernel(program.encode(), (0.0,), [x], 1, isa=isa)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite & ~np.isnan(want)], want[~finite & ~np.isnan(want)])
    np.testing.assert_allclose(got[finite], want[finite], rtol=1e-5, atol=1e-30)


@st.composite
def binary_programs(draw: st.DrawFn) -> tuple[Program, int, int]:
    outer, inner = draw(st.integers(1, 5)), draw(st.integers(1, 37))
    op = draw(st.sampled_from(_BINARY))
    ways = {
        "rows": (Port(Kind.ROWS, (outer, inner)), False, inner),
        "tokens": (Port(Kind.TOKENS, (outer, inner)), False, inner),
        "weights": (Port(Kind.FIXED, (outer * inner,)), False, inner),
        "repeated": (Port(Kind.FIXED, (inner,)), False, 0),
        "spread": (Port(Kind.ROWS, (outer, 1)), True, 1),
        "number": (Port(Kind.FIXED, (1,)), True, 0),
    }
    a, b = ways["rows"], ways[draw(st.sampled_from(sorted(ways)))]
    if draw(st.booleans()):
        a, b = b, a
    places = (
        Place(a[0].kind, 0, a[0].width),
        Place(b[0].kind, 1, b[0].width),
        Place(Kind.OUTPUT, 0, outer * inner),
    )
    program = Program(
        inputs=(a[0], b[0]),
        outputs=(Port(Kind.OUTPUT, (outer, inner)),),
        places=places,
        instructions=(Instruction(op, 2, 0, 1, -1, outer, inner, a[1], a[2], b[1], b[2]),),
        shifts=(),
        tails=(),
        constants=(0.0,),
        registers=0,
        depth=0,
    )
    return program, draw(st.integers(1, 3)), draw(st.integers(1, 6))


@settings(max_examples=60, deadline=None)
@given(binary_programs())
def test_binary_instructions_and_their_spreading(case: tuple[Program, int, int]) -> None:
    program, B, T = case
    x = values(program, B, T)
    if program.instructions[0].op == OpCode.DIV:
        x = [np.abs(v) + np.float32(0.5) for v in x]
    close(kernel(program.encode(), (0.0,), x, 1), run_program(program, x), TOLERANCES["fused_rows"])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("heads", "size"), [(1, 1), (3, 5), (2, 16), (12, 64), (1, 40)])
def test_reductions_norms_picks_and_places(heads: int, size: int, isa: str) -> None:
    n = heads * size
    reductions = (OpCode.SUM, OpCode.MEAN, OpCode.LARGEST, OpCode.L2)
    places = [
        Place(Kind.ROWS, 0, n),
        Place(Kind.FIXED, 1, size),
        Place(Kind.FIXED, 2, size),
        Place(Kind.OUTPUT, 0, n),
    ]
    code = [Instruction(OpCode.LAYER_NORM, 3, 0, 1, 2, heads, size, a_step=1)]
    ports = [Port(Kind.OUTPUT, (heads, size))]

    def output(width: int, instruction: Instruction) -> None:
        ports.append(Port(Kind.OUTPUT, (width,)))
        places.append(Place(Kind.OUTPUT, len(ports) - 1, width))
        code.append(instruction)

    output(n, Instruction(OpCode.RMS_NORM, 4, 0, 1, -1, heads, size, a_step=1))
    for op in reductions:
        output(heads, Instruction(op, len(places), 0, outer=heads, inner=size))
    output(n, Instruction(OpCode.MUL_ADD, len(places), 0, 3, 4, 1, n))
    output(heads, Instruction(OpCode.PICK, len(places), 0, outer=heads, inner=1, a_step=size, b_step=1))
    output(n, Instruction(OpCode.PLACE, len(places), 0, outer=heads, inner=size, b_step=size))
    program = Program(
        (Port(Kind.ROWS, (n,)), Port(Kind.FIXED, (size,)), Port(Kind.FIXED, (size,))),
        tuple(ports), tuple(places), tuple(code), (), (), (0.0, 1e-5), 0, 0,
    )  # fmt: skip
    x = values(program, 2, 5)
    got = kernel(program.encode(), program.constants, x, len(ports), isa=isa, constant=(1, 2))
    close(got, run_program(program, x), TOLERANCES["fused_rows"])


def shifting(width: int) -> Program:
    """Two shifts, one of a value that hangs on the other: depth 2; and the last rows."""
    return Program(
        inputs=(Port(Kind.ROWS, (width,)), Port(Kind.HISTORY, (width,)), Port(Kind.HISTORY, (width,))),
        outputs=(Port(Kind.OUTPUT, (width,)), Port(Kind.OUTPUT, (width,)), Port(Kind.TAIL, (width,))),
        places=(
            Place(Kind.ROWS, 0, width),
            Place(Kind.REGISTER, 0, width, 0),
            Place(Kind.OUTPUT, 0, width),
            Place(Kind.REGISTER, 0, width, width),
            Place(Kind.OUTPUT, 1, width),
        ),
        instructions=(
            Instruction(OpCode.SUB, 2, 1, 0, -1, 1, width, a_step=width, b_step=width),
            Instruction(OpCode.MUL, 4, 3, 2, -1, 1, width, a_step=width, b_step=width),
        ),
        shifts=(Shift(0, 1, 0, width), Shift(2, 2, width, width)),
        tails=(Tail(2, 2, width),),
        constants=(0.0,),
        registers=2 * width,
        depth=2,
    )


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (1, 2), (3, 1), (2, 100), (1, 1000), (5, 61)])
def test_shifts_across_sequences_and_threads(B: int, T: int, threads: int) -> None:
    program = shifting(300)
    x = values(program, B, T)
    got = kernel(program.encode(), (0.0,), x, 3, threads=threads)
    close(got, run_program(program, x), TOLERANCES["fused_rows"])


def test_without_tokens_a_shift_looks_back_on_what_it_did() -> None:
    """A coarse model of patches gets no rows from most chunks."""
    program = shifting(8)
    x = values(program, 3, 0)
    one, two, last = kernel(program.encode(), (0.0,), x, 3)
    assert one.shape == two.shape == (3, 0, 8)
    np.testing.assert_array_equal(last, x[2])
    odd = dataclasses.replace(program, tails=(Tail(0, 2, 8), Tail(4, 2, 8)))
    with pytest.raises(Exception, match="node 'r0': there are no tokens"):
        kernel(odd.encode(), (0.0,), x, 3)


def outcome(numbers: Sequence[int], x: Sequence[np.ndarray]) -> str:
    try:
        kernel(numbers, (0.0,), x, 3)
    except Exception as error:  # ORT's exception classes share no public base
        return str(error)
    return ""


def test_a_program_that_reaches_too_far_is_refused() -> None:
    """Every number of the attribute is changed in turn: the kernel refuses or computes, it never crashes."""
    program = shifting(8)
    x, numbers = values(program, 1, 3), program.encode()
    refused = 0
    for i in range(len(numbers)):
        for wrong in (-2, 9, 1 << 40):
            changed = [*numbers[:i], wrong, *numbers[i + 1 :]]
            refused += "fused_rows" in outcome(changed, x)
    assert refused > 2 * len(numbers)
    with pytest.raises(Exception, match="node 'r0': the attribute program is not valid: it ends too early"):
        kernel(numbers[:-1], (0.0,), x, 3)


@pytest.mark.parametrize(
    ("index", "wrong", "says"),
    [
        (0, (1, 3, 9), r"rows?.*must be|input 0 must be"),
        (1, (1, 7), r"input 1 must be float32 \[1,8\], got float32 \[1,7\]"),
        (1, (2, 8), r"input 1 must be float32 \[1,8\], got float32 \[2,8\]"),
    ],
)
def test_wrong_shapes_name_the_node(index: int, wrong: tuple[int, ...], says: str) -> None:
    program = shifting(8)
    x = values(program, 1, 3)
    x[index] = np.zeros(wrong, np.float32)
    with pytest.raises(Exception, match=rf"(?s)node 'r0': .*{says}"):
        kernel(program.encode(), (0.0,), x, 3)


# --- the pass -----------------------------------------------------------------------------------------------


def parsed(text: str) -> ir.Model:
    model = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 23]>\n' + text)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model, data_prop=True))


def three_ways(model: ir.Model, feeds: dict[str, np.ndarray]) -> tuple[list[str], list[str]]:
    """Run the graph as it is, fused with bodies, and fused with kernels; reasons of refusals, and ops."""
    before = ir.to_proto(model).SerializeToString()
    refusals = rewrite(model)
    after = ir.to_proto(model).SerializeToString()
    onnx.checker.check_model(after)
    plain = ort.InferenceSession(before).run(None, feeds)
    close(ort.InferenceSession(after).run(None, feeds), plain, 0.0)
    close(ort.InferenceSession(after, options()).run(None, feeds), plain, TOLERANCES["fused_rows"])
    return [r.reason for r in refusals], [n.op_type for n in model.graph]


def random_feeds(model: ir.Model, B: int, T: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    sizes = {"B": B, "T": T}
    return {
        v.name or "": rng.standard_normal(
            [d if isinstance(d, int) else sizes[str(d)] for d in v.shape or ()]
        ).astype(np.float32)
        for v in model.graph.inputs
    }


SHIFT = """
g (float[B,T,6] x, float[B,6] last, float[6] w, float[6] b, float[1,1,6] mu)
    => (float[B,T,6] y, float[B,6] new)
<int64[1] one = {1}, int64[1] zero = {0}, int64[1] minus = {-1}, int64 end = {-1}, float[B,T,6] s>
{
    n = LayerNormalization <axis = -1> (x, w, b)
    l = Unsqueeze (last, one)
    c = Concat <axis = 1> (l, n)
    s = Slice (c, zero, minus, one)
    d = Sub (s, n)
    m = Mul (d, mu)
    y = Add (n, m)
    new = Gather <axis = 1> (n, end)
}
"""
HEADS = """
g (float[B,T,12] k, float[B,T,3,4] v, float[3,4] u) => (float[B,T,3,4] y, float[B,T,12] z)
<int64[4] split = {0,0,3,4}, int64[3] flat = {0,0,12}, int64[1] last = {-1},
 float tiny = {1e-12}, float one = {1.0}>
{
    r = Reshape (k, split)
    n = ReduceL2 <keepdims = 1> (r, last)
    c = Clip (n, tiny)
    q = Div (r, c)
    a = Sub (one, q)
    p = Mul (a, u)
    s = ReduceSum <keepdims = 1> (p, last)
    y = Mul (s, v)
    t = Reshape (y, flat)
    e = Sigmoid (t)
    z = Mul (e, t)
}
"""
TURN = """
g (float[B,T,2,6] x, float[T,1,3] cos, float[T,1,3] sin) => (float[B,T,2,6] y)
<int64[1] zero = {0}, int64[1] three = {3}, int64[1] six = {6}, int64[1] last = {-1}>
{
    a = Slice (x, zero, three, last)
    b = Slice (x, three, six, last)
    ac = Mul (a, cos)
    bs = Mul (b, sin)
    left = Sub (ac, bs)
    as = Mul (a, sin)
    bc = Mul (b, cos)
    right = Add (as, bc)
    y = Concat <axis = -1> (left, right)
}
"""
PARTS = """
g (float[B,T,6] x, float[3,3] w) => (float[B,T,3] y)
{
    a, b = Split <axis = -1, num_outputs = 2> (x)
    m = MatMul (a, w)
    s = Sigmoid (b)
    e = Exp (s)
    y = Mul (m, e)
}
"""
ACROSS = """
g (float[B,T,5] x, float[5,5] w) => (float[B,T,5] y)
{
    a = Sigmoid (x)
    b = Exp (a)
    m = MatMul (b, w)
    c = Mul (m, a)
    y = Add (c, b)
}
"""


@pytest.mark.parametrize(("B", "T"), [(1, 1), (2, 7), (1, 300)])
@pytest.mark.parametrize(
    ("text", "ops"),
    [
        (SHIFT, ["fused_rows_0"]),
        (HEADS, ["fused_rows_0"]),
        (TURN, ["fused_rows_0"]),
        (PARTS, ["fused_rows_0", "MatMul", "Mul"]),
        (ACROSS, ["fused_rows_0", "MatMul", "fused_rows_1"]),
    ],
    ids=["token shift", "heads", "rotation", "a part for somebody else", "around a product"],
)
def test_chains_become_one_node(text: str, ops: list[str], B: int, T: int) -> None:
    model = parsed(text)
    reasons, found = three_ways(model, random_feeds(model, B, T))
    assert found == ops
    assert all("stands alone" in r for r in reasons)


def test_equal_chains_share_one_function() -> None:
    text = "g (float[B,T,4] x, float[4,4] w) => (float[B,T,4] y) {\n"
    for i in range(5):
        before = "x" if i == 0 else f"h{i}"
        text += f"  a{i} = Sigmoid ({before})\n  b{i} = Exp (a{i})\n  h{i + 1} = MatMul (b{i}, w)\n"
    model = parsed(text + "  y = Identity (h5)\n}")
    _, found = three_ways(model, random_feeds(model, 1, 3))
    assert found.count("fused_rows_0") == 5
    assert len(model.functions) == 1


def test_more_different_chains_than_names_are_refused() -> None:
    text = "g (float[B,T,4] x, float[4,4] w) => (float[B,T,4] y) {\n  h0 = Identity (x)\n"
    for i in range(NAMES + 2):
        text += f"  k{i} = Constant <value = float {{{i}.5}}> ()\n  a{i} = Add (h{i}, k{i})\n"
        text += f"  b{i} = Tanh (a{i})\n"
        text += f"  h{i + 1} = MatMul (b{i}, w)\n"
    model = parsed(text + f"  y = Identity (h{NAMES + 2})\n}}")
    reasons, found = three_ways(model, random_feeds(model, 1, 2))
    assert sum(op.startswith("fused_rows") for op in found) == NAMES
    assert [r for r in reasons if "different chains" in r]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("a = Sigmoid (x)\n y = MatMul (a, w)", "it stands alone between other nodes"),
        (
            "a = ReduceSum <keepdims = 1> (x, one)\n b = Sigmoid (x)\n c = Mul (a, b)\n y = Neg (c)",
            "sums over axes [1]",
        ),
        ("a = Slice (x, zero, two, one)\n y = Sigmoid (x)", "cuts along the tokens"),
        ("a = Pow (x, w3)\n y = Neg (a)", "exponent 3.0 has no instruction"),
        ("a = Gather <axis = 1> (x, first)\n y = Neg (x)", "takes other rows than the last"),
        ("a = Add (x, o)\n b = Neg (a)\n y = Exp (b)", "neither rows of [4] nor a constant"),
    ],
)  # fmt: skip
def test_refusals_give_their_reason(body: str, reason: str) -> None:
    consts = (
        "int64[1] one = {1}, int64[1] zero = {0}, int64[1] two = {2}, float w3 = {3.0}, int64 first = {0}"
    )
    text = f"g (float[B,T,4] x, float[4,4] w, float[B,1,4] o) => (float[B,T,4] y) <{consts}> {{\n {body}\n}}"
    reasons, _ = three_ways(parsed(text), random_feeds(parsed(text), 2, 4))
    assert any(reason in r for r in reasons), reasons


@pytest.mark.parametrize(("family", "most"), [("rwkv", 60), ("mamba", 60), ("retnet", 75), ("hyena", 75)])
def test_bundles_hold_few_nodes(exporter: Exporter, family: str, most: int) -> None:
    """Two layers: RWKV had 167 nodes before the fusion; what stays has its reason in the manifest."""
    path = exporter(family, "cpu-fp32")
    model = onnx.load(path / "model.onnx", load_external_data=False)
    rows = {f.name: f.node for f in model.functions if f.name.startswith("sequence_")}
    nodes = [m for n in model.graph.node for m in rows.get(n.op_type, [n]) if m.op_type != "Constant"]
    fused = [n for n in nodes if n.op_type.startswith("fused_rows_")]
    assert fused
    assert len(nodes) <= most
    assert {n.op_type for n in fused} <= {f.name for f in model.functions}
    refusals = [r for r in read_manifest(path).refusals if r.pass_ == "rows"]
    assert all(r.node and r.reason for r in refusals)
