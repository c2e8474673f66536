"""The tests' own Hub, asked by the unmodified client: who sees and may do what, and requests that fail on demand."""

import re
import time
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import BadRequestError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

YOUR_TOKEN = "hf_token_of_you"
WEIGHTS = bytes(range(256)) * 400


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "folder" / "part").mkdir(parents=True)
    (tmp_path / "folder" / "config.json").write_text("{}")
    (tmp_path / "folder" / "part" / "model.safetensors").write_bytes(WEIGHTS)
    return tmp_path / "folder"


@pytest.fixture
def repo_id(request):
    """A name for one test."""
    return "me/server-" + "-".join(re.findall("[A-Za-z0-9]+", request.node.name))[:80].strip("-")


@pytest.fixture
def repo(hub, folder, repo_id):
    """A repository with two files, as the server keeps it."""
    hub.upload_folder(folder, repo_id, commit_message="two files")
    return hub.repos["models", repo_id]


def ask(hub, path, method="GET", token=None, **headers):
    """Send a request without the client; returns the response, read."""
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    connection = HTTPConnection(urlsplit(hub.url).netloc)
    try:
        connection.request(method, path, b"{}" if method == "POST" else None, headers)
        response = connection.getresponse()
        response.content = response.read()
        return response
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("token", "public", "private", "missing"),
    [
        ("hf_local_test_token", 200, 200, 404),
        (YOUR_TOKEN, 200, 404, 404),
        (None, 200, 401, 401),
        ("hf_wrong", 401, 401, 401),
    ],
    ids=["owner", "other", "nobody", "wrong"],
)
def test_who_sees(hub, repo, token, public, private, missing):
    """What is private and what does not exist look the same from outside."""
    found = []
    for is_private, name in ((False, repo.id), (True, repo.id), (False, "me/no-such-repo")):
        repo.private = is_private
        info = ask(hub, f"/api/models/{name}", token=token)
        assert ask(hub, f"/{name}/resolve/main/config.json", token=token).status == info.status
        if info.status != 200 and token != "hf_wrong":
            assert info.headers["X-Error-Code"] == "RepoNotFound"
        found.append(info.status)
    assert found == [public, private, missing]


def test_who_writes(hub, repo, folder):
    you = HfApi(token=YOUR_TOKEN)
    assert (you.whoami()["name"], HfApi().whoami()["name"]) == ("you", "me")
    (folder / "config.json").write_text("[]")
    refused = [
        lambda: you.create_repo("me/another"),
        lambda: you.upload_folder(repo_id=repo.id, folder_path=folder),
        lambda: you.create_branch(repo.id, branch="next"),
        lambda: you.delete_repo(repo.id),
        lambda: you.update_repo_settings(repo.id, private=True),
    ]
    for attempt in refused:
        with pytest.raises(HfHubHTTPError, match="403"):
            attempt()
    assert list(repo.refs) == ["refs/heads/main"]
    assert repo.at("main").title == "two files"
    assert you.upload_folder(repo_id=repo.id, folder_path=folder, create_pr=True).pr_num == 1


def test_organisation(hub, repo_id, monkeypatch):
    monkeypatch.setattr(hub, "namespaces", {*hub.namespaces, "lab"})
    repo_id = repo_id.replace("me/", "lab/")
    assert HfApi().create_repo(repo_id).repo_id == repo_id
    assert [entry["name"] for entry in HfApi().whoami()["orgs"]] == ["lab"]


def test_space(hub, folder, repo_id):
    api = HfApi()
    with pytest.raises(BadRequestError, match="sdk"):
        api.create_repo(repo_id, repo_type="space", space_sdk="streamlit")
    api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=True)
    commit = api.upload_folder(repo_id=repo_id, repo_type="space", folder_path=folder)
    assert str(commit.commit_url).startswith(f"{hub.url}/spaces/{repo_id}/commit/")
    info = api.space_info(repo_id)
    assert (info.sdk, info.private, info.sha) == ("gradio", True, commit.oid)
    tree = {entry.path for entry in api.list_repo_tree(repo_id, repo_type="space", recursive=True)}
    assert tree == {"config.json", "part", "part/model.safetensors"}
    local = snapshot_download(repo_id, repo_type="space")
    assert Path(local, "part", "model.safetensors").read_bytes() == WEIGHTS
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(repo_id)


def test_commits(repo):
    """Additions, deletions, a description, and a parent that has moved on."""
    api, first = HfApi(), repo.refs["refs/heads/main"]
    operations = [CommitOperationAdd("notes.txt", b"hello"), CommitOperationDelete("part/")]
    commit = api.create_commit(
        repo.id, operations, commit_message="title", commit_description="why", parent_commit=first
    )
    assert repo.at("main").tree.keys() == {"config.json", "notes.txt"}
    newest = api.list_repo_commits(repo.id)[0]
    assert (newest.commit_id, newest.title, newest.message, newest.authors) == (commit.oid, "title", "why", ["me"])
    operations = [CommitOperationDelete("notes.txt")]
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(repo.id, operations, commit_message="late", parent_commit=first)
    with pytest.raises(HfHubHTTPError, match="404"):
        api.create_commit(repo.id, [CommitOperationDelete("no-such-file")], commit_message="nothing")


def test_unchanged_files(hub, repo, folder):
    """Are neither sent again nor committed."""
    before = len(hub.requests)
    assert hub.upload_folder(folder, repo.id) == repo.refs["refs/heads/main"]
    assert not [path for method, path in hub.requests[before:] if method == "PUT" or "/commit/" in path]


def test_refs(repo):
    api = HfApi()
    api.create_branch(repo.id, branch="a/b")
    api.create_tag(repo.id, tag="v1")
    refs = api.list_repo_refs(repo.id)
    assert ([ref.name for ref in refs.branches], [ref.name for ref in refs.tags]) == (["main", "a/b"], ["v1"])
    api.delete_branch(repo.id, branch="a/b")
    api.delete_tag(repo.id, tag="v1")
    assert list(repo.refs) == ["refs/heads/main"]
    with pytest.raises(RevisionNotFoundError):
        api.model_info(repo.id, revision="v1")


def test_pull_request_opened_first(repo, folder):
    """As the client does where files go through Xet."""
    opened = HfApi(token=YOUR_TOKEN).create_pull_request(repo.id, title="better", description="because")
    assert (opened.status, opened.git_reference, opened.events[0].content) == ("draft", "refs/pr/1", "because")
    (folder / "config.json").write_text("[]")
    HfApi(token=YOUR_TOKEN).upload_folder(repo_id=repo.id, folder_path=folder, revision="refs/pr/1")
    assert repo.at("refs/pr/1").tree["config.json"].data == b"[]"
    assert repo.at("main").tree["config.json"].data == b"{}"


def test_deletion(hub, repo):
    HfApi().delete_repo(repo.id)
    assert ("models", repo.id) not in hub.repos
    with pytest.raises(RepositoryNotFoundError):
        HfApi().delete_repo(repo.id)


@pytest.mark.parametrize(
    ("kind", "metadata", "complaint"),
    [
        ("model", "tags: [a, b]\nbase_model: me/backbone", None),
        ("model", "tags: [a, b", "YAML Metadata Error"),
        ("model", "- a", "must be a mapping"),
        ("model", "library_name: [a]", '"library_name" must be a string'),
        ("model", "tags: [1]", '"tags" must hold strings'),
        ("model", "model-index: [{name: a, results: [{task: {type: b}, metrics: [{type: c}]}]}]", "metrics.value"),
        ("space", "sdk: gradio\ncolorFrom: indigo", None),
        ("space", "title: no sdk", '"sdk" must be one of'),
        ("space", "sdk: gradio\ncolorTo: mauve", '"colorTo" must be one of'),
    ],
)
def test_metadata_of_a_card(repo_id, kind, metadata, complaint):
    """Is checked before anything is uploaded."""
    api = HfApi()
    api.create_repo(repo_id, repo_type=kind, space_sdk="gradio" if kind == "space" else None)
    operations = [CommitOperationAdd("README.md", f"---\n{metadata}\n---\n\n# Title\n".encode())]
    if complaint is None:
        api.create_commit(repo_id, operations, commit_message="card", repo_type=kind)
    else:
        with pytest.raises(ValueError, match=complaint):
            api.create_commit(repo_id, operations, commit_message="card", repo_type=kind)


def test_requests_that_fail(hub, repo):
    address = f"/api/models/{repo.id}"
    with hub.failing("GET", f"{repo.id}$", status=503, times=1) as failure:
        assert [ask(hub, address).status for _ in range(2)] == [503, 200]
        assert ask(hub, f"{address}/refs").status == 200, "only what was named"
    assert failure.count == 1
    with hub.failing("POST", "/branch/", after_bytes=1), pytest.raises(ConnectionError):
        ask(hub, f"{address}/branch/cut", "POST", token=hub.token)
    with hub.failing("POST", "/branch/", reply_lost=True), pytest.raises(ConnectionError):
        ask(hub, f"{address}/branch/lost", "POST", token=hub.token)
    assert list(repo.refs) == ["refs/heads/main", "refs/heads/lost"]


def test_download_that_is_cut_off(hub, repo, tmp_path, monkeypatch):
    """Goes on at the byte where it stopped; older clients want to be asked again."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with hub.failing("GET", "/lfs/", after_bytes=60_000, times=1) as failure, suppress(Exception):
        hf_hub_download(repo.id, "part/model.safetensors", cache_dir=tmp_path)
    assert failure.count == 1
    assert Path(hf_hub_download(repo.id, "part/model.safetensors", cache_dir=tmp_path)).read_bytes() == WEIGHTS
    address = next(path for _, path in reversed(hub.requests) if path.startswith("/lfs/"))
    rest = ask(hub, address, Range="bytes=1000-")
    assert (rest.status, rest.content) == (206, WEIGHTS[1000:])


@pytest.mark.parametrize("downloads_by_xet", [True, False])
def test_xet(hub, folder, repo_id, tmp_path, monkeypatch, downloads_by_xet):
    """A file that came through Xet can be fetched with and without it."""
    pytest.importorskip("hf_xet", reason="needs hf_xet")
    (tmp_path / "xet").mkdir()
    monkeypatch.setattr(hub, "xet_folder", tmp_path / "xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.upload_folder(folder, repo_id)
    assert hub.repos["models", repo_id].at("main").tree["part/model.safetensors"].data == WEIGHTS
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not downloads_by_xet)
    before = len(hub.requests)
    path = hf_hub_download(repo_id, "part/model.safetensors", cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == WEIGHTS
    assert any("xet-read-token" in path for _, path in hub.requests[before:]) == downloads_by_xet
