"""Reading bundles: whole ones, and every way in which one can be broken or hostile."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xexport.core.errors import BundleError, InputError, RuntimeFailure
from xexport.runtimes import native
from xexport.runtimes.bundle import load
from xexport.runtimes.onnxruntime import open_engine, unavailable

ToyMaker = Callable[..., Path]


def _edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_load_needs_neither_torch_nor_onnx(toy_bundle: Path) -> None:
    code = (
        "import sys, xexport; s = xexport.load(sys.argv[1]).stream(threads=1); s.feed([1, 2]); "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'onnx', 'onnxscript', 'onnx_ir'}))"
    )
    root = Path(__file__).resolve().parents[1] / ".dev"
    done = subprocess.run(
        [sys.executable, "-c", code, str(toy_bundle)], capture_output=True, text=True, cwd=root, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_sizes(toy_bundle: Path) -> None:
    bundle = load(toy_bundle)
    files = [toy_bundle / "model.onnx", toy_bundle / "model.onnx.data"]
    assert bundle.bytes_of_weights == sum(f.stat().st_size for f in files)
    assert bundle.bytes_of_state() == 8 * 4 + 8 * 4 + 8
    assert bundle.bytes_of_state(3) == 3 * bundle.bytes_of_state()


def test_inspect_is_plain_json_with_sizes_and_formats(toy_bundle: Path) -> None:
    record = json.loads(json.dumps(load(toy_bundle).inspect()))
    assert record["bytes"]["weights"] == load(toy_bundle).bytes_of_weights
    assert record["formats"] == {"float32": {"tensors": 2, "bytes": 2 * 4 * 256 * 8}}
    assert [s["name"] for s in record["state"]] == ["layers.0.sum", "layers.0.last", "position"]


def test_fingerprint_tells_weights_apart_and_survives_a_copy(
    make_toy_bundle: ToyMaker, tmp_path: Path
) -> None:
    one, two = make_toy_bundle("one"), make_toy_bundle("two", seed=1)
    shutil.copytree(one, tmp_path / "copy")
    assert load(one).fingerprint == load(tmp_path / "copy").fingerprint != load(two).fingerprint


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a bundle"):
        load(tmp_path)
    with pytest.raises(BundleError, match="not a bundle"):
        load(tmp_path / "absent")


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_changed_byte_is_found_and_the_file_named(toy_bundle: Path, name: str) -> None:
    path = toy_bundle / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=rf"file {name} was changed"):
        load(toy_bundle)
    assert load(toy_bundle, verify=False).path == toy_bundle


@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_file_is_found(toy_bundle: Path, verify: bool) -> None:
    path = toy_bundle / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"model\.onnx\.data has a wrong size"):
        load(toy_bundle, verify=verify)


@pytest.mark.parametrize("verify", [True, False])
def test_a_missing_file_is_found(toy_bundle: Path, verify: bool) -> None:
    (toy_bundle / "model.onnx.data").unlink()
    with pytest.raises(BundleError, match=r"lacks its file model\.onnx\.data"):
        load(toy_bundle, verify=verify)


def test_a_folder_in_the_place_of_a_file_is_refused(toy_bundle: Path) -> None:
    (toy_bundle / "model.onnx").unlink()
    (toy_bundle / "model.onnx").mkdir()
    with pytest.raises(BundleError, match="lacks its file"):
        load(toy_bundle)


@pytest.mark.parametrize(
    "path", ["../model.onnx", "/etc/passwd", "a/../../x", "..", "", "C:evil", "a\\b", "sub/model.onnx"]
)
@pytest.mark.parametrize("place", ["graph", "files"])
def test_a_path_that_leaves_the_folder_is_refused(toy_bundle: Path, path: str, place: str) -> None:
    def change(data: dict[str, Any]) -> None:
        if place == "graph":
            data["graph"] = path
        else:
            data["files"][0]["path"] = path

    _edit(toy_bundle, change)
    with pytest.raises(BundleError, match="leaves the bundle's folder"):
        load(toy_bundle)


@pytest.mark.parametrize("name", ["model.onnx.data", "manifest.json"])
def test_a_symbolic_link_is_refused(toy_bundle: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    shutil.move(toy_bundle / name, outside)
    (toy_bundle / name).symlink_to(outside)
    with pytest.raises(BundleError, match="symbolic link"):
        load(toy_bundle)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b'{"schema_version": "one"}', b"null"])
def test_a_corrupt_manifest_is_refused(toy_bundle: Path, text: bytes) -> None:
    (toy_bundle / "manifest.json").write_bytes(text)
    with pytest.raises(BundleError, match="manifest is not valid"):
        load(toy_bundle)


def test_a_manifest_that_lacks_a_key_is_refused_by_name(toy_bundle: Path) -> None:
    _edit(toy_bundle, lambda data: data.pop("provider"))
    with pytest.raises(BundleError, match="not valid") as caught:
        load(toy_bundle)
    assert "provider" in str(caught.value.got)


def test_a_manifest_of_another_version_says_which(toy_bundle: Path) -> None:
    _edit(toy_bundle, lambda data: data.update(schema_version=99))
    with pytest.raises(BundleError, match="schema version") as caught:
        load(toy_bundle)
    assert (caught.value.got, caught.value.allowed) == (99, 1)


def test_a_graph_that_is_not_listed_is_refused(toy_bundle: Path) -> None:
    _edit(toy_bundle, lambda data: data.update(files=data["files"][1:]))
    with pytest.raises(BundleError, match="list its own graph"):
        load(toy_bundle)


def test_an_unknown_tokenizer_is_refused(toy_bundle: Path) -> None:
    _edit(toy_bundle, lambda data: data.update(tokenizer={"kind": "os.system"}))
    with pytest.raises(BundleError, match="tokenizer"):
        load(toy_bundle).stream(threads=1)


@pytest.mark.parametrize("runtime", ["toaster", "bundle", "../evil", "os"])
def test_an_unknown_runtime_is_refused(toy_bundle: Path, runtime: str) -> None:
    _edit(toy_bundle, lambda data: data.update(runtime=runtime))
    with pytest.raises(RuntimeFailure, match="this xexport doesn't have that runtime"):
        load(toy_bundle).stream()


def test_a_provider_that_is_not_here_is_an_error_and_no_fallback(toy_bundle: Path) -> None:
    _edit(toy_bundle, lambda data: data.update(provider="MadeUpExecutionProvider"))
    with pytest.raises(RuntimeFailure, match="MadeUpExecutionProvider") as caught:
        load(toy_bundle).stream()
    assert "CPUExecutionProvider" in str(caught.value.got)
    assert unavailable("CPUExecutionProvider") is None


@pytest.mark.parametrize("key", ["session_options", "provider_options"])
@pytest.mark.parametrize("value", ["/tmp/evil.so", "..", "evil.so", "a\\b"])
def test_options_cannot_name_files(toy_bundle: Path, key: str, value: str) -> None:
    _edit(toy_bundle, lambda data: data["target_row"].update({key: {"backend_path": value}}))
    with pytest.raises(BundleError, match="name a path"):
        load(toy_bundle).stream()


def test_session_options_reach_the_session(toy_bundle: Path) -> None:
    options = {"session.intra_op.allow_spinning": "0"}
    _edit(toy_bundle, lambda data: data["target_row"].update(session_options=options))
    session = load(toy_bundle).engine(threads=1).session
    held = session.get_session_options()
    assert held.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert held.intra_op_num_threads == 1


def test_a_graph_that_is_not_what_the_manifest_says_is_refused(toy_bundle: Path) -> None:
    _edit(toy_bundle, lambda data: data["state"][0].update(name="layers.0.other"))
    with pytest.raises(BundleError, match="inputs are not those") as caught:
        load(toy_bundle).stream()
    assert "layers.0.other" in str(caught.value.got)


def test_a_wrong_dtype_in_the_manifest_is_refused(toy_bundle: Path) -> None:
    _edit(toy_bundle, lambda data: data["state"][1].update(dtype="float16"))
    with pytest.raises(BundleError, match=r"inputs are not those") as caught:
        load(toy_bundle).stream()
    assert "float16" in str(caught.value.got)


def test_a_graph_that_onnxruntime_refuses_is_a_clear_error(toy_bundle: Path) -> None:
    (toy_bundle / "model.onnx").write_bytes(b"not a protobuf at all")
    manifest = load_manifest(toy_bundle)
    with pytest.raises(RuntimeFailure, match="refused the graph") as caught:
        open_engine(toy_bundle, manifest)
    assert "model.onnx" in str(caught.value.got)


def load_manifest(folder: Path) -> Any:
    from xexport.core.manifest import read_manifest

    return read_manifest(folder)


@pytest.mark.parametrize("threads", [-1, True, 1.5])
def test_bad_thread_counts_are_refused(toy_bundle: Path, threads: Any) -> None:
    with pytest.raises(InputError, match="threads"):
        load(toy_bundle).stream(threads=threads)


def test_profile_is_written_when_asked(toy_bundle: Path, tmp_path: Path) -> None:
    import numpy as np

    engine = open_engine(toy_bundle, load_manifest(toy_bundle), threads=1, profile_prefix=tmp_path / "ops")
    engine.cell(1).run(np.array([[1]], np.int64))
    written = Path(engine.session.end_profiling())
    assert written.parent == tmp_path
    assert "MatMul" in written.read_text()


# Native kernels


def test_native_kernels_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XEXPORT_NATIVE", "0")
    found = native.find_native()
    assert not found.available
    assert "XEXPORT_NATIVE=0" in found.reason


def test_a_missing_library_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XEXPORT_NATIVE", raising=False)
    monkeypatch.setattr(native, "library_name", lambda: "no_such_library.so")
    found = native.find_native()
    assert found.path is None
    assert found.reason.startswith("no native kernels: ")


def test_a_library_that_cannot_be_loaded_is_an_error_with_a_way_out(
    toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "libbroken.so"
    broken.write_bytes(b"no library")
    found = native.NativeKernels(broken, "planted")
    monkeypatch.setattr("xexport.runtimes.onnxruntime.find_native", lambda: found)
    with pytest.raises(RuntimeFailure, match="native kernels can't be loaded") as caught:
        load(toy_bundle).stream()
    assert "XEXPORT_NATIVE=0" in str(caught.value.fix)


def test_an_onnxruntime_that_is_too_old_is_named(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.__version__", "1.22.1")
    with pytest.raises(RuntimeFailure) as caught:
        load(toy_bundle).stream()
    assert "onnxruntime 1.22.1 is older than 1.23" in str(caught.value.got)
