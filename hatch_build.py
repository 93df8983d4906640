"""Put the compiled decoder into wheels. Where it cannot be compiled, the wheel is made without it and runs everywhere.

An editable install compiles nothing: the first use does (mobillama.native.library), and again whenever the sources change.
"""

from __future__ import annotations

import importlib.util
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeDecoder(BuildHookInterface):
    """hatchling's hook."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the library and name it as a file of the wheel, which then serves one kind of machine."""
        if version == "editable":
            return
        place = Path(self.root) / "src" / "mobillama" / "native" / "build.py"
        spec = importlib.util.spec_from_file_location("mobillama_native_build", place)
        assert spec is not None and spec.loader is not None
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        self._directory = tempfile.TemporaryDirectory()
        try:
            library = native.build(Path(self._directory.name))
        except native.CannotBuild as error:
            self.app.display_warning(f"mobillama is built without its native decoder: {error}")
            return
        build_data["force_include"][str(library)] = f"mobillama/native/{library.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
