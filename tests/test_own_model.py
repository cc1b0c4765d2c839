"""A module of the user's own: exported if it keeps the chunk law, refused with numbers if it does not."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tolerances import TOLERANCES
from torch import Tensor, nn

import xexport
from xexport.core.errors import (
    CheckpointError,
    ChunkLawError,
    ExportError,
    InputError,
    ParityError,
    XexportError,
)
from xexport.core.state import StateSpec
from xexport.runtimes.torch_eager import TorchStream

VOCAB, WIDTH = 29, 24


class Leaky(nn.Module):
    """A leaky integrator: ``h_t = h_{t-1} * a + x_t``, written as a cumulative sum."""

    vocab_size = VOCAB

    def __init__(self, width: int = WIDTH, vocab: int = VOCAB) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vocab_size = vocab
        self.embed = nn.Embedding(vocab, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, vocab)
        self.rate = nn.Parameter(torch.rand(width) * 0.2)
        self.width = width

    def state_spec(self) -> Sequence[StateSpec]:
        return [StateSpec("memory", ("B", self.width))]

    def integrate(self, x: Tensor, memory: Tensor) -> Tensor:
        at = torch.cumsum(torch.ones_like(x[:, :, :1]), 1)  # 1, 2, ... T
        undo = torch.exp(self.rate * at)
        return (torch.cumsum(x * undo, 1) + memory.unsqueeze(1)) / undo

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        h = self.integrate(self.embed(tokens), state[0])
        return self.head(torch.tanh(self.mix(h))), h[:, -1]


class Positional(Leaky):
    """Adds a signal of the position inside the call: right only when fed whole."""

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        logits, memory = super().forward(tokens, *state)
        at = torch.cumsum(torch.ones_like(logits[:, :, :1]), 1)
        return logits + 0.1 * torch.sin(at), memory


class Forgetful(Leaky):
    """A convolution over the last two inputs that does not carry the last one over."""

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        x = self.embed(tokens)
        before = torch.cat((torch.zeros_like(x[:, :1]), x), 1)[:, :-1]
        h = self.integrate(x + 0.5 * before, state[0])
        return self.head(h), h[:, -1]


class Branching(Leaky):
    """One token goes another way, which is also wrong."""

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        if tokens.shape[1] == 1:
            h = self.embed(tokens) + state[0].unsqueeze(1)
        else:
            h = self.integrate(self.embed(tokens), state[0])
        return self.head(h), h[:, -1]


class Looping(Leaky):
    """A Python loop over the tokens."""

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        x, h, rows = self.embed(tokens), state[0], []
        for t in range(tokens.shape[1]):
            h = h * torch.exp(-self.rate) + x[:, t]
            rows.append(h)
        return self.head(torch.stack(rows, 1)), h


class TooManyStates(Leaky):
    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        logits, memory = super().forward(tokens, *state)
        return logits, memory, memory


class GrowingState(Leaky):
    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        logits, memory = super().forward(tokens, *state)
        return logits, torch.cat((memory, memory), 1)


class LogitsOnly(Leaky):
    def forward(self, tokens: Tensor, *state: Tensor) -> Any:
        return super().forward(tokens, *state)[0]


class Tied(Leaky):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight


class Unused(Leaky):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(400.0))
        self.spare = nn.Linear(WIDTH, 3)


class Noisy(Leaky):
    """Dropout, which export must switch off, and the user's module must get back."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        logits, memory = super().forward(tokens, *state)
        return self.drop(logits), memory


Export = Callable[..., Any]


@pytest.fixture
def export(exporter: Any, tmp_path: Path) -> Export:
    """``export(module, target) -> bundle``, with small measurements."""

    def run(module: nn.Module, target: str = "cpu-fp32", **options: Any) -> Any:
        return xexport.load(exporter.export(module, target, tmp_path / "out", **options))

    return run


def refused(export: Export, module: Any, tmp_path: Path, kind: type[XexportError], **options: Any) -> str:
    """The message of an export that must fail and leave nothing."""
    with pytest.raises(kind) as caught:
        export(module, **options)
    assert list(tmp_path.iterdir()) == []
    return str(caught.value)


def relative(got: Any, want: Any) -> float:
    return float(np.abs(got - want).max() / max(1.0, float(np.abs(want).max())))


@pytest.mark.parametrize("make", [Leaky, Tied, Noisy, Unused], ids=lambda m: m.__name__)
def test_streams_what_pytorch_does(export: Export, make: Callable[[], Leaky]) -> None:
    module = make()
    bundle = export(module, name="mine")
    tokens = np.random.default_rng(0).integers(0, VOCAB, (3, 21))
    want = TorchStream(module, batch=3).feed(tokens)
    stream = bundle.stream(batch=3)
    assert relative(stream.feed(tokens), want) < TOLERANCES["model_fp32"]
    stream.reset()
    pieces = [stream.feed(part) for part in np.split(tokens, [1, 2, 9], axis=1)]
    assert relative(np.concatenate(pieces, 1), want) < TOLERANCES["model_fp32"]
    assert list(stream.state()) == ["memory"]
    assert bundle.manifest.model.family == "mine"
    assert {d.tensor.removesuffix(" (as head)") for d in bundle.manifest.decisions} == set(
        module.state_dict()
    )


def test_users_module_is_left_as_it_was(export: Export) -> None:
    module = Noisy().train()
    module.mix.eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    export(module)
    assert module.training
    assert module.drop.training
    assert not module.mix.training
    assert all(p.requires_grad for p in module.parameters())
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_a_model_of_small_tensors_alone(export: Export) -> None:
    bundle = export(Leaky(width=4, vocab=5), eval_text=None)
    assert not (bundle.path / "model.onnx.data").exists()
    assert bundle.stream().feed([1, 2, 3]).shape == (1, 3, 5)


def test_int8_of_a_module_large_enough_for_8_bit_products(export: Export) -> None:
    module = Leaky(width=384, vocab=VOCAB)
    bundle = export(module, "cpu-int8")
    formats = {d.tensor: d.format for d in bundle.manifest.decisions}
    assert formats["mix.weight"] == "int8 block 128"
    assert formats["embed.weight"] == "int8 per row"
    assert formats["rate"] == "float32"
    graph = onnx.load(bundle.path / "model.onnx", load_external_data=False).graph
    assert [n.name for n in graph.node if n.op_type == "linear_int8"] == ["mix/linear_int8"]
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 30))
    want = TorchStream(module, batch=2).feed(tokens)
    stream = bundle.stream(batch=2)
    whole = stream.feed(tokens)
    error = np.sqrt(np.mean(np.square(whole - want)) / np.mean(np.square(want)))
    stream.reset()
    steps = np.concatenate([stream.feed(tokens[:, i : i + 1]) for i in range(30)], 1)
    print(f"int8 products: RMS error {error:.1e}, steps against whole {relative(steps, whole):.1e}")
    assert error < TOLERANCES["int8_products"]
    assert relative(steps, whole) < TOLERANCES["linear_int8_cut"]


def test_tied_weights_are_quantized_as_table_and_as_head(export: Export) -> None:
    module = Tied()
    bundle = export(module, "cpu-int8")
    formats = {d.tensor: d.format for d in bundle.manifest.decisions}
    (name,) = (n.removesuffix(" (as head)") for n in formats if n.endswith(" (as head)"))
    assert formats[name] == "int8 per row"
    assert formats[f"{name} (as head)"].startswith("int8 block")
    assert sorted(f for f in formats.values() if f == "not stored") == ["not stored"]
    tokens = np.random.default_rng(0).integers(0, VOCAB, (1, 20))
    want = TorchStream(module).feed(tokens)
    got = bundle.stream().feed(tokens)
    assert np.sqrt(np.mean(np.square(got - want)) / np.mean(np.square(want))) < TOLERANCES["int8_products"]


# Refusals


@pytest.mark.parametrize("make", [Positional, Forgetful], ids=lambda m: m.__name__)
def test_chunk_law_is_enforced_with_numbers(export: Export, tmp_path: Path, make: type[Leaky]) -> None:
    message = refused(export, make(), tmp_path, ChunkLawError)
    assert "cutting a sequence changes the result" in message
    error = re.search(r"got: (?:logits|state memory): error ([\d.e+-]+) for chunks of [\d+]+", message)
    assert error is not None, message
    assert 1e-3 < float(error[1]) < 10
    assert "at most 1e-04" in message
    assert "carry everything that looks back in the state" in message


@pytest.mark.parametrize("make", [Branching, Looping], ids=lambda m: m.__name__)
def test_python_control_flow_over_the_length_is_caught(
    export: Export, tmp_path: Path, make: type[Leaky]
) -> None:
    message = refused(export, make(), tmp_path, ExportError)
    assert "got:" in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (TooManyStates, ("does not match its state_spec", "2 new state tensors for 1")),
        (LogitsOnly, ("got:",)),
        (GrowingState, ("'memory'", "another shape", "48")),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else "",
)
def test_forward_that_does_not_match_state_spec(
    export: Export, tmp_path: Path, make: type[Leaky], says: tuple[str, ...]
) -> None:
    message = refused(export, make(), tmp_path, ExportError)
    for part in says:
        assert part in message


def test_module_without_state_spec(export: Export, tmp_path: Path) -> None:
    message = refused(export, nn.Linear(3, 3), tmp_path, InputError)
    assert "no state_spec()" in message
    assert "StateSpec" in message


@pytest.mark.parametrize(
    ("specs", "says"),
    [
        ([("memory", ("B", WIDTH))], "must return xexport.StateSpec rows"),
        ([StateSpec("memory", ("B", WIDTH)), StateSpec("memory", ("B", WIDTH))], "is taken"),
        ([StateSpec("tokens", ("B", WIDTH))], "is taken"),
    ],
    ids=["no rows", "twice", "reserved"],
)
def test_bad_state_spec(export: Export, tmp_path: Path, specs: list[Any], says: str) -> None:
    module = Leaky()
    module.state_spec = lambda: specs  # type: ignore[method-assign]
    assert says in refused(export, module, tmp_path, InputError)


def test_module_with_weights_or_preset(export: Export, tmp_path: Path) -> None:
    message = refused(export, Leaky(), tmp_path, InputError, preset="tiny")
    assert "brings its own weights" in message


def test_weights_that_are_not_finite(export: Export, tmp_path: Path) -> None:
    module = Leaky()
    with torch.no_grad():
        module.mix.weight[1, 2] = float("nan")
    assert "'mix.weight' holds NaN" in refused(export, module, tmp_path, CheckpointError)


# Finding the layer (exporter/locate.py)


def test_a_wrong_graph_is_named_by_its_layer(
    exporter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xexport.exporter import graph

    real = graph.write_graph

    def spoiled(model: Any, *rest: Any, **options: Any) -> Any:
        node = next(n for n in model.graph if n.name.startswith("blocks.1.ffn") and n.op_type == "Relu")
        node.op_type = "Abs"
        return real(model, *rest, **options)

    monkeypatch.setattr(graph, "write_graph", spoiled)
    with pytest.raises(ParityError) as caught:
        # the graph that is verified before quantization is not fused yet, so every part can be named
        exporter.export("rwkv", "cpu-int8", tmp_path / "out", preset="tiny")
    assert "first part in layer 'blocks.1.ffn' before its part 'value'" in str(caught.value)
    assert "ONNX Runtime and PyTorch disagree at B=" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_operator_body_is_named_with_its_operator(
    exporter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    from xexport.core.op import Body
    from xexport.exporter import functions

    real = functions.get_op

    def wrong(opset: int) -> onnx.FunctionProto:
        proto = real("selective_scan").bodies["auto"].build(opset)
        twice = onnx.helper.make_node("Add", ["y_once", "y_once"], ["y"])
        for node in proto.node:
            node.output[:] = ["y_once" if o == "y" else o for o in node.output]
        proto.node.append(twice)
        return proto

    def get_op(name: str) -> Any:
        spec = real(name)
        if name != "selective_scan":
            return spec
        assert spec.outputs[0] == "y"
        return dataclasses.replace(spec, bodies={"auto": Body(wrong, "a body that is wrong on purpose")})

    monkeypatch.setattr(functions, "get_op", get_op)
    monkeypatch.setenv("XEXPORT_NATIVE", "0")
    with pytest.raises(ParityError) as caught:
        exporter.export("mamba", "cpu-int8", tmp_path / "out", preset="tiny")
    layer = "layer 'backbone.layers.0.mixer' (it holds xexport::causal_conv1d, xexport::selective_scan)"
    assert f"first part in {layer} before its part 'out_proj'" in str(caught.value)
