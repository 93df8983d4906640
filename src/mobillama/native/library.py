"""The decoder's functions in Python: the library is found beside this file, in the user's cache, or compiled into it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import time
from pathlib import Path

from mobillama.native.build import SOURCES, CannotBuild, build, find_compiler, library_name


class Shape(ctypes.Structure):
    """``struct Shape`` of model.cpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("vocabulary", "width", "inner", "layers", "heads", "key_heads")),
        ("head_width", ctypes.c_int32),
        ("context", ctypes.c_int32),
        ("slots", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("theta", ctypes.c_float),
        ("exact", ctypes.c_int32),
        ("cache", ctypes.c_int32),
    ]


class Layer(ctypes.Structure):
    """``struct Layer`` of model.cpp: numbers of matrices and vectors."""

    _fields_ = [
        (name, ctypes.c_int32)
        for name in "q k v o gate up down attention_norm ffn_norm query_norm key_norm".split()  # noqa: SIM905 as there
    ]


class Run(ctypes.Structure):
    """``struct Run`` of model.cpp: tokens of one sequence in a pass."""

    _fields_ = [(name, ctypes.c_int32) for name in ("slot", "start", "tokens", "wanted")]


_KEPT_SECONDS = 30 * 24 * 3600
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int
_FUNCTIONS = {
    "kernels": (ctypes.c_char_p, []),
    "chunk": (_INT, []),
    "new": (_POINTER, [ctypes.POINTER(Shape), _INT, ctypes.c_char_p]),
    "free": (None, [_POINTER]),
    "add_matrix": (_INT, [_POINTER, _INT, _INT, _INT, _POINTER]),
    "add_vector": (_INT, [_POINTER, _POINTER, _INT]),
    "prepare": (_INT, [_POINTER, ctypes.POINTER(Layer), _INT, _INT, _INT, _INT]),
    "cache_bytes": (ctypes.c_size_t, [_POINTER]),
    "feed": (None, [_POINTER, _POINTER, ctypes.POINTER(Run), _INT, _POINTER]),
    "copy": (None, [_POINTER, _INT, _INT, _INT]),
    "multiply_only": (None, [_POINTER, _INT, _INT, _INT, _POINTER]),
}


@functools.cache
def library() -> ctypes.CDLL:
    """Return the decoder's library; where none is found that these sources made, compile it into the user's cache.

    Raises:
        CannotBuild: there is none and it cannot be compiled or loaded; one line says why.
    """
    path = _found()
    try:
        if path is not None and path.parent == _cache():
            path.touch()  # used, so kept
        loaded = _opened(path) if path is not None else None
        if loaded is None:
            loaded = ctypes.CDLL(str(_built()))
    except OSError as error:
        raise CannotBuild(
            f"the native decoder cannot be kept or loaded ({error}); MOBILLAMA_CACHE names another place for it"
        ) from None
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(loaded, f"mobillama_{name}")
        function.restype, function.argtypes = result, arguments
    return loaded


def kernels() -> list[str]:
    """Return the sets of kernels that this processor can run, best first.

    Raises:
        CannotBuild: see :func:`library`.
    """
    return str(library().mobillama_kernels().decode()).splitlines()


def _built() -> Path:
    find_compiler()  # or it would be said to compile
    print("mobillama: compiling the native decoder, once for this version; about half a minute …", file=sys.stderr)
    path = build(_cache())
    _remove_unused(_cache())
    return path


def _opened(path: Path) -> ctypes.CDLL | None:
    """Return a library, or None where the file in the cache is damaged: it is made again."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        if path.parent != _cache():
            raise
        return None


def _remove_unused(cache: Path) -> None:
    """Remove libraries of other versions that nobody has loaded for long."""
    for library_file in cache.glob("libmobillama-*.so"):
        with contextlib.suppress(OSError):  # another process removes it too
            if library_file.stat().st_mtime < time.time() - _KEPT_SECONDS:
                library_file.unlink()


def _found() -> Path | None:
    candidates = (directory / library_name() for directory in (SOURCES, _cache()))
    return next((path for path in candidates if path.is_file()), None)


def _cache() -> Path:
    return Path(os.environ.get("MOBILLAMA_CACHE") or Path.home() / ".cache" / "mobillama") / "native"
