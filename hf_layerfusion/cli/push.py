"""Upload a saved head to the Hub, in one commit; with --space, also a page where people can try it.

  layerfusion push --model my-head --repo_id user/flowers
  layerfusion push --model my-head --repo_id user/flowers --space

The head names its backbone by Hub id and commit. If it was trained on a backbone in a folder, say with --backbone_id
under which id others find the same one; its weights are compared whenever the head is loaded.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from huggingface_hub import HfApi

from ..checkpoints import open_config
from ..errors import LayerFusionError
from ..hub.push import push_folder
from ..hub.space import write_space
from ..modeling_layer_fusion import ViTForAttentiveLayerFusionClassification


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder of a head, or the Hub id of one to copy")
    parser.add_argument("--repo_id", required=True, help="user/name of the repository, created if it is missing")
    parser.add_argument("--backbone_id", help="Hub id of a backbone that was opened from a folder")
    parser.add_argument("--include_backbone", action="store_true", help="push the backbone's weights with the head")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="branch to commit to, created if it is missing (default: main)")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--commit_message", default="Upload head", help="default: %(default)s")
    parser.add_argument("--token", help="default: HF_TOKEN, or the one of `hf auth login`")
    group = parser.add_argument_group("page")
    group.add_argument("--space", action="store_true", help="also push a Space that shows the head, to REPO_ID-demo")
    group.add_argument("--space_id", help="user/name of the Space, if another")
    group.add_argument(
        "--examples", nargs="+", default=(), metavar="PICTURE", help="pictures to offer on the page of the Space"
    )
    group.add_argument(
        "--space_requirements",
        nargs="+",
        metavar="LINE",
        help="what the Space installs this library from, if no package index has it (default: hf-layerfusion[demo])",
    )


def run(arguments: argparse.Namespace) -> None:
    where = {"private": arguments.private, "token": arguments.token}
    model = _open(arguments)
    address = model.push_to_hub(
        arguments.repo_id,
        backbone_id=arguments.backbone_id,
        include_backbone=True if arguments.include_backbone else None,
        commit_message=arguments.commit_message,
        revision=arguments.revision,
        create_pr=arguments.create_pr,
        **where,
    )
    print(f"head pushed: {address}")
    if not (arguments.space or arguments.space_id):
        return
    space_id = arguments.space_id or f"{arguments.repo_id}-demo"
    with tempfile.TemporaryDirectory() as folder:

        def write(_: str) -> Path:
            return write_space(
                folder,
                _whole_id(arguments),
                examples=arguments.examples,
                **({"requirements": arguments.space_requirements} if arguments.space_requirements else {}),
            )

        commit = push_folder(
            space_id, write, commit_message="Upload page", repo_type="space", space_sdk="gradio", **where
        )
    print(f"page pushed: {commit.commit_url}")


def _whole_id(arguments: argparse.Namespace) -> str:
    """`user/name` of the head, which `name` alone means to its owner only."""
    if "/" in arguments.repo_id:
        return arguments.repo_id
    return f"{HfApi(token=arguments.token).whoami()['name']}/{arguments.repo_id}"


def _open(arguments: argparse.Namespace) -> ViTForAttentiveLayerFusionClassification:
    """The head; its backbone too, if that is to be pushed."""
    try:
        config = open_config(arguments.model, {})
        if arguments.include_backbone or config.includes_backbone:
            return ViTForAttentiveLayerFusionClassification.from_pretrained(arguments.model)
        return ViTForAttentiveLayerFusionClassification.load_head(arguments.model, config=config)[0]
    except OSError as error:
        raise LayerFusionError(f"no head can be loaded from {arguments.model!r}: {error}") from error
