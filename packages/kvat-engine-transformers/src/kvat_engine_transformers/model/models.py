"""From a model id to files on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kvat_core.errors import UsageError
from kvat_engine_transformers.model.naming import BUILTIN, RANDOM

_PACKAGE = Path(__file__).parent
SHAPES = _PACKAGE / "shapes"
"""Configurations of real models that come with this package, a directory each."""
_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_UNWANTED = ("*/*", "consolidated*")
"""The same weights once more, in the form of other libraries."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Source:
    """Where a model comes from, with its files on this machine."""

    kind: Literal["builtin", "random", "directory", "hub"]
    path: Path
    revision: str | None = None


def builtin_path(name: str) -> Path:
    """Directory of a checkpoint that comes with this package.

    Raises:
        UsageError: there is none of that name.
    """
    return _named(_PACKAGE / "builtin", name, BUILTIN)


def random_path(name: str) -> Path:
    """Directory of a shape that comes with this package, or the directory of that name.

    Raises:
        UsageError: there is neither.
    """
    if len(Path(name).parts) == 1 and (SHAPES / name / "config.json").is_file():
        return SHAPES / name
    if name and (Path(name) / "config.json").is_file():
        return Path(name)
    if len(Path(name).parts) > 1:
        raise UsageError(f"random:{name} needs a directory with a config.json; there is none")
    return _named(SHAPES, name, RANDOM)


def resolve(model_id: str, revision: str | None, allow_download: bool) -> Source:
    """Find the files of a model.

    Raises:
        UsageError: no such model, or none without a download that was not allowed.
    """
    if model_id.startswith(BUILTIN):
        return Source("builtin", builtin_path(model_id.removeprefix(BUILTIN)))
    if model_id.startswith(RANDOM):
        return Source("random", random_path(model_id.removeprefix(RANDOM)))
    if Path(model_id).is_dir():
        return Source("directory", Path(model_id))
    if Path(model_id).is_absolute() or model_id.startswith("."):
        raise UsageError(f"there is no directory {model_id}; name a model directory or a hub id")
    path = _hub_files(model_id, revision, allow_download)
    return Source("hub", path, revision=path.name)


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint; None where there is none, or none that can be loaded here.

    Without it prompts are random tokens, so an odd tokenizer or a library that it lacks costs no measurement.
    """
    # Without files some classes make an empty tokenizer.
    if source.kind == "random" or not any((source.path / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.path, trust_remote_code=False)
    except Exception:  # every tokenizer class fails in its own way
        return None
    return tokenizer


def _named(folder: Path, name: str, scheme: str) -> Path:
    known = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if name not in known:
        raise UsageError(f"there is no model {scheme}{name}; choose one of: {', '.join(scheme + one for one in known)}")
    return folder / name


def _hub_files(model_id: str, revision: str | None, allow_download: bool) -> Path:
    named = model_id if revision is None else f"{model_id} at revision {revision}"
    try:
        found = snapshot_download(
            model_id,
            revision=revision,
            allow_patterns=list(_WANTED),
            ignore_patterns=list(_UNWANTED),
            local_files_only=not allow_download,
        )
    except HFValidationError as error:
        raise UsageError(f"{model_id} is neither a directory here nor a hub id of the form owner/name") from error
    except GatedRepoError as error:
        raise UsageError(f"{named} is gated; accept its terms on the hub and log in with: hf auth login") from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UsageError(f"the hub has no {named} that this login may read; check the spelling") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if allow_download:
            raise UsageError(f"{named} cannot be downloaded; check the connection to the hub") from error
        raise UsageError(f"{named} is not on this machine; add --allow-download to fetch it") from error
    return Path(found)
