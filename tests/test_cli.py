"""The command line: what it parses, calls and prints, its exit codes, and how fast it starts."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from xexport.cli import cli
from xexport.core.errors import ExportError

ToyMaker = Callable[..., Path]
_PROFILED = ("threads", "steps", "prefill", "positions", "runtime")
DEV = Path(__file__).resolve().parents[1] / ".dev"

SUMMARY: dict[str, Any] = {
    "model": "rwkv",
    "target": "cpu-int8",
    "bundle": "rwkv-cpu-int8",
    "bytes": {"weights": 1_234_567, "state": 2048},
    "bits_per_byte": {"torch": 2.0, "onnx": 2.0, "bundle": 2.01},
    "kl": {"mean": 0.001, "p99": 0.01, "max": float("inf")},
    "same_top1": 0.99,
    "chunk_error": 1e-6,
    "latency": {
        "step_ms": {"p50": 0.5, "p90": 0.6, "p99": 0.9},
        "decode_tokens_per_s": 1900.0,
        "prefill_tokens_per_s": 12000.0,
        "load_ms": 80.0,
    },
    "native_kernels": False,
    "warnings": ["slower than [fp32] here"],
}


def _run(*args: str, text: str | None = None) -> Result:
    return CliRunner().invoke(cli, list(args), input=text, prog_name="xexport")


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What pipeline.export was called with, in the place of an export."""
    called: dict[str, Any] = {}

    def export(model: str, **options: Any) -> str:
        called.update(model=model, **options)
        print("a library chats on stdout")
        return "a bundle"

    monkeypatch.setattr("xexport.pipeline.export", export)
    monkeypatch.setattr("xexport.pipeline.summary", lambda bundle: SUMMARY)
    return called


# Parsing


@pytest.mark.parametrize(
    "args",
    [
        ("rwkv", "--target", "cpu-int8"),
        ("export", "rwkv", "--target", "cpu-int8"),
        ("--target", "cpu-int8", "rwkv"),
    ],
    ids=" ".join,
)
def test_export_is_the_default_command(exported: dict[str, Any], args: tuple[str, ...]) -> None:
    done = _run(*args)
    assert done.exit_code == 0, done.output
    assert (exported["model"], exported["target"]) == ("rwkv", "cpu-int8")
    assert exported["out"] is exported["weights"] is exported["preset"] is None
    assert exported["force"] is False


def test_every_option_reaches_the_pipeline(exported: dict[str, Any]) -> None:
    done = _run(
        *("mamba", "--target", "cpu-fp32", "--weights", "w", "--out", "d", "--eval-text", "t.txt"),
        *("--tokenizer", "bytes"),
        *("--preset", "tiny", "--distill", "8", "--seed", "5", "--force", "--quiet"),
    )
    assert done.exit_code == 0, done.output
    exported.pop("progress")
    assert exported == {
        "model": "mamba",
        "target": "cpu-fp32",
        "weights": Path("w"),
        "out": Path("d"),
        "eval_text": Path("t.txt"),
        "tokenizer": "bytes",
        "preset": "tiny",
        "distill": 8,
        "seed": 5,
        "force": True,
    }


def test_an_alias_of_a_model_is_taken(exported: dict[str, Any]) -> None:
    assert _run("rwkv7", "--target", "cpu-int8").exit_code == 0
    assert exported["model"] == "rwkv7"


@pytest.mark.parametrize(
    ("word", "near"), [("rwvk", "rwkv"), ("mamab", "mamba"), ("inspct", "inspect"), ("modles", "models")]
)
def test_an_unknown_word_names_near_models_and_commands(word: str, near: str) -> None:
    done = _run(word)
    assert done.exit_code == 1
    assert f"unknown model or command '{word}'" in done.stderr
    assert near in done.stderr.split("did you mean")[1]
    assert done.stdout == ""


def test_a_missing_target_lists_the_targets() -> None:
    done = _run("rwkv")
    assert done.exit_code == 2
    assert "cpu-int8" in done.stderr


def test_an_unknown_target_names_the_nearest() -> None:
    done = _run("rwkv", "--target", "cpu-in8")
    assert done.exit_code == 1
    assert "cpu-int8" in done.stderr.split("did you mean")[1]


@pytest.mark.parametrize(
    "args",
    [("run",), ("report",), ("rwkv", "--nonsense"), ("inspect", "a", "b"), ("run", "x", "--top-k", "y")],
)
def test_wrong_usage_exits_with_2(args: tuple[str, ...]) -> None:
    done = _run(*args)
    assert done.exit_code == 2
    assert done.stdout == ""
    as_json = _run(*args, "--json")
    assert as_json.exit_code == 2
    assert set(json.loads(as_json.stdout)["error"]) == {"what", "got", "allowed", "fix"}


COMMANDS = sorted(cli.commands)


def test_all_commands_are_there() -> None:
    wanted = "compare doctor export inspect models profile report run serve sweep targets validate worker"
    assert " ".join(COMMANDS) == wanted


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str) -> None:
    done = _run(command, "--help")
    assert done.exit_code == 0
    if command not in ("doctor", "models", "targets"):
        assert f"xexport {'rwkv' if command == 'export' else command}" in done.stdout.split("Options:")[0]


def test_help_teaches_and_version_is_one_line() -> None:
    done = _run("--help")
    assert "xexport rwkv --target cpu-int8" in done.stdout
    assert "..." not in done.stdout.split("Commands:")[1]  # no command's one line is cut off
    from xexport import __version__

    assert _run("--version").stdout == f"xexport {__version__}\n"


# Output


def test_json_is_one_object_whatever_libraries_print(exported: dict[str, Any]) -> None:
    done = _run("rwkv", "--target", "cpu-int8", "--json")
    assert done.exit_code == 0
    record = json.loads(done.stdout)
    assert record["kl"].pop("max") is None  # infinity has no place in JSON
    assert set(record) == set(SUMMARY)
    assert record["bytes"] == SUMMARY["bytes"]
    assert "a library chats" in done.stderr


def test_people_see_the_figures_and_the_price(exported: dict[str, Any]) -> None:
    done = _run("rwkv", "--target", "cpu-int8")
    for words in ("rwkv on cpu-int8", "+0.500 %", "99.00 %", "p50 0.5", "1,900 tokens/s", "1.23 MB"):
        assert words in done.stdout
    assert "slower than [fp32] here" in done.stdout
    assert "chats" not in done.stdout


def test_an_error_goes_to_stderr_and_under_json_also_to_stdout(
    exported: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: str, **options: Any) -> None:
        raise ExportError("no such operator", got="Foo", allowed=("Bar",), fix="write it")

    monkeypatch.setattr("xexport.pipeline.export", fail)
    done = _run("rwkv", "--target", "cpu-int8")
    assert done.exit_code == 1
    assert done.stdout == ""
    assert "error: no such operator" in done.stderr
    assert "fix: write it" in done.stderr
    as_json = _run("rwkv", "--target", "cpu-int8", "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout) == {
        "error": {"what": "no such operator", "got": "Foo", "allowed": "('Bar',)", "fix": "write it"}
    }
    assert "no such operator" in as_json.stderr


def test_an_interrupt_exits_with_130_and_says_nothing_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(model: str, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("xexport.pipeline.export", interrupt)
    done = _run("rwkv", "--target", "cpu-int8")
    assert done.exit_code == 130
    assert "nothing was written" in done.stderr


def test_quiet_means_no_progress(exported: dict[str, Any]) -> None:
    from xexport.core.progress import PlainProgress, Silent

    _run("rwkv", "--target", "cpu-int8", "--quiet")
    assert isinstance(exported["progress"], Silent)
    _run("rwkv", "--target", "cpu-int8")
    assert isinstance(exported["progress"], PlainProgress)


@pytest.mark.parametrize("command", ["models", "targets"])
def test_lists(command: str) -> None:
    done = _run(command, "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)[command]
    names = {row["name"] for row in rows}
    assert names >= ({"rwkv", "mamba"} if command == "models" else {"cpu-fp32", "cpu-int8"})
    shown = _run(command)
    assert shown.exit_code == 0
    assert all(name in shown.stdout for name in names)


def test_inspect_shows_state_and_formats(toy_bundle: Path) -> None:
    done = _run("inspect", str(toy_bundle))
    assert done.exit_code == 0, done.output
    for words in ("layers.0.sum", "float32", "CPUExecutionProvider", "position"):
        assert words in done.stdout
    record = json.loads(_run("inspect", str(toy_bundle), "--json").stdout)
    assert record["model"]["family"] == "toy"
    assert record["bytes"]["state"] == 72


def test_a_bundle_that_fails_validation_exits_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"ok": False, "problems": ["the chunk law is broken here"], "chunk_error": 3.5}
    monkeypatch.setattr("xexport.pipeline.validate", lambda path, **options: record)
    done = _run("validate", "b")
    assert done.exit_code == 1
    assert "problem the chunk law is broken here" in done.stdout
    as_json = _run("validate", "b", "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout) == record


def test_validate_profile_and_report_pass_their_arguments_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def validate(path: Path, *, eval_text: Any, runtime: Any, progress: Any) -> dict[str, Any]:
        calls.append((path, eval_text, runtime))
        return {"chunk_error": 1e-6, "odd": {"deep": [1, 2]}}

    def profile(path: Path, *, progress: Any, **options: Any) -> dict[str, Any]:
        calls.append((path, *(options.pop(name) for name in _PROFILED)))
        assert not options
        return {"latency": SUMMARY["latency"]}

    def report(paths: list[Path], out: Path, *, progress: Any) -> Path:
        calls.append((*paths, out))
        return out

    for function in (validate, profile, report):
        monkeypatch.setattr(f"xexport.pipeline.{function.__name__}", function)
    one = _run("validate", "b", "--eval-text", "t", "--runtime", "cpu")
    assert "1e-06" in one.stdout
    assert "odd.deep" in one.stdout
    two = _run(
        "profile", "b", "--threads", "1", "--steps", "9", "--prefill", "64", "--prefill", "128", "--json"
    )
    assert json.loads(two.stdout)["latency"]["load_ms"] == 80.0
    assert _run("profile", "b", "--position", "0", "--position", "300").exit_code == 0
    three = _run("report", "a", "b", "-o", "r.html")
    assert "r.html" in three.stdout
    assert calls == [
        (Path("b"), Path("t"), "cpu"),
        (Path("b"), 1, 9, (64, 128), None, None),
        (Path("b"), None, None, None, (0, 300), None),
        (Path("a"), Path("b"), Path("r.html")),
    ]


# run


def test_run_streams_text_and_says_the_speed_on_stderr(toy_bundle: Path) -> None:
    args = ("run", str(toy_bundle), "--prompt", "Call", "--max-tokens", "12", "--seed", "1", "--threads", "1")
    done = _run(*args)
    assert done.exit_code == 0, done.output
    assert "prompt 4 tokens" in done.stderr
    assert "generated 12 tokens" in done.stderr
    as_json = json.loads(_run(*args, "--json").stdout)
    assert as_json["text"] + "\n" == done.stdout
    assert len(as_json["ids"]) == as_json["new_tokens"] == 12
    assert as_json["decode_tokens_per_s"] > 0
    assert _run(*args, "--quiet").stderr == ""


def test_run_takes_ids_and_stdin(make_toy_bundle: ToyMaker) -> None:
    bare = str(make_toy_bundle("bare", tokenizer="none"))
    refused = _run("run", bare, "--prompt", "abc")
    assert refused.exit_code == 1
    assert "--ids" in refused.stderr
    args = ("run", bare, "--ids", "--temperature", "0", "--max-tokens", "3", "--threads", "1", "--quiet")
    done = _run(*args, "--prompt", "1 2 3")
    assert len([int(word) for word in done.stdout.split()]) == 3
    assert _run(*args, "--prompt", "-", text="1,2,3\n").stdout == done.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompt", ""), "empty"),
        (("--prompt", "x", "--temperature", "-1"), "temperature"),
        (("--prompt", "x", "--top-p", "2"), "top_p"),
        (("--prompt", "x", "--max-tokens", "-1"), "max_tokens"),
        (("--prompt", "x", "--threads", "-1"), "threads"),
        (("--prompt", "x", "--seed", "-1"), "seed"),
        (("--prompt", "x y", "--ids"), "token id"),
        (("--prompt", "999", "--ids"), "out of range"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_run_refuses_bad_options_by_name(toy_bundle: Path, options: tuple[str, ...], words: str) -> None:
    done = _run("run", str(toy_bundle), *options)
    assert done.exit_code == 1
    assert words in done.stderr
    assert done.stdout == ""


def test_run_checks_the_files_first(toy_bundle: Path) -> None:
    data = bytearray((toy_bundle / "model.onnx.data").read_bytes())
    data[7] ^= 1
    (toy_bundle / "model.onnx.data").write_bytes(data)
    done = _run("run", str(toy_bundle), "--prompt", "x")
    assert done.exit_code == 1
    assert "model.onnx.data was changed" in done.stderr
    assert _run("run", str(toy_bundle), "--prompt", "x", "--no-verify", "--max-tokens", "1").exit_code == 0


def test_text_that_could_steer_a_terminal_is_defused(monkeypatch: pytest.MonkeyPatch) -> None:
    from xexport import cli as module

    assert module._printable("a\x1b[31m") == "a\x1b[31m"  # a pipe gets what the model wrote
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert module._printable("a\x1b[31mé\n\t") == "a\ufffd[31mé\n\t"


# doctor


def test_doctor_says_what_is_here_and_why_not() -> None:
    done = _run("doctor", "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["packages"]["onnxruntime"].count(".") == 2
    assert "CPUExecutionProvider" in record["providers"]
    assert record["cpu"]["cores"] >= 1
    assert record["memory_bytes"]["total"] > record["memory_bytes"]["available"] > 0
    kernels = record["native_kernels"]
    assert kernels["available"] == (kernels["path"] is not None)
    assert kernels["reason"]
    runs = {row["name"]: row["runs_here"] for row in record["targets"]}
    assert runs["cpu-int8"] is True
    shown = _run("doctor")
    assert kernels["reason"][:30] in shown.stdout


# A new process


def _python(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, cwd=DEV, check=False, timeout=120, **options
    )


@pytest.mark.parametrize("args", ["--help", "run --help", "--version", "models", "targets"])
def test_light_commands_load_no_heavy_package(args: str) -> None:
    code = (
        f"import sys; from xexport.cli import cli; cli({args.split()!r}, standalone_mode=False); "
        "print(sorted({m.split('.')[0] for m in sys.modules} & "
        "{'torch', 'onnxruntime', 'onnx', 'transformers', 'numpy', 'plotly'}), file=sys.stderr)"
    )
    done = _python("-c", code)
    assert done.returncode == 0, done.stderr
    allowed = ["[]"] if "help" in args or "version" in args else ["[]", "['numpy']"]
    assert done.stderr.strip().splitlines()[-1] in allowed


@pytest.mark.parametrize(
    "args", [("-c", "import xexport"), ("-m", "xexport.cli", "--help")], ids=["import", "help"]
)
def test_start_is_fast(args: tuple[str, ...]) -> None:
    """0.3 s of processor time: unlike the clock on the wall it is nearly the same on a busy machine."""

    def seconds(command: tuple[str, ...]) -> float:
        times = []
        for _ in range(5):
            before = os.times()
            assert _python(*command).returncode == 0
            after = os.times()
            spent = after.children_user + after.children_system
            times.append(spent - before.children_user - before.children_system)
        return statistics.median(times)

    slack = 3.0 if os.environ.get("CI") else 1.0
    assert seconds(args) < 0.3 * slack


def test_a_closed_pipe_is_no_traceback(toy_bundle: Path) -> None:
    command = (
        f"{sys.executable} -m xexport.cli run {toy_bundle} --prompt x --max-tokens 3000 --seed 0 | head -c 20"
    )
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=DEV, check=False, timeout=120
    )
    assert "Traceback" not in done.stderr
    assert len(done.stdout) >= 20 - 10  # replacement characters count once and weigh three bytes
