"""A Hugging Face Hub for tests: in memory, on 127.0.0.1, for the unmodified client.

    hub = LocalHub().start()
    os.environ.update(hub.environment())  # before huggingface_hub is imported

Model, dataset and Space repositories are commits over trees of files with git's own hashes, with branches, tags and
pull requests, public or private. Large and binary files go through LFS, or through Xet where `xet_folder` is set.
Requests fail when a test asks for it (`failing`). There is no limit, no gate, and no file in a new repository.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml  # huggingface_hub needs it too

LFS_SUFFIXES = {".arrow", ".bin", ".gz", ".npy", ".npz", ".onnx", ".parquet", ".pt", ".safetensors", ".tar", ".zip"}
LFS_SIZE = 10 * 1024 * 1024
DATE = "2026-01-01T00:00:00.000Z"
REF_GROUPS = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}
SPACE_SDKS = ("gradio", "docker", "static")
SPACE_COLORS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")


@dataclass
class Reply:
    """A response; a body that is not bytes is sent as JSON."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class HubError(Exception):
    """Becomes an HTTP status, with the headers by which the client tells one kind of 404 from another."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.reply = Reply({"error": message}, status, {"X-Error-Message": message, "X-Error-Code": code})


@dataclass
class Failure:
    """Requests that are made to fail, see `LocalHub.failing`; `count` of them have failed so far."""

    method: str
    path: re.Pattern[str]
    status: int | None
    after_bytes: int
    times: int | None
    reply_lost: bool
    count: int = 0


@dataclass(frozen=True)
class StoredFile:
    """One version of one file; in LFS, git holds only a pointer to it."""

    data: bytes
    lfs: bool = False
    xet_hash: str | None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def in_git(self) -> bytes:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return pointer.encode() if self.lfs else self.data

    @property
    def oid(self) -> str:
        return _sha1(b"blob %d\0" % len(self.in_git) + self.in_git)

    def entry(self, path: str) -> dict[str, Any]:
        """As tree listings show it."""
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": self.oid, "size": len(self.data)}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.in_git)}
        if self.xet_hash:
            entry["xetHash"] = self.xet_hash
        return entry


@dataclass(frozen=True)
class Commit:
    """One commit and the whole tree at it."""

    sha: str
    title: str
    description: str
    author: str
    parent: str | None
    tree: dict[str, StoredFile]


@dataclass
class PullRequest:
    """Somebody's changes, on a ref of their own; a draft until it has a commit."""

    title: str
    description: str
    author: str
    status: str


class Repo:
    """Commits in the order they were made, and the refs that point at them; it starts with an empty one on `main`."""

    def __init__(self, repo_id: str, private: bool = False, sdk: str | None = None):
        self.id, self.private, self.sdk = repo_id, private, sdk
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        self.lfs: dict[str, bytes] = {}  # by sha256; an upload may stay without a commit
        self.pull_requests: list[PullRequest] = []  # the first is number 1
        self.commit("refs/heads/main", {}, "initial commit")

    def commit(
        self,
        ref: str,
        tree: dict[str, StoredFile],
        title: str,
        description: str = "",
        author: str = "system",
        parent: str | None = None,
    ) -> str:
        listing = [(path, file.oid) for path, file in sorted(tree.items())]
        sha = _sha1(json.dumps([self.id, len(self.commits), title, listing]).encode())
        self.commits[sha] = Commit(sha, title, description, author, parent, tree)
        self.refs[ref] = sha
        return sha

    def ref(self, revision: str) -> str | None:
        candidates = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((ref for ref in candidates if ref in self.refs), None)

    def at(self, revision: str) -> Commit:
        ref = self.ref(revision)
        sha = revision if ref is None else self.refs[ref]
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def open_pull_request(self, pull_request: PullRequest) -> str:
        """Number it; returns its ref, which starts at `main`."""
        self.pull_requests.append(pull_request)
        ref = f"refs/pr/{len(self.pull_requests)}"
        self.refs[ref] = self.refs["refs/heads/main"]
        return ref


class LocalHub:
    """The server and its state.

    Attributes:
        user, token: of the person whose environment the tests run in.
        namespaces: where that person may write; a test may add organisations.
        other_users: names by token; each may write under their own name only.
        repos: by kind (`models`, `datasets`, `spaces`) and id.
        requests: `(method, path)` of every request so far.
        xet_folder: where Xet keeps its chunks, `None` while there is no Xet.
    """

    def __init__(self, user: str = "me", token: str = "hf_local_test_token"):
        self.user, self.token = user, token
        self.namespaces = {user}
        self.other_users = {"hf_token_of_you": "you"}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.xet_folder: Path | None = None
        self.failures: list[Failure] = []
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def start(self) -> LocalHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self) -> dict[str, str]:
        """Variables that send every Hugging Face library here."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token, "HF_HUB_DISABLE_XET": "1"}

    def may_write(self, user: str | None, repo_id: str) -> bool:
        owner = repo_id.split("/")[0]
        return owner == user or (user == self.user and owner in self.namespaces)

    @contextmanager
    def failing(
        self,
        method: str,
        path: str,
        *,
        status: int | None = None,
        after_bytes: int = 0,
        times: int | None = None,
        reply_lost: bool = False,
    ) -> Iterator[Failure]:
        """Make requests fail for a while.

        Args:
            method: of the requests.
            path: regular expression that is searched for in their paths.
            status: answered instead of anything else; `None` drops the connection.
            after_bytes: dropped after that many bytes of an upload were read, or of a download sent.
            times: fail the first that many requests only.
            reply_lost: do as asked, and drop the connection instead of answering.
        """
        failure = Failure(method, re.compile(path), status, after_bytes, times, reply_lost)
        self.failures.append(failure)
        try:
            yield failure
        finally:
            self.failures.remove(failure)

    def upload_folder(self, folder: str | Path, repo_id: str, repo_type: str = "model", **kwargs: Any) -> str:
        """Upload a folder as a repository, through the client as a user would; returns the commit's hash."""
        from huggingface_hub import HfApi  # reads the environment when it is imported

        api = HfApi(endpoint=self.url, token=self.token)
        api.create_repo(repo_id, repo_type=repo_type, exist_ok=True)
        return api.upload_folder(repo_id=repo_id, folder_path=str(folder), repo_type=repo_type, **kwargs).oid


_ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Any]]] = []


def _route(method: str, path: str) -> Callable:
    """Register a handler. `{repo}` stands for kind and id in an API path, `{site}` for those in any other."""
    path = path.replace("{repo}", r"(?P<kind>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)")
    path = path.replace("{site}", r"(?:(?P<kind>datasets|spaces)/)?(?P<id>[^/]+(?:/[^/]+?)?)")
    path = path.replace("{rev}", "(?P<rev>[^/]+)").replace("{oid}", "(?P<oid>[0-9a-f]{64})")

    def register(function: Callable) -> Callable:
        _ROUTES.append((method, re.compile(path), function))
        return function

    return register


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: test output is for tests."""

    def _answer(self) -> None:
        url = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        with self.hub.lock:
            self.hub.requests.append((self.command, url.path))
            failure = self._next_failure(url.path)
        if failure and not failure.status and not failure.reply_lost and self.command != "GET":
            self.rfile.read(min(length, failure.after_bytes))
            self.close_connection = True
            return
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        self.body = self.rfile.read(length)
        if failure and failure.status:
            self._send(HubError(failure.status, "this request was made to fail").reply)
            return
        with self.hub.lock:
            try:
                reply = self._dispatch(url.path)
            except HubError as error:
                reply = error.reply
        if failure and failure.reply_lost:
            self.close_connection = True
            return
        self._send(reply if isinstance(reply, Reply) else Reply(reply), failure.after_bytes if failure else None)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

    def _next_failure(self, path: str) -> Failure | None:
        for failure in self.hub.failures:
            is_left = failure.times is None or failure.count < failure.times
            if is_left and failure.method == self.command and failure.path.search(path):
                failure.count += 1
                return failure
        return None

    def _dispatch(self, path: str) -> Any:
        method = "GET" if self.command == "HEAD" else self.command
        for route_method, pattern, function in _ROUTES:
            match = pattern.fullmatch(path)
            if match and route_method == method:
                return function(self, **{name: value and unquote(value) for name, value in match.groupdict().items()})
        raise HubError(404, f"this hub has no {self.command} {path}")

    def _send(self, reply: Reply, cut_after: int | None = None) -> None:
        """Send a response, or the first bytes of one."""
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        status, headers = reply.status, {"Content-Type": "application/json", **reply.headers}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and status == 200 and self.command == "GET":
            start = int(wanted[1])
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(body) - 1}/{len(body)}"
            body = body[start:]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut_after])
        if cut_after is not None:
            self.close_connection = True

    # ---- for the routes ----------------------------------------------------------------------------------------

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def caller(self, required: bool = True) -> str | None:
        """Name of the user who asks, `None` without a token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if token:
            names = {**self.hub.other_users, self.hub.token: self.hub.user}
            if token not in names:
                raise HubError(401, "Invalid credentials in Authorization header")
            return names[token]
        if required:
            raise HubError(401, "Invalid username or password.")
        return None

    def repo(self, kind: str | None, repo_id: str) -> Repo:
        """A repository that the caller may see."""
        user, repo = self.caller(required=False), self.hub.repos.get((kind or "models", repo_id))
        if repo is None or (repo.private and not self.hub.may_write(user, repo_id)):
            # The Hub does not say whether it exists.
            status, message = (404, "Repository not found") if user else (401, "Invalid username or password.")
            raise HubError(status, message, "RepoNotFound")
        return repo

    def own_repo(self, kind: str | None, repo_id: str) -> Repo:
        """A repository that the caller may write to."""
        user, repo = self.caller(), self.repo(kind, repo_id)
        if not self.hub.may_write(user, repo_id):
            raise HubError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    def repo_to_commit_to(self, kind: str | None, repo_id: str, revision: str) -> Repo:
        """Likewise; a pull request may be anybody's who sees the repository."""
        self.caller()
        is_pull_request = self.query.get("create_pr") or revision.startswith("refs/pr/")
        return self.repo(kind, repo_id) if is_pull_request else self.own_repo(kind, repo_id)

    def site(self, kind: str | None, repo_id: str) -> str:
        return f"{self.hub.url}/{'' if kind in (None, 'models') else f'{kind}/'}{repo_id}"


# ---- repositories ----------------------------------------------------------------------------------------------


@_route("GET", "/api/whoami-v2")
def _whoami(h: _Handler) -> Any:
    name = h.caller()
    organisations = sorted(h.hub.namespaces - {name}) if name == h.hub.user else []
    token = {"type": "access_token", "accessToken": {"displayName": "tests", "role": "write"}}
    return {"type": "user", "name": name, "orgs": [{"name": owner} for owner in organisations], "auth": token}


def _named_repo(h: _Handler) -> tuple[str, str]:
    """Kind and id in the body of a request to create or delete."""
    wanted = h.json()
    return (wanted.get("type") or "model") + "s", f"{wanted.get('organization') or h.caller()}/{wanted['name']}"


@_route("POST", "/api/repos/create")
def _create(h: _Handler) -> Any:
    user, wanted = h.caller(), h.json()
    kind, repo_id = _named_repo(h)
    if not h.hub.may_write(user, repo_id):
        owner = repo_id.split("/")[0]
        raise HubError(403, f"You don't have the rights to create a repo under the namespace {owner}")
    if kind == "spaces" and wanted.get("sdk") not in SPACE_SDKS:
        raise HubError(400, f"sdk must be one of {', '.join(SPACE_SDKS)}")
    if (kind, repo_id) in h.hub.repos:
        return Reply({"error": "You already created this repo", "url": h.site(kind, repo_id)}, 409)
    is_private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
    h.hub.repos[kind, repo_id] = Repo(repo_id, is_private, wanted.get("sdk"))
    return {"url": h.site(kind, repo_id), "name": repo_id}


@_route("DELETE", "/api/repos/delete")
def _delete(h: _Handler) -> Any:
    kind, repo_id = _named_repo(h)
    h.own_repo(kind, repo_id)
    del h.hub.repos[kind, repo_id]
    return {}


@_route("PUT", "/api/{repo}/settings")
def _settings(h: _Handler, kind: str, id: str) -> Any:
    repo, wanted = h.own_repo(kind, id), h.json()
    repo.private = wanted["visibility"] == "private" if "visibility" in wanted else wanted.get("private", repo.private)
    return {"private": repo.private}


@_route("GET", "/api/{repo}(?:/revision/{rev})?")
def _info(h: _Handler, kind: str, id: str, rev: str | None) -> Any:
    repo = h.repo(kind, id)
    commit = repo.at(rev or "main")
    info = {"id": id, "author": id.split("/")[0], "sha": commit.sha, "lastModified": DATE, "createdAt": DATE}
    info |= {"private": repo.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
    if kind == "spaces":
        info["sdk"] = repo.sdk
    return {**info, "siblings": [{"rfilename": path} for path in sorted(commit.tree)]}


def _listing(tree: dict[str, StoredFile]) -> dict[str, dict[str, Any]]:
    """Every folder and file of a tree, by path."""
    folders = {str(parent) for path in tree for parent in Path(path).parents} - {"."}
    entries = {path: {"type": "directory", "path": path, "oid": _sha1(path.encode()), "size": 0} for path in folders}
    return entries | {path: file.entry(path) for path, file in tree.items()}


@_route("GET", "/api/{repo}/tree/{rev}(?:/(?P<path>.*))?")
def _tree(h: _Handler, kind: str, id: str, rev: str, path: str | None) -> Any:
    root = f"{path}/" if path else ""
    below = {p: e for p, e in sorted(_listing(h.repo(kind, id).at(rev).tree).items()) if p.startswith(root)}
    if path and not below:
        raise HubError(404, f"{path} does not exist on {rev}", "EntryNotFound")
    recursive = h.query.get("recursive", "").lower() in ("true", "1")
    return [entry for p, entry in below.items() if recursive or "/" not in p.removeprefix(root)]


@_route("POST", "/api/{repo}/paths-info/{rev}")
def _paths_info(h: _Handler, kind: str, id: str, rev: str) -> Any:
    entries = _listing(h.repo(kind, id).at(rev).tree)
    return [entries[path] for path in parse_qs(h.body.decode()).get("paths", []) if path in entries]


@_route("GET", "/api/{repo}/commits/{rev}")
def _commits(h: _Handler, kind: str, id: str, rev: str) -> Any:
    repo = h.repo(kind, id)
    log, commit = [], repo.at(rev)
    while True:
        entry = {"id": commit.sha, "title": commit.title, "message": commit.description, "date": DATE}
        log.append({**entry, "authors": [{"user": commit.author}]})
        if commit.parent is None:
            return log
        commit = repo.commits[commit.parent]


@_route("GET", "/api/{repo}/refs")
def _refs(h: _Handler, kind: str, id: str) -> Any:
    listed: dict[str, list] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    for ref, sha in h.repo(kind, id).refs.items():
        _, group, name = ref.split("/", 2)
        listed[REF_GROUPS[group]].append({"name": name, "ref": ref, "targetCommit": sha})
    return listed


@_route("POST", "/api/{repo}/branch/{rev}")
def _new_branch(h: _Handler, kind: str, id: str, rev: str) -> Any:
    return _point(h.own_repo(kind, id), f"refs/heads/{rev}", h.json().get("startingPoint", "main"))


@_route("POST", "/api/{repo}/tag/{rev}")
def _new_tag(h: _Handler, kind: str, id: str, rev: str) -> Any:
    return _point(h.own_repo(kind, id), f"refs/tags/{h.json()['tag']}", rev)


def _point(repo: Repo, ref: str, revision: str) -> Any:
    if ref in repo.refs:
        raise HubError(409, f"Reference already exists: {ref}")
    repo.refs[ref] = repo.at(revision).sha
    return {}


@_route("DELETE", "/api/{repo}/(?P<group>branch|tag)/{rev}")
def _delete_ref(h: _Handler, kind: str, id: str, group: str, rev: str) -> Any:
    repo, ref = h.own_repo(kind, id), f"refs/{'heads' if group == 'branch' else 'tags'}/{rev}"
    if repo.refs.pop(ref, None) is None:
        raise HubError(404, f"Reference does not exist: {ref}", "RevisionNotFound")
    return {}


# ---- pull requests ---------------------------------------------------------------------------------------------


def _discussion(kind: str, repo: Repo, number: int) -> dict[str, Any]:
    found = repo.pull_requests[number - 1]
    shown = {"num": number, "title": found.title, "status": found.status, "author": {"name": found.author}}
    comment = {"edited": False, "hidden": False, "latest": {"raw": found.description}}
    opened = {"id": str(number), "type": "comment", "createdAt": DATE, "author": shown["author"], "data": comment}
    shown |= {"isPullRequest": True, "createdAt": DATE, "repo": {"name": repo.id, "type": kind.removesuffix("s")}}
    return {**shown, "events": [opened], "changes": {"base": "refs/heads/main"}, "filesWithConflicts": [], "diff": ""}


@_route("GET", "/api/{repo}/discussions")
def _discussions(h: _Handler, kind: str, id: str) -> Any:
    repo = h.repo(kind, id)
    listed = [_discussion(kind, repo, number + 1) for number in range(len(repo.pull_requests))]
    return {"discussions": listed, "count": len(listed), "start": 0}


@_route("POST", "/api/{repo}/discussions")
def _new_discussion(h: _Handler, kind: str, id: str) -> Any:
    user, repo, wanted = h.caller(), h.repo(kind, id), h.json()
    if not wanted.get("pullRequest"):
        raise HubError(400, "this hub has pull requests only")
    repo.open_pull_request(PullRequest(wanted["title"], wanted.get("description", ""), str(user), "draft"))
    return {"num": len(repo.pull_requests)}


@_route("GET", "/api/{repo}/discussions/(?P<number>[0-9]+)")
def _one_discussion(h: _Handler, kind: str, id: str, number: str) -> Any:
    repo = h.repo(kind, id)
    if not 1 <= int(number) <= len(repo.pull_requests):
        raise HubError(404, f"there is no discussion {number}")
    return _discussion(kind, repo, int(number))


# ---- upload ----------------------------------------------------------------------------------------------------


@_route("POST", "/api/validate-yaml")
def _validate_yaml(h: _Handler) -> Any:
    content, kind = h.json()["content"], h.json().get("repoType")
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", content, re.DOTALL)
    if match is None:
        return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
    try:
        values = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        values, errors = {}, [f"YAML Metadata Error: {error}"]
    else:
        errors = _metadata_errors(values, is_space=kind == "space")
    return Reply({"errors": [{"message": message} for message in errors], "warnings": []}, 400 if errors else 200)


def _metadata_errors(values: Any, is_space: bool) -> list[str]:
    """The part of the Hub's rules that a card of this project could break."""
    if not isinstance(values, dict):
        return ["the metadata must be a mapping"]
    errors = []
    if is_space:
        colors = (None, *SPACE_COLORS)
        allowed = {"sdk": SPACE_SDKS, "colorFrom": colors, "colorTo": colors}
        errors += [f'"{key}" must be one of {names}' for key, names in allowed.items() if values.get(key) not in names]
    for key in ("library_name", "pipeline_tag", "title"):
        if not isinstance(values.get(key, ""), str):
            errors.append(f'"{key}" must be a string')
    for key in ("tags", "datasets", "metrics", "base_model"):
        names = values.get(key, [])
        if not all(isinstance(name, str) for name in (names if isinstance(names, list) else [names])):
            errors.append(f'"{key}" must hold strings')
    for entry in values.get("model-index", []):
        for result in entry["results"]:
            given = {f"{part}.{key}" for part in ("task", "dataset") for key in result.get(part, {})}
            missing = sorted({"task.type", "dataset.type", "dataset.name"} - given)
            missing += [
                f"metrics.{key}" for metric in result["metrics"] for key in ("type", "value") if key not in metric
            ]
            errors += [f'"model-index[0].results[0].{key}" is required' for key in missing]
    return errors


@_route("POST", "/api/{repo}/preupload/{rev}")
def _preupload(h: _Handler, kind: str, id: str, rev: str) -> Any:
    tree = h.repo_to_commit_to(kind, id, rev).at(rev).tree
    files = []
    for file in h.json()["files"]:
        is_lfs = file["size"] >= LFS_SIZE or Path(file["path"]).suffix in LFS_SUFFIXES
        stored = tree.get(file["path"])
        # By the hash of what is there, the client finds files that have not changed.
        oid = stored and (stored.sha256 if stored.lfs else stored.oid)
        mode = "lfs" if is_lfs else "regular"
        files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return {"files": files}


@_route("POST", r"/{site}\.git/info/lfs/objects/batch")
def _lfs_batch(h: _Handler, kind: str | None, id: str) -> Any:
    h.caller()
    repo, objects = h.repo(kind, id), h.json()["objects"]
    if h.hub.xet_folder and "xet" in h.json()["transfers"]:
        return {"transfer": "xet", "objects": objects}
    for item in objects:
        if item["oid"] not in repo.lfs:
            href = f"{h.hub.url}/lfs/{kind or 'models'}/{id}/{item['oid']}"
            verify = {"href": f"{href}/verify", "header": {}}
            item["actions"] = {"upload": {"href": href, "header": {}}, "verify": verify}
    return {"transfer": "basic", "objects": objects}


@_route("PUT", "/lfs/{repo}/{oid}")
def _lfs_upload(h: _Handler, kind: str, id: str, oid: str) -> Any:
    if hashlib.sha256(h.body).hexdigest() != oid:
        raise HubError(400, "the content does not have the promised sha256")
    h.hub.repos[kind, id].lfs[oid] = h.body  # the address is the permission, as in a signed one
    return {}


@_route("POST", "/lfs/{repo}/{oid}/verify")
def _lfs_verify(h: _Handler, kind: str, id: str, oid: str) -> Any:
    h.caller()
    stored = h.repo(kind, id).lfs.get(oid)
    if stored is None or len(stored) != h.json()["size"]:
        raise HubError(404, "there is no such object, or it has another size")
    return {}


@_route("POST", "/api/{repo}/commit/{rev}")
def _commit(h: _Handler, kind: str, id: str, rev: str) -> Any:
    user, repo = h.caller(), h.repo_to_commit_to(kind, id, rev)
    header, *operations = [json.loads(line) for line in h.body.splitlines() if line.strip()]
    title, description = header["value"]["summary"], header["value"].get("description", "")
    parent, ref, reply = repo.at(rev), repo.ref(rev), {}
    if header["value"].get("parentCommit") not in (None, parent.sha):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    tree = dict(parent.tree)
    for operation in operations:
        _apply(h, repo, tree, operation["key"], operation["value"])
    if h.query.get("create_pr"):
        ref = repo.open_pull_request(PullRequest(title, description, str(user), "open"))
        reply = {"pullRequestUrl": f"{h.site(kind, id)}/discussions/{len(repo.pull_requests)}"}
    if ref is None or ref.startswith("refs/tags/"):
        raise HubError(400, f"cannot commit to {rev}: not a branch")
    sha = repo.commit(ref, tree, title, description, str(user), parent.sha)
    return {"success": True, "commitOid": sha, "commitUrl": f"{h.site(kind, id)}/commit/{sha}", **reply}


def _apply(h: _Handler, repo: Repo, tree: dict[str, StoredFile], key: str, value: dict[str, Any]) -> None:
    """Carry out one operation of a commit."""
    path = value["path"]
    if key == "file":
        tree[path] = StoredFile(base64.b64decode(value["content"]))
    elif key == "lfsFile":
        xet_hash = None
        if value["oid"] not in repo.lfs:
            xet_hash, repo.lfs[value["oid"]] = _fetch_from_xet(h.hub, value)
        tree[path] = StoredFile(repo.lfs[value["oid"]], lfs=True, xet_hash=xet_hash)
    elif key in ("deletedFile", "deletedFolder"):
        gone = [name for name in tree if name == path or name.startswith(f"{path.rstrip('/')}/")]
        if not gone:
            raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        for name in gone:
            del tree[name]
    else:
        raise HubError(400, f"this hub has no operation {key}")


# ---- Xet: the client cuts files into chunks and keeps them itself, in a folder of this hub's -------------------------


@_route("GET", "/api/{repo}/xet-(?P<mode>read|write)-token/{rev}")
def _xet_token(h: _Handler, kind: str, id: str, mode: str, rev: str) -> Any:
    if mode == "read":
        h.repo(kind, id)
    else:
        h.repo_to_commit_to(kind, id, rev)
    if h.hub.xet_folder is None:
        raise HubError(404, "this hub has no Xet")
    token = {"casUrl": f"local://{h.hub.xet_folder}", "accessToken": "xet_local_test_token", "exp": 2**31}
    names = {"casUrl": "X-Xet-Cas-Url", "accessToken": "X-Xet-Access-Token", "exp": "X-Xet-Token-Expiration"}
    return Reply(token, headers={names[key]: str(value) for key, value in token.items()})


def _files_in_shard(shard: bytes) -> Iterator[tuple[str, str]]:
    """Sha256 and Xet hash of the files that a shard describes (https://huggingface.co/docs/xet/shard)."""
    position, record = 48, 48  # behind the header; everything is made of records of one size
    while (header := shard[position : position + record])[:32] != b"\xff" * 32:
        file_hash, flags, segments = struct.unpack("<32sII8x", header)
        has_verification, has_sha256 = flags >> 31 & 1, flags >> 30 & 1
        position += record * (1 + segments * (1 + has_verification))
        if has_sha256:
            yield _xet_hex(shard[position : position + 32]), _xet_hex(file_hash)
            position += record


def _xet_hex(digest: bytes) -> str:
    """Xet writes hashes as four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))


def _fetch_from_xet(hub: LocalHub, value: dict[str, Any]) -> tuple[str, bytes]:
    """Xet hash and content of a file in a commit, of which the client sends sha256 and size."""
    shards = hub.xet_folder.rglob("shards/*.mdb") if hub.xet_folder else ()
    hashes = dict(pair for shard in shards for pair in _files_in_shard(shard.read_bytes()))
    if value["oid"] not in hashes:
        raise HubError(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
    import hf_xet  # only where it uploaded something

    xet_hash = hashes[value["oid"]]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "file")
        with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{hub.xet_folder}") as group:
            group.start_download_file(hf_xet.XetFileInfo(xet_hash, value["size"]), str(target))
        return xet_hash, target.read_bytes()


# ---- download --------------------------------------------------------------------------------------------------


@_route("GET", "/{site}/resolve/{rev}/(?P<path>.+)")
def _resolve(h: _Handler, kind: str | None, id: str, rev: str, path: str) -> Any:
    commit = h.repo(kind, id).at(rev)
    if path not in commit.tree:
        raise HubError(404, "Entry not found", "EntryNotFound")
    file = commit.tree[path]
    headers = {"X-Repo-Commit": commit.sha, "Content-Type": "application/octet-stream"}
    if not file.lfs:
        return Reply(file.data, headers={**headers, "ETag": f'"{file.oid}"'})
    headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data))}
    if file.xet_hash:
        token = f"{h.hub.url}/api/{kind or 'models'}/{id}/xet-read-token/{commit.sha}"
        headers |= {"X-Xet-Hash": file.xet_hash, "Link": f'<{token}>; rel="xet-auth"'}
    if h.command == "HEAD":
        # The Hub redirects to another host, where a HEAD does not follow; here it would, and lose these headers.
        return Reply(b"", headers=headers)
    return Reply(b"", 302, {**headers, "Location": f"{h.hub.url}/lfs/{kind or 'models'}/{id}/{file.sha256}"})


@_route("GET", "/lfs/{repo}/{oid}")
def _lfs_download(h: _Handler, kind: str, id: str, oid: str) -> Any:
    headers = {"ETag": f'"{oid}"', "Content-Type": "application/octet-stream"}
    return Reply(h.hub.repos[kind, id].lfs[oid], headers=headers)


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
