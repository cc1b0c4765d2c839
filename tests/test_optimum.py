"""``optimum-cli export xexport``: found where the wheel puts it, and does what ``xexport export`` does."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from xexport.core.manifest import read_manifest

ROOT = Path(__file__).parent.parent
#: what an installation does: optimum looks in its own folder only, where the wheel puts the file
_START = """
import importlib.util, sys
import optimum.commands
place = sys.argv.pop(1)
if importlib.util.find_spec("optimum.commands.register") is None:  # an editable install shows it by itself
    optimum.commands.__path__.append(place)
from optimum.commands.optimum_cli import main
main()
"""


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """The folder ``optimum/commands`` of a wheel."""
    pytest.importorskip("optimum", reason="optimum is not installed")
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]["wheel"]["packages"]
    (name,) = (n for n in table if n.startswith("optimum/"))
    place = tmp_path / "wheel" / name
    place.parent.mkdir(parents=True)
    shutil.copy(ROOT / table[name], place)
    return tmp_path / "wheel" / "optimum" / "commands"


def optimum_cli(commands: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _START, str(commands), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_it_exports_a_family(commands: Path, tmp_path: Path) -> None:
    done = optimum_cli(
        commands,
        "export",
        "xexport",
        "-m",
        "mamba",
        "--preset",
        "tiny",
        "--target",
        "cpu-int8",
        tmp_path / "out",
    )
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.model.family, manifest.target) == ("mamba", "cpu-int8")


def test_an_error_is_that_of_xexport(commands: Path, tmp_path: Path) -> None:
    done = optimum_cli(commands, "export", "xexport", "-m", "mambo", "--target", "cpu-int8", tmp_path / "out")
    assert done.returncode == 1
    assert "mambo" in done.stderr
    assert "mamba" in done.stderr
    assert not (tmp_path / "out").exists()
