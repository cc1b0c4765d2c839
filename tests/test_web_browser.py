"""A headless Chromium on the page of ``xexport serve``: greedy text on WebAssembly and WebGPU is Python's."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from environment import need, need_environment
from tokenizer_json import write_tokenizer

import xexport
from xexport.core.manifest import MANIFEST_NAME, FileEntry, StateTensor, encode_manifest, read_manifest
from xexport.runtimes.bundle import Bundle
from xexport.runtimes.environments import get_environment
from xexport.runtimes.opening import CPU
from xexport.runtimes.serve import make_server

ToyMaker = Callable[..., Path]
PROMPT = [3, 4, 5, 11, 2]
COUNT = 12
_PATIENCE = 240_000  # milliseconds: a busy machine compiles 14 to 27 MB of WebAssembly first
_FLAGS = [
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
]


def chromium() -> str:
    """The browser: ``XEXPORT_CHROMIUM``, or the one on the PATH."""
    found = os.environ.get("XEXPORT_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        need("web", "no chromium is on the PATH")
    return str(found)


@pytest.fixture(scope="module")
def bundle(exporter: Any) -> Bundle:
    need_environment("web")
    return xexport.load(exporter("rwkv", "web-fp32"))


@pytest.fixture(scope="module")
def gpu_bundle(exporter: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A graph with 4-bit weights as a bundle for ONNX Runtime's WebGPU provider, as `webgpu-int4` has it."""
    need_environment("web")
    folder = tmp_path_factory.mktemp("bundles") / "rwkv-webgpu-int4"
    shutil.copytree(exporter("rwkv", "cpu-int4"), folder)
    manifest = msgspec.structs.replace(
        read_manifest(folder), target="webgpu-int4", runtime="onnxruntime", provider="WebGpuExecutionProvider"
    )
    (folder / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
    return Bundle(folder, manifest)


@pytest.fixture(scope="module")
def page(bundle: Bundle, gpu_bundle: Bundle) -> Iterator[Any]:
    """The page, with the bundle open on WebAssembly; what the browser complains of fails the test."""
    if find_spec("playwright") is None:
        need("web", "the package playwright is not installed")
    from playwright.sync_api import sync_playwright

    packages = get_environment("web").folder / "node_modules" / "onnxruntime-web" / "dist"
    with make_server([bundle.path, gpu_bundle.path], ort=packages, port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=chromium(), args=_FLAGS, timeout=120_000)
            tab = browser.new_page(viewport={"width": 1200, "height": 780})
            tab.set_default_timeout(_PATIENCE)
            complaints: list[str] = []
            tab.on("pageerror", lambda error: complaints.append(str(error)))
            tab.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
            tab.on("requestfailed", lambda r: complaints.append(f"{r.url}: {r.failure}"))
            tab.goto(server.url)
            yield tab
            browser.close()
            assert complaints == []
        server.shutdown()


def wait(page: Any, state: str) -> None:
    """Until the page says that state, or that it failed."""
    page.wait_for_selector(f"body[data-state={state}], body[data-state=failed]", state="attached")
    assert page.get_attribute("body", "data-state") == state, page.inner_text("#error")


def generate(page: Any, count: int, prompt: str = "") -> list[int]:
    """Greedy ids after the prompt."""
    page.fill("#prompt", prompt or " ".join(map(str, PROMPT)))
    page.fill("#temperature", "0")
    page.fill("#max", str(count))
    page.evaluate("document.body.dataset.state = ''")
    page.click("#go")
    wait(page, "done")
    return [int(word) for word in page.get_attribute("body", "data-ids").split()]


def want(bundle: Bundle, count: int, prompt: str | list[int] = PROMPT) -> list[int]:
    generation = bundle.stream(runtime=CPU).generate(prompt, max_tokens=count, temperature=0)
    "".join(generation)
    return generation.ids


def pick_folder(page: Any, folder: Path) -> None:
    """As a person does: the button, then a folder of the disk."""
    page.evaluate("document.body.dataset.state = ''")
    with page.expect_file_chooser() as chosen:
        page.click("#open-folder")
    chosen.value.set_files(folder)


def need_adapter(page: Any) -> None:
    if not page.evaluate("navigator.gpu ? navigator.gpu.requestAdapter().then(Boolean) : false"):
        need("web", "this Chromium has no WebGPU adapter, not even SwiftShader")


def failure(page: Any) -> str:
    """What the page says went wrong; nothing can be generated then."""
    page.wait_for_selector("body[data-state=failed], body[data-state=ready]", state="attached")
    assert page.get_attribute("body", "data-state") == "failed"
    assert page.is_disabled("#go")
    return str(page.inner_text("#error"))


def test_webassembly(page: Any, bundle: Bundle, tmp_path: Path) -> None:
    wait(page, "ready")
    assert page.evaluate("self.crossOriginIsolated")
    assert generate(page, COUNT) == want(bundle, COUNT)
    assert page.inner_text("#made").split() == [str(i) for i in want(bundle, COUNT)]
    assert float(page.inner_text("#speed").replace(",", "")) > 0
    assert page.inner_text("#memory").endswith("MB")
    assert page.is_hidden("#device")
    page.screenshot(path=tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000
    # nothing lies below the window's edge, and nothing beside it
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_two_threads(page: Any, bundle: Bundle) -> None:
    page.evaluate("document.body.dataset.state = ''")
    page.select_option("#threads", "2")
    wait(page, "ready")
    assert "2 of" in page.inner_text("#facts")
    assert generate(page, COUNT) == want(bundle, COUNT)
    page.select_option("#threads", "0")


def test_stop_and_errors_are_shown(page: Any) -> None:
    wait(page, "ready")
    page.fill("#prompt", "no ids")
    page.click("#go")
    page.wait_for_selector("body[data-state=failed]", state="attached")
    assert "not a token id" in page.inner_text("#error")
    page.fill("#prompt", "1 2 3")
    page.fill("#max", "100000")
    page.click("#go")
    page.wait_for_selector("#made:not(:empty)")
    page.click("#stop")
    wait(page, "done")
    assert 0 < len(page.get_attribute("body", "data-ids").split()) < 100_000


def test_a_folder_is_opened(page: Any, make_toy_bundle: ToyMaker, tmp_path: Path) -> None:
    """One of the disk, that no server lists, among other things; it reads text by a tokenizer.json."""
    path = write_tokenizer(tmp_path)
    entry = FileEntry(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
    folder = make_toy_bundle("kept/my bundle", vocab=400, tokenizer="huggingface")
    path.rename(folder / path.name)
    manifest = read_manifest(folder)
    manifest = msgspec.structs.replace(
        manifest,
        tokenizer={"kind": "huggingface", "file": path.name},
        files=(*manifest.files, entry),
    )
    (folder / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
    (folder.parent / "notes.txt").write_text("not of the bundle", encoding="utf-8")
    (folder.parent / "model.onnx").write_text("of another model", encoding="utf-8")
    prompt = "Ishmael, naïve 日本語 👩‍👩‍👧‍👦"
    ids = want(Bundle(folder, manifest), COUNT, prompt)
    text = Bundle(folder, manifest).tokenizer().decode(ids)
    pick_folder(page, folder.parent)
    wait(page, "ready")
    assert page.text_content("#text") == "", "no text of the model before"
    assert page.inner_text("#bundle option:checked") == folder.parent.name
    assert page.inner_text("#model").startswith("my bundle")
    assert "exported for cpu-fp32, not for browsers" in page.inner_text("#note")
    assert generate(page, COUNT, prompt) == ids
    assert page.text_content("#made") == text
    # the picked one stays in the list
    page.evaluate("document.body.dataset.state = ''")
    page.select_option("#bundle", index=0)
    wait(page, "ready")
    assert page.is_hidden("#note")
    page.evaluate("document.body.dataset.state = ''")
    page.select_option("#bundle", label=folder.parent.name)
    wait(page, "ready")


def test_a_folder_that_can_not_be_opened(page: Any, make_toy_bundle: ToyMaker, tmp_path: Path) -> None:
    one, two = make_toy_bundle("one"), make_toy_bundle("two")
    pick_folder(page, tmp_path)
    assert "there are several bundles in this folder" in failure(page)
    assert f"{tmp_path.name}/one" in failure(page)
    (one / MANIFEST_NAME).unlink()
    pick_folder(page, one)
    assert f"this folder is no bundle: it has no {MANIFEST_NAME}" in failure(page)
    assert "fix:     pick a folder that `xexport MODEL --target T` wrote" in failure(page)
    data = two / "model.onnx.data"
    content = data.read_bytes()
    for fault, what in (
        (content[:-1] + b"!", "the bundle's file model.onnx.data was changed"),
        (content[:-1], "the bundle's file model.onnx.data has a wrong size"),
        (content + b"!", "the bundle's file model.onnx.data is longer than the manifest says"),
        (None, "the bundle lacks its file model.onnx.data"),
    ):
        data.unlink()
        if fault is not None:
            data.write_bytes(fault)
        pick_folder(page, two)
        assert what in failure(page)
    data.write_bytes(content)
    pick_folder(page, two)
    wait(page, "ready")
    assert page.is_hidden("#error")
    assert page.is_enabled("#go")


def test_webgpu(page: Any, gpu_bundle: Bundle) -> None:
    """On SwiftShader, slow and exact; after the prompt nothing but logits comes back from the device."""
    need_adapter(page)
    assert any(d.format.startswith("int4 block") for d in gpu_bundle.manifest.decisions)
    page.evaluate("document.body.dataset.state = ''")
    page.select_option("#bundle", label=gpu_bundle.path.name)
    wait(page, "ready")
    assert "WebGPU" in page.inner_text("#status"), "a bundle for WebGPU begins there"
    assert "webgpu-int4" in page.inner_text("#facts")
    assert page.is_visible("#device")
    page.workers[-1].evaluate(_COUNT_DOWNLOADS)
    assert generate(page, COUNT) == want(gpu_bundle, COUNT)
    logits = -(-gpu_bundle.manifest.model.vocab_size // 4) * 16  # of float32, in buffers of whole 16 bytes
    assert page.workers[-1].evaluate("self.downloads")[-COUNT:] == [logits] * COUNT


_COUNT_DOWNLOADS = """() => {
  self.downloads = [];
  const { mapAsync } = GPUBuffer.prototype;
  GPUBuffer.prototype.mapAsync = function (mode, offset, size) {
    if (mode & GPUMapMode.READ) self.downloads.push(size ?? this.size);
    return mapAsync.apply(this, arguments);
  };
}"""


def test_the_state_stays_on_the_device(page: Any, make_toy_bundle: ToyMaker) -> None:
    """A graph that WebGPU computes wholly gives back nothing but logits, of the prompt and of each token."""
    need_adapter(page)
    bundle = on_device(make_toy_bundle("on-device", vocab=64, tokenizer="none"))
    pick_folder(page, bundle.path)
    wait(page, "ready")
    assert "WebGPU" in page.inner_text("#status")
    page.workers[-1].evaluate(_COUNT_DOWNLOADS)
    assert generate(page, COUNT) == want(bundle, COUNT)
    logits = 4 * 64  # bytes of a position's; this graph computes those of every position
    assert page.workers[-1].evaluate("self.downloads") == [len(PROMPT) * logits] + [logits] * COUNT


def on_device(folder: Path) -> Bundle:
    """The toy's place taken by h = h / 2 + sum of x; logits of x + h: nothing without a WebGPU kernel."""
    from onnx import TensorProto, helper, numpy_helper, save

    rng = np.random.default_rng(0)
    constants = {
        "embed": rng.normal(size=(64, 32)).astype(np.float32),
        "head": rng.normal(size=(32, 64)).astype(np.float32),
        "half": np.array([0.5], np.float32),
        "one": np.array([1], np.int64),
    }
    node, info = helper.make_node, helper.make_tensor_value_info
    nodes = [
        node("Gather", ["embed", "tokens"], ["x"]),
        node("ReduceSum", ["x", "one"], ["sum"], keepdims=1),
        node("Mul", ["h", "half"], ["less"]),
        node("Add", ["less", "sum"], ["h.next"]),
        node("Add", ["x", "h.next"], ["both"]),
        node("Tanh", ["both"], ["seen"]),
        node("MatMul", ["seen", "head"], ["logits"]),
    ]
    state = ["B", 1, 32]
    graph = helper.make_graph(
        nodes,
        "on-device",
        [
            info("tokens", TensorProto.INT64, ["B", "T"]),
            info("h", TensorProto.FLOAT, state),
        ],
        [
            info("logits", TensorProto.FLOAT, ["B", "T", 64]),
            info("h.next", TensorProto.FLOAT, state),
        ],
        [numpy_helper.from_array(a, n) for n, a in constants.items()],
    )
    path = folder / "model.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    manifest = msgspec.structs.replace(
        read_manifest(folder),
        provider="WebGpuExecutionProvider",
        files=(FileEntry(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size),),
        state=(StateTensor("h", "h.next", "float32", ("B", 1, 32), 0.0),),
    )
    (folder / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
    return Bundle(folder, manifest)


def test_a_browser_without_webgpu(page: Any, gpu_bundle: Bundle) -> None:
    """The page says so, and goes on with WebAssembly when told to."""
    hide = "Object.defineProperty(navigator, 'gpu', { value: undefined });"

    def without(route: Any) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, body=answer.text() + hide)

    page.route("**/page/engine.mjs", without)
    page.evaluate("document.body.dataset.state = ''; document.querySelector('#bundle').selectedIndex = 0")
    page.select_option("#bundle", label=gpu_bundle.path.name)
    assert "WebGPU can't be used here" in failure(page)
    assert "or WebAssembly" in failure(page)
    page.evaluate("document.body.dataset.state = ''")
    page.check("[name=provider][value=wasm]", force=True)
    wait(page, "ready")
    page.unroute("**/page/engine.mjs")
