"""Prepare a study's base: from a packaged model or a folder, trimmed if asked, with a chat template if asked.

The one idea: whatever the base comes from, everything after this step meets the same thing, a safetensors folder
that plain transformers loads. Weight files that nothing changed are linked, so preparing costs no disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from mixmerge.errors import UserError
from mixmerge.model.chat import set_chat_template, template_text
from mixmerge.model.check import check_model
from mixmerge.model.folder import copy_model, whole_folder
from mixmerge.model.package import package_model
from mixmerge.model.trim import Progress, TrimReport, trim_vocabulary
from mixmerge.model.words import check_languages


def prepare_base(
    source: Path | None,
    package: str | None,
    out: Path,
    *,
    trim: tuple[Sequence[str], int] | None,
    chat_template: str | None,
    progress: Progress | None = None,
) -> TrimReport | None:
    """Write the base to the new folder `out`: `source` or `package`, trimmed to (languages, size), templated.

    `chat_template` is a name or a Jinja file (see `set_chat_template`); None keeps what the model has. Gives the
    trimming's report, or None where nothing was trimmed. `progress` counts the trimming.

    Raises:
        UserError: not exactly one of `source` and `package`, or as the steps raise.
        ModelError, CheckpointError: as the steps raise.
    """
    if (source is None) == (package is None):
        raise UserError("a base is either a model folder or a packaged model", do="give exactly one of the two")
    # What a look can tell is told before a minute of work.
    if source is not None:
        check_model(source)
    if trim is not None:
        check_languages(trim[0])
    if chat_template is not None:
        template_text(chat_template)
    report = None
    with whole_folder(out) as partial, TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as work:
        current = source or Path(work, "package")
        if package is not None:
            package_model(package, current)
        if trim is not None:
            languages, size = trim
            trimmed = Path(work, "trimmed")
            report = trim_vocabulary(current, trimmed, languages=languages, size=size, progress=progress)
            current = trimmed
        copy_model(current, partial)
        if chat_template is not None:
            set_chat_template(partial, chat_template)
        check_model(partial)
    return report
