"""Bad input: every refusal is a clear error with exit code not 0, and nothing half written stays behind."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from xexport.cli import cli
from xexport.core.checkpoint import open_checkpoint
from xexport.core.errors import CheckpointError, OutputError
from xexport.core.registry import get_family

DEV = Path(__file__).resolve().parents[1] / ".dev"
ToyMaker = Callable[..., Path]


def listing(folder: Path) -> dict[str, str]:
    """Every file, folder and link below a folder, with what is in it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "file"
        content = hashlib.sha256(path.read_bytes()).hexdigest() if kind == "file" else ""
        found[str(path.relative_to(folder))] = f"{kind} {content}"
    return found


def refused(folder: Path, *args: str | Path, code: int = 1) -> str:
    """Run the command, which must fail and leave ``folder`` as it was; the message with all its fields."""
    before = listing(folder)
    done = CliRunner().invoke(cli, [str(a) for a in args], prog_name="xexport")
    assert isinstance(done.exception, SystemExit), repr(done.exception)
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert listing(folder) == before
    return done.stderr


def tensors(family: str = "rwkv") -> dict[str, torch.Tensor]:
    """The weights of a tiny model."""
    found = get_family(family)
    module = found.build(found.presets["tiny"])
    found.init(module, 0)
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


@contextmanager
def no_trace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Bad input must be found before the slow part."""

    def trace(*_: Any, **__: Any) -> None:
        raise AssertionError("the export went as far as tracing")

    with monkeypatch.context() as patch:
        patch.setattr("xexport.exporter.graph.trace", trace)
        yield


# Checkpoints


class _Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def _cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def _pth(folder: Path, change: Callable[[dict[str, Any]], object] = lambda t: None) -> Path:
    table: dict[str, Any] = tensors()
    change(table)
    torch.save(table, folder / "weights.pth")
    return folder / "weights.pth"


def _safe(folder: Path) -> Path:
    save_file(tensors(), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda table: table.update({name: value})


def _spoil(name: str, value: float) -> Callable[[dict[str, Any]], object]:
    return lambda table: table[name].view(-1)[5:7].fill_(value)


def _text(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def _hf(folder: Path, **files: str) -> Path:
    (folder / "hf").mkdir()
    for name, text in files.items():
        _text(folder / "hf", name.replace("__", "."), text)
    return folder / "hf"


_W = "blocks.1.att.key.weight"
_INDEX = json.dumps({"weight_map": {"a": "../weights.safetensors"}})

CHECKPOINTS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "missing": (lambda d: d / "no.pth", ("does not exist", "no.pth")),
    "empty": (lambda d: _text(d, "empty.pth", ""), ("empty", "empty.pth")),
    "truncated pth": (lambda d: _cut(_pth(d), 0.5), ("truncated", "weights.pth")),
    "truncated safetensors": (lambda d: _cut(_safe(d), 0.5), ("truncated", "weights.safetensors")),
    "header of safetensors": (lambda d: _cut(_safe(d), 0.001), ("truncated",)),
    "a web page": (lambda d: _text(d, "model.pth", "<html>404</html>"), ("weights only", "model.pth")),
    "an LFS pointer": (lambda d: _text(d, "m.safetensors", "version https://git-lfs"), ("corrupt",)),
    "unknown ending": (lambda d: _text(d, "model.gguf", "GGUF"), ("unknown checkpoint format", ".pth")),
    "tensor missing": (lambda d: _pth(d, lambda t: t.pop(_W)), (_W,)),
    "wrong shape": (lambda d: _pth(d, _set(_W, torch.zeros(32, 31))), (_W, "wrong shape", "[32, 32]")),
    "nan": (lambda d: _pth(d, _spoil(_W, float("nan"))), (_W, "NaN", "2 in elements")),
    "infinity": (lambda d: _pth(d, _spoil(_W, float("-inf"))), (_W, "infinite")),
    "whole numbers": (lambda d: _pth(d, _set(_W, torch.ones(32, 32, dtype=torch.int8))), (_W, "int8")),
    "no tensors": (lambda d: _pth(d, lambda t: t.clear()), ("no tensors",)),
    "a number among tensors": (lambda d: _pth(d, _set("epoch", 3)), ("not a table of tensors",)),
    "folder without config": (lambda d: _hf(d, readme__md="hi"), ("config.json",)),
    "folder without weights": (lambda d: _hf(d, config__json="{}"), ("no weights",)),
    "broken config": (lambda d: _hf(d, config__json='{"a": '), ("config.json", "can't be read")),
    "config that is a list": (lambda d: _hf(d, config__json="[]"), ("config.json", "object")),
    "shard outside its folder": (
        lambda d: _hf(d, config__json="{}", model__safetensors__index__json=_INDEX),
        ("leaves the folder", "../weights.safetensors"),
    ),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_bad_checkpoint(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, says = CHECKPOINTS[kind]
    path = make(tmp_path)
    with no_trace(monkeypatch):
        message = refused(
            tmp_path, "rwkv", "--target", "cpu-int8", "--weights", path, "--out", tmp_path / "out"
        )
    for part in says:
        assert part in message
    assert "got:" in message
    assert "fix:" in message or "allowed:" in message


@pytest.mark.parametrize(("asked", "given"), [("rwkv", "mamba"), ("mamba", "rwkv"), ("retnet", "hyena")])
def test_checkpoint_of_another_family(asked: str, given: str, tmp_path: Path) -> None:
    torch.save(tensors(given), tmp_path / "other.pth")
    message = refused(
        tmp_path,
        asked,
        "--target",
        "cpu-int8",
        "--weights",
        tmp_path / "other.pth",
        "--out",
        tmp_path / "out",
    )
    assert "got:" in message
    assert "other.pth" in message


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
def test_code_in_a_checkpoint_is_refused_and_not_run(form: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "pwned", tmp_path / "evil.pth"
    table = {**tensors(), "evil": _Evil(mark)}
    if form == "bare pickle":
        path.write_bytes(pickle.dumps({"evil": _Evil(mark)}, protocol=2))
    else:
        torch.save(table, path, _use_new_zipfile_serialization=form == "zip")
    message = refused(tmp_path, "rwkv", "--target", "cpu-int8", "--weights", path, "--out", tmp_path / "out")
    assert not mark.exists()
    assert "holds code" in message


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_damaged_checkpoint_loads_or_is_refused_but_never_crashes(suffix: str, tmp_path: Path) -> None:
    import random

    rng = random.Random(0)
    family = get_family("rwkv")
    good = (_pth(tmp_path) if suffix == ".pth" else _safe(tmp_path)).read_bytes()
    path = tmp_path / f"damaged{suffix}"
    refusals = 0
    for round_ in range(60):
        data = bytearray(good)
        if round_ % 3 == 0:
            del data[rng.randrange(len(data)) :]
        else:
            # mostly in the tables at the beginning and end, where a wrong byte matters
            for _ in range(4):
                data[rng.choice([rng.randrange(2000), -1 - rng.randrange(2000)])] = rng.randrange(256)
        path.write_bytes(data)
        try:
            family.load(open_checkpoint(path))
        except CheckpointError:
            refusals += 1
    assert refusals > 20


# Names and options


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("rwkw", "--target", "cpu-int8"), ("rwkw", "did you mean rwkv")),
        (("rwkv", "--target", "cpu-int9"), ("cpu-int9", "did you mean cpu-int")),
        (("rwkv", "--target", "cpu-int8", "--preset", "0.1b"), ("0.1b", "did you mean 0.1B")),
        (("rwkv", "--target", "cpu-int8", "--preset", "tiny", "--weights", "x.pth"), ("exclude each other",)),
    ],
    ids=["model", "target", "preset", "weights and preset"],
)
def test_wrong_name(
    args: tuple[str, ...], says: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with no_trace(monkeypatch):
        message = refused(tmp_path, *args)
    for part in says:
        assert part in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "can't be read"),
        ("", "too short"),
        ("7", "too short"),
        ("1 2 three", "three"),
        ("1 2 61", "id 61"),
        ("1 2 99999999999999999999999", "0..60"),
    ],
    ids=["missing", "empty", "one id", "words", "id out of range", "huge id"],
)
def test_bad_evaluation_text(
    text: str | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.txt"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    args = ("rwkv", "--target", "cpu-fp32", "--preset", "tiny", "--out", tmp_path / "out")
    with no_trace(monkeypatch):
        message = refused(tmp_path, *args, "--eval-text", path)
    assert says in message


# Where the bundle goes


def _bundle_like(folder: Path) -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text("{}", encoding="utf-8")
    (folder / "model.onnx").write_bytes(b"old")
    return folder


def _other_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work", encoding="utf-8")
    return folder


def _file(path: Path) -> Path:
    path.write_text("a file", encoding="utf-8")
    return path


def _link(path: Path) -> Path:
    path.symlink_to(path.parent / "elsewhere")
    return path


OUTPUTS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...], str]] = {
    "exists": (lambda d: _bundle_like(d / "out"), (), "--force"),
    "no bundle, forced": (lambda d: _other_folder(d / "out"), ("--force",), "not a bundle"),
    "a file": (lambda d: _file(d / "out"), (), "not a folder"),
    "a file, forced": (lambda d: _file(d / "out"), ("--force",), "not a folder"),
    "a link, forced": (lambda d: _link(d / "out"), ("--force",), "not a folder"),
    "below a file": (lambda d: _file(d / "out") / "deep" / "bundle", (), "can't write here"),
    "a name too long": (lambda d: d / ("x" * 300), (), "can't write here"),
    "where nobody may write": (lambda d: Path("/proc/xexport/out"), (), "can't write here"),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_bad_output_folder(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "where nobody may write" and not Path("/proc/self").exists():
        pytest.skip("needs a /proc, which even root can't write to")
    make, more, says = OUTPUTS[kind]
    out = make(tmp_path)
    with no_trace(monkeypatch):
        message = refused(tmp_path, "rwkv", "--target", "cpu-int8", "--preset", "tiny", "--out", out, *more)
    assert says in message
    assert "got:" in message


def test_parents_made_for_nothing_go_again(tmp_path: Path) -> None:
    refused(
        tmp_path,
        "rwkv",
        "--target",
        "cpu-int8",
        "--weights",
        tmp_path / "no.pth",
        "--out",
        tmp_path / "a" / "b" / "out",
    )


def _full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "where",
    [
        "xexport.exporter.writer._put",
        "onnx_ir.save",
        "numpy.savez_compressed",
        "xexport.report.html.write_html",
        "xexport.exporter.output._sync",
    ],
)
def test_full_disk_leaves_the_old_bundle(
    where: str, exporter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _bundle_like(tmp_path / "out")
    monkeypatch.setattr(where, _full)
    args = ("rwkv", "--target", "cpu-fp32", "--preset", "tiny", "--eval-text", exporter.ids, "--force")
    monkeypatch.setattr("xexport.evaluate.suite.sizes_for", lambda *_: _sizes())
    with exporter.traced_once():
        message = refused(tmp_path, *args, "--out", tmp_path / "out")
    assert "disk is full" in message


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for the weights of a tiny model but not for its report."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        shutil.which("mount")
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)], capture_output=True, check=False
        ).returncode
    )
    if not mounted:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_disk_that_fills_up(exporter: Any, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xexport.evaluate.suite.sizes_for", lambda *_: _sizes())
    args = ("rwkv", "--target", "cpu-int8", "--preset", "tiny", "--eval-text", exporter.ids)
    with exporter.traced_once():
        message = refused(small_disk, *args, "--out", small_disk / "out")
    assert "disk is full" in message or "No space left on device" in message
    assert list(small_disk.iterdir()) == []


def _sizes() -> Any:
    from exported import sizes

    return sizes()


def test_too_little_room_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with no_trace(monkeypatch):
        message = refused(
            tmp_path, "rwkv", "--target", "cpu-int8", "--preset", "tiny", "--out", tmp_path / "out"
        )
    assert "too little room" in message
    assert "allowed:" in message


def test_a_rename_that_fails_puts_the_old_bundle_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xexport.exporter.output import output_folder

    old = listing(_bundle_like(tmp_path / "out"))
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "bundle":
            raise OSError(errno.EIO, "the disk died")
        return real(self, target)

    def replace() -> None:
        with output_folder(tmp_path / "out", force=True) as output:
            monkeypatch.setattr(Path, "rename", rename)
            output.commit()

    with pytest.raises(OutputError, match="can't write here"):
        replace()
    assert listing(tmp_path / "out") == old
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# Killed

_VICTIM = """
import signal, sys, time
from xexport import cli, pipeline

# a test run in the background inherits an ignored SIGINT, which Python then leaves ignored
signal.signal(signal.SIGINT, signal.default_int_handler)

def export_into(output, *_):
    (output.bundle / "model.onnx.data").write_bytes(bytes(100000))
    (output.scratch / "spool.bin").write_bytes(bytes(100000))
    print("half way", flush=True)
    time.sleep(60)

pipeline._resolve = lambda *_: None
pipeline._export_into = export_into
sys.argv = ["xexport", "rwkv", "--target", "cpu-int8", "--quiet", *sys.argv[1:]]
cli.main()
"""


def _kill(out: Path, signal_: signal.Signals, *args: str) -> tuple[int, str]:
    """Kill an export half way; its exit code and what it said."""
    command = [sys.executable, "-c", _VICTIM, "--out", str(out), *args]
    # the marker goes to stderr: the command line keeps stdout clean
    with subprocess.Popen(command, cwd=DEV, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as victim:
        assert victim.stderr is not None
        assert victim.stderr.readline() == b"half way\n"
        assert any(p.name.startswith(f".{out.name}.partial-") for p in out.parent.iterdir())
        victim.send_signal(signal_)
        said = victim.stderr.read().decode()
        return victim.wait(30), said


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_interrupted_export_leaves_nothing(signal_: signal.Signals, tmp_path: Path) -> None:
    code, said = _kill(tmp_path / "out", signal_)
    assert code == {signal.SIGTERM: 143, signal.SIGINT: 130}[signal_]
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in said
    if signal_ == signal.SIGINT:
        assert "nothing was written" in said


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_killed_replacement_keeps_the_old_bundle_and_is_swept_by_the_next_export(
    signal_: signal.Signals, tmp_path: Path
) -> None:
    from xexport.exporter.output import output_folder

    out = _bundle_like(tmp_path / "out")
    old = listing(out)
    code, _ = _kill(out, signal_, "--force")
    assert code == {signal.SIGTERM: 143, signal.SIGKILL: -9}[signal_]
    assert listing(out) == old
    left = [p.name for p in tmp_path.iterdir() if p != out]
    assert len(left) == (1 if signal_ == signal.SIGKILL else 0)
    with output_folder(out, force=True) as output:
        assert not any((tmp_path / name).exists() for name in left)
        (output.bundle / "manifest.json").write_text("{}", encoding="utf-8")
        output.commit()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in out.iterdir()] == ["manifest.json"]


def test_two_exports_at_once_do_not_sweep_each_other(tmp_path: Path) -> None:
    from xexport.exporter.output import output_folder

    with output_folder(tmp_path / "out", force=False) as first:
        (first.bundle / "model.onnx").write_bytes(b"first")
        with output_folder(tmp_path / "out", force=False):
            assert (first.bundle / "model.onnx").exists()
    assert list(tmp_path.iterdir()) == []


# Bundles that were tampered with


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def apply(bundle: Path) -> None:
        path = bundle / "manifest.json"
        manifest = json.loads(path.read_text(encoding="utf-8"))
        change(manifest)
        path.write_text(json.dumps(manifest), encoding="utf-8")

    return apply


def _flip(bundle: Path) -> None:
    data = bytearray((bundle / "model.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / "model.onnx.data").write_bytes(data)


def _grow(bundle: Path) -> None:
    with (bundle / "model.onnx.data").open("ab") as out:
        out.write(b"\0")


def _relink(name: str) -> Callable[[Path], object]:
    def apply(bundle: Path) -> None:
        shutil.move(bundle / name, bundle.parent / "elsewhere")
        (bundle / name).symlink_to(bundle.parent / "elsewhere")

    return apply


def _first_file(value: str) -> Callable[[Path], object]:
    return _edit(lambda m: m["files"][0].update(path=value))


TAMPERED: dict[str, tuple[Callable[[Path], object], str]] = {
    "one bit": (_flip, "changed after the export"),
    "size": (_grow, "wrong size"),
    "file missing": (lambda b: (b / "model.onnx.data").unlink(), "lacks its file"),
    "path up": (_first_file("../model.onnx"), "leaves the bundle's folder"),
    "absolute path": (_first_file("/etc/passwd"), "leaves the bundle's folder"),
    "graph up": (_edit(lambda m: m.update(graph="../x.onnx")), "leaves the bundle's folder"),
    "link": (_relink("model.onnx.data"), "symbolic link"),
    "manifest is a link": (_relink("manifest.json"), "symbolic link"),
    "other schema": (_edit(lambda m: m.update(schema_version=99)), "schema version"),
    "no JSON": (lambda b: (b / "manifest.json").write_text("{oops", "utf-8"), "not valid"),
    "empty manifest": (lambda b: (b / "manifest.json").write_text("", "utf-8"), "not valid"),
    "bytes, no text": (lambda b: (b / "manifest.json").write_bytes(b"\xff\xfe\0"), "not valid"),
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "not a bundle"),
    "wrong type": (_edit(lambda m: m.update(opset="many")), "not valid"),
    "graph not listed": (_edit(lambda m: m["files"].pop(0)), "doesn't list its own graph"),
    "other runtime": (_edit(lambda m: m.update(runtime="os.system")), "doesn't have that runtime"),
    "other state": (_edit(lambda m: m["state"][0].update(name="layers.9.sum")), "layers."),
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_tampered_bundle(kind: str, make_toy_bundle: ToyMaker, tmp_path: Path) -> None:
    bundle = make_toy_bundle()
    change, says = TAMPERED[kind]
    change(bundle)
    for command in (("run", bundle, "--prompt", "a", "--max-tokens", "1"), ("validate", bundle)):
        message = refused(tmp_path, *command)
        assert says in message
        assert "got:" in message


@pytest.mark.parametrize("command", ["inspect", "profile", "report"])
def test_every_command_refuses_what_is_no_bundle(command: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    more = ["-o", str(tmp_path / "r.html")] if command == "report" else []
    for path in (tmp_path / "folder", tmp_path / "missing"):
        message = refused(tmp_path, command, path, *more)
        assert "manifest.json" in message
