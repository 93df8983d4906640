"""Does ExecuTorch hold a shared network once? Disk and memory of eight uses of one network, and of a model's own program.

    pip install 'mobillama[executorch]'
    python benchmarks/executorch_sharing.py runs/random-0.5b

Beside eight uses of one network stand eight networks. Models are exported by ``mobillama export executorch`` with its check.

The XNNPACK backend packs weights when a program is loaded. Its option ``weight_cache_enabled`` (ExecuTorch 1.5) has no
Python interface; a C++ library of six lines, compiled here against the headers of the package, sets it.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobillama.deploy.gguf import record_of
from mobillama.record.environment import environment
from mobillama.record.files import read_json, write_json

RESULTS = Path(__file__).parent / "results" / "executorch.json"
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
    """Load a program in this process; return the memory that took, that of the whole process, and an output's sum."""
    from executorch.runtime import Runtime

    from mobillama.deploy.executorch_program import load_operators

    load_operators()
    runtime = Runtime.get()
    if option and ctypes.CDLL(option).enable_weight_cache():
        raise SystemExit("the backend does not know weight_cache_enabled")
    before = resident()
    method = runtime.load_program(program).load_method("forward")
    taken = resident() - before
    is_stack = method.metadata.num_inputs() == 1
    (y,) = method.execute([torch.ones(1, WIDTH)] if is_stack else [torch.tensor([[1]]), torch.tensor([0])])
    return {"load_mib": taken, "resident_mib": resident(), "output_sum": float(y.sum())}


def loaded(program: Path, option: Path | None) -> dict[str, Any]:
    """Load a program in a process of its own, with the option or without."""
    words = [sys.executable, __file__, "--load", str(program), str(option or "")]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    facts = json.loads(done.stdout.splitlines()[-1])
    return {"weight_cache": option is not None, "file_mb": program.stat().st_size / 1e6, **facts}


def exported(model: Path, option: Path, folder: Path) -> dict[str, Any]:
    """Export a model as a user does; return what that took, what its check said, and what loading takes."""
    program, before = folder / "model.pte", time.perf_counter()
    words = [sys.executable, "-m", "mobillama", "export", "executorch", str(model), str(program)]
    child = subprocess.Popen(words)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(words)}: exit code {child.returncode}")
    taken = {"export_seconds": time.perf_counter() - before, "export_peak_mib": usage.ru_maxrss / 1024}
    return {**read_json(record_of(program)), **taken, "loads": [loaded(program, its) for its in (None, option)]}


def main() -> None:
    """Export, then load each program in a process of its own, with the option and without."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*", help="model directories or GGUF files")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        print(json.dumps(load(*args.load)))
        return
    if not args.models and args.results == RESULTS:
        parser.error("the record has models; name some, or give --results another file")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        option = build_option(folder)
        models = []
        for number, model in enumerate(args.models):
            (folder / str(number)).mkdir()
            models.append(exported(model, option, folder / str(number)))
            print(models[-1])
        for shared in (True, False):
            program = folder / "program.pte"
            export(shared, program)
            for its in (None, option):
                rows.append({"shared": shared, **loaded(program, its)})
                print(rows[-1])
    result = {
        "environment": environment(),
        "layers": LAYERS,
        "one_network_mib": 2 * WIDTH * INNER * 4 / 2**20,
        "executorch": importlib.metadata.version("executorch"),
        "torch": torch.__version__,
        "rows": rows,
        "models": models,
    }
    write_json(args.results, result)


if __name__ == "__main__":
    main()
