"""Environments of another processor: a root of Debian packages and wheels, run by qemu's user emulation.

Nothing of the machine changes: apt downloads into a state of its own, the packages are unpacked, and qemu
finds the root's files by ``-L`` without a chroot, so that a worker there reads bundles where they lie.

    ENVIRONMENT/root      Debian's Python, and /proc/cpuinfo of the processor
    ENVIRONMENT/site      wheels of that processor
    ENVIRONMENT/kernels   the project's kernels, cross-compiled, and the digest of what they were made of
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from xexport.core.errors import RuntimeFailure
from xexport.runtimes.native import library_name

if TYPE_CHECKING:
    from xexport.runtimes.environments import Environment

__all__ = ["install", "worker_command"]

_DEBIAN = "arm64"
_COMPILER = "aarch64-linux-gnu-g++"
_EMULATOR = ("qemu-aarch64-static", "-cpu", "cortex-a76")  # -cpu max gave wrong sums of 8-bit products
#: what a Python wheel for this processor may call itself; Debian 12 and later have that glibc
_PLATFORMS = ("manylinux2014", "manylinux_2_17", "manylinux_2_26", "manylinux_2_27", "manylinux_2_28")
#: the processor as Linux would show it: ONNX Runtime reads its kind from here
_CPUINFO = """processor\t: {core}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1

"""
_CORES = 2


def install(row: Environment) -> None:
    """Make the root, install the wheels, compile the kernels.

    Raises:
        RuntimeFailure: a package can't be had, or the kernels don't compile.
    """
    from xexport.runtimes.environments import run

    root, site = row.folder / "root", row.folder / "site"
    _unpack(row.debian, root, row.folder / "apt")
    (root / "proc").mkdir()
    (root / "proc" / "cpuinfo").write_text("".join(_CPUINFO.format(core=i) for i in range(_CORES)))
    version = _python(root).name.removeprefix("python")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    command += ["--only-binary=:all:", "--implementation=cp", f"--python-version={version}"]
    command += [f"--platform={platform}_aarch64" for platform in _PLATFORMS]
    run([*command, f"--target={site}", *row.packages])
    _compile(row.folder / "kernels")


def worker_command(row: Environment, boot: str, root: str) -> list[str]:
    """The arguments that start the worker.

    Args:
        row: the environment.
        boot: the program that makes the package at ``root`` importable and starts its worker.
        root: the folder of this xexport.

    Raises:
        RuntimeFailure: the kernels in the environment are not of this xexport.
    """
    kernels = row.folder / "kernels"
    digest = kernels / "sources"
    if (digest.read_text() if digest.is_file() else "") != _digest():
        raise RuntimeFailure(
            f"the kernels in the environment {row.name!r} are not made of this xexport's sources",
            got=kernels,
            fix=f"python -m xexport.runtimes.environments install {row.name}",
        )
    library = kernels / library_name()
    variables = {
        "PYTHONPATH": str(row.folder / "site"),
        "PYTHONNOUSERSITE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "XEXPORT_NATIVE": str(library) if library.is_file() else "0",
    }
    command = [*_EMULATOR, "-L", str(row.folder / "root")]
    for name, value in variables.items():
        command += ["-E", f"{name}={value}"]
    return [*command, str(_python(row.folder / "root")), "-c", boot, root]


def _python(root: Path) -> Path:
    """The root's interpreter, ``python3.<minor>``."""
    return next(p for p in sorted((root / "usr" / "bin").glob("python3.*")) if p.name[8:].isdigit())


def _unpack(packages: Sequence[str], root: Path, folder: Path) -> None:
    """Download Debian packages with all they depend on, and unpack them; ``folder`` is apt's meanwhile."""
    from xexport.runtimes.environments import run

    archives = folder / "cache" / "archives"
    for path in (folder / "state" / "lists" / "partial", archives / "partial", root):
        path.mkdir(parents=True)
    status = folder / "status"  # no package is installed there
    status.touch()
    options = {
        "APT::Architecture": _DEBIAN,
        "APT::Architectures": _DEBIAN,
        "APT::Install-Recommends": "0",
        "APT::Sandbox::User": "root",
        "Debug::NoLocking": "1",
        "Dir::State": str(folder / "state"),
        "Dir::State::status": str(status),
        "Dir::Cache": str(folder / "cache"),
    }
    apt = ["apt-get", "-qq", *(f"-o{key}={value}" for key, value in options.items())]
    run([*apt, "update"])
    run([*apt, "--yes", "--download-only", "install", *packages])
    for archive in sorted(archives.glob("*.deb")):
        run(["dpkg-deb", "--extract", str(archive), str(root)])
    shutil.rmtree(folder)


def _sources() -> Path | None:
    """The folder with the kernels' sources and how to build them: a checkout. A wheel has no such thing."""
    from xexport.runtimes.environments import package_root

    root = package_root()
    return root if (root / "CMakeLists.txt").is_file() else None


def _digest() -> str:
    """Names what the kernels are made of; "" where there are no sources."""
    root = _sources()
    if root is None:
        return ""
    digest = hashlib.sha256()
    native = [p for p in (root / "ops").glob("*/*") if p.suffix in (".cc", ".h")]
    for path in [root / "CMakeLists.txt", *sorted(native)]:
        digest.update(str(path.relative_to(root)).encode() + b"\n" + path.read_bytes())
    return digest.hexdigest()


def _compile(folder: Path) -> None:
    """Cross-compile the kernels, in the tree that ``make arm64`` builds in, so that each is compiled once."""
    from xexport.runtimes.environments import run

    folder.mkdir()
    (folder / "sources").write_text(_digest())
    root = _sources()
    if root is None:
        return
    build = root / "build" / "check" / "arm64"
    system = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    flags = [*system, f"-DCMAKE_CXX_COMPILER={_COMPILER}", "-DXEXPORT_HARNESS=ON"]
    run(["cmake", "-S", str(root), "-B", str(build), *flags])
    run(["cmake", "--build", str(build), "--target", "xexport_ops", "--parallel", "2"])
    shutil.copy2(build / library_name(), folder)
