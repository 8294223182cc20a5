"""A small hub on this machine that speaks what the real client asks, and misbehaves as it is told.

    with serve({("org/vit", COMMIT, "config.json"): b"{}"}) as hub:
        hub.faults.append(Fault(status=503, where="config.json"))
        ...  # HF_ENDPOINT=hub.url
        assert [request.method for request in hub.requests] == ["HEAD", "HEAD", "GET"]

Large files (`LARGE`) are sent by a second server on another port, as the hub sends them from its CDN.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

from support.hub.ports import free_ports

COMMIT = "a" * 40
LARGE = (".safetensors", ".bin", ".pth", ".npz")
TOKEN = "hf_a_token_that_nobody_may_see"
MODEL = r"/api/models/(?P<repo>[^/]+/[^/]+)"


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of `method` whose path contains `where`.

    Fields that are set apply together: `content` in place of the file, of which the body ends after `cut`
    bytes although its announced length is that of the whole, or comes after `hang` seconds.
    """

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None
    cut: int | None = None
    hang: float = 0.0
    method: str = ""
    where: str = ""
    times: int = 1


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    host: str
    """`hub` or `cdn`."""
    token: str | None
    """What was sent as authorization."""


@dataclass
class Hub:
    """What the server stores, what it shall do wrong, and what it was asked."""

    files: dict[tuple[str, str, str], bytes]
    refs: dict[str, dict[str, str]]
    """Commit by branch or tag, by repository; `main` is `COMMIT` where a repository is not named."""
    private: set[str] = field(default_factory=set)
    private_by_default: set[str] = field(default_factory=set)
    """Organizations whose new repositories are private unless they are asked for as public."""
    gated: set[str] = field(default_factory=set)
    readable: set[str] = field(default_factory=set)
    """The private and the gated repositories that the account behind `token` may read."""
    token: str = TOKEN
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    sent: int = 0
    """Bytes of files so far."""
    url: str = ""
    cdn: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    closed: threading.Event = field(default_factory=threading.Event)

    def repositories(self) -> list[str]:
        return sorted({repository for repository, _, _ in self.files} | self.refs.keys())

    def commit(self, repository: str, revision: str) -> str | None:
        """The commit that a branch, a tag or a commit names, None where there is none."""
        known = self.refs.get(repository) or {"main": COMMIT}
        commits = {commit for name, commit, _ in self.files if name == repository} | set(known.values())
        return known.get(revision) or (revision if revision in commits else None)

    def names(self, repository: str, commit: str) -> list[str]:
        return sorted(name for owner, of, name in self.files if (owner, of) == (repository, commit))

    def fault(self, method: str, path: str) -> Fault:
        """The first scripted fault that this request meets, used up once."""
        with self.lock:
            for fault in self.faults:
                if fault.where in path and fault.method in ("", method):
                    fault.times -= 1
                    if fault.times <= 0:
                        self.faults.remove(fault)
                    return fault
        return Fault()

    def asked(self, method: str = "", where: str = "") -> list[Request]:
        """The requests so far of a method whose path contains `where`."""
        return [one for one in self.requests if method in ("", one.method) and where in one.path]


class HubHandler(BaseHTTPRequestHandler):
    """Answers by the first of `routes` that fits: method, pattern of the path, name of the method here.

    Further endpoints: a subclass with more routes, given to `serve` as `handler`.
    """

    hub: Hub
    host: str
    fault: Fault
    routes: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ("HEAD GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)", "resolve"),
        ("HEAD GET", r"/cdn/(?P<digest>[0-9a-f]{64})", "large_file"),
        ("GET", r"/api/models", "search"),
        ("GET", MODEL, "info"),
        ("GET", MODEL + r"/revision/(?P<revision>[^/]+)", "info"),
        ("GET", MODEL + r"/tree/(?P<revision>[^/]+)", "tree"),
        ("GET", MODEL + r"/refs", "refs"),
        ("GET", r"/api/whoami-v2", "whoami"),
    )

    def dispatch(self) -> None:
        path = urlsplit(self.path).path
        token = self.headers.get("Authorization")
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, path, self.host, token))
        self.fault = self.hub.fault(self.command, path)
        if self.fault.hang:
            self.hub.closed.wait(self.fault.hang)
        if self.fault.status is not None:
            return self.reply(self.fault.status, self.fault.content or b"", self.fault.headers)
        for methods, pattern, name in self.routes:
            found = re.fullmatch(pattern, path)
            if found and self.command in methods.split():
                handler = getattr(self, name)
                return handler(**{key: unquote(value) for key, value in found.groupdict().items()})
        return self.reply(404)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self.dispatch
        raise AttributeError(name)

    def resolve(self, repo: str, revision: str, name: str) -> None:
        commit = self.opened(repo, revision)
        if commit is None:
            return
        content = self.hub.files.get((repo, commit, name))
        if content is None:
            self.refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        elif name.endswith(LARGE):
            digest = hashlib.sha256(content).hexdigest()
            known = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            place = f"{self.hub.cdn}/cdn/{digest}?X-Signature=secret-of-a-signed-address"
            self.reply(302, b"", {"X-Repo-Commit": commit, "Location": place, **known})
        else:
            self.send_file(content, {"X-Repo-Commit": commit, "ETag": f'"{git_hash(content)}"'})

    def large_file(self, digest: str) -> None:
        held = {hashlib.sha256(content).hexdigest(): content for content in self.hub.files.values()}
        self.send_file(held[digest], {}) if digest in held else self.reply(404)

    def search(self) -> None:
        query = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
        author, words = query.get("author"), query.get("search", "")
        names = [
            name for name in self.hub.repositories()
            if name not in self.hub.private and words in name and author in (None, name.split("/")[0])
        ]  # fmt: skip
        self.send_json([{"id": name, "modelId": name} for name in names[: int(query.get("limit", 100))]])

    def info(self, repo: str, revision: str = "main") -> None:
        commit = self.opened(repo, revision)
        if commit is not None:
            siblings = [{"rfilename": name} for name in self.hub.names(repo, commit)]
            known = {"private": repo in self.hub.private, "gated": repo in self.hub.gated, "tags": []}
            self.send_json({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, **known})

    def tree(self, repo: str, revision: str) -> None:
        commit = self.opened(repo, revision)
        if commit is not None:
            held = {name: self.hub.files[repo, commit, name] for name in self.hub.names(repo, commit)}
            self.send_json(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
                    for name, content in held.items()
                ]
            )

    def refs(self, repo: str) -> None:
        if self.opened(repo, "main") is not None:
            refs = self.hub.refs.get(repo) or {"main": COMMIT}
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
                for name, commit in refs.items()
            ]
            self.send_json({"branches": branches, "tags": [], "converts": []})

    def whoami(self) -> None:
        if self.known_token() is None:
            return self.refuse(401, None, {"X-Error-Message": "Invalid username or password."})
        return self.send_json({"type": "user", "name": "tester", "orgs": [{"name": "org"}], "auth": {}})

    def known_token(self) -> bool | None:
        """True for the account's token, False for an unknown one, None where none was sent."""
        sent = self.headers.get("Authorization")
        return None if sent is None else sent == f"Bearer {self.hub.token}"

    def opened(self, repo: str, revision: str) -> str | None:
        """The commit asked for; None where the request was refused the way the hub does it."""
        token, hidden = self.known_token(), repo not in self.hub.readable
        if token is False:
            self.refuse(401, None, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repo not in self.hub.repositories() or (repo in self.hub.private and not (token and not hidden)):
            # whoever is not logged in cannot tell what is private from what is not there
            self.refuse(404 if token else 401, "RepoNotFound", {"X-Error-Message": "Repository not found"})
        elif repo in self.hub.gated and not (token and not hidden):
            self.refuse(403 if token else 401, "GatedRepo", {"X-Error-Message": f"{repo} is gated"})
        elif (commit := self.hub.commit(repo, revision)) is None:
            self.refuse(404, "RevisionNotFound", {"X-Error-Message": f"Invalid rev id: {revision}"})
        else:
            return commit
        return None

    def refuse(self, status: int, code: str | None, headers: Mapping[str, str]) -> None:
        self.reply(status, b"", {**({"X-Error-Code": code} if code else {}), **headers})

    def send_file(self, content: bytes, headers: Mapping[str, str]) -> None:
        """A file or the rest of it, with the fault of this request."""
        if self.fault.content is not None:
            content = self.fault.content
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked is None:
            return self.reply(200, content, headers)
        span = {"Content-Range": f"bytes {asked[1]}-{len(content) - 1}/{len(content)}"}
        return self.reply(206, content[int(asked[1]) :], {**headers, **span})

    def send_json(self, value: Any, status: int = 200) -> None:
        self.reply(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        body = body if self.fault.cut is None else body[: self.fault.cut]
        if status in (200, 206):
            with self.hub.lock:  # counted first: a client that has its file may ask for the count at once
                self.hub.sent += len(body)
        try:
            self.wfile.write(body)
            self.wfile.flush()
        except OSError:  # the client hung up first
            return

    def log_message(self, *arguments: Any) -> None:
        """Silence."""


def git_hash(content: bytes) -> str:
    """The name that git gives a file: what the hub sends as the ETag of a small one."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serve(
    files: Mapping[tuple[str, str, str], bytes],
    *,
    refs: Mapping[str, Mapping[str, str]] | None = None,
    handler: type[HubHandler] = HubHandler,
) -> Iterator[Hub]:
    """A hub with `files[repository, commit, name]` and `refs[repository][branch]`, up while the block runs."""
    hub = Hub(dict(files), {name: dict(of) for name, of in (refs or {}).items()})
    servers = [
        ThreadingHTTPServer(("127.0.0.1", 0), type(host, (handler,), {"hub": hub, "host": host}))
        for host in ("hub", "cdn")
    ]
    hub.url, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.closed.set()
        for server in servers:
            server.shutdown()
            server.server_close()


def closed_port() -> str:
    """An address where nothing listens."""
    return f"http://127.0.0.1:{free_ports(1)[0]}"
