"""The model that is evaluated: a directory, a GGUF file or a repository of the hub, known by the digest of its files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import mobillama.hf  # noqa: F401  (registers our model with the Auto classes)
from mobillama.directory import CONFIG_FILE, WEIGHTS_FILE, verify_in_checkpoint
from mobillama.engine.gguf import is_gguf
from mobillama.engine.weights import check_vocabulary
from mobillama.errors import CorruptDataError, UsageError, cause
from mobillama.importing.models import VERSION, import_model
from mobillama.record.files import read_json, sha256_file, sha256_json
from mobillama.record.lock import locked

_KINDS = ("*.json", "*.safetensors", "*.model", "*.txt")
_TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "spiece")
_VOCABULARIES = ("tokenizer.", "vocab")


@dataclass(frozen=True)
class ModelFiles:
    """A model's files on this machine."""

    name: str
    """As the user calls it, with the revision of a repository behind an ``@``."""
    directory: Path
    sha256: dict[str, str]
    """Of each file that counts, by name."""

    @property
    def digest(self) -> str:
        """The one number that names this model."""
        return sha256_json(self.sha256)

    @property
    def type(self) -> str:
        """The architecture, as transformers calls it."""
        return str(read_json(self.directory / CONFIG_FILE).get("model_type"))

    @property
    def tokenizer_digest(self) -> str:
        """Names the tokenizer."""
        return sha256_json({k: v for k, v in self.sha256.items() if k.startswith(_TOKENIZER_FILES)})


def find_model(name: str, cache: Path, revision: str | None = None) -> ModelFiles:
    """Return a model's files: those of a directory, else of the hub's repository, brought here where they are not yet.

    Every file is hashed; those of a checkpoint are compared with its manifest. A GGUF file is imported into ``cache``.

    Raises:
        UsageError: there is no such directory or repository, or it holds no model, or one without its tokenizer.
        CorruptDataError: a file of a checkpoint is not as it was written, or goes while it is read.
    """
    directory = Path(name)
    if directory.is_file() and is_gguf(directory):
        return _import(directory, cache)
    if directory.is_file():
        raise UsageError(f"{name}: is a file; name the model directory that holds it, or a GGUF file")
    if not directory.is_dir():
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is None or name.startswith("."):
            raise UsageError(f"{name}: no such directory; name a model directory or a repository of the hub")
        directory = _fetch(name, revision)
        name = f"{name}@{revision or 'main'}"
    elif not (directory / CONFIG_FILE).is_file():
        models = sorted([*directory.glob("checkpoints/step-*/model"), *directory.glob("model")])
        hint = f"; did you mean {models[-1]}, or --all-checkpoints?" if models else ""
        raise UsageError(f"{directory}: no {CONFIG_FILE} there, so this is no model directory{hint}")
    verify_in_checkpoint(directory)
    files = sorted(path for kind in (*_KINDS, "*.bin") for path in directory.glob(kind))
    if not any(path.suffix in (".safetensors", ".bin") for path in files):
        raise UsageError(f"{directory}: holds no weights; copy the model's safetensors files there")
    if not any(path.name.startswith(_VOCABULARIES) or path.suffix == ".model" for path in files):
        raise UsageError(f"{directory}: no tokenizer there (tokenizer.json or tokenizer.model); copy the model's own")
    try:
        return ModelFiles(name, directory, {path.name: sha256_file(path) for path in files})
    except OSError as error:
        raise CorruptDataError(
            f"{error.filename}: {error.strerror} while it was read; restore it from a copy"
        ) from None


def _import(file: Path, cache: Path) -> ModelFiles:
    """Return a GGUF file's model, known by the file and what it was read as: not by the file's name."""
    digest = sha256_file(file)
    directory = cache / f"imported-{VERSION}-{digest[:24]}"
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache, "an import", wait=True):
        if not directory.exists():
            import_model(file, directory)
    files = find_model(str(directory), cache)
    read = {n: value for n, value in files.sha256.items() if n.startswith((WEIGHTS_FILE, *_TOKENIZER_FILES))}
    return ModelFiles(str(file), directory, {"model.gguf": digest, **read})


def _fetch(name: str, revision: str | None) -> Path:
    try:
        # The hub's patterns match across "/": without the second one, weights in sub-directories would come along.
        directory = Path(snapshot_download(name, revision=revision, allow_patterns=list(_KINDS), ignore_patterns="*/*"))
        if not any(directory.glob("*.safetensors")):
            snapshot_download(name, revision=revision, allow_patterns="*.bin", ignore_patterns="*/*")
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise UsageError(
            f"{name}{f' at {revision}' if revision else ''}: neither a directory here nor to be had from the hub "
            f"({cause(error)}); "
            "check the name, or go online"
        ) from None
    return directory


def list_revisions(name: str) -> list[str]:
    """Return the branches of a hub repository that end in a number, as ckpt_100, in its order.

    Raises:
        UsageError: the hub does not answer, or has no such repository.
    """
    try:
        branches = [ref.name for ref in HfApi().list_repo_refs(name).branches]
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UsageError(f"{name}: the hub lists no revisions of it ({cause(error)})") from None
    numbered = [(number_of(branch), branch) for branch in branches]
    return [branch for number, branch in sorted((n, b) for n, b in numbered if n is not None)]


def number_of(revision: str) -> int | None:
    """Return the number that a revision's name ends in: 358 of ckpt_358."""
    found = re.search(r"(\d+)$", revision)
    return int(found[1]) if found else None


def load(files: ModelFiles, device: torch.device) -> tuple[Any, Any]:
    """Return the transformers model in float32 and evaluation mode, and its tokenizer.

    Raises:
        UsageError: transformers cannot load it, or the tokenizer has ids that the model lacks.
        CorruptDataError: its weights are damaged.
    """
    disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(files.directory)
        auto: Any = AutoModelForCausalLM
        model, loading = auto.from_pretrained(files.directory, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UsageError(f"{files.name}: transformers does not load it ({cause(error)}); mend the directory") from None
    except Exception as error:  # safetensors, torch and json each have their own
        reason = f"{type(error).__name__}: {cause(error)}"
        raise CorruptDataError(f"{files.name}: damaged ({reason}); restore it from a copy") from None
    if loading["missing_keys"]:  # transformers would draw them at random
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise CorruptDataError(f"{files.name}: its weights lack {missing}; restore it from a copy")
    ids = model.get_input_embeddings().weight.shape[0]
    check_vocabulary(files.name, len(tokenizer), ids)
    return model.to(device).eval(), tokenizer
