"""Compiles the native kernels at first use and loads them.

The source is plain C++ without torch headers, so this takes seconds, once per machine: the library
is cached under a key of source, compiler and CPU. Knows nothing about what the kernels compute.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "native"
COMPILERS = ("g++", "clang++", "c++")
# No -fopenmp and no default libraries: the thread pool's symbols stay undefined and resolve to the
# OpenMP library torch has loaded already. A second pool would spin against the first for the cores.
FLAGS = (
    "-std=c++17 -O3 -march=native -ffp-contract=fast -fno-math-errno -fvisibility=hidden"
    " -shared -fPIC -nodefaultlibs"
).split()
LIBRARIES = ("-lc", "-lm")
COMPILE_TIMEOUT_S = 120


class BuildError(Exception):
    """The native kernels cannot be compiled or loaded here."""


def load_library(cache_dir: Path | None = None) -> ctypes.CDLL:
    """The compiled kernels, from the cache or freshly compiled. Calls through it release the GIL.

    Raises: BuildError without a compiler, if the compilation fails, or if the result does not load.
    """
    found = (shutil.which(name) for name in COMPILERS)
    compiler = next((path for path in found if path), None)
    if compiler is None:
        raise BuildError(f"no C++ compiler on the PATH (looked for {', '.join(COMPILERS)})")
    try:
        library = _build(compiler, cache_dir or default_cache_dir())
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        raise BuildError(f"{compiler}: {detail.strip().splitlines()[-1]}") from error


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/loraplex` or `~/.cache/loraplex`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraplex"


def _build(compiler: str, cache_dir: Path) -> Path:
    key = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".cpp", ".h"):
            key.update(source.name.encode() + b"\0" + source.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=20)
    key.update(version.stdout + " ".join(FLAGS).encode() + _cpu().encode())
    library = cache_dir / f"kernels-{key.hexdigest()[:24]}.so"
    if library.exists():
        return library
    cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Another process may build at the same time: each renames its own file into place.
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix="build-") as scratch:
        target = Path(scratch) / "kernels.so"
        subprocess.run(
            [compiler, *FLAGS, "-o", str(target), str(SOURCES / "kernels.cpp"), *LIBRARIES],
            capture_output=True,
            text=True,
            check=True,
            timeout=COMPILE_TIMEOUT_S,
        )
        os.replace(target, library)
    return library


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(names)}))
