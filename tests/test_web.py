"""onnxruntime-web in Node: the same logits and tokens as Python, the tokenizers, the errors, the profile."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from environment import need_environment
from tokenizer_json import KINDS, ODD, moby_dick, write_tokenizer
from tolerances import TOLERANCES

import xexport
from xexport.core.errors import InputError, RuntimeFailure
from xexport.core.manifest import read_manifest
from xexport.evaluate.optimes import profile_ops
from xexport.evaluate.suite import setup_for
from xexport.runtimes.bundle import Bundle
from xexport.runtimes.environments import get_environment
from xexport.runtimes.opening import CPU
from xexport.runtimes.sampling import Sampler, probabilities
from xexport.runtimes.tokenizers import load_tokenizer

ToyMaker = Callable[..., Path]
WEB = Path(__file__).resolve().parents[1] / "runtimes" / "web"
RUNTIME = "onnxruntime-web"


@pytest.fixture(scope="module", autouse=True)
def _environment() -> None:
    need_environment("web")


def node(script: str, *given: Any) -> Any:
    """What a script prints as JSON; it finds ``given`` in ``given``, the package in ``web``."""
    text = f"""
        import {{ readFileSync }} from "node:fs";
        const given = {json.dumps(given)};
        const web = await import({json.dumps((WEB / "node.mjs").as_uri())});
        const part = (name) => import({json.dumps(WEB.as_uri())} + "/" + name);
        const told = (work) => work().then((v) => v, (e) => ({{ error: e.constructor.name, what: e.what }}));
        {script}
        process.exit(0);
    """
    done = subprocess.run(
        ["node", "--input-type=module", "-e", text], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def rwkv(exporter: Any) -> Bundle:
    """Exported, verified against PyTorch and agreed with in Node, all by the export itself."""
    return xexport.load(exporter("rwkv", "web-fp32"))


def test_an_export_has_been_run_in_node(rwkv: Bundle) -> None:
    manifest = rwkv.manifest
    assert (manifest.runtime, manifest.provider) == (RUNTIME, "wasm")
    assert manifest.checks[RUNTIME]["error"] < TOLERANCES["model_fp32"] * 10
    assert not [w for w in manifest.warnings if "not run by" in w]
    assert any(t.name == "logits_to_keep" for t in manifest.inputs)


def test_any_cut_in_node_is_python(rwkv: Bundle) -> None:
    """Two sequences; the state is read, written and reset, and only the last logits are computed if asked."""
    tokens = np.random.default_rng(5).integers(0, 29, (2, 40))
    here, there = rwkv.stream(2, runtime=CPU), rwkv.stream(2)
    assert there.keeps
    whole = here.feed(tokens)
    bound = TOLERANCES["model_fp32"] * np.abs(whole).max()
    for part in np.split(tokens, [1, 18, 19], axis=1):
        at = there.position
        got = there.feed(part)
        assert np.abs(got - whole[:, at : at + part.shape[1]]).max() < bound
    for name, want in here.state().items():
        assert np.abs(there.state()[name] - want).max() < TOLERANCES["model_fp32"] * max(
            1.0, np.abs(want).max()
        )
    saved = there.save()
    want = there.feed(tokens)
    there.reset()
    assert np.abs(there.feed(tokens)[:, -1] - whole[:, -1]).max() < bound
    there.restore(saved)
    np.testing.assert_array_equal(there.feed(tokens, keep=3), want[:, -3:])


def test_greedy_text_is_pythons(rwkv: Bundle) -> None:
    """By the ES module alone, as a web page uses it, with the state saved and restored in between."""
    prompt = [3, 4, 5, 11, 2]
    generation = rwkv.stream(runtime=CPU).generate(prompt, max_tokens=24, temperature=0)
    text = "".join(generation)
    found = node(
        """
        const ort = await web.loadOrt(given[1]);
        const bundle = await web.openBundle(web.fromFolder(given[0]), { ort, threads: 1 });
        const stream = bundle.stream();
        const generation = stream.generate(given[2], { temperature: 0, maxTokens: 24 });
        let text = "";
        for await (const piece of generation) text += piece;
        const saved = await stream.save();
        const once = Array.from((await stream.feed([1, 2])).data);
        stream.restore(saved);
        const again = Array.from((await stream.feed([1, 2])).data);
        const bad = await told(() => stream.feed([stream.vocabSize]));
        console.log(JSON.stringify({ text, ids: generation.ids, stats: generation.stats, once, again, bad,
                                     position: stream.position, provider: bundle.provider }));
        """,
        str(rwkv.path),
        str(get_environment("web").folder),
        prompt,
    )
    assert (found["text"], found["ids"]) == (text, generation.ids)
    assert found["once"] == found["again"]
    assert found["position"] == len(prompt) + 24 + 2
    assert found["bad"] == {"error": "InputError", "what": "a token id is out of range"}
    assert found["provider"] == "wasm"
    assert found["stats"]["newTokens"] == 24


def test_any_bundle_runs_in_node(toy_bundle: Path) -> None:
    """One for a CPU, with an int64 state that does not fit float64, and no export for the web."""
    here, there = xexport.load(toy_bundle).stream(), xexport.load(toy_bundle).stream(runtime=RUNTIME)
    for part in ([1, 2, 250], [7], [9, 9]):
        np.testing.assert_array_equal(there.feed(part), here.feed(part))
    saved = here.save()
    saved.tensors["position"][:] = 2**60 + 1
    there.restore(saved)
    there.feed([3])
    assert int(there.state()["position"][0]) == 2**60 + 2


def test_graphs_of_fixed_lengths_share_the_state(make_toy_bundle: ToyMaker) -> None:
    """A bundle with a graph a length: an input is cut into those lengths, largest first."""
    folder = make_toy_bundle(vocab=64)
    path = folder / "manifest.json"
    row = json.loads(path.read_bytes())
    tokens = np.random.default_rng(2).integers(0, 64, 11).tolist()
    want = xexport.load(folder).stream(runtime=CPU).feed(tokens)
    path.write_text(json.dumps({**row, "graphs": {"1": row["graph"], "4": row["graph"]}}), encoding="utf-8")
    found = node(
        """
        const ort = await web.loadOrt(given[1]);
        const bundle = await web.openBundle(web.fromFolder(given[0]), { ort, threads: 1 });
        const whole = await bundle.stream().feed(given[2]);
        const kept = await bundle.stream().feed(given[2], { keep: 5 });
        const batch = await told(async () => bundle.engine.cell(2));
        console.log(JSON.stringify({ lengths: bundle.engine.lengths, shape: whole.shape, batch,
                                     whole: Array.from(whole.data), kept: Array.from(kept.data) }));
        """,
        str(folder),
        str(get_environment("web").folder),
        tokens,
    )
    assert (found["lengths"], found["shape"]) == ([4, 1], [1, 11, 64])
    np.testing.assert_array_equal(np.reshape(found["whole"], (1, 11, 64)), want)
    np.testing.assert_array_equal(np.reshape(found["kept"], (1, 5, 64)), want[:, -5:])
    assert found["batch"]["error"] == "InputError"


def test_a_refused_graph_says_why(toy_bundle: Path) -> None:
    (toy_bundle / "model.onnx").write_bytes(b"no graph")
    bundle = Bundle(toy_bundle, read_manifest(toy_bundle))
    with pytest.raises(RuntimeFailure, match="wrong size"):
        bundle.stream(runtime=RUNTIME)
    (toy_bundle / "model.onnx").write_bytes(b"no graph".ljust(bundle.manifest.files[0].bytes))
    with pytest.raises(RuntimeFailure, match="can't open the graph with wasm"):
        bundle.stream(runtime=RUNTIME)


def test_profile_is_read_by_node_and_provider(rwkv: Bundle) -> None:
    setup = setup_for(rwkv.manifest, "rwkv", None)
    times = profile_ops(rwkv.path, [1, 2, 3, 4], setup=setup, steps=3, warmup=1)
    assert times.calls == 3
    found = {op.op: op for op in times.ops}
    assert found["MatMul"].nodes >= 10
    assert {op.provider for op in times.ops} == {"CPUExecutionProvider"}
    assert (times.wanted, times.fallbacks) == ("CPUExecutionProvider", ())


TEXTS = [
    "",
    "plain",
    "Zürich, naïve café",
    "日本語と😀 emoji \U0001f9d1\u200d\U0001f680",
    "tab\tnew\nline\r",
    "\ufeffmark",
]


def entry_of(path: Path) -> dict[str, Any]:
    """A file's row in a manifest."""
    content = path.read_bytes()
    return {"path": path.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def vocabulary(folder: Path) -> Path:
    """Bytes that are no text, quotes, escapes and entries that overlap."""
    pieces: list[str | bytes] = [bytes((i,)) if i > 127 else chr(i) for i in range(256)]
    pieces += [
        "th",
        "the",
        "the ",
        "é",
        "日本",
        "'",
        '"',
        'it\'s "q"',
        "\\n",
        b"\xe6\x97",
        "a\tb",
        "\U0001f600",
    ]
    unique = dict.fromkeys(p if isinstance(p, bytes) else p.encode() for p in pieces)
    lines = []
    for i, piece in enumerate(unique, 1):
        try:
            literal: str | bytes = piece.decode()
        except UnicodeDecodeError:
            literal = piece
        lines.append(f"{i} {literal!r} {len(piece)}\n")
    path = folder / "rwkv_vocab.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["bytes", "rwkv-world"])
def test_tokenizers_are_pythons(kind: str, tmp_path: Path) -> None:
    """Ids of texts, and text of ids one at a time: characters that are cut, bytes that are no text."""
    path = vocabulary(tmp_path)
    row = {"kind": kind, "file": path.name}
    tokenizer = load_tokenizer(row, tmp_path)
    rng = np.random.default_rng(0)
    streams = [rng.integers(1, 256, 40).tolist(), tokenizer.encode(TEXTS[3])[:-1]]
    found = node(
        """
        const { loadTokenizer } = await part("tokenizers.mjs");
        const tokenizer = await loadTokenizer(given[0], web.fromFolder(given[1]), { verify: true });
        const pieces = given[3].map((ids) => {
          const decoder = tokenizer.decoder();
          return [...ids.map((id) => decoder.push(id)), decoder.flush()];
        });
        const lone = await told(async () => tokenizer.encode("\\ud800"));
        console.log(JSON.stringify({ ids: given[2].map((t) => tokenizer.encode(t)), pieces, lone,
                                     size: tokenizer.vocabSize, ends: [...tokenizer.endIds] }));
        """,
        {"tokenizer": row, "files": [entry_of(path)]},
        str(tmp_path),
        TEXTS,
        streams,
    )
    assert found["ids"] == [tokenizer.encode(text) for text in TEXTS]
    assert found["size"] == tokenizer.vocab_size
    assert set(found["ends"]) == tokenizer.end_ids
    assert found["lone"]["error"] == "InputError"
    for ids, pieces in zip(streams, found["pieces"], strict=True):
        decoder = tokenizer.decoder()
        assert "".join(pieces) == "".join([*(decoder.push(i) for i in ids), decoder.flush()])
        assert all(c < "\ud800" or c > "\udfff" for piece in pieces for c in piece)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_json_is_pythons(kind: str, tmp_path: Path) -> None:
    """What the npm library makes of the file: ids of texts, and text of any ids one at a time."""
    path = write_tokenizer(tmp_path, kind)
    row = {"kind": "huggingface", "file": path.name, "end": [2]}
    tokenizer = load_tokenizer(row, tmp_path)
    texts = [*ODD, *TEXTS, moby_dick(3000)]
    size = tokenizer.vocab_size or 0
    rng = np.random.default_rng(0)
    streams = [*rng.integers(0, size, (6, 40)).tolist(), *(tokenizer.encode(t) for t in ODD)]
    found = node(
        """
        const { loadTokenizer } = await part("tokenizers.mjs");
        const tokenizers = () => web.loadTokenizers(given[2]);
        const options = { verify: true, tokenizers };
        const tokenizer = await loadTokenizer(given[0], web.fromFolder(given[1]), options);
        const pieces = given[4].map((ids) => {
          const decoder = tokenizer.decoder();
          return [...ids.map((id) => decoder.push(id)), decoder.flush()];
        });
        const lone = await told(async () => tokenizer.encode("\\ud800"));
        console.log(JSON.stringify({ ids: given[3].map((t) => tokenizer.encode(t)), pieces, lone,
                                     size: tokenizer.vocabSize, ends: [...tokenizer.endIds] }));
        """,
        {"tokenizer": row, "files": [entry_of(path)]},
        str(tmp_path),
        str(get_environment("web").folder),
        texts,
        streams,
    )
    assert (found["size"], found["ends"], found["lone"]["error"]) == (size, [2], "InputError")
    for text, ids in zip(texts, found["ids"], strict=True):
        assert ids == tokenizer.encode(text), repr(text[:40])
    for ids, pieces in zip(streams, found["pieces"], strict=True):
        decoder = tokenizer.decoder()
        assert pieces == [*(decoder.push(i) for i in ids), decoder.flush()]


@pytest.mark.parametrize(
    ("fault", "error", "what"),
    [
        ("no json", "BundleError", "the bundle's tokenizer.json can't be read"),
        ("no model", "BundleError", "the bundle's tokenizer.json can't be read"),
        ("no library", "RuntimeFailure", "@huggingface/tokenizers can't be loaded"),
        ("not given", "InputError", "text can't be read here with a tokenizer of kind huggingface"),
    ],
)
def test_a_tokenizer_that_can_not_be_read(fault: str, error: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{" if fault == "no json" else "{}", encoding="utf-8")
    found = node(
        """
        const { loadTokenizer } = await part("tokenizers.mjs");
        const tokenizers = given[3] === "not given" ? undefined : () => web.loadTokenizers(given[2]);
        const load = () => loadTokenizer(given[0], web.fromFolder(given[1]), { verify: true, tokenizers });
        const found = await told(async () => (await load()).encode("a"));
        console.log(JSON.stringify(found));
        """,
        {"tokenizer": {"kind": "huggingface", "file": path.name}, "files": [entry_of(path)]},
        str(tmp_path),
        str(tmp_path if fault == "no library" else get_environment("web").folder),
        fault,
    )
    assert found == {"error": error, "what": what}


def test_the_world_vocabulary_is_pythons() -> None:
    rwkv_package = find_spec("rwkv")
    if rwkv_package is None or rwkv_package.submodule_search_locations is None:
        pytest.skip("the package rwkv, which has the vocabulary, is not installed")
    from xexport.runtimes.world import WorldTokenizer

    path = Path(rwkv_package.submodule_search_locations[0]) / "rwkv_vocab_v20230424.txt"
    text = " ".join([*TEXTS, (WEB.parent / "stream.py").read_text(encoding="utf-8")])
    found = node(
        """
        const { WorldTokenizer, parseVocabulary } = await part("world.mjs");
        const tokenizer = new WorldTokenizer(parseVocabulary(readFileSync(given[0], "utf-8")), () => null);
        console.log(JSON.stringify([tokenizer.vocabSize, tokenizer.encode(given[1])]));
        """,
        str(path),
        text,
    )
    assert found == [65530, WorldTokenizer(path).encode(text)]


def test_the_distribution_is_pythons() -> None:
    rng = np.random.default_rng(1)
    logits = np.round(rng.normal(size=40) * 3, 1).astype(np.float32)  # with ties
    options = [(1.0, 1.0, 0), (0.7, 0.8, 0), (1.3, 1.0, 5), (0.9, 0.6, 7), (1.0, 1e-6, 0)]
    found = node(
        """
        const { Sampler, probabilities } = await part("sampling.mjs");
        const logits = Float32Array.from(given[0]);
        const rows = given[1].map(([temperature, topP, topK]) =>
          Array.from(probabilities(logits, new Sampler({ temperature, topP, topK }))));
        const greedy = new Sampler({ temperature: 0 });
        const draws = (seed) => {
          const sampler = new Sampler({ seed });
          return Array.from({ length: 2000 }, () => sampler.choose(logits));
        };
        const bad = await told(async () => greedy.choose(Float32Array.of(1, NaN, 2)));
        const best = greedy.choose(logits);
        console.log(JSON.stringify({ rows, best, draws: draws(3), same: draws(3), bad }));
        """,
        logits.tolist(),
        options,
    )
    for (temperature, top_p, top_k), row in zip(options, found["rows"], strict=True):
        np.testing.assert_allclose(row, probabilities(logits, Sampler(temperature, top_p, top_k)), atol=1e-12)
    assert found["best"] == int(logits.argmax())
    assert found["draws"] == found["same"]
    assert found["bad"]["error"] == "RuntimeFailure"
    chances = probabilities(logits, Sampler())
    counts = np.bincount(found["draws"], minlength=40)
    assert np.abs(counts / 2000 - chances).max() < 5 * np.sqrt(0.25 / 2000)


@pytest.mark.parametrize(
    ("fault", "error", "what"),
    [
        ("version", "BundleError", "the manifest has a schema version this package can't read"),
        ("hash", "BundleError", "the bundle's file model.onnx.data was changed"),
        ("size", "BundleError", "the bundle's file model.onnx.data has a wrong size"),
        ("path", "BundleError", "a path in the manifest leaves the bundle's folder"),
        ("missing", "BundleError", "the bundle's file model.onnx can't be read"),
        ("provider", "RuntimeFailure", "WebGPU can't be used here"),
    ],
)
def test_what_is_refused(make_toy_bundle: ToyMaker, fault: str, error: str, what: str) -> None:
    folder = make_toy_bundle()
    manifest = json.loads((folder / "manifest.json").read_bytes())
    data = folder / "model.onnx.data"
    if fault == "version":
        manifest["schema_version"] = 99
    elif fault == "hash":
        data.write_bytes(data.read_bytes()[:-1] + b"!")
    elif fault == "size":
        data.write_bytes(data.read_bytes()[:-1])
    elif fault == "path":
        manifest["files"][0]["path"] = "../../etc/passwd"
    elif fault == "missing":
        (folder / "model.onnx").unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    found = node(
        """
        const provider = given[1] === "provider" ? "webgpu" : undefined;
        const found = await told(() => web.openBundle(web.fromFolder(given[0]), { ort: {}, provider }));
        console.log(JSON.stringify(found));
        """,
        str(folder),
        fault,
    )
    assert found == {"error": error, "what": what}


def test_a_stream_has_its_limit(make_toy_bundle: ToyMaker) -> None:
    """The state holds what came before; a generation gives all that fits, then says that it is full."""
    folder = make_toy_bundle(max_tokens=6)
    found = node(
        """
        const ort = await web.loadOrt(given[1]);
        const bundle = await web.openBundle(web.fromFolder(given[0]), { ort, threads: 1 });
        const stream = bundle.stream();
        await stream.feed([1, 2, 3]);
        const full = await told(() => stream.feed([1, 2, 3, 4]));
        const position = stream.position;
        const generation = stream.generate([4], { temperature: 0, maxTokens: 5 });
        const ended = await told(async () => { for await (const piece of generation); });
        const both = await told(() => Promise.all([bundle.stream().feed([1]), (async () => {
          const other = bundle.stream();
          return Promise.all([other.feed([1]), other.feed([1])]);
        })()]));
        console.log(JSON.stringify({ full, position, ids: generation.ids, ended, both }));
        """,
        str(folder),
        str(get_environment("web").folder),
    )
    assert found["full"] == {"error": "LimitError", "what": "the stream can hold 6 tokens"}
    assert found["position"] == 3
    assert found["ended"]["error"] == "LimitError"
    assert len(found["ids"]) == 3
    assert found["both"] == {"error": "RuntimeFailure", "what": "this stream is running"}


def test_stop_texts_end_a_generation(toy_bundle: Path) -> None:
    stream = xexport.load(toy_bundle).stream()
    text = "".join(stream.generate("ab", 12, temperature=0))
    stop = text[4:6]
    stream.reset()
    want = "".join(stream.generate("ab", 12, temperature=0, stop=stop))
    found = node(
        """
        const ort = await web.loadOrt(given[1]);
        const bundle = await web.openBundle(web.fromFolder(given[0]), { ort, threads: 1 });
        let text = "";
        const options = { temperature: 0, maxTokens: 12, stop: given[2] };
        for await (const piece of bundle.stream().generate("ab", options)) text += piece;
        console.log(JSON.stringify(text));
        """,
        str(toy_bundle),
        str(get_environment("web").folder),
        stop,
    )
    assert found == want


def test_a_prompt_of_features_is_refused(toy_bundle: Path) -> None:
    with pytest.raises(InputError):
        xexport.load(toy_bundle).stream(runtime=RUNTIME).feed([300])
