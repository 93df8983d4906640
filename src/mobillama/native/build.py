"""Compiling the decoder: what hatch_build.py calls for a wheel, and the first use where no wheel brought it.

Needs a C++17 compiler (``CXX``, else c++, g++ or clang++) and nothing else. The library's name holds the hash of the sources
and of how they are compiled, so a library of other sources is never loaded. Only the standard library is imported: the build
runs this file by its path.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent
_COMMON = ("-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-fvisibility=hidden", "-pthread")
# The library runs where an older libstdc++ or none is installed.
_LINK = ("-shared", "-pthread", *(("-static-libgcc", "-static-libstdc++") if sys.platform == "linux" else ()))
_X86 = {
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma -mf16c",
    "avxvnni": "-mavx2 -mavxvnni -mfma -mf16c",
    "avx2": "-mavx2 -mfma -mf16c",
}
_ARM = {"dotprod": "-march=armv8.2-a+dotprod"}
_KERNELS = {"x86_64": _X86, "amd64": _X86, "aarch64": _ARM, "arm64": _ARM}


class CannotBuild(Exception):
    """There is no compiler, or it does not compile this; the message says which, in one line."""


def library_name(machine: str | None = None) -> str:
    """Return the file name of the library that these sources make for a kind of processor (absent: this one)."""
    digest = hashlib.sha256(repr([_COMMON, _LINK, _kernels(machine)]).encode())
    for source in sorted(SOURCES.glob("*.[ch]*")):
        digest.update(source.read_bytes())
    return f"libmobillama-{digest.hexdigest()[:16]}.so"


def build(directory: Path, compiler: str | None = None, machine: str | None = None) -> Path:
    """Compile the library into a directory, whole or not at all; return its path.

    Args:
        directory: where it goes; made if missing.
        compiler: the command to call; absent: the machine's.
        machine: the kind of processor that the compiler compiles for, as Python's ``platform.machine`` names it.

    Raises:
        CannotBuild: there is no compiler, or it fails.
        OSError: the directory cannot be written.
    """
    command = shlex.split(compiler) if compiler else _compiler()
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as work:
        jobs = [["model.cpp", "-o", f"{work}/model.o"]]
        for name, flags in _kernels(machine).items():
            jobs.append(["kernels.cpp", f"-DKERNELS={name}", *flags.split(), "-o", f"{work}/{name}.o"])
        started = [_start([*command, *_COMMON, "-c", *job]) for job in jobs]
        for process in started:
            _finish(process)
        library = f"{work}/library.so"
        _finish(_start([*command, *(job[-1] for job in jobs), *_LINK, "-o", library]))
        path = directory / library_name(machine)
        os.replace(library, path)
    return path


def _kernels(machine: str | None) -> dict[str, str]:
    return _KERNELS.get((machine or platform.machine()).lower(), {}) | {"portable": ""}


def _compiler() -> list[str]:
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise CannotBuild("no C++ compiler was found; install g++ or clang++, or name one in CXX")


def _start(words: list[str]) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(words, cwd=SOURCES, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # noqa: S603
    except OSError as error:
        raise CannotBuild(f"the compiler '{words[0]}' cannot be run ({error.strerror})") from None


def _finish(process: subprocess.Popen[str]) -> None:
    said = process.communicate()[0].strip().splitlines()
    if process.returncode:
        first = next((line for line in said if "error" in line), said[0] if said else "without a word")
        raise CannotBuild(f"the C++ compiler failed: {first[:200]}")
