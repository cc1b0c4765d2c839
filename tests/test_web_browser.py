"""A headless Chromium on the page of ``xexport serve``: greedy text on WebAssembly and WebGPU is Python's."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import pytest
from environment import need, need_environment

import xexport
from xexport.core.manifest import MANIFEST_NAME, encode_manifest
from xexport.runtimes.bundle import Bundle
from xexport.runtimes.environments import get_environment
from xexport.runtimes.opening import CPU
from xexport.runtimes.serve import make_server

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
def gpu_bundle(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same graph as a bundle for ONNX Runtime's WebGPU provider, as the targets webgpu-* say it."""
    folder = tmp_path_factory.mktemp("bundles") / "rwkv-webgpu-fp32"
    shutil.copytree(bundle.path, folder)
    manifest = msgspec.structs.replace(
        bundle.manifest, target="webgpu-fp32", runtime="onnxruntime", provider="WebGpuExecutionProvider"
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


def generate(page: Any, count: int) -> list[int]:
    """Greedy ids after the prompt."""
    page.fill("#prompt", " ".join(map(str, PROMPT)))
    page.fill("#temperature", "0")
    page.fill("#max", str(count))
    page.click("#go")
    wait(page, "done")
    return [int(word) for word in page.get_attribute("body", "data-ids").split()]


def want(bundle: Bundle, count: int) -> list[int]:
    generation = bundle.stream(runtime=CPU).generate(PROMPT, max_tokens=count, temperature=0)
    "".join(generation)
    return generation.ids


def test_webassembly(page: Any, bundle: Bundle, tmp_path: Path) -> None:
    wait(page, "ready")
    assert page.evaluate("self.crossOriginIsolated")
    assert generate(page, COUNT) == want(bundle, COUNT)
    assert page.inner_text("#made").split() == [str(i) for i in want(bundle, COUNT)]
    assert float(page.inner_text("#speed").replace(",", "")) > 0
    assert page.inner_text("#memory").endswith("MB")
    page.screenshot(path=tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000
    # nothing lies below the window's edge, and nothing beside it
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_stop_and_errors_are_shown(page: Any) -> None:
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


def test_webgpu(page: Any, bundle: Bundle, gpu_bundle: Bundle) -> None:
    """On SwiftShader, slow and exact: the state stays in buffers of the device between the tokens."""
    if not page.evaluate("navigator.gpu ? navigator.gpu.requestAdapter().then(Boolean) : false"):
        need("web", "this Chromium has no WebGPU adapter, not even SwiftShader")
    page.evaluate("document.body.dataset.state = ''")
    page.select_option("#bundle", label=gpu_bundle.path.name)
    wait(page, "ready")
    assert "WebGPU" in page.inner_text("#status"), "a bundle for WebGPU begins there"
    assert "webgpu-fp32" in page.inner_text("#facts")
    assert generate(page, COUNT) == want(bundle, COUNT)
