"""``xexport serve``: bundles and the page that runs them in a browser, over HTTP, from this machine.

Everything that can be asked for stands in one table of addresses, so no path of a request ever reaches the
file system. The headers make the page cross-origin isolated, without which a browser gives WebAssembly no
threads (https://web.dev/articles/cross-origin-isolation-guide).
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from xexport.core.errors import InputError, RuntimeFailure
from xexport.core.manifest import MANIFEST_NAME, Manifest, safe_path
from xexport.runtimes.bundle import load

__all__ = ["DEFAULT_HOST", "DEFAULT_PORT", "Server", "make_server"]

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8765
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".json": "application/json",
    ".mjs": "text/javascript; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
    ".wasm": "application/wasm",
}
_HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'wasm-unsafe-eval' blob:; "
    "worker-src 'self' blob:; img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
    "Accept-Ranges": "bytes",
}
_PIECE = 1 << 20
_RANGE = re.compile(r"bytes=(\d*)-(\d*)", re.ASCII)
_ORT_FILES = re.compile(r"ort(\.wasm|\.webgpu)\.min\.mjs|ort-wasm-simd-threaded[a-z.]*\.(mjs|wasm)")


class Server(ThreadingHTTPServer):
    """A server of one table; a thread a connection.

    Attributes:
        table: address -> a file, or bytes with their type.
        url: where the page is.
        names: host names that requests may be for.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], table: dict[str, Path | tuple[bytes, str]]) -> None:
        self.table = table
        super().__init__(address, _Handler)
        host, port = str(self.server_address[0]), int(self.server_address[1])
        self.url = f"http://{'localhost' if host == DEFAULT_HOST else host}:{port}/"
        self.names = _own_names(host)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away while it is sent something is no news."""


def make_server(
    bundles: Sequence[Path], *, ort: Path, host: str = DEFAULT_HOST, port: int = DEFAULT_PORT
) -> Server:
    """A server that listens already; ``serve_forever`` answers.

    Args:
        bundles: folders that ``xexport MODEL --target T`` wrote.
        ort: the folder ``dist`` of the npm package onnxruntime-web; @huggingface/tokenizers, which reads a
            tokenizer.json, lies in the same node_modules.
        host: the address to listen on; other machines reach the loopback's not.
        port: 0 takes a free one.

    Raises:
        BundleError: a folder is no bundle, or not whole.
        InputError: no bundles, or a bad port.
        RuntimeFailure: onnxruntime-web is not there, or the address can't be listened on.
    """
    if not bundles:
        raise InputError("no bundle to serve", fix="name a folder that `xexport MODEL --target T` wrote")
    if not 0 <= port <= 65535:
        raise InputError("bad port", got=port, allowed="0 (a free one) to 65535")
    table: dict[str, Path | tuple[bytes, str]] = {}
    _add_page(table)
    _add_ort(table, ort)
    _add_tokenizers(table, ort.resolve().parent.parent / "@huggingface" / "tokenizers" / "dist")
    rows = [_add_bundle(table, folder, index) for index, folder in enumerate(bundles)]
    table["/bundles.json"] = json.dumps(rows).encode(), _TYPES[".json"]
    try:
        return Server((host, port), table)
    except OSError as error:
        raise RuntimeFailure(
            f"can't listen on {host}:{port}", got=error, fix="choose another --port, or 0 for a free one"
        ) from error


def _add_page(table: dict[str, Path | tuple[bytes, str]]) -> None:
    """The page and the ES module; read once, as an installed package may be no folder."""
    web = files("xexport.runtimes") / "web"
    for prefix, folder in (("/xexport", web), ("/page", web / "page")):
        for item in folder.iterdir():
            kind = _TYPES.get(Path(item.name).suffix)
            if item.is_file() and kind and item.name != "package.json":
                table[f"{prefix}/{item.name}"] = item.read_bytes(), kind
    table["/"] = table.pop("/page/index.html")


def _add_ort(table: dict[str, Path | tuple[bytes, str]], folder: Path) -> None:
    found = [p for p in folder.iterdir() if _ORT_FILES.fullmatch(p.name)] if folder.is_dir() else []
    if not any(p.suffix == ".wasm" for p in found):
        raise RuntimeFailure(
            "onnxruntime-web is not installed, which runs the bundle in the browser",
            got=f"nothing in {folder}",
            fix="python -m xexport.runtimes.environments install web (needs npm), or name the folder `dist` "
            "of that npm package with --ort",
        )
    for path in found:
        table[f"/ort/{path.name}"] = path


def _add_tokenizers(table: dict[str, Path | tuple[bytes, str]], folder: Path) -> None:
    """The reader of tokenizer.json; without it the page says so when it opens a bundle with one."""
    path = folder / "tokenizers.min.mjs"
    if path.is_file():
        table[f"/tokenizers/{path.name}"] = path


def _add_bundle(table: dict[str, Path | tuple[bytes, str]], folder: Path, index: int) -> dict[str, str | int]:
    """The files that the manifest lists, and a row for the page's list."""
    bundle = load(folder, verify=False)
    base = f"/bundle/{index}/{quote(folder.resolve().name)}/"
    for name in [MANIFEST_NAME, *(entry.path for entry in bundle.manifest.files)]:
        table[base + quote(name)] = safe_path(folder, name)
    return {
        "name": folder.resolve().name,
        "url": base,
        "provider": _provider(bundle.manifest),
        "bytes": bundle.bytes_of_weights,
    }


def _provider(manifest: Manifest) -> str:
    """The backend that the page begins with."""
    return "webgpu" if "webgpu" in manifest.provider.lower() else "wasm"


def _own_names(host: str) -> frozenset[str] | None:
    """Host names a request may be for: a page elsewhere that points its name here is refused.

    None allows any, where the server was told to be reached from other machines.
    """
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    return frozenset((host, "localhost", DEFAULT_HOST, "::1")) if local else None


class _Handler(BaseHTTPRequestHandler):
    """GET and HEAD of what is in the table, whole or in one range."""

    protocol_version = "HTTP/1.1"
    server_version = "xexport"
    sys_version = ""
    timeout = 60  # seconds an idle connection is kept
    server: Server

    def do_GET(self) -> None:
        """Answer with the body."""
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        """Answer without it."""
        self._answer(with_body=False)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the terminal belongs to the address."""

    def _answer(self, *, with_body: bool) -> None:
        if self.server.names is not None and _host_of(self.headers.get("Host", "")) not in self.server.names:
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST, "this server answers for this machine alone")
            return
        found = self.server.table.get(urlsplit(self.path).path) or self.server.table.get(
            quote(unquote(urlsplit(self.path).path))
        )
        if found is None:
            self._refuse(HTTPStatus.NOT_FOUND, "nothing is served at this address")
            return
        try:
            body, size, kind = _open(found)
        except OSError:
            self._refuse(HTTPStatus.NOT_FOUND, "the file has been removed since the server started")
            return
        with body:
            part = _range_of(self.headers.get("Range"), size)
            if part is None:
                self._refuse(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "no such range", f"bytes */{size}")
                return
            start, stop = part
            whole = stop - start == size
            self._begin(HTTPStatus.OK if whole else HTTPStatus.PARTIAL_CONTENT, kind, stop - start)
            if not whole:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
            self.end_headers()
            body.seek(start)
            if with_body and not _copy(body, self.wfile, stop - start):
                self.close_connection = True  # the file has become shorter: what was promised can't come

    def _refuse(self, status: HTTPStatus, why: str, content_range: str | None = None) -> None:
        text = f"{status.value} {status.phrase}: {why}\n".encode()
        self._begin(status, _TYPES[".txt"], len(text))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _begin(self, status: HTTPStatus, kind: str, length: int) -> None:
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))


def _open(found: Path | tuple[bytes, str]) -> tuple[BufferedIOBase, int, str]:
    """A body that can be sought, its size, its type."""
    if isinstance(found, tuple):
        return BytesIO(found[0]), len(found[0]), found[1]
    file = found.open("rb")
    return file, found.stat().st_size, _TYPES.get(found.suffix, "application/octet-stream")


def _range_of(header: str | None, size: int) -> tuple[int, int] | None:
    """(start, stop) of what is asked for; the whole where the header is absent or of another kind (RFC 9110).

    None where no byte of it exists.
    """
    match = _RANGE.fullmatch((header or "").strip())
    if match is None or match.groups() == ("", ""):
        return 0, size
    first, last = match.groups()
    if not first:
        start, stop = max(size - int(last), 0), size
    else:
        start, stop = int(first), min(int(last) + 1, size) if last else size
    return (start, stop) if start < stop else None


def _copy(body: BufferedIOBase, out: BufferedIOBase, count: int) -> bool:
    """``count`` bytes, a piece at a time: weights may be larger than the memory. False if there are fewer."""
    while count > 0 and (piece := body.read(min(count, _PIECE))):
        out.write(piece)
        count -= len(piece)
    return count == 0


def _host_of(header: str) -> str:
    """The name in a Host header, without its port or brackets."""
    return (urlsplit(f"//{header}").hostname or "") if header else ""
