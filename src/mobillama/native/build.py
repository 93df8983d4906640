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
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).parent
# Contracting sums at the compiler's discretion would make bits depend on how many vectors a product is written for.
_COMMON = ("-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-pthread")
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


def library_name() -> str:
    """Return the file name of the library that these sources make for this kind of processor."""
    digest = hashlib.sha256(repr([_COMMON, _LINK, _kernels()]).encode())
    for source in sorted(SOURCES.glob("*.[ch]*")):
        digest.update(source.read_bytes())
    return f"libmobillama-{digest.hexdigest()[:16]}.so"


def build(directory: Path) -> Path:
    """Compile the library into a directory, whole or not at all; return its path.

    Raises:
        CannotBuild: there is no compiler, or it fails.
        OSError: the directory cannot be written.
    """
    command = find_compiler()
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as work:
        objects = compile_objects(command, Path(work), SOURCES / "model.cpp")
        library = Path(work) / "library.so"
        run_all([[*command, *map(str, objects), *_LINK, "-o", str(library)]])
        path = directory / library_name()
        with open(library, "rb") as file:
            os.fsync(file.fileno())
        os.replace(library, path)
    return path


def compile_objects(
    command: list[str], work: Path, main: Path, machine: str | None = None, flags: Sequence[str] = ()
) -> list[Path]:
    """Compile each set of kernels, and the file that holds or includes the rest; return the object files.

    Args:
        command: the compiler.
        work: where the object files go.
        main: model.cpp, or a program that includes it.
        machine: the kind of processor that is compiled for, as ``platform.machine`` names it; absent: this one.
        flags: more to tell the compiler.

    Raises:
        CannotBuild: the compiler fails.
    """
    jobs = {"main": [str(main)]}
    for name, instructions in _kernels(machine).items():
        jobs[name] = ["kernels.cpp", f"-DKERNELS={name}", *instructions.split()]
    objects = {name: work / f"{name}.o" for name in jobs}
    run_all([[*command, *_COMMON, *flags, "-I.", "-c", *job, "-o", str(objects[name])] for name, job in jobs.items()])
    return list(objects.values())


def _kernels(machine: str | None = None) -> dict[str, str]:
    return _KERNELS.get((machine or platform.machine()).lower(), {}) | {"portable": ""}


def find_compiler() -> list[str]:
    """Return the words of the C++ compiler's command.

    Raises:
        CannotBuild: there is none.
    """
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        if not command or not shutil.which(command[0]):
            raise CannotBuild(
                f"CXX names '{os.environ['CXX']}', which is no program here; install g++ or clang++, or unset it"
            )
        return command
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise CannotBuild("no C++ compiler was found; install g++ or clang++, or name one in CXX")


def run_all(commands: list[list[str]]) -> None:
    """Run compilers side by side among the sources.

    Raises:
        CannotBuild: one cannot be run or fails.
    """
    try:
        started = [
            subprocess.Popen(words, cwd=SOURCES, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # noqa: S603
            for words in commands
        ]
    except OSError as error:
        raise CannotBuild(f"the compiler '{commands[0][0]}' cannot be run ({error.strerror})") from None
    for process in started:
        said = process.communicate()[0].strip().splitlines()
        if process.returncode:
            first = next((line for line in said if "error" in line), said[0] if said else "without a word")
            raise CannotBuild(f"the C++ compiler '{commands[0][0]}' failed: {first[:200]}; CXX names another one")
