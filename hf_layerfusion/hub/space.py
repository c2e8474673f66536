"""A folder that is a Space: a page on the Hub where people try a head."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from string import Template

from huggingface_hub import SpaceCard, SpaceCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import LayerFusionError
from ..files import write_file
from .record import plain_text

REQUIREMENT = "hf-layerfusion[demo]"
# Of a Space that is written where gradio is not installed: the version that the demo's tests run with.
_GRADIO_VERSION = "6.31.0"
_EXAMPLES = "examples"
_HINT = "# If no package index has hf_layerfusion under this name, put the address here that it is installed from."


def write_space(
    folder: str | Path,
    head_repo_id: str | Path,
    *,
    title: str | None = None,
    examples: Iterable[str | Path] = (),
    requirements: str | Sequence[str] = REQUIREMENT,
    license: str = "apache-2.0",
    sdk_version: str | None = None,
) -> Path:
    """Write `app.py`, `requirements.txt`, `README.md` and `examples/`: a Space, and a page that runs as it is.

    Args:
        folder: created if needed. Files of these names are replaced, but `examples/` must be empty or missing.
        head_repo_id: Hub id of the head that the page opens; a `Path` is a folder, for trying it out on this machine.
        title: by default the head's name.
        examples: pictures to click on: files, and folders of them (at most 12 of each).
        requirements: what the Space installs, lines for pip. The default is this package by its name, which is right
            where a package index has it under that name; otherwise name the address it is installed from.
        license: of the Space's own files, as the Hub spells licences.
        sdk_version: of gradio, which the Hub installs; by default the one that is installed here.

    Returns:
        The folder.

    Raises:
        LayerFusionError: if the head is no Hub id and no folder, the title or a requirement is no line of text, an
            example cannot be read, or the folder has examples already.
    """
    from ..demo import find_examples  # later than the model that the package's other modules need

    folder = Path(folder)
    head = None if isinstance(head_repo_id, Path) else _checked_id(head_repo_id)
    if head is None and not Path(head_repo_id).is_dir():
        raise LayerFusionError(f"there is no folder {head_repo_id} with a head")
    opened = head or str(Path(head_repo_id).resolve())
    name = plain_text(title or head or Path(opened).name)
    if not name:
        raise LayerFusionError(f"title={title!r} has no letters: give the Space a name")
    lines = [requirements] if isinstance(requirements, str) else list(requirements)
    for line in lines:
        if not line.strip() or "\n" in line:
            raise LayerFusionError(f"requirements: {line!r} is not one line for pip, such as {REQUIREMENT!r}")
    pictures = find_examples(examples)
    if any((folder / _EXAMPLES).glob("*")):
        raise LayerFusionError(
            f"{folder / _EXAMPLES} holds files already, which the page would show: give an empty folder"
        )

    data = SpaceCardData(
        title=name,
        sdk="gradio",
        sdk_version=sdk_version or _installed_gradio(),
        app_file="app.py",
        license=license,
        models=[head] if head else None,
        tags=["layer-fusion", "image-classification"],
    )
    values = {
        "title": name,
        "head": opened,
        "head_literal": repr(opened),
        "title_literal": repr(name),
        "requirements": ", ".join(f"`{line}`" for line in lines),
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write_examples(folder / _EXAMPLES, pictures)
    write_file(folder / "requirements.txt", "".join(f"{line}\n" for line in (_HINT, *lines)).encode())
    write_file(folder / "app.py", _fill("space_app.txt", values).encode())
    card = SpaceCard(f"---\n{data.to_yaml()}\n---\n\n{_fill('space_readme.md', values)}")
    write_file(folder / "README.md", str(card).encode())
    return folder


def _checked_id(repo_id: str) -> str:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise LayerFusionError(f"{repo_id!r} is no Hub id of a head, such as 'user/head': {error}") from error
    return repo_id


def _write_examples(folder: Path, pictures: Sequence[Path]) -> None:
    """Copies with names that sort in the given order."""
    for number, picture in enumerate(pictures):
        folder.mkdir(exist_ok=True)
        stem = re.sub(r"[^\w-]+", "-", picture.stem)[:40].strip("-")
        target = folder / f"{number:02d}-{stem or 'picture'}{picture.suffix.lower()}"
        write_file(target, picture.read_bytes())


def _fill(template: str, values: dict[str, str]) -> str:
    return Template(files(__package__).joinpath(template).read_text(encoding="utf-8")).substitute(values)


def _installed_gradio() -> str:
    try:
        return version("gradio")
    except PackageNotFoundError:
        return _GRADIO_VERSION
