"""``xexport serve``: what is served and what is not, headers, ranges, and its errors. No browser here."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from xexport.core.errors import BundleError, InputError, RuntimeFailure
from xexport.runtimes.serve import Server, make_server

ToyMaker = Callable[..., Path]
Answer = tuple[int, dict[str, str], bytes]


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """What of the npm packages is served, and a file of each that is not."""
    ort, tokenizers = (tmp_path / p / "dist" for p in ("onnxruntime-web", "@huggingface/tokenizers"))
    for folder, names in (
        (ort, ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.wasm", "ort.min.js.map")),
        (tokenizers, ("tokenizers.min.mjs", "tokenizers.mjs")),
    ):
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_bytes(name.encode())
    return ort


@pytest.fixture
def server(toy_bundle: Path, packages: Path) -> Iterator[Server]:
    (toy_bundle / "secret.txt").write_text("not listed in the manifest", encoding="utf-8")
    with make_server([toy_bundle], ort=packages, port=0) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, {k.lower(): v for k, v in answer.getheaders()}, body


def test_the_page_is_isolated_and_loads_nothing_from_elsewhere(server: Server) -> None:
    status, headers, body = ask(server, "/")
    assert status == 200
    assert headers["content-type"].startswith("text/html")
    assert headers["cross-origin-opener-policy"] == "same-origin"
    assert headers["cross-origin-embedder-policy"] == "require-corp"
    assert "default-src 'self'" in headers["content-security-policy"]
    assert b"http://" not in body
    assert b"https://" not in body
    for path in (
        "/page/page.mjs",
        "/page/engine.mjs",
        "/xexport/xexport.mjs",
        "/ort/ort.wasm.min.mjs",
        "/tokenizers/tokenizers.min.mjs",
    ):
        status, headers, _ = ask(server, path)
        assert (status, headers["content-type"]) == (200, "text/javascript; charset=utf-8"), path
    status, headers, _ = ask(server, "/ort/ort-wasm-simd-threaded.wasm")
    assert (status, headers["content-type"]) == (200, "application/wasm")


def test_a_bundle_is_listed_and_served(server: Server, toy_bundle: Path) -> None:
    (row,) = json.loads(ask(server, "/bundles.json")[2])
    assert (row["name"], row["provider"]) == ("toy", "wasm")
    for name in ("manifest.json", "model.onnx", "model.onnx.data"):
        status, headers, body = ask(server, row["url"] + name)
        assert status == 200
        assert body == (toy_bundle / name).read_bytes()
        assert headers["content-length"] == str(len(body))


@pytest.mark.parametrize(
    "path",
    [
        "/bundle/0/toy/secret.txt",
        "/bundle/0/toy/../../../etc/passwd",
        "/bundle/0/toy/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/page/../serve.py",
        "/xexport/package.json",
        "/ort/ort.min.js.map",
        "/tokenizers/tokenizers.mjs",
        "/page/",
        "/%00",
    ],
)
def test_nothing_else_is_served(server: Server, path: str) -> None:
    status, headers, body = ask(server, path)
    assert status == 404
    assert b"nothing is served at this address" in body
    assert headers["cross-origin-embedder-policy"] == "require-corp"


@pytest.mark.parametrize(
    ("asked", "status", "want"),
    [
        ("bytes=0-3", 206, slice(0, 4)),
        ("bytes=5-", 206, slice(5, None)),
        ("bytes=-7", 206, slice(-7, None)),
        ("bytes=2-99999999", 206, slice(2, None)),
        ("bytes=0-", 200, slice(None)),
        ("lines=1-2", 200, slice(None)),
        ("bytes=99999999-", 416, None),
        ("bytes=-0", 416, None),
    ],
)
def test_ranges(server: Server, toy_bundle: Path, asked: str, status: int, want: slice | None) -> None:
    data = (toy_bundle / "model.onnx").read_bytes()
    got, headers, body = ask(server, "/bundle/0/toy/model.onnx", Range=asked)
    assert got == status
    if want is None:
        assert headers["content-range"] == f"bytes */{len(data)}"
        return
    assert body == data[want]
    if status == 206:
        start = range(len(data))[want][0]
        assert headers["content-range"] == f"bytes {start}-{start + len(body) - 1}/{len(data)}"


def test_head_has_no_body_and_other_methods_are_refused(server: Server, toy_bundle: Path) -> None:
    status, headers, body = ask(server, "/bundle/0/toy/model.onnx", "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["content-length"]) == (toy_bundle / "model.onnx").stat().st_size
    assert ask(server, "/", "POST")[0] == 501
    assert ask(server, "/", "DELETE")[0] == 501


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "localhost.evil.example", ""])
def test_another_name_for_this_machine_is_refused(server: Server, host: str) -> None:
    """A page elsewhere that points its own name here must not read the bundle."""
    assert ask(server, "/bundles.json", Host=host)[0] == 421
    assert ask(server, "/bundles.json", Host=f"localhost:{server.server_address[1]}")[0] == 200


def test_many_at_once_with_one_that_does_not_read(server: Server, toy_bundle: Path) -> None:
    data = toy_bundle / "model.onnx.data"
    want = b"x" * (8 << 20)
    data.write_bytes(want)
    idle = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    idle.request("GET", "/bundle/0/toy/model.onnx.data")
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: ask(server, "/bundle/0/toy/model.onnx.data")[2], range(6)))
    assert all(body == want for body in found)
    idle.close()
    data.unlink()
    assert ask(server, "/bundle/0/toy/model.onnx.data")[0] == 404


def test_what_it_needs(toy_bundle: Path, packages: Path, tmp_path: Path, server: Server) -> None:
    with pytest.raises(InputError, match="no bundle to serve"):
        make_server([], ort=packages)
    with pytest.raises(BundleError, match="not a bundle"):
        make_server([tmp_path], ort=packages)
    with pytest.raises(InputError, match="bad port"):
        make_server([toy_bundle], ort=packages, port=70000)
    with pytest.raises(RuntimeFailure, match="onnxruntime-web is not installed") as caught:
        make_server([toy_bundle], ort=tmp_path / "absent")
    assert "environments install web" in str(caught.value)
    with pytest.raises(RuntimeFailure, match="can't listen"):
        make_server([toy_bundle], ort=packages, port=int(server.server_address[1]))


def test_the_command_says_where_and_ends_when_interrupted(toy_bundle: Path, packages: Path) -> None:
    dev = Path(__file__).resolve().parents[1] / ".dev"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "xexport.cli",
            "serve",
            str(toy_bundle),
            "--port",
            "0",
            "--ort",
            str(packages),
            "--json",
        ],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(dev)},
        text=True,
        # a job in the background ignores it, and its children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    with process.stdout as out:
        address = json.loads(out.readline())["url"]
        assert address.startswith("http://localhost:")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
