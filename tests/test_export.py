"""Exports end to end: every family for every target, read back without PyTorch, and real weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from exported import BOUNDED, FAMILIES, TARGETS, TIMED
from reversal import VOCABULARY, need, score, strings, write_published
from tolerances import TOLERANCES

import xexport
from xexport import pipeline
from xexport.core.manifest import KEEP_INPUT
from xexport.core.registry import get_family, get_op, op_names

DEV = Path(__file__).resolve().parents[1] / ".dev"
SHIPPED = DEV.parent / "zoo" / "checkpoints"
LENGTH = 40
ALL = [(f, t) for f in FAMILIES for t in TARGETS]
each_export = pytest.mark.parametrize(("family", "target"), ALL, ids=[f"{f}-{t}" for f, t in ALL])

# What a device does: it has onnxruntime and numpy, and nothing that could have made the bundle.
_DEVICE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "onnx", "onnxscript", "onnx_ir", "safetensors", "transformers"}:
            raise ImportError(f"{name} does not exist on a device")

sys.meta_path.insert(0, Blocked())
import numpy as np
import xexport

root, length = sys.argv[1], int(sys.argv[2])
for name in sys.argv[3:]:
    bundle = xexport.load(f"{root}/{name}")
    tokens = np.random.default_rng(1).integers(0, bundle.manifest.model.vocab_size, (2, length))
    stream = bundle.stream(batch=2, threads=1)
    whole = stream.feed(tokens)
    end = stream.state()
    stream.reset()
    steps = np.concatenate([stream.feed(tokens[:, i:i + 1]) for i in range(length)], 1)
    last = stream.state()
    stream.reset()
    chunks = np.concatenate([stream.feed(part) for part in np.split(tokens, [1, 8, 10, 31], 1)], 1)
    arrays = {f"end {k}": v for k, v in end.items()} | {f"last {k}": v for k, v in last.items()}
    np.savez(f"{root}/{name}.npz", tokens=tokens, whole=whole, steps=steps, chunks=chunks, **arrays)
assert not {"torch", "onnx", "onnxscript", "onnx_ir", "safetensors"} & set(sys.modules)
"""


@pytest.fixture(scope="session")
def on_device(
    exporter: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], dict[str, Any]]:
    """What every bundle gives in a process without torch, from a copy of it in another folder."""
    root = tmp_path_factory.mktemp("device")
    names = []
    for family, target in ALL:
        names.append(f"{family}-{target}")
        shutil.copytree(exporter(family, target), root / names[-1])
    command = [sys.executable, "-c", _DEVICE, str(root), str(LENGTH), *names]
    done = subprocess.run(command, cwd=DEV, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    def results(family: str, target: str) -> dict[str, Any]:
        with np.load(root / f"{family}-{target}.npz") as table:
            return dict(table)

    return results


def relative(got: Any, want: Any) -> float:
    """Largest error against the largest expected value, as the table of tolerances means it."""
    assert got.shape == want.shape
    return float(np.abs(got.astype(np.float64) - want).max() / max(1.0, float(np.abs(want).max())))


def tiny(family: str) -> Any:
    """The module that the exporter fixture exported, in PyTorch."""
    found = get_family(family)
    module = found.build(found.presets["tiny"]).eval().requires_grad_(False)
    found.init(module, 0)
    return module


# Every family, every target


@each_export
def test_a_device_without_torch_streams_what_it_computes_at_once(
    on_device: Callable[[str, str], dict[str, Any]], family: str, target: str
) -> None:
    got = on_device(family, target)
    limit = TOLERANCES["model_fp32"]  # small matrices: float products for every target
    assert relative(got["steps"], got["whole"]) < limit
    assert relative(got["chunks"], got["whole"]) < limit
    for name in (n.removeprefix("end ") for n in got if n.startswith("end ")):
        assert relative(got[f"last {name}"], got[f"end {name}"]) < limit, name


@each_export
def test_logits_are_pytorchs(
    on_device: Callable[[str, str], dict[str, Any]], family: str, target: str
) -> None:
    from xexport.runtimes.torch_eager import TorchStream

    got = on_device(family, target)
    want = TorchStream(tiny(family), batch=2).feed(got["tokens"])
    rms = float(np.sqrt(np.mean(np.square(got["whole"] - want)) / np.mean(np.square(want))))
    print(f"{family} {target}: RMS error of the logits {rms:.1e}")
    assert rms < TOLERANCES[f"tiny_logits_{target.removeprefix('cpu-')}"]


@each_export
def test_manifest_decides_every_weight_and_says_why(exporter: Any, family: str, target: str) -> None:
    manifest = xexport.load(exporter(family, target)).manifest
    decided = [d.tensor.removesuffix(" (as head)") for d in manifest.decisions]
    assert set(decided) == set(tiny(family).state_dict())
    for decision in manifest.decisions:
        assert len(decision.reason) > 20, decision
        assert decision.bytes > 0
        assert decision.shape
        assert 0 <= decision.error < (0.2 if "int4" in decision.format else 0.02), decision
    formats = {d.format for d in manifest.decisions}
    assert (formats <= {"float32", "int64"}) == (target == "cpu-fp32")
    assert all(d.error == 0 for d in manifest.decisions if d.format in ("float32", "int64"))


FUSED = ("fused_rows_", "linear_group_", "sequence_")


def one_name_for_fused(domain: str, name: str) -> tuple[str, str]:
    """Chains of row-wise nodes and groups of products have a function each and one row in the manifest."""
    prefix = next((p for p in FUSED if domain == "xexport" and name.startswith(p)), None)
    return (domain, f"{prefix}*" if prefix else name)


@each_export
def test_every_custom_operator_has_a_body_and_its_lowering(exporter: Any, family: str, target: str) -> None:
    folder = exporter(family, target)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    ours = {(get_op(n).domain, get_op(n).graph_name) for n in op_names()}
    ours |= {("xexport", f"{p}*") for p in FUSED}
    joined = {f.name: f.node for f in model.functions if f.name.startswith(("linear_group_", "sequence_"))}

    def with_called(nodes: Any) -> list[Any]:
        return [m for n in nodes for m in (n, *with_called(joined.get(n.op_type, ())))]

    nodes = with_called(model.graph.node)
    used = [one_name_for_fused(n.domain, n.op_type) for n in nodes]
    used = [key for key in used if key in ours]
    assert used, "a family of xexport that needs no operator of its own"
    functions = {one_name_for_fused(f.domain, f.name) for f in model.functions}
    assert set(used) <= functions <= ours
    lowerings = {(low.domain, low.op): low for low in xexport.load(folder).manifest.lowerings}
    assert set(lowerings) == functions
    for key, low in lowerings.items():
        assert low.nodes == used.count(key)
        assert len(low.why) > 20
        assert low.variant
    names = {f.name for f in model.functions}
    undefined = {n.op_type for n in model.graph.node if n.domain == "xexport"} - names
    assert undefined == set()


@each_export
def test_graph_is_valid_portable_and_free_of_trace_metadata(exporter: Any, family: str, target: str) -> None:
    path = exporter(family, target) / "model.onnx"
    onnx.checker.check_model(str(path), full_check=False)
    model = onnx.load(path, load_external_data=False)
    assert {o.version for o in model.opset_import if o.domain == ""} == {23}
    assert model.ir_version == 10
    manifest = xexport.load(path.parent).manifest
    assert (manifest.opset, manifest.ir_version) == (23, 10)
    assert not model.metadata_props
    assert not model.doc_string
    holders = [model.graph, *model.graph.node, *model.graph.input, *model.graph.output]
    assert not [h for h in holders if h.metadata_props or h.doc_string]
    assert str(path.parent).encode() not in path.read_bytes()
    assert b"site-packages" not in path.read_bytes()


@each_export
def test_parameters_keep_their_names_and_lie_in_one_file_beside_the_graph(
    exporter: Any, family: str, target: str
) -> None:
    folder = exporter(family, target)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    stored = {t.name for t in model.graph.initializer}
    plain = {
        n.rsplit(".", 1)[0] if n.endswith((".int8", ".int6", ".int4", ".fp16", ".scale")) else n
        for n in stored
    }
    wanted = set(tiny(family).state_dict())
    assert wanted <= plain | stored
    external = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert external
    places = {e.value for t in external for e in t.external_data if e.key == "location"}
    assert places == {"model.onnx.data"}
    offsets = [int(e.value) for t in external for e in t.external_data if e.key == "offset"]
    assert all(offset % 64 == 0 for offset in offsets)
    inside = [t.name for t in model.graph.initializer if len(t.raw_data) >= 1024]
    assert inside == []


@each_export
def test_states_are_inputs_and_outputs_of_one_dynamic_graph(exporter: Any, family: str, target: str) -> None:
    folder = exporter(family, target)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    specs = tiny(family).state_spec()
    assert [i.name for i in model.graph.input] == ["tokens", *(s.name for s in specs), KEEP_INPUT]
    assert KEEP_INPUT in {i.name for i in model.graph.initializer}, "a default makes feeding it a choice"
    assert [o.name for o in model.graph.output] == ["logits", *(f"{s.name}.out" for s in specs)]
    dims = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["B", "T"]


@pytest.mark.parametrize("family", FAMILIES)
def test_narrower_targets_are_smaller(exporter: Any, family: str) -> None:
    size = {
        t: sum(
            d.bytes
            for d in xexport.load(exporter(family, t)).manifest.decisions
            if d.role in ("projection", "head", "embedding")
        )
        for t in TARGETS
    }
    assert size["cpu-int4"] < size["cpu-int8"] < size["cpu-fp16"] < size["cpu-fp32"]


# What is reported

_REQUIRED = {
    "model": str,
    "target": str,
    "bundle": str,
    "bytes": {"weights": int, "state": int},
    "bits_per_byte": {"torch": float, "onnx": float, "bundle": float},
    "kl": {"mean": float, "p99": float, "max": float},
    "same_top1": float,
    "chunk_error": float,
    "latency": {
        "step_ms": {"p50": float, "p90": float, "p99": float},
        "decode_tokens_per_s": float,
        "prefill_tokens_per_s": float,
        "load_ms": float,
    },
    "native_kernels": bool,
    "warnings": list,
}


def _check_keys(got: Any, wanted: Any, where: str = "") -> None:
    for key, kind in wanted.items():
        assert key in got, f"{where}{key}"
        if isinstance(kind, dict):
            _check_keys(got[key], kind, f"{where}{key}.")
        else:
            assert isinstance(got[key], kind), f"{where}{key} is {got[key]!r}"


@pytest.mark.parametrize("family", TIMED)
def test_json_object_has_every_figure(exporter: Any, family: str) -> None:
    folder = exporter(family, "cpu-int8")
    summary = pipeline.summary(xexport.load(folder))
    _check_keys(json.loads(json.dumps(summary)), _REQUIRED)
    assert (summary["model"], summary["target"], summary["bundle"]) == (family, "cpu-int8", str(folder))
    assert summary["latency"]["step_ms"]["p50"] <= summary["latency"]["step_ms"]["p99"]
    assert summary["bytes"]["weights"] == sum(p.stat().st_size for p in folder.glob("model.onnx*"))
    assert any("random" in w for w in summary["warnings"])
    assert (folder / "report.html").stat().st_size > 100_000


@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int8"])
def test_every_stage_of_an_export_has_a_name_of_its_own(exporter: Any, target: str) -> None:
    """cpu-int8 writes the exact weights first; bundle, PyTorch and ONNX are each timed."""
    stages = exporter.stages(TIMED[0], target)
    assert sorted(stages) == sorted(set(stages))
    timed = {"latency of bundle", "latency of torch", "latency of onnx"} if target == "cpu-int8" else set()
    assert timed | {"write weights"} <= set(stages)


@each_export
def test_exactness_is_reported(
    exporter: Any, family: str, target: str, record_property: Callable[[str, object], None]
) -> None:
    summary = pipeline.summary(xexport.load(exporter(family, target)))
    kl, bits = summary["kl"], summary["bits_per_byte"]
    for name, value in (("kl", kl), ("bits per byte", bits), ("top-1", summary["same_top1"])):
        record_property(f"{family} {target} {name}", value)
    print(f"{family} {target}: KL {kl['mean']:.2e}, {bits}, top-1 {summary['same_top1']:.4f}")
    assert kl["mean"] <= kl["max"] < float("inf")
    assert 0 <= kl["mean"] < TOLERANCES[f"tiny_kl_{target.removeprefix('cpu-')}"]
    assert bits["onnx"] == pytest.approx(bits["torch"], abs=1e-5)
    assert bits["bundle"] == pytest.approx(bits["torch"], rel=0.01)
    checks = xexport.load(exporter(family, target)).manifest.checks
    assert set(checks["parity"]) >= {"B=1,T=1", "B=2,T=1", "B=1,T=3", "B=3,T=5"}
    assert max(*checks["parity"].values(), checks["chunk_error_onnx"]) < TOLERANCES["model_fp32"]


@pytest.mark.parametrize("family", FAMILIES)
def test_validate_accepts_what_was_exported(exporter: Any, family: str, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exporter(family, "cpu-int8"), folder)
    result = pipeline.validate(folder, eval_text=exporter.ids)
    assert result["ok"], result["problems"]
    assert result["bits_per_byte"]["here"] == pytest.approx(
        result["bits_per_byte"]["bundle_at_export"], rel=0.01
    )


def test_validate_sees_that_a_device_computes_something_else(exporter: Any, tmp_path: Path) -> None:
    import hashlib

    folder = tmp_path / "copy"
    shutil.copytree(exporter("rwkv", "cpu-int8"), folder)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    (table,) = [t for t in graph.initializer if t.name == "emb.weight.int8"]
    start = next(int(e.value) for e in table.external_data if e.key == "offset")
    data = bytearray((folder / "model.onnx.data").read_bytes())
    data[start : start + 1000] = bytes(i * 37 % 251 for i in range(1000))
    (folder / "model.onnx.data").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    entry = next(f for f in manifest["files"] if f["path"] == "model.onnx.data")
    entry["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    result = pipeline.validate(folder, eval_text=exporter.ids)
    assert not result["ok"]
    assert any("the results here are not PyTorch's: mean KL" in p for p in result["problems"])


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in BOUNDED])
def test_quantization_noise_does_not_grow_along_a_stream(exporter: Any, family: str) -> None:
    from xexport.evaluate.metrics import compare_logits

    exact, narrow = (xexport.load(exporter(family, t)).stream() for t in ("cpu-fp32", "cpu-int8"))
    tokens = np.random.default_rng(5).integers(0, exact.vocab_size, 2001)
    parts = []
    for i in range(0, 2000, 250):
        ids, targets = tokens[i : i + 250], tokens[i + 1 : i + 251]
        parts.append(compare_logits(exact.feed(ids)[0], narrow.feed(ids)[0], targets))
    kl = [float(p.kl.mean()) for p in parts]
    assert all(np.isfinite(kl))
    assert np.mean(kl[-2:]) < 1.5 * np.mean(kl[:2]), kl


# Real weights


@pytest.fixture(scope="session")
def reverse(exporter: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """The trained reversal model for a target."""
    root = tmp_path_factory.mktemp("reverse")
    weights = write_published(need("rwkv7-reverse-l2.pth"), root / "reverse.pth")
    text = root / "text.txt"
    words = [s + "," + s[::-1] for s, *_ in strings(0)[5:15]]
    text.write_text(" ".join(str(VOCABULARY.index(c)) for word in words for c in word), encoding="utf-8")

    def export(target: str) -> Any:
        out = root / target
        if not out.exists():
            from exported import sizes

            exporter.export("rwkv", target, out, weights=weights, eval_text=text, sizes=sizes())
        return xexport.load(out)

    return export


@pytest.mark.oracle
def test_reversal_is_exact_in_fp32(reverse: Callable[[str], Any]) -> None:
    exact, count, wrong, _digits = score(reverse("cpu-fp32"), seed=3)
    assert (exact, count, wrong) == (600, 600, 0)


@pytest.mark.oracle
@pytest.mark.parametrize("target", ["cpu-fp16", "cpu-int8"])
def test_reversal_survives_quantization(
    reverse: Callable[[str], Any], target: str, record_property: Callable[[str, object], None]
) -> None:
    results = [score(reverse(target), seed) for seed in (3, 4)]
    exact, count, wrong, digits = (sum(column) for column in zip(*results, strict=True))
    record_property(f"reversal {target}", {"exact": exact, "of": count, "wrong": wrong, "digits": digits})
    print(f"reversal {target}: {exact}/{count} strings exact, {wrong} of {digits} digits lost")
    assert wrong / digits <= TOLERANCES["reversal_digits_lost"]


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in FAMILIES if (SHIPPED / f"{f}.safetensors").is_file()])
def test_8_bits_of_the_shipped_checkpoint_lose_under_one_percent(
    exporter: Any, tmp_path: Path, family: str, record_property: Callable[[str, object], None]
) -> None:
    from xexport.evaluate.suite import Sizes

    few = Sizes(1024, 512, chunk_tokens=24, timed=False)
    folder = exporter.export(family, "cpu-int8", tmp_path / "out", eval_text=None, sizes=few)
    summary = pipeline.summary(xexport.load(folder))
    record_property(
        f"{family} int8", {k: summary[k] for k in ("bits_per_byte", "bits_lost", "kl", "same_top1")}
    )
    assert summary["tokens"] >= 500
    assert summary["bits_per_byte"]["torch"] < 3, "a trained model"
    assert summary["bits_per_byte"]["onnx"] == pytest.approx(summary["bits_per_byte"]["torch"], abs=1e-4)
    assert summary["bits_lost"]["percent"] < 1
    assert not any("random" in w for w in summary["warnings"])


@pytest.mark.oracle
def test_published_test_model_gives_the_expected_logits(exporter: Any, tmp_path: Path) -> None:
    folder = exporter.export(
        "rwkv", "cpu-fp32", tmp_path / "out", weights=need("rwkv7-834k.pth"), eval_text=_english(tmp_path)
    )
    expected = np.load(need("rwkv7-834k.expected-logits.npy"))
    stream = xexport.load(folder).stream()
    for token in b'"i':
        stream.feed([token])
    logits = stream.feed([ord("n")])[0, -1]
    assert np.abs(logits - expected).max() < TOLERANCES["oracle_fp32"]
    stream.reset()
    assert np.abs(stream.feed(list(b'"in'))[0, -1] - expected).max() < TOLERANCES["oracle_fp32"]


def _english(folder: Path) -> Path:
    path = folder / "english.txt"
    path.write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 8, encoding="utf-8")
    return path
