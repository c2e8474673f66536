"""A Hugging Face Hub for tests: standard library only, in memory, on 127.0.0.1, for the unmodified client.

    hub = LocalHub().start()
    os.environ.update(hub.environment())  # before huggingface_hub is imported

Model and dataset repositories are commits over trees of files with git's own hashes, with branches, tags and pull
requests; large and binary files go through LFS. There is no Xet, one user, and no limit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = {".arrow", ".bin", ".gz", ".npy", ".npz", ".onnx", ".parquet", ".pt", ".safetensors", ".tar", ".zip"}
LFS_SIZE = 10 * 1024 * 1024
DATE = "2026-01-01T00:00:00.000Z"
REF_GROUPS = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}


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


@dataclass(frozen=True)
class StoredFile:
    """One version of one file; in LFS, git holds only a pointer to it."""

    data: bytes
    lfs: bool = False

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
        return entry


@dataclass(frozen=True)
class Commit:
    """One commit and the whole tree at it."""

    sha: str
    title: str
    tree: dict[str, StoredFile]


class Repo:
    """Commits in the order they were made, and the refs that point at them; it starts with an empty one on `main`."""

    def __init__(self, repo_id: str):
        self.id = repo_id
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        self.commit("refs/heads/main", {}, "initial commit")

    def commit(self, ref: str, tree: dict[str, StoredFile], title: str) -> str:
        listing = [(path, file.oid) for path, file in sorted(tree.items())]
        sha = _sha1(json.dumps([self.id, len(self.commits), title, listing]).encode())
        self.commits[sha] = Commit(sha, title, tree)
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


class LocalHub:
    """The server and its state; the one user owns the namespace of that name.

    Attributes:
        repos: by kind (`models`, `datasets`) and id.
        requests: `(method, path)` of every request so far.
    """

    def __init__(self, user: str = "me", token: str = "hf_local_test_token"):
        self.user, self.token = user, token
        self.namespaces = {user}  # a test may add organisations that the user writes to
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
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

    def upload_folder(self, folder: str | Path, repo_id: str, repo_type: str = "model", **kwargs: Any) -> str:
        """Upload a folder as a repository, through the client as a user would; returns the commit's hash."""
        from huggingface_hub import HfApi  # reads the environment when it is imported

        api = HfApi(endpoint=self.url, token=self.token)
        api.create_repo(repo_id, repo_type=repo_type, exist_ok=True)
        return api.upload_folder(repo_id=repo_id, folder_path=str(folder), repo_type=repo_type, **kwargs).oid


_ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Any]]] = []


def _route(method: str, path: str) -> Callable:
    """Register a handler. `{repo}` stands for kind and id in an API path, `{site}` for those in any other."""
    path = path.replace("{repo}", r"(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)")
    path = path.replace("{site}", r"(?:(?P<kind>datasets)/)?(?P<id>[^/]+(?:/[^/]+?)?)")
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
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.hub.lock:
            self.hub.requests.append((self.command, url.path))
            try:
                reply = self._dispatch(url.path)
            except HubError as error:
                reply = error.reply
        self._send(reply if isinstance(reply, Reply) else Reply(reply))

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _dispatch(self, path: str) -> Any:
        method = "GET" if self.command == "HEAD" else self.command
        for route_method, pattern, function in _ROUTES:
            match = pattern.fullmatch(path)
            if match and route_method == method:
                return function(self, **{name: value and unquote(value) for name, value in match.groupdict().items()})
        raise HubError(404, f"this hub has no {self.command} {path}")

    def _send(self, reply: Reply) -> None:
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # ---- for the routes ----------------------------------------------------------------------------------------

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def check_user(self, required: bool = True) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if token != self.hub.token and (token or required):
            raise HubError(401, "Invalid credentials in Authorization header")

    def repo(self, kind: str | None, repo_id: str, write: bool = False) -> Repo:
        self.check_user(required=write)
        if (kind or "models", repo_id) not in self.hub.repos:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return self.hub.repos[kind or "models", repo_id]

    def site(self, kind: str, repo_id: str) -> str:
        return f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{repo_id}"


# ---- repositories ----------------------------------------------------------------------------------------------


@_route("GET", "/api/whoami-v2")
def _whoami(h: _Handler) -> Any:
    h.check_user()
    return {"type": "user", "name": h.hub.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}}


@_route("POST", "/api/repos/create")
def _create(h: _Handler) -> Any:
    h.check_user()
    wanted = h.json()
    kind, owner = wanted.get("type", "model") + "s", wanted.get("organization") or h.hub.user
    repo_id = f"{owner}/{wanted['name']}"
    if owner not in h.hub.namespaces:
        raise HubError(403, f"You don't have the rights to create a repo under the namespace {owner}")
    if (kind, repo_id) in h.hub.repos:
        return Reply({"error": "You already created this repo", "url": h.site(kind, repo_id)}, 409)
    h.hub.repos[kind, repo_id] = Repo(repo_id)
    return {"url": h.site(kind, repo_id), "name": repo_id}


@_route("GET", "/api/{repo}(?:/revision/{rev})?")
def _info(h: _Handler, kind: str, id: str, rev: str | None) -> Any:
    commit = h.repo(kind, id).at(rev or "main")
    info = {"id": id, "author": id.split("/")[0], "sha": commit.sha, "lastModified": DATE, "createdAt": DATE}
    info |= {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
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


@_route("GET", "/api/{repo}/refs")
def _refs(h: _Handler, kind: str, id: str) -> Any:
    listed: dict[str, list] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    for ref, sha in h.repo(kind, id).refs.items():
        _, group, name = ref.split("/", 2)
        listed[REF_GROUPS[group]].append({"name": name, "ref": ref, "targetCommit": sha})
    return listed


@_route("POST", "/api/{repo}/branch/{rev}")
def _new_branch(h: _Handler, kind: str, id: str, rev: str) -> Any:
    return _point(h.repo(kind, id, write=True), f"refs/heads/{rev}", h.json().get("startingPoint", "main"))


@_route("POST", "/api/{repo}/tag/{rev}")
def _new_tag(h: _Handler, kind: str, id: str, rev: str) -> Any:
    return _point(h.repo(kind, id, write=True), f"refs/tags/{h.json()['tag']}", rev)


def _point(repo: Repo, ref: str, revision: str) -> Any:
    if ref in repo.refs:
        raise HubError(409, f"Reference already exists: {ref}")
    repo.refs[ref] = repo.at(revision).sha
    return {}


# ---- upload ----------------------------------------------------------------------------------------------------


@_route("POST", "/api/validate-yaml")
def _validate_yaml(h: _Handler) -> Any:
    return {"errors": [], "warnings": []}


@_route("POST", "/api/{repo}/preupload/{rev}")
def _preupload(h: _Handler, kind: str, id: str, rev: str) -> Any:
    h.repo(kind, id, write=True)
    files = h.json()["files"]
    for file in files:
        is_lfs = file["size"] >= LFS_SIZE or Path(file["path"]).suffix in LFS_SUFFIXES
        file |= {"uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False, "oid": None}
    return {"files": files}


@_route("POST", r"/{site}\.git/info/lfs/objects/batch")
def _lfs_batch(h: _Handler, kind: str | None, id: str) -> Any:
    h.repo(kind, id, write=True)
    objects = h.json()["objects"]
    for item in objects:
        item["actions"] = {"upload": {"href": f"{h.hub.url}/lfs/{item['oid']}", "header": {}}}
    return {"transfer": "basic", "objects": objects}


@_route("PUT", "/lfs/{oid}")
def _lfs_upload(h: _Handler, oid: str) -> Any:
    if hashlib.sha256(h.body).hexdigest() != oid:
        raise HubError(400, "the content does not have the promised sha256")
    h.hub.lfs[oid] = h.body
    return {}


@_route("POST", "/api/{repo}/commit/{rev}")
def _commit(h: _Handler, kind: str, id: str, rev: str) -> Any:
    repo = h.repo(kind, id, write=True)
    header, *operations = [json.loads(line) for line in h.body.splitlines() if line.strip()]
    tree, ref, reply = dict(repo.at(rev).tree), repo.ref(rev), {}
    for operation in operations:
        value, path = operation["value"], operation["value"]["path"]
        if operation["key"] == "file":
            tree[path] = StoredFile(base64.b64decode(value["content"]))
        elif operation["key"] == "lfsFile":
            tree[path] = StoredFile(h.hub.lfs[value["oid"]], lfs=True)
        elif operation["key"] == "deletedFile":
            del tree[path]
        else:
            raise HubError(400, f"this hub has no operation {operation['key']}")
    if h.query.get("create_pr"):
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
        ref, reply = f"refs/pr/{number}", {"pullRequestUrl": f"{h.site(kind, id)}/discussions/{number}"}
    if ref is None or ref.startswith("refs/tags/"):
        raise HubError(400, f"cannot commit to {rev}: not a branch")
    sha = repo.commit(ref, tree, header["value"]["summary"])
    return {"success": True, "commitOid": sha, "commitUrl": f"{h.site(kind, id)}/commit/{sha}", **reply}


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
    if h.command == "HEAD":
        # The Hub redirects to another host, where a HEAD does not follow; here it would, and lose these headers.
        return Reply(b"", headers=headers)
    return Reply(b"", 302, {**headers, "Location": f"{h.hub.url}/lfs/{file.sha256}"})


@_route("GET", "/lfs/{oid}")
def _lfs_download(h: _Handler, oid: str) -> Any:
    return Reply(h.hub.lfs[oid], headers={"ETag": f'"{oid}"', "Content-Type": "application/octet-stream"})


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
