"""Isolated environments: one folder each for runtimes whose packages are heavy or conflict with others.

    python -m xexport.runtimes.environments install NAME...
    python -m xexport.runtimes.environments list

They lie in ``$XEXPORT_ENVIRONMENTS``, by default ``xexport/environments`` of the user's cache folder. A
bundle whose target names one runs in a worker process there (remote.py). The rows are in environments.toml.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import xexport
from xexport.core.errors import OutputError, RuntimeFailure, unknown_name

__all__ = [
    "Environment",
    "environment_names",
    "get_environment",
    "home",
    "install",
    "main",
    "needed",
    "package_root",
    "run",
    "simulated",
    "why_not",
    "worker_command",
]

_MODULE = "xexport.runtimes.environments"  # __name__ is "__main__" when it is run
_STAMP = "environment.json"
#: starts the worker of this very package in an interpreter that has not installed it
_BOOT = """
import importlib.util, sys
root = sys.argv[1]
spec = importlib.util.spec_from_file_location(
    "xexport", root + "/__init__.py", submodule_search_locations=[root])
module = sys.modules["xexport"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from xexport.runtimes.worker import main
main()
"""


@dataclass(frozen=True)
class Environment:
    """One row of environments.toml.

    Attributes:
        name: of the row, and of the folder.
        kind: ``here`` (this interpreter, in a process of its own: nothing to install), ``python``, ``node``
            or ``qemu``.
        about: one line for ``list`` and ``xexport doctor``.
        packages: requirements, as pip or npm takes them.
        debian: Debian packages of a root (qemu).
        machine: the processor it stands for, as ``platform.machine()`` says it: on such a machine the bundle
            runs in the process that opens it.
        needs: programs that must be on the PATH, with the Debian package that has each.
        variables: environment variables of its worker; a value that is the path of a file is set only where
            that file exists.
        simulated: why its times say nothing about the device; "" if they do.
    """

    name: str
    kind: str
    about: str
    packages: list[str] = field(default_factory=list)
    debian: list[str] = field(default_factory=list)
    machine: str = ""
    needs: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    simulated: str = ""

    @property
    def folder(self) -> Path:
        """Where it is, or will be."""
        return home() / self.name


def home() -> Path:
    """The folder of all environments."""
    chosen = os.environ.get("XEXPORT_ENVIRONMENTS")
    if chosen:
        return Path(chosen)
    cache_folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_folder) / "xexport" / "environments"


@cache
def _rows() -> Mapping[str, Environment]:
    text = (files("xexport.runtimes") / "environments.toml").read_text(encoding="utf-8")
    return {name: Environment(name, **row) for name, row in tomllib.loads(text).items()}


def environment_names() -> tuple[str, ...]:
    """Names of the rows."""
    return tuple(sorted(_rows()))


def get_environment(name: str) -> Environment:
    """The row of that name.

    Raises:
        UnknownNameError: with the nearest names.
    """
    if name not in _rows():
        raise unknown_name("environment", name, _rows())
    return _rows()[name]


def needed(name: str) -> str:
    """The environment of that name, or "" where this machine is what it stands for (or for "").

    Raises:
        UnknownNameError: there is no such environment.
    """
    return "" if not name or get_environment(name).machine == platform.machine() else name


def why_not(name: str) -> str | None:
    """Why nothing can run in an environment here, or None if it can.

    Raises:
        UnknownNameError: there is no such environment.
    """
    row = get_environment(name)
    if row.kind == "here":
        return None
    stamp = _read_stamp(row.folder)
    if stamp is None:
        return f"the environment {name!r} is not installed: python -m {_MODULE} install {name}"
    if stamp["packages"] != row.packages:
        return f"the environment {name!r} is of another xexport: python -m {_MODULE} install {name}"
    return None


def simulated(name: str) -> str:
    """Why times measured in an environment say nothing about the device; "" if they do, or for ""."""
    return get_environment(name).simulated if needed(name) else ""


def install(name: str, say: Callable[[str], None] = print) -> Path:
    """Make an environment anew; what was there of it is removed first.

    Returns:
        Its folder.

    Raises:
        UnknownNameError: there is no such environment.
        RuntimeFailure: a program is missing, or a package could not be installed.
        OutputError: the folder can't be written.
    """
    row = get_environment(name)
    for program, package in row.needs.items():
        if shutil.which(program) is None:
            raise RuntimeFailure(
                f"the environment {name!r} needs {program!r}", fix=f"install the Debian package {package}"
            )
    say(f"installing {name} into {row.folder}")
    try:
        shutil.rmtree(row.folder, ignore_errors=True)
        row.folder.mkdir(parents=True)
        _INSTALLERS.get(row.kind, _install_elsewhere)(row)
        stamp = {"packages": row.packages, "environment": asdict(row)}
        (row.folder / _STAMP).write_text(json.dumps(stamp), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"the environment {name!r} can't be written", got=error) from error
    return row.folder


def package_root() -> Path:
    """The folder of this package's modules; in an editable install that is the checkout."""
    return Path(xexport.__file__).parent


def worker_command(name: str) -> tuple[list[str], dict[str, str]]:
    """The arguments that start an environment's worker, and its environment variables.

    Raises:
        RuntimeFailure: it is not installed.
    """
    reason = why_not(name)
    if reason is not None:
        raise RuntimeFailure(
            "the bundle's runtime lives in an environment of its own", got=reason, fix="install it"
        )
    row = get_environment(name)
    given = {key: value for key, value in row.variables.items() if "/" not in value or Path(value).exists()}
    root = str(package_root())
    if row.kind == "here":
        command = [sys.executable, "-c", "from xexport.runtimes.worker import main; main()"]
    elif row.kind == "python":
        command = [str(row.folder / "bin" / "python"), "-c", _BOOT, root]
    elif row.kind == "node":
        command = ["node", str(Path(root) / "runtimes" / "web" / "worker.mjs"), str(row.folder)]
    else:
        command = _elsewhere(row).worker_command(row, _BOOT, root)
    return command, {**os.environ, **given}


def _read_stamp(folder: Path) -> dict[str, Any] | None:
    """What the environment was made of; None where it is absent or half made."""
    try:
        stamp = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) and "packages" in stamp else None


def _install_python(row: Environment) -> None:
    run([sys.executable, "-m", "venv", str(row.folder)])
    pip = [str(row.folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-compile"]
    run([*pip, *row.packages])


def _install_node(row: Environment) -> None:
    command = ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error", "--prefix", str(row.folder)]
    run([*command, *row.packages], {"ONNXRUNTIME_NODE_INSTALL": "skip"})


_INSTALLERS: dict[str, Callable[[Environment], None]] = {
    "here": lambda _row: None,
    "python": _install_python,
    "node": _install_node,
}


def _install_elsewhere(row: Environment) -> None:
    _elsewhere(row).install(row)


def _elsewhere(row: Environment) -> Any:
    """The module of a kind that takes more than a command: environment_<kind>.py."""
    return import_module(f"xexport.runtimes.environment_{row.kind}")


def run(command: Sequence[str], variables: Mapping[str, str] | None = None) -> None:
    """A command of an installation; what it prints is shown only if it fails.

    Raises:
        RuntimeFailure: with its last lines.
    """
    done = subprocess.run(
        list(command), env={**os.environ, **(variables or {})}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise RuntimeFailure(
            f"{Path(command[0]).name} failed with exit code {done.returncode}",
            got="; ".join(said[-3:]),
            fix="see what it says; is there a connection to the package index?",
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """``install NAME...`` or ``list``; the exit code."""
    from argparse import ArgumentParser

    from xexport.core.errors import XexportError

    parser = ArgumentParser(prog=f"python -m {_MODULE}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the environments, and whether each is installed")
    chosen = commands.add_parser("install", help="make environments, or make them anew")
    chosen.add_argument("names", nargs="+", metavar="NAME", help=", ".join(environment_names()))
    given = parser.parse_args(arguments)
    if given.command == "list":
        for name in environment_names():
            state = "installed" if why_not(name) is None else "absent"
            print(f"{name:14} {state:10} {get_environment(name).about}")
        return 0
    try:
        for name in given.names:
            get_environment(name)  # every name is checked before the first is made
        for name in given.names:
            install(name)
    except XexportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
