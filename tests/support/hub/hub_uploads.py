"""The endpoints by which the real client creates repositories and uploads, on top of `hub_server`.

with serve_uploads() as (hub, store):
    ...  # HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET=1
assert store.commits[0].message == "Upload"
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import yaml
from support.hub.hub_server import COMMIT, LARGE, MODEL, Hub, HubHandler, git_hash, serve

OWNERS = ("org", "tester")
"""Whom the account behind TOKEN may write for."""


@dataclass
class Committed:
    """A commit as it was sent."""

    repository: str
    branch: str
    oid: str
    message: str
    parent: str | None
    added: list[str]
    deleted: list[str]


@dataclass
class Store:
    """What was uploaded."""

    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files by their sha256."""
    commits: list[Committed] = field(default_factory=list)
    created: list[dict[str, Any]] = field(default_factory=list)
    cards: list[str] = field(default_factory=list)
    """What `validate-yaml` was asked about."""


class UploadHandler(HubHandler):
    """Whoever has the token may write for `OWNERS`; commits are built from what was uploaded before."""

    store: ClassVar[Store]
    sent: bytes
    routes: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", MODEL + r"/branch/(?P<branch>[^/]+)", "branch"),
        ("POST", MODEL + r"/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/upload/(?P<digest>[0-9a-f]{64})", "large_upload"),
        ("POST", MODEL + r"/commit/(?P<revision>[^/]+)", "commit"),
        ("PUT", MODEL + r"/settings", "settings"),
        *HubHandler.routes,
    )

    def dispatch(self) -> None:
        """What was sent is read first: an answer before would reach the client as a connection that broke."""
        self.sent = self.body()
        super().dispatch()

    def create(self) -> None:
        asked = json.loads(self.sent)
        name = f"{asked['organization']}/{asked['name']}"
        if not self.writes(name):
            return None
        if name in self.hub.repositories():
            return self.send_json({"error": "You already created this model repo"}, 409)
        self.store.created.append(asked)
        self.hub.refs[name] = {"main": hashlib.sha1(name.encode()).hexdigest()}
        self.hub.files[name, self.hub.refs[name]["main"], ".gitattributes"] = b""
        said = asked.get("private"), asked.get("visibility")
        if (
            True in said
            or "private" in said
            or (said == (None, None) and asked["organization"] in self.hub.private_by_default)
        ):
            self.hub.private.add(name)
            self.hub.readable.add(name)
        self.send_json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})
        return None

    def settings(self, repo: str) -> None:
        """Who may see the repository."""
        if not self.writes(repo):
            return
        asked = json.loads(self.sent)
        if asked.get("private") is False or asked.get("visibility") == "public":
            self.hub.private.discard(repo)
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(repo)
            self.hub.readable.add(repo)
        self.send_json({})

    def validate(self) -> None:
        """The hub's own check of a card's head, as far as these tests need it."""
        card = json.loads(self.sent)["content"]
        self.store.cards.append(card)
        found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
        head = yaml.safe_load(found[1]) if found else {}
        errors = (
            [{"message": '"license" must be a string'}]
            if not isinstance(head.get("license", ""), str)
            else []
        )
        self.send_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def branch(self, repo: str, branch: str) -> None:
        if not self.writes(repo):
            return None
        refs = self.hub.refs.setdefault(repo, {"main": COMMIT})
        if branch in refs:
            return self.send_json({"error": "Reference already exists"}, 409)
        refs[branch] = refs["main"]
        self.send_json({})
        return None

    def preupload(self, repo: str, revision: str) -> None:
        asked = json.loads(self.sent)["files"]
        commit = self.opened(repo, revision) if self.writes(repo) else None
        if commit is None:
            return
        held = {name: self.hub.files[repo, commit, name] for name in self.hub.names(repo, commit)}
        self.send_json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                        "shouldIgnore": False,
                        "oid": name_of(file["path"], held[file["path"]]) if file["path"] in held else None,
                    }
                    for file in asked
                ]
            }
        )

    def batch(self, repo: str) -> None:
        asked = json.loads(self.sent)["objects"]
        if not self.writes(repo):
            return
        objects: list[dict[str, Any]] = [{"oid": one["oid"], "size": one["size"]} for one in asked]
        for one in objects:
            if one["oid"] not in self.store.objects:
                address = f"{self.hub.cdn}/upload/{one['oid']}"
                one["actions"] = {"upload": {"href": address, "header": {}}}
        self.send_json({"transfer": "basic", "objects": objects})

    def large_upload(self, digest: str) -> None:
        content = self.sent
        if hashlib.sha256(content).hexdigest() != digest:
            return self.reply(400, b"wrong hash")
        self.store.objects[digest] = content
        return self.reply(200, b"", {"ETag": f'"{digest}"'})

    def commit(self, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.sent.splitlines()]
        old = self.opened(repo, revision) if self.writes(repo) else None
        if old is None:
            return None
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, old):
            return self.send_json({"error": "The branch has moved"}, 412)
        added = {
            line["value"]["path"]: self.content(line) for line in lines if line["key"] in ("file", "lfsFile")
        }
        deleted = [line["value"]["path"] for line in lines if line["key"] == "deletedFile"]
        held = {name: self.hub.files[repo, old, name] for name in self.hub.names(repo, old)} | added
        oid = hashlib.sha1(repr((old, sorted(added), deleted)).encode()).hexdigest()
        self.hub.files |= {
            (repo, oid, name): content for name, content in held.items() if name not in deleted
        }
        self.hub.refs.setdefault(repo, {"main": COMMIT})[revision] = oid
        made = Committed(
            repo, revision, oid, header["summary"], header.get("parentCommit"), sorted(added), deleted
        )
        self.store.commits.append(made)
        address = f"{self.hub.url}/{repo}/commit/{oid}"
        self.send_json({"success": True, "commitOid": oid, "commitUrl": address, "hookOutput": ""})
        return None

    def content(self, line: Mapping[str, Any]) -> bytes:
        value = line["value"]
        large = line["key"] == "lfsFile"
        return self.store.objects[value["oid"]] if large else base64.b64decode(value["content"])

    def writes(self, repo: str) -> bool:
        """Whether the account may write there; refused the hub's way where it may not."""
        if not self.known_token():
            self.refuse(401, None, {"X-Error-Message": "Invalid username or password."})
            return False
        if repo.split("/")[0] not in OWNERS:
            self.refuse(403, None, {"X-Error-Message": "You don't have the rights to do this"})
            return False
        return True

    def body(self) -> bytes:
        """What was sent, with its length or in chunks; nothing without either."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)


def name_of(path: str, content: bytes) -> str:
    """The name by which the client compares a file with its own: of large ones the sha256."""
    return hashlib.sha256(content).hexdigest() if path.endswith(LARGE) else git_hash(content)


@contextmanager
def serve_uploads(files: Mapping[tuple[str, str, str], bytes] | None = None) -> Iterator[tuple[Hub, Store]]:
    """A hub that takes uploads, with what it was given, up while the block runs."""
    store = Store()
    handler = type("Uploads", (UploadHandler,), {"store": store})
    with serve(files or {}, handler=handler) as hub:
        yield hub, store
