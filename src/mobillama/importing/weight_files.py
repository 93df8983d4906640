"""Weights of foreign Hugging Face directories: safetensors or pickles, in one file or many, each tensor read when asked for.

The only place of the project where a pickle is opened. torch's ``weights_only`` reader rebuilds tensors and plain containers
and refuses all else, so nothing in the file is ever run.
"""

from __future__ import annotations

import functools
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mobillama.errors import CorruptDataError, UsageError, cause
from mobillama.record.files import read_json

_FILES = ("model.safetensors", "pytorch_model.bin")


class WeightFiles(Mapping[str, Tensor]):
    """The tensors of a directory by name.

    Args:
        directory: holds ``model.safetensors`` or ``pytorch_model.bin``, or the index of several such files.

    Raises:
        UsageError: it holds neither.
        CorruptDataError: a file is missing, damaged, or holds something else than tensors.
    """

    def __init__(self, directory: Path) -> None:
        self.paths = _weight_paths(directory)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._readers: dict[str, Callable[[], Tensor]] = {}
        for path in self.paths:
            entries = _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)
            for name, (shape, read) in entries.items():
                if name in self.shapes:
                    raise CorruptDataError(
                        f"{path}: holds '{name}', which another file holds too; fetch the files again"
                    )
                self.shapes[name], self._readers[name] = shape, read

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _weight_paths(directory: Path) -> list[Path]:
    for name in _FILES:
        if (directory / name).is_file():
            return [directory / name]
        index = directory / f"{name}.index.json"
        if index.is_file():
            table = read_json(index).get("weight_map")
            names = sorted(set(table.values())) if isinstance(table, dict) and table else []
            if not names or not all(isinstance(its, str) and Path(its).name == its for its in names):
                raise CorruptDataError(f"{index}: its weight_map names no files of this directory; fetch it again")
            missing = [its for its in names if not (directory / its).is_file()]
            if missing:
                raise CorruptDataError(f"{directory / missing[0]}: missing, and {index.name} names it; fetch it again")
            return [directory / its for its in names]
    raise UsageError(
        f"{directory}: holds neither {_FILES[0]} nor {_FILES[1]}, nor an index of several; fetch the weights"
    )


_Entries = dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]]


def _open_safetensors(path: Path) -> _Entries:
    try:
        file: Any = safe_open(path, "pt")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 no mapping
    except (SafetensorError, OSError) as error:
        raise CorruptDataError(f"{path}: damaged or truncated ({cause(error)}); fetch it again") from None
    return {name: (shape, functools.partial(file.get_tensor, name)) for name, shape in shapes.items()}


def _open_pickle(path: Path) -> _Entries:
    with open(path, "rb") as file:
        is_archive = file.read(4) == b"PK\3\4"  # torch's present format can be mapped, that of before 2020 cannot
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle's versions
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:  # what torch raises of a damaged file is of many kinds
        refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused is None:
            raise CorruptDataError(f"{path}: damaged or truncated ({cause(error)}); fetch it again") from None
        raise CorruptDataError(
            f"{path}: wants to run {refused[1]}, so it is more than weights; it was refused and nothing of it was run: do not "
            "trust it, take the model's safetensors"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(each, Tensor) for each in found.values()):
        raise CorruptDataError(f"{path}: holds something else than named tensors; take the model's own weights")
    return {
        str(name): (tuple(tensor.shape), functools.partial(found.__getitem__, name)) for name, tensor in found.items()
    }
