"""The wheel holds what the tree holds, and `platform/` never shadows the standard library."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("platform", "engine", "adapters", "kernels", "migrations")
SHIPPED = {".py", ".cpp", ".h", ".mako", ".safetensors", ".json", ".jinja"}


def shipped_files() -> set[str]:
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *LAYERS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    return {f"loraplex/{name}" for name in files if Path(name).suffix in SHIPPED}


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_tree(tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            ".",
            "--no-deps",
            "--no-build-isolation",
            "--quiet",
            "-w",
            str(tmp_path),
        ],
        cwd=ROOT,
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("loraplex/")}
    assert shipped_files() - names == set(), (
        "files missing from the wheel: list their package in pyproject.toml"
    )


def test_every_package_folder_is_listed() -> None:
    listed = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    for layer in LAYERS:
        for init in (ROOT / layer).rglob("__init__.py"):
            package = "loraplex." + ".".join(init.parent.relative_to(ROOT).parts)
            assert package in listed, (
                f"{package} is not in pyproject's packages: it would be missing from the wheel"
            )


@pytest.mark.parametrize("layer", LAYERS)
def test_root_folders_are_not_packages(layer: str) -> None:
    """With platform/__init__.py, `python -m pytest` from the root dies at once: `module
    'platform' has no attribute 'system'`.
    """
    assert not (ROOT / layer / "__init__.py").exists()


def test_the_standard_library_wins() -> None:
    code = "import platform; assert platform.system(); import loraplex.platform"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_api_process_never_imports_torch() -> None:
    code = (
        "import sys, loraplex.platform.app, loraplex.platform.cli;"
        "heavy = {'torch', 'transformers', 'triton', 'peft'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
