"""Models and adapters that were trained elsewhere, brought in as candidates.

The one idea: whatever comes from outside has to fit what it was trained from, and the headers tell whether it does: a whole
model has the same tensors, an adapter changes tensors that are there. A model is linked, an adapter folded (exactly, as a
merge of one model), so that every candidate is a whole model folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from mixmerge.errors import MixmergeError, ModelError
from mixmerge.merge import MergeConfig, parse_config
from mixmerge.merge import merge as merge_models
from mixmerge.merge.sources import Files
from mixmerge.merge.stream import prepare
from mixmerge.model.chat import own_chat_template, put_chat_template
from mixmerge.model.check import check_model
from mixmerge.model.folder import copy_model, whole_folder
from mixmerge.yaml import Marks

ADAPTER = "adapter_config.json"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter, and no model of its own."""
    return (folder / ADAPTER).is_file() and not (folder / "config.json").is_file()


def check_adopted(source: Path, start: Path | None = None) -> None:
    """Refuse, from headers alone, a folder that is neither a model nor an adapter, or does not fit `start`.

    Without `start` only the folder itself is looked at.

    Raises:
        ModelError, CheckpointError: says which file or tensor, and why.
    """
    if not source.is_dir():
        raise ModelError("no such folder", where=str(source), do="give the folder of a model or of an adapter")
    if is_adapter(source):
        if not (source / "adapter_model.safetensors").is_file():
            do = "save the adapter with save_pretrained, which writes safetensors"
            raise ModelError("an adapter without adapter_model.safetensors", where=str(source), do=do)
    else:
        check_model(source)
    if start is not None:
        with put_together(source, start) as config, closing(Files()) as files:
            prepare(config, files)


def adopt(
    source: Path,
    start: Path,
    out: Path,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> bool:
    """Write the new model folder `out`: `source` linked, or, if it is an adapter, folded into `start`; gives whether it is one.

    A model without a chat template gets that of `start`.

    Raises:
        ModelError, CheckpointError: as `check_adopted`; a NaN or infinity in what is folded.
    """
    check_adopted(source, start)
    if is_adapter(source):
        with put_together(source, start) as config:
            merge_models(config, out, threads=threads, progress=progress)
        return True
    with whole_folder(out) as partial:
        copy_model(source, partial)
        own = own_chat_template(start)
        if own_chat_template(source) is None and own is not None:
            put_chat_template(partial, own[0], str(own[1]))
    return False


@contextmanager
def put_together(source: Path, start: Path) -> Iterator[MergeConfig]:
    """The merge that has to be possible: of `start` and `source`, or of `start` with the adapter on it alone."""
    with TemporaryDirectory() as work:
        # under names that hold no plus, which parts a model from its adapter
        places = {
            f"{role}-{folder.name.replace('+', '-')}": folder
            for role, folder in zip("12", (start, source), strict=True)
        }
        for name, folder in places.items():
            Path(work, name).symlink_to(folder.resolve())
        models = ["+".join(places)] if is_adapter(source) else list(places)
        entries = [{"model": name, "parameters": {"weight": 1.0}} for name in models]
        try:
            yield parse_config({"merge_method": "linear", "models": entries}, Marks(str(Path(work, "adopt"))))
        except MixmergeError as error:

            def given(text: str | None) -> str | None:
                for name, folder in places.items():
                    text = (
                        None
                        if text is None
                        else text.replace(str(Path(work, name)), str(folder)).replace(name, str(folder))
                    )
                return text

            raise error.again(what=given(error.what), where=given(error.where)) from error
