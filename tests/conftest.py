"""Fixtures that several test files use: a small hand-made bundle that needs no exporter."""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xexport.core.contract import Contract

ToyMaker = Callable[..., Path]

TOY_DIM = 8
#: the file whose tests run now
_frozen_before: Path | None = None


def _toy_graph(vocab: int, seed: int) -> Any:
    """A recurrent model with two float states and an int64 position; every value is a small integer.

    sum_t = sum_{t-1} + e_t;  logits_t = (sum_t + 3 e_{t-1} + position_t) @ head
    """
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(seed)
    emb = rng.integers(-4, 5, (vocab, TOY_DIM)).astype(np.float32)
    head = rng.integers(-2, 3, (TOY_DIM, vocab)).astype(np.float32)
    constants = {
        "emb": emb,
        "head": head,
        "one": np.array([1], np.int64),
        "minus_one": np.array([-1], np.int64),
        "zero": np.array([0], np.int64),
        "far": np.array([2**62], np.int64),
        "three": np.array(3, np.float32),
        "axis1": np.array(1, np.int64),
    }
    node = helper.make_node
    nodes = [
        node("Gather", ["emb", "tokens"], ["x"]),
        node("CumSum", ["x", "axis1"], ["running"]),
        node("Unsqueeze", ["layers.0.sum", "one"], ["sum3"]),
        node("Add", ["running", "sum3"], ["c"]),
        node("Gather", ["c", "minus_one"], ["c_last"], axis=1),
        node("Squeeze", ["c_last", "one"], ["layers.0.sum.next"]),
        node("Unsqueeze", ["layers.0.last", "one"], ["last3"]),
        node("Concat", ["last3", "x"], ["seen"], axis=1),
        node("Slice", ["seen", "zero", "minus_one", "one"], ["before"]),
        node("Gather", ["x", "minus_one"], ["x_last"], axis=1),
        node("Squeeze", ["x_last", "one"], ["layers.0.last.next"]),
        node("Mul", ["before", "three"], ["before3"]),
        node("Sub", ["tokens", "tokens"], ["zeros"]),
        node("Add", ["zeros", "one"], ["ones"]),
        node("CumSum", ["ones", "axis1"], ["steps"]),
        node("Unsqueeze", ["position", "one"], ["position2"]),
        node("Add", ["steps", "position2"], ["at"]),
        node("Gather", ["at", "minus_one"], ["at_last"], axis=1),
        node("Squeeze", ["at_last", "one"], ["position.next"]),
        node("Cast", ["at"], ["at_float"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["at_float", "minus_one"], ["at3"]),
        node("Add", ["c", "before3"], ["mixed"]),
        node("Add", ["mixed", "at3"], ["hidden"]),
        node("MatMul", ["hidden", "head"], ["logits"]),
    ]
    info = helper.make_tensor_value_info
    real, whole = TensorProto.FLOAT, TensorProto.INT64
    inputs = [info("tokens", whole, ["B", "T"])]
    outputs = [info("logits", real, ["B", "T", vocab])]
    for name, kind, shape in (
        ("layers.0.sum", real, ["B", TOY_DIM]),
        ("layers.0.last", real, ["B", TOY_DIM]),
        ("position", whole, ["B"]),
    ):
        inputs.append(info(name, kind, shape))
        outputs.append(info(f"{name}.next", kind, shape))
    tensors = [numpy_helper.from_array(a, n) for n, a in constants.items()]
    graph = helper.make_graph(nodes, "toy", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


@pytest.fixture
def make_toy_bundle(tmp_path: Path) -> ToyMaker:
    """Write a toy bundle: ``make_toy_bundle(name="toy", vocab=256, max_tokens=None, ...) -> folder``."""
    import msgspec
    import onnx

    from xexport.core.manifest import (
        FileEntry,
        GraphTensor,
        Manifest,
        ModelInfo,
        StateTensor,
        TensorDecision,
        encode_manifest,
    )

    def make(
        name: str = "toy",
        *,
        vocab: int = 256,
        max_tokens: int | None = None,
        tokenizer: str = "bytes",
        seed: int = 0,
        **changes: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        graph = folder / "model.onnx"
        onnx.save(
            _toy_graph(vocab, seed),
            graph,
            save_as_external_data=True,
            location="model.onnx.data",
            size_threshold=1024,
        )
        entries = tuple(
            FileEntry(p.name, hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_size)
            for p in sorted(folder.iterdir())
        )
        state = (
            StateTensor("layers.0.sum", "layers.0.sum.next", "float32", ("B", TOY_DIM), 1.0),
            StateTensor("layers.0.last", "layers.0.last.next", "float32", ("B", TOY_DIM), 0.0),
            StateTensor("position", "position.next", "int64", ("B",), 0.0),
        )
        manifest = Manifest(
            schema_version=1,
            xexport_version="0.1.0",
            created="2026-01-01T00:00:00Z",
            model=ModelInfo(
                "toy", "A toy", {"dim": TOY_DIM}, vocab * TOY_DIM * 2, vocab, max_tokens, "made up"
            ),
            target="cpu-fp32",
            precision="fp32",
            runtime="onnxruntime",
            provider="CPUExecutionProvider",
            target_row={"session_options": {}, "provider_options": {}},
            opset=23,
            ir_version=10,
            graph="model.onnx",
            graph_form="dynamic",
            files=entries,
            inputs=(GraphTensor("tokens", "int64", ("B", "T")),),
            outputs=(GraphTensor("logits", "float32", ("B", "T", vocab)),),
            state=state,
            tokenizer={"kind": tokenizer},
            lowerings=(),
            decisions=(
                TensorDecision(
                    "emb", "embedding", (vocab, TOY_DIM), "float32", 4 * vocab * TOY_DIM, "as is", 0
                ),
                TensorDecision("head", "head", (TOY_DIM, vocab), "float32", 4 * vocab * TOY_DIM, "as is", 0),
            ),
            checks={},
            environment={},
        )
        manifest = msgspec.structs.replace(manifest, **changes)
        (folder / "manifest.json").write_bytes(encode_manifest(manifest))
        return folder

    return make


@pytest.fixture
def toy_bundle(make_toy_bundle: ToyMaker) -> Path:
    """A toy bundle of a byte vocabulary and no maximum length."""
    return make_toy_bundle()


class FakeRunner:
    """A recurrent model in numpy, with faults to order: ``s = 0.9 s + E[token]; logits = s H``.

    Args:
        step: round the logits to multiples of this (a coarse quantization).
        drift: add ``drift * position`` times a fixed direction to the logits, and to the state.
        leak: multiply the state by ``1 - leak`` at the beginning of every call: breaks the chunk law.
        bad_at: position whose logits are nan.
        uniform: logits are all zero.
        delay: seconds slept a call, plus ``delay_per_token`` times the position.
    """

    def __init__(
        self,
        vocab: int = 16,
        *,
        batch: int = 1,
        max_tokens: int | None = None,
        step: float = 0.0,
        drift: float = 0.0,
        leak: float = 0.0,
        bad_at: int | None = None,
        uniform: bool = False,
        delay: float = 0.0,
        delay_per_token: float = 0.0,
    ) -> None:
        rng = np.random.default_rng(7)
        self.vocab_size, self.batch, self.max_tokens, self.position = vocab, batch, max_tokens, 0
        self.embed = rng.normal(size=(vocab, 8))
        self.head = rng.normal(size=(8, vocab))
        self.direction = rng.normal(size=vocab)
        self.step, self.drift, self.leak, self.bad_at, self.uniform = step, drift, leak, bad_at, uniform
        self.delay, self.delay_per_token = delay, delay_per_token
        self.hidden = np.zeros((batch, 8))
        self.calls: list[int] = []
        self.kept: list[int] = []
        self.keeps = True
        self.contract = Contract(max_tokens=max_tokens)

    def feed(self, tokens: Any, keep: int = 0) -> Any:
        import time

        ids = np.asarray(tokens, np.int64).reshape(self.batch, -1)
        self.calls.append(ids.shape[1])
        self.kept.append(keep)
        time.sleep(self.delay + self.delay_per_token * self.position)
        self.hidden = self.hidden * (1 - self.leak)
        rows = []
        for t in range(ids.shape[1]):
            self.hidden = 0.9 * self.hidden + self.embed[ids[:, t]]
            logits = self.hidden @ self.head + self.drift * self.position * self.direction
            if self.step:
                logits = np.round(logits / self.step) * self.step
            if self.uniform:
                logits = np.zeros_like(logits)
            if self.position == self.bad_at:
                logits = logits * np.nan
            rows.append(logits)
            self.position += 1
        return np.stack(rows, axis=1).astype(np.float32)[:, -keep:]

    def reset(self) -> None:
        self.hidden, self.position = np.zeros((self.batch, 8)), 0

    def save(self) -> Any:
        return self.hidden.copy(), self.position

    def restore(self, saved: Any) -> None:
        self.hidden, self.position = saved[0].copy(), saved[1]

    def state(self) -> dict[str, Any]:
        return {
            "layers.0.hidden": self.hidden + self.drift * self.position,
            "position": np.array([self.position]),
        }


@pytest.fixture
def fake_runner() -> type[FakeRunner]:
    """The class itself: ``fake_runner(step=0.5)`` makes a runner that needs no model."""
    return FakeRunner


@pytest.fixture
def setup() -> Any:
    """A measurement's configuration, with the facts of this machine."""
    from xexport.evaluate.environment import make_setup

    return make_setup(model="toy", target="cpu-fp32", bundle="toy-cpu-fp32", text="made up", threads=1)


@pytest.fixture(scope="session")
def exporter(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``exporter("rwkv", "cpu-int8") -> folder``: tiny exports, each made once (tests/exported.py)."""
    from exported import Exporter

    # pytest-xdist gives every worker a folder of its own in that of the run: the exports are for all
    own = tmp_path_factory.getbasetemp()
    root = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "exported"
    root.mkdir(exist_ok=True)
    return Exporter(root)


@pytest.hookimpl(trylast=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """What an earlier file left in memory (torch, its graphs) is not looked through by every collection.

    Late in a run that took over a second a time, and the tests that time something collect often.
    """
    global _frozen_before
    if item.path != _frozen_before:
        _frozen_before = item.path
        gc.collect()
        gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """With XEXPORT_RECORD_ORACLES=FILE, keep how near every oracle test came (tests/oracle_record.py)."""
    path = os.environ.get("XEXPORT_RECORD_ORACLES")
    if not path or item.get_closest_marker("oracle") is None:
        yield
        return
    from oracle_record import keep, watch

    with pytest.MonkeyPatch.context() as patch:
        watched = watch(patch)
        yield
    if watched.found:
        keep(Path(path), item, max(watched.found))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where the oracles are required (CI), a comparison that was skipped has failed."""
    report = yield
    required = os.environ.get("XEXPORT_REQUIRE_ORACLES") == "1" and item.get_closest_marker("oracle")
    if report.skipped and required:
        report.outcome = "failed"
        report.longrepr = f"an oracle is missing: {report.longrepr}"
    return report
