"""Uploading a folder as one commit, and saying beforehand what would stand in the way."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

from huggingface_hub import CommitInfo, HfApi, get_token
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)

from ..configuration_layer_fusion import LayerFusionConfig
from ..errors import LayerFusionError


def hub_id(name_or_path: str | None) -> str | None:
    """A Hub id, or `None` for a folder: a path of one machine means nothing on another."""
    if (
        not name_or_path
        or not re.fullmatch(r"[\w-][\w.-]{0,95}(/[\w.-]{1,96})?", name_or_path)
        or Path(name_or_path).is_dir()
    ):
        return None
    return name_or_path


def public_name(name_or_path: str) -> str:
    """A Hub id, or a folder's last part: where it lies on somebody's disk is nobody's business."""
    return hub_id(name_or_path) or PurePath(name_or_path.replace("\\", "/")).name


def push_folder(
    repo_id: str,
    write: Callable[[str], Path],
    *,
    commit_message: str,
    repo_type: str = "model",
    space_sdk: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload a folder in one commit, to a repository and a branch that are created if they are missing.

    Args:
        repo_id: `user/name`, or `name` for one's own.
        write: makes the folder, given the whole repository id; called when the repository is known to be writable.
        commit_message: title of the commit.
        repo_type: `"model"` or `"space"`.
        space_sdk: of a Space.
        private: of a new repository.
        token: of a user who may write; by default the one that is logged in.
        revision: branch to commit to; a new one starts at `main`.
        create_pr: open a pull request instead.

    Returns:
        The commit; of a pull request, with its address.

    Raises:
        LayerFusionError: without a token, without the right to write, for a bad name, or if the upload fails.
            The commit comes last, so that the repository holds all of an upload or nothing.
    """
    if token is False or (token in (None, True) and get_token() is None):
        raise LayerFusionError(
            f"pushing to {repo_id!r} needs a token that may write: log in with `hf auth login`, set HF_TOKEN, or pass token="
        )
    if create_pr and revision not in (None, "main"):
        raise LayerFusionError(f"create_pr opens a pull request to main, not to {revision!r}: leave one of them out")
    api = HfApi(token=token)
    with _hub_errors(repo_id):
        repo = api.create_repo(
            repo_id, repo_type=repo_type, space_sdk=space_sdk, private=private, exist_ok=True
        ).repo_id
        if private and not api.repo_info(repo, repo_type=repo_type).private:
            raise LayerFusionError(
                f"{repo!r} is public already: leave private out, or make it private on the Hub first"
            )
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            _create_missing_branch(api, repo, repo_type, revision)
    folder = write(repo)
    with _hub_errors(repo_id):
        return api.upload_folder(
            repo_id=repo,
            repo_type=repo_type,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Say what errors of the client mean.

    Raises:
        LayerFusionError: instead of any of them.
    """
    try:
        yield
    except LayerFusionError:
        raise
    except HfHubHTTPError as error:
        raise LayerFusionError(f"cannot push to {repo_id!r}: {_reason(error)}") from error
    # A ValueError is a bad name, or metadata of the card that the Hub does not take.
    except (ValueError, LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
        raise LayerFusionError(f"cannot push to {repo_id!r}: {error}") from error
    # A broken connection is an error of httpx or httpx2; LFS wraps it in a RuntimeError; Xet has errors of its own.
    except Exception as error:
        raise LayerFusionError(f"cannot push to {repo_id!r}: {_interrupted(error.__cause__ or error)}") from error


def check_shareable(config: LayerFusionConfig) -> None:
    """Refuse a head whose backbone nobody else can find.

    Raises:
        LayerFusionError: if the config names a folder, or nothing, and the backbone is not pushed with the head.
    """
    if config.freeze_backbone and hub_id(config.backbone_name_or_path) is None:
        raise LayerFusionError(
            f"this head's backbone is {config.backbone_name_or_path or 'a model in memory'}, which nobody else has: name "
            "the same backbone on the Hub (push_to_hub(backbone_id=...), --backbone_id, or "
            "model.config.backbone_name_or_path before training), or push it too (include_backbone=True)"
        )


def pin_backbone(backbone_id: str, token: str | bool | None = None) -> str:
    """The current commit of a backbone's repository.

    Raises:
        LayerFusionError: if it is no Hub id, or cannot be found.
    """
    if hub_id(backbone_id) is None:
        raise LayerFusionError(f"backbone_id={backbone_id!r} is no Hub id: give one such as 'facebook/dinov2-small'")
    try:
        return str(HfApi(token=token).model_info(backbone_id).sha)
    except Exception as error:  # httpx's errors among them, which are no OSError
        raise LayerFusionError(f"backbone_id={backbone_id!r} cannot be found on the Hub: {error}") from error


def _create_missing_branch(api: HfApi, repo_id: str, repo_type: str, revision: str) -> None:
    try:
        api.repo_info(repo_id, repo_type=repo_type, revision=revision)
    except RevisionNotFoundError:
        api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)


def _reason(error: HfHubHTTPError) -> str:
    """What an HTTP status means to somebody who pushes, before the server's own words."""
    status = getattr(error.response, "status_code", None)
    words = {
        401: "the token is not accepted (log in again with `hf auth login`, or pass another as token=)",
        403: "this token may not write there (use your own name or an organisation's that you belong to, and a token "
        "with write permission)",
        404: "there is no such repository, or the token may not see it",
    }
    if status in words:
        return f"{words[status]}: {error.server_message or error}"
    if isinstance(error, BadRequestError):
        return f"the Hub refuses it: {error.server_message or error}"
    return _interrupted(error)


def _interrupted(error: BaseException) -> str:
    # The answer to a commit may be lost, too.
    return f"the upload failed, and the repository holds all of it or nothing: push again ({error})"
