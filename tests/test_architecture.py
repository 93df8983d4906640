"""The house stands: floors import downward only, light imports stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "mobillama"

# Rooms by floor (docs/architecture.md); a room may import its own floor and those below.
FLOORS = [
    {"errors", "record", "recipe", "config", "console", "progress"},
    {"model"},
    {"data", "directory", "hf", "engine", "importing", "native"},
    {"train", "deploy"},
    {"evaluate", "tune"},
    {"compress", "report"},
    {"serve", "workflows"},
    {"cli", "__main__"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("mobillama.")}
    return rooms & FLOOR_OF.keys()


def test_every_room_has_a_floor_and_imports_downward():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = room_of(path)
        if room == "__init__":
            continue
        assert room in FLOOR_OF, f"{room} stands on no floor"
        wrong += [f"{path.name} -> {r}" for r in imported_rooms(path) if FLOOR_OF[r] > FLOOR_OF[room]]
    assert wrong == []


def test_workflows_and_serve_do_not_know_each_other():
    for path in PACKAGE.rglob("*.py"):
        pair = {room_of(path)} | imported_rooms(path)
        assert not {"workflows", "serve"} <= pair or room_of(path) == "cli"


def loaded_modules(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(' '.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_package_is_light():
    loaded = loaded_modules("import mobillama, mobillama.cli, mobillama.recipe, mobillama.engine.stream")
    assert loaded.isdisjoint({"torch", "transformers", "yaml", "rich", "sentencepiece"})


def test_training_decoding_and_importing_do_not_import_transformers():
    loaded = loaded_modules(
        "import mobillama.train.loop, mobillama.engine.torch_engine, mobillama.engine.load, mobillama.importing.models"
    )
    assert "transformers" not in loaded


def test_decoding_an_exported_graph_loads_neither_torch_nor_transformers(tmp_path):
    from onnx_support import model_and_graph

    model_and_graph(tmp_path)
    loaded = loaded_modules(
        "from pathlib import Path; from mobillama.engine.load import open_engine; import mobillama.cli\n"
        "import mobillama.serve.chat, mobillama.data.tokenizer, tokenizers\n"
        f"open_engine(Path({str(tmp_path)!r})).feed([1, 2, 3])"
    )
    assert "onnxruntime" in loaded
    assert loaded.isdisjoint({"torch", "transformers", "onnx", "safetensors", "yaml", "rich", "sentencepiece"})
