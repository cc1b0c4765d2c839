"""examples/cpp: built against the wheel's library, it decodes the tokens that Python decodes."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from conftest import ToyMaker
from environment import need
from native_run import native_library

import xexport

EXAMPLE = Path(__file__).parents[1] / "examples" / "cpp"


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program; CI requires it as the environment ``cpp``."""
    libraries = list(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.1.*"))
    absent = [name for name in ("cmake", "c++") if shutil.which(name) is None]
    absent += [] if libraries else ["libonnxruntime.so in the onnxruntime wheel"]
    absent += [] if Path("/usr/include/nlohmann/json.hpp").is_file() else ["nlohmann-json3-dev"]
    if absent:
        need("cpp", f"the C++ example needs {', '.join(absent)}")
    build = tmp_path_factory.mktemp("cpp")
    library = f"-DONNXRUNTIME_LIBRARY={libraries[0]}"
    # unoptimised: half the time of a build that runs for a second
    flags = ["-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS=-Werror"]
    subprocess.run(
        ["cmake", "-S", EXAMPLE, "-B", build, library, *flags], check=True, stdout=subprocess.DEVNULL
    )
    subprocess.run(["cmake", "--build", build], check=True, stdout=subprocess.DEVNULL)
    return build / "stream"


def run(program: Path, *words: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([program, *map(str, words), "--threads", "1"], capture_output=True, check=False)


def greedy(bundle: Path, prompt: str | list[int], count: int) -> list[int]:
    """What Python generates from that prompt."""
    generation = xexport.load(bundle).stream(threads=1).generate(prompt, max_tokens=count, temperature=0)
    list(generation)
    return generation.ids


@pytest.mark.parametrize("family", ["rwkv", "hyena"])
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "bodies"])
def test_greedy_tokens_equal_pythons(
    stream: Path, exporter: Any, family: str, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, prompt = exporter(family, "cpu-int8"), [3, 1, 4, 1, 5, 9, 2, 6, 5]
    extra = ["--ops", native_library()] if kernels else []
    if not kernels:
        monkeypatch.setenv("XEXPORT_NATIVE", "0")
    done = run(stream, bundle, "--ids", " ".join(map(str, prompt)), "--max-tokens", 20, *extra)
    assert done.returncode == 0, done.stderr
    assert [int(word) for word in done.stdout.split()] == greedy(bundle, prompt, 20)
    assert re.search(
        rb"prompt: 9 tokens, [\d.]+ tokens/s\ngenerated: 20 tokens, [\d.]+ tokens/s", done.stderr
    )


def test_text_of_bytes_with_a_prompt_of_two_chunks(stream: Path, toy_bundle: Path) -> None:
    """The toy's state has int64 and values that don't begin at zero; 700 letters are a chunk and a half."""
    prompt = "Übung " * 100
    done = run(stream, toy_bundle, "--prompt", prompt, "--max-tokens", 30)
    assert done.returncode == 0, done.stderr
    assert list(done.stdout[:-1]) == greedy(toy_bundle, prompt, 30)


def test_a_bounded_stream_ends_with_a_reason(stream: Path, make_toy_bundle: ToyMaker) -> None:
    bundle = make_toy_bundle(max_tokens=8)
    done = run(stream, bundle, "--prompt", "12345", "--max-tokens", 30)
    assert done.returncode == 0
    assert b"generated: 4 tokens" in done.stderr  # the last of them is not fed any more
    assert b"the stream is full" in done.stderr
    done = run(stream, bundle, "--prompt", "123456789")
    assert done.returncode == 1
    assert b"ends after 8 tokens" in done.stderr


def test_refusals_say_why(stream: Path, make_toy_bundle: ToyMaker, tmp_path: Path) -> None:
    whole = make_toy_bundle("static", graph_form="static")
    leaves = make_toy_bundle("leaves", graph="../model.onnx")
    ids = make_toy_bundle("ids", vocab=7, tokenizer="none")
    for words, reason in (
        ([tmp_path, "--prompt", "a"], b"no manifest.json"),
        ([whole, "--prompt", "a"], b"fixed lengths"),
        ([leaves, "--prompt", "a"], b"leaves the folder"),
        ([ids, "--prompt", "a"], b"no tokenizer but bytes"),
        ([ids, "--ids", "1 7"], b"from 0 to 6"),
        ([ids, "--ids", "1 x"], b"whole numbers"),
        ([ids, "--max-tokens", "-1"], b"--max-tokens takes a number"),
        ([ids, "--nothing", "1"], b"unknown argument --nothing"),
    ):
        done = run(stream, *words)
        assert (done.returncode, done.stdout) == (1, b""), words
        assert reason in done.stderr, done.stderr
