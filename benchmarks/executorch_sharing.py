"""Does ExecuTorch hold a shared network once? Disk and memory of eight uses of one network, beside eight networks.

    python -m venv V && V/bin/pip install torch executorch
    PYTHONPATH=src V/bin/python benchmarks/executorch_sharing.py --out FILE.json

The XNNPACK backend packs weights when a program is loaded. Its option ``weight_cache_enabled`` (ExecuTorch 1.5) has no
Python interface; a C++ library of six lines, compiled here against the headers of the package, sets it.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobillama.record.environment import environment

LAYERS, WIDTH, INNER = 8, 1024, 2816
OPTION = """
#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/backend/options.h>
extern "C" int enable_weight_cache() {
  executorch::runtime::BackendOptions<1> options;
  options.set_option("weight_cache_enabled", true);
  return static_cast<int>(executorch::runtime::set_option("XnnpackBackend", options.view()));
}
"""


class Stack(nn.Module):
    """Residual layers, each with its own norm, that share a network or not."""

    def __init__(self, shared: bool) -> None:
        super().__init__()

        def network() -> nn.Module:
            return nn.Sequential(nn.Linear(WIDTH, INNER, bias=False), nn.SiLU(), nn.Linear(INNER, WIDTH, bias=False))

        one = network()
        self.networks = nn.ModuleList(one if shared else network() for _ in range(LAYERS))
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        """Map (1, c) to (1, c)."""
        for norm, network in zip(self.norms, self.networks, strict=True):
            x = x + network(norm(x))
        return x


def export(shared: bool, path: Path) -> None:
    """Write a program for the XNNPACK backend, float32."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    torch.manual_seed(0)
    exported = torch.export.export(Stack(shared).eval(), (torch.zeros(1, WIDTH),))
    lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)


def build_option(folder: Path) -> Path:
    """Compile what sets the option."""
    import executorch.runtime

    package = Path(executorch.runtime.__file__).parents[1]
    source, library = folder / "option.cpp", folder / "option.so"
    source.write_text(OPTION)
    portable = package / "include" / "executorch" / "runtime" / "core" / "portable_type" / "c10"
    words = [
        "g++",
        "-std=c++17",
        "-shared",
        "-fPIC",
        "-DC10_USING_CUSTOM_GENERATED_MACROS",
        str(source),
        "-o",
        str(library),
    ]
    words += [f"-I{package / 'include'}", f"-I{portable}"]
    words += [f"-L{package / 'lib'}", "-lexecutorch", f"-Wl,-rpath,{package / 'lib'}"]
    subprocess.run(words, check=True)
    return library


def resident() -> float:
    """Return this process's resident MiB."""
    found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def load(program: str, option: str) -> dict[str, Any]:
    """Load a program in this process; return what memory that took, and its output's sum."""
    from executorch.runtime import Runtime

    runtime = Runtime.get()
    if option and ctypes.CDLL(option).enable_weight_cache():
        raise SystemExit("the backend does not know weight_cache_enabled")
    before = resident()
    method = runtime.load_program(program).load_method("forward")
    taken = resident() - before
    (y,) = method.execute([torch.ones(1, WIDTH)])
    return {"load_mib": taken, "output_sum": float(y.sum())}


def main() -> None:
    """Export, then load each program in a process of its own, with the option and without."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        print(json.dumps(load(*args.load)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        option = build_option(folder)
        for shared in (True, False):
            program = folder / "program.pte"
            export(shared, program)
            for cache in (False, True):
                words = [sys.executable, __file__, "--load", str(program), str(option) if cache else ""]
                done = subprocess.run(words, capture_output=True, text=True, check=True)
                facts = json.loads(done.stdout.splitlines()[-1])
                rows.append({"shared": shared, "weight_cache": cache, "file_mb": program.stat().st_size / 1e6, **facts})
                print(rows[-1])
    result = {
        "environment": environment(),
        "layers": LAYERS,
        "one_network_mib": 2 * WIDTH * INNER * 4 / 2**20,
        "executorch": importlib.metadata.version("executorch"),
        "torch": torch.__version__,
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
