"""llama.cpp's tools, built once into a cache folder from the source archive of llama-cpp-python.

That package's source archive carries the whole of llama.cpp, so its name is all that is needed to
get a released version. Nothing is installed: the archive is unpacked and three programs are built.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BenchmarkError", "Tools", "cache_folder", "get_tools", "run"]

PACKAGE = "llama-cpp-python"
PROGRAMS = ("llama-bench", "llama-quantize", "llama-results")
#: As a user would build it for this machine: its own instruction set, llama.cpp's own kernels.
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DGGML_LLAMAFILE=ON",
    "-DGGML_OPENMP=ON",
    "-DGGML_BLAS=OFF",
    "-DGGML_CCACHE=OFF",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_COMMON=ON",
    "-DLLAMA_BUILD_TOOLS=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
Log = Callable[[str], None]


class BenchmarkError(Exception):
    """Something that the benchmark needs is missing or failed; the message says how to mend it."""


@dataclass(frozen=True)
class Tools:
    """What was built.

    Attributes:
        source: llama.cpp's source tree (its converter runs from there).
        programs: folder of the programs.
        version: of the package, as ``llama_cpp_python-0.3.36``.
    """

    source: Path
    programs: Path
    version: str

    def program(self, name: str) -> str:
        """The path of one program of :data:`PROGRAMS`."""
        return str(self.programs / name)


def cache_folder(given: Path | None) -> Path:
    """Where everything large is kept: ``given``, or a folder of the user's cache; never the checkout."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = (given or base / "xexport-benchmarks").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run(command: Sequence[str], what: str, *, cwd: Path | None = None, timeout: float = 7200) -> str:
    """The output of a command.

    Raises:
        BenchmarkError: it is missing, failed or took too long; with the end of what it said.
    """
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, errors="replace", timeout=timeout, check=False
        )
    except FileNotFoundError as error:
        raise BenchmarkError(f"{what}: there is no {command[0]} here") from error
    except subprocess.TimeoutExpired as error:
        raise BenchmarkError(f"{what}: not done after {timeout:.0f} s") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip())[-1500:]
        raise BenchmarkError(f"{what} failed (exit code {done.returncode}):\n{said}")
    return done.stdout


def get_tools(cache: Path, log: Log, source: Path | None = None) -> Tools:
    """Download, unpack and build, each only if it isn't there already.

    Args:
        cache: from :func:`cache_folder`.
        log: told what is going on.
        source: an own llama.cpp source tree instead of the package's.

    Raises:
        BenchmarkError: no network, no compiler, or the build failed.
    """
    if source is None:
        source, version = _unpacked(cache, log)
    else:
        version = source.resolve().name
    if not (source / "CMakeLists.txt").is_file() or not (source / "convert_hf_to_gguf.py").is_file():
        raise BenchmarkError(f"{source} is not a llama.cpp source tree (no CMakeLists.txt or converter)")
    build = cache / f"build-{version}"
    tools = Tools(source, build / "bin", version)
    if all(Path(tools.program(name)).is_file() for name in PROGRAMS):
        return tools
    for needed in ("cmake", "c++"):
        if shutil.which(needed) is None:
            raise BenchmarkError(f"building llama.cpp needs {needed}: install cmake and a C++ compiler")
    log(f"building {', '.join(PROGRAMS)} (some minutes, once) in {build}")
    run(["cmake", "-S", str(source), "-B", str(build), *OPTIONS], "configuring llama.cpp")
    jobs = str(min(8, os.cpu_count() or 1))
    run(
        ["cmake", "--build", str(build), "--config", "Release", "--target", *PROGRAMS, "-j", jobs],
        "building llama.cpp",
    )
    missing = [name for name in PROGRAMS if not Path(tools.program(name)).is_file()]
    if missing:
        raise BenchmarkError(f"the build of llama.cpp left no {', '.join(missing)} in {tools.programs}")
    return tools


def _unpacked(cache: Path, log: Log) -> tuple[Path, str]:
    """llama.cpp inside the unpacked archive, and the archive's version."""
    have = sorted(cache.glob("llama_cpp_python-*/vendor/llama.cpp/CMakeLists.txt"), key=_version)
    if not have:
        archive = _archive(cache, log)
        log(f"unpacking {archive.name}")
        with tempfile.TemporaryDirectory(dir=cache) as scratch, tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
            (top,) = Path(scratch).iterdir()
            top.rename(cache / top.name)
        have = sorted(cache.glob("llama_cpp_python-*/vendor/llama.cpp/CMakeLists.txt"), key=_version)
    if not have:
        raise BenchmarkError(f"the archive of {PACKAGE} in {cache} holds no vendor/llama.cpp")
    return have[-1].parent, have[-1].parents[2].name


def _archive(cache: Path, log: Log) -> Path:
    have = sorted(cache.glob("llama_cpp_python-*.tar.gz"), key=_version)
    if have:
        return have[-1]
    log(f"downloading the source archive of {PACKAGE} (about 75 MB) into {cache}")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE]
    run([*pip, "--dest", str(cache), PACKAGE], f"pip download {PACKAGE}")
    have = sorted(cache.glob("llama_cpp_python-*.tar.gz"), key=_version)
    if not have:
        raise BenchmarkError(f"pip left no source archive of {PACKAGE} in {cache}")
    return have[-1]


def _version(path: Path) -> tuple[int, ...]:
    """The numbers after the package's name, so that 0.3.10 is newer than 0.3.9."""
    found = re.search(r"llama_cpp_python-([0-9.]+)", str(path))
    return tuple(int(n) for n in found[1].strip(".").split(".") if n) if found else ()
