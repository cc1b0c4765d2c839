"""State that a kernel appends to in place: which tensors, when, and what a failed run leaves behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from chunk_form import random_model
from exported import Exporter
from onnx import helper, numpy_helper
from tolerances import TOLERANCES

import xexport
from xexport.core.contract import Contract
from xexport.core.errors import BundleError, RuntimeFailure
from xexport.core.manifest import Appended, Ring, StateTensor
from xexport.core.op import DOMAIN
from xexport.core.registry import get_family, get_op
from xexport.exporter.appended import appended_states
from xexport.ops.fft_conv.reference import fft_sizes
from xexport.runtimes.native import find_native
from xexport.runtimes.onnxruntime import OrtCell
from xexport.runtimes.state_buffers import StateBuffers, check_appended

LENGTH = 20
APPENDED = Appended("fft_conv_cached", 2, "position")


@pytest.fixture
def native() -> Path:
    found = find_native()
    if found.path is None:
        pytest.skip(found.reason)
    return found.path


@pytest.fixture
def hyena(exporter: Exporter) -> Path:
    return exporter("hyena", "cpu-fp32")


def cuts() -> list[Any]:
    ids = np.random.default_rng(3).integers(0, 29, (2, 50))
    return np.split(ids, [17, 18, 19, 30, 31], axis=1)


def run(cell: OrtCell) -> list[np.ndarray]:
    """Logits and state after chunks and single tokens."""
    cell.reset()
    return [cell.run(np.ascontiguousarray(part)) for part in cuts()] + list(cell.read().values())


# What the exporter records


def test_a_caches_only_use_is_recorded(exporter: Exporter) -> None:
    for family, names in (
        ("hyena", {f"layers.{i}.cache.{j}" for i in (0, 1) for j in (0, 1)}),
        ("mamba", set()),
    ):
        state = xexport.load(exporter(family, "cpu-fp32")).manifest.state
        assert {s.name for s in state if s.appended is not None} == names
        assert all(s.appended in (None, APPENDED) for s in state)


def test_a_hyena_of_order_two_is_one_operator_with_its_cache_in_place(
    native: Path, exporter: Exporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernel in place, in two buffers, and its body without any kernel, give the same."""
    from xexport.models.hyena import FAMILY, Hyena

    torch.manual_seed(0)
    module = Hyena(dataclasses.replace(FAMILY.presets["tiny"], order=2))
    assert FAMILY.init is not None
    FAMILY.init(module, 0)
    folder = exporter.export(module, "cpu-fp32", tmp_path / "two")
    engine = xexport.load(folder).engine(threads=1)
    assert "hyena_conv" in {low.op for low in engine.manifest.lowerings}
    assert engine.in_place() == {"layers.0.cache.0", "layers.1.cache.0"}
    want = run(engine.cell(2))
    for got, twin in zip(run(OrtCell(engine.session, engine.manifest, 2)), want, strict=True):
        np.testing.assert_array_equal(got, twin)
    monkeypatch.setenv("XEXPORT_NATIVE", "0")
    for got, twin in zip(run(xexport.load(folder).engine(threads=1).cell(2)), want, strict=True):
        scale = max(1.0, float(np.abs(twin).max()))
        assert float(np.abs(got - twin).max()) / scale < TOLERANCES["model_fp32"]


def graph(change: str = "") -> ir.Model:
    """``y, cache.out = fft_conv_cached(tokens, h, cache, position)`` and a table of logits, in one graph."""
    n1, n2 = fft_sizes(LENGTH)
    node = helper.make_node
    position = "at" if change == "position" else "position"
    nodes = [
        node("Cast", ["tokens"], ["numbers"], to=1),
        node("Unsqueeze", ["numbers", "one"], ["u"]),
        node("Add", ["position", "zero"], ["at"]),
        node(
            "Identity" if change == "reader" else "Neg", ["cache" if change == "reader" else "u"], ["other"]
        ),
        node(
            "fft_conv_cached",
            ["u", "h", "cache", position],
            ["y", "cache.out"],
            domain=DOMAIN,
            n1=n1,
            n2=n2,
        ),
        node("Squeeze", ["y", "one"], ["sums"]),
        node("Sub", ["sums", "sums"], ["nothing"]),
        node("Cast", ["nothing"], ["none"], to=7),
        node("Add", ["tokens", "none"], ["rows"]),  # a token that the table lacks fails here, after the cache
        node("Gather", ["table", "rows"], ["logits"]),
        node("Shape", ["tokens"], ["count"], start=1, end=2),
        node("Add", ["position", "count"], ["position.out"]),
    ]
    info = helper.make_tensor_value_info
    inputs = [info("tokens", 7, ["B", "T"]), info("cache", 1, ["B", 1, LENGTH]), info("position", 7, [1])]
    outputs = [info("logits", 1, ["B", "T", 4]), info("cache.out", 1, ["B", 1, LENGTH])]
    outputs += [info("position.out", 7, [1]), info("other", 1, None)][: 2 if change == "reader" else 1]
    constants = {
        "h": np.ones((1, LENGTH), np.float32),
        "table": np.arange(40, dtype=np.float32).reshape(10, 4),
        "one": np.array([1]),
        "zero": np.array([0]),
    }
    tensors = [numpy_helper.from_array(a, n) for n, a in constants.items()]
    proto = helper.make_graph(nodes, "toy", inputs, outputs, tensors)
    body = get_op("fft_conv_cached").bodies["monarch"].build(23)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    return ir.from_proto(helper.make_model(proto, functions=[body], opset_imports=opsets, ir_version=10))


@pytest.mark.parametrize("change", ["", "reader", "position"])
def test_another_reader_or_an_unknown_position_needs_two_buffers(change: str) -> None:
    model = graph(change)
    if change == "reader":  # what is read is not the last output
        model.graph.outputs.pop()
    names = ["cache", "position"]
    assert appended_states(model, names) == ({"cache": APPENDED} if change == "" else {})


# When it is done


def test_in_place_is_the_same_to_the_bit(native: Path, hyena: Path) -> None:
    engine = xexport.load(hyena).engine(threads=1)
    here, there = (OrtCell(engine.session, engine.manifest, 2, names) for names in (engine.in_place(), ()))
    first, second = here.buffers.sets
    assert {n for n in first if first[n] is second[n]} == engine.in_place() != frozenset()
    assert all(there.buffers.sets[0][n] is not there.buffers.sets[1][n] for n in first)
    for _ in range(2):  # the second time after a reset
        for got, want in zip(run(here), run(there), strict=True):
            np.testing.assert_array_equal(got, want)


def test_without_kernels_there_are_two_buffers(
    native: Path, hyena: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function body may read the old value after it has written the new one."""
    want = run(xexport.load(hyena).engine(threads=1).cell(2))
    monkeypatch.setenv("XEXPORT_NATIVE", "0")
    engine = xexport.load(hyena).engine(threads=1)
    assert engine.in_place() == frozenset()
    for got, twin in zip(run(engine.cell(2)), want, strict=True):
        scale = max(1.0, float(np.abs(twin).max()))
        assert float(np.abs(got - twin).max()) / scale < TOLERANCES["model_fp32"]


def test_only_for_a_kernel_that_can(native: Path, hyena: Path) -> None:
    engine = xexport.load(hyena).engine(threads=1)
    assert {"fft_conv_cached", "wkv7"} <= engine.native.in_place
    assert "fft_conv" not in engine.native.in_place
    assert replace(engine, native=replace(engine.native, in_place=frozenset({"wkv7"}))).in_place() == set()
    other = msgspec.structs.replace(engine.manifest, provider="CUDAExecutionProvider")
    assert replace(engine, manifest=other).in_place() == set()


def test_a_stream_saves_restores_and_resets(native: Path, hyena: Path) -> None:
    stream = xexport.load(hyena).stream(batch=2, threads=1)
    parts = cuts()
    fresh = stream.state()
    stream.feed(parts[0])
    saved = stream.save()
    want = [stream.feed(part) for part in parts[1:]]
    stream.restore(saved)
    for got, twin in zip([stream.feed(part) for part in parts[1:]], want, strict=True):
        np.testing.assert_array_equal(got, twin)
    stream.reset()
    for name, value in stream.state().items():
        np.testing.assert_array_equal(value, fresh[name], name)


# What a failed run leaves behind


@pytest.mark.parametrize("bad", [[[3, 77]], [[77]]], ids=["chunk", "step"])
def test_a_failed_run_leaves_the_state_alone(native: Path, bad: list[list[int]]) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(native))
    model = ir.to_proto(graph()).SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    state = (
        StateTensor("cache", "cache.out", "float32", ("B", 1, LENGTH), 0.0, APPENDED),
        StateTensor("position", "position.out", "int64", (1,), 0.0),
    )
    manifest: Any = SimpleNamespace(
        state=state, inputs=(), model=SimpleNamespace(vocab_size=4, contract=Contract())
    )
    cell = OrtCell(session, manifest, 1, {"cache"})
    written = cell.buffers.present["cache"]
    cell.run(np.array([[1, 2, 3]]))
    before = cell.read()
    undo, seen = cell.buffers.undo, []
    cell.buffers.undo = lambda: (seen.append(written[0, 0].copy()), undo())[0]  # type: ignore[method-assign]
    with pytest.raises(RuntimeFailure, match="failed to run"):
        cell.run(np.array(bad))
    assert 77 in seen[0]  # the kernel had run, in place
    for name, value in cell.read().items():
        np.testing.assert_array_equal(value, before[name])
    np.testing.assert_array_equal(cell.run(np.array([[5]])), [[[20, 21, 22, 23]]])
    assert written[0, 0, :5].tolist() == [1, 2, 3, 5, 0]


# Rings, in which a token overwrites an older one

WINDOW, SINKS = 5, 2
RINGS = {
    "window": (Ring(first=0, span=SINKS, until=SINKS), Ring(first=SINKS, span=WINDOW, start=SINKS)),
    "no sinks": (Ring(first=0, span=WINDOW),),
    "dilated": (Ring(first=0, span=4), Ring(first=4, span=9, rate=3)),
}


@pytest.mark.parametrize("rings", RINGS.values(), ids=RINGS)
def test_the_rows_that_a_chunk_overwrites(rings: tuple[Ring, ...]) -> None:
    """Against one token at a time, over three turns and across the sinks' end."""
    for ring in rings:
        for begin in range(20):
            for count in (1, 2, 3, 7, 30):
                tokens = range(max(begin, ring.start), min(begin + count, ring.until or 99))
                want = {ring.first + (n - ring.start) % ring.span // ring.rate for n in tokens}
                assert ring.written(begin, count) == sorted(want)


@pytest.mark.parametrize("family", ["transformer", "longnet"])
def test_a_ring_is_updated_in_place(
    native: Path, exporter: Exporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Steps and chunks, over several turns: the same bits as in two buffers, and what the bodies give; a run
    that fails after all its kernels have written leaves every byte as it was."""
    config = get_family(family).presets["tiny"]
    if family == "transformer":
        config = replace(config, windows=(WINDOW,), sinks=SINKS)
    module = random_model(get_family(family), config)
    folder = exporter.export(module, "cpu-fp32", tmp_path / "ring")
    engine = xexport.load(folder).engine(threads=1)
    names = {s.name for s in engine.manifest.state if s.appended and s.appended.rings}
    assert engine.in_place() == names
    assert len(names) == 2 * config.layers
    cell, twin = engine.cell(2), OrtCell(engine.session, engine.manifest, 2)
    session, ids = cell._session, np.random.default_rng(4).integers(0, config.vocab_size, (2, 60))

    class Fails:
        """A session whose runs fail when everything is written."""

        io_binding = staticmethod(session.io_binding)

        def run_with_iobinding(self, binding: Any) -> None:
            session.run_with_iobinding(binding)
            raise RuntimeError("out of luck")

    for part in np.split(ids, [1, 2, 3, 9, 10, 23, 24, 25, 41, 42], axis=1):
        before = cell.read()
        monkeypatch.setattr(cell, "_session", Fails())
        with pytest.raises(RuntimeFailure, match="out of luck"):
            cell.run(np.ascontiguousarray(part))
        monkeypatch.setattr(cell, "_session", session)
        for name, value in cell.read().items():
            np.testing.assert_array_equal(value, before[name], name)
        np.testing.assert_array_equal(*(c.run(np.ascontiguousarray(part)) for c in (cell, twin)))
        for name, value in twin.read().items():
            np.testing.assert_array_equal(cell.read()[name], value, name)
    monkeypatch.setenv("XEXPORT_NATIVE", "0")
    plain = xexport.load(folder).engine(threads=1)
    assert plain.in_place() == frozenset()
    last = plain.cell(2)
    last.run(ids)
    for name, value in last.read().items():
        scale = max(1.0, float(np.abs(value).max()))
        assert float(np.abs(value - cell.read()[name]).max()) / scale < TOLERANCES["model_fp32"], name
    fresh = engine.cell(2).read()
    cell.reset()
    for name, value in cell.read().items():
        np.testing.assert_array_equal(value, fresh[name], name)


@pytest.mark.parametrize(
    "ring",
    [Ring(first=0, span=7), Ring(first=-1, span=2), Ring(first=0, span=0), Ring(first=0, span=2, rate=0)],
)
def test_a_ring_outside_of_its_tensor_is_refused(ring: Ring) -> None:
    first, cache, last = states()
    inside = msgspec.structs.replace(APPENDED, rings=(Ring(first=0, span=6),))
    check_appended((first, msgspec.structs.replace(cache, appended=inside), last))
    outside = msgspec.structs.replace(APPENDED, rings=(ring,))
    with pytest.raises(BundleError, match="ring that is not in it"):
        check_appended((first, msgspec.structs.replace(cache, appended=outside), last))


# The buffers themselves


def states(init: float = 0.0) -> Sequence[StateTensor]:
    return (
        StateTensor("sum", "sum.out", "float32", ("B", 3), 1.0),
        StateTensor("cache", "cache.out", "float32", ("B", 2, 6), init, APPENDED),
        StateTensor("position", "position.out", "int64", (1,), 0.0),
    )


def test_a_reset_clears_what_was_filled_or_written() -> None:
    buffers = StateBuffers(states(), 2, {"cache"})
    buffers.present["cache"][..., :4] = 7
    buffers.present["position"][...] = 4
    buffers.reset()
    assert not buffers.present["cache"].any()
    buffers.write({n: np.full_like(a, 9) for n, a in buffers.read().items()})
    buffers.reset()
    assert not buffers.present["cache"].any()
    assert (buffers.present["sum"] == 1).all()


@pytest.mark.parametrize("in_place", [(), ("cache",)], ids=["two-buffers", "one-buffer"])
def test_first_values_other_than_zero(in_place: tuple[str, ...]) -> None:
    buffers = StateBuffers(states(2.0), 1, in_place)
    assert (buffers.present["cache"] == 2).all()
    for buffer in (buffers.sets[0], buffers.sets[1]):
        buffer["cache"][..., 1:3] = 5
    buffers.present["position"][...] = 1
    if in_place:
        buffers.undo()
        assert (buffers.present["cache"] == 2).all()
    buffers.commit()
    assert buffers.side == 1


@pytest.mark.parametrize(
    ("axis", "position"), [(3, "position"), (-1, "position"), (0, "position"), (2, "sum"), (2, "nowhere")]
)
def test_a_manifest_that_makes_no_sense_is_refused(axis: int, position: str) -> None:
    first, cache, last = states()
    odd = msgspec.structs.replace(cache, appended=Appended("fft_conv_cached", axis, position))
    check_appended(states())
    with pytest.raises(BundleError, match="'cache' can't be appended to"):
        check_appended((first, odd, last))
