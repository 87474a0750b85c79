"""A local stand-in for the Hugging Face Hub: the requests that huggingface_hub makes of it."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repository:
    """A model's files, and the status of an account that may not read them."""

    files: dict[str, bytes]
    gated: int | None = None
    sizes: dict[str, int] = field(default_factory=dict)  # where the hub tells another size

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files)).encode()).hexdigest()

    @property
    def listing(self) -> list[tuple[str, int, str]]:
        """Path, size and blob id of each file."""
        return [
            (path, self.sizes.get(path, len(data)), hashlib.sha1(data).hexdigest())
            for path, data in self.files.items()
        ]


@dataclass
class Hub:
    """A running stand-in: its repositories, and the files and pages that were asked for."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    downloads: list[str] = field(default_factory=list)
    requests: int = 0

    def upload(self, name: str, folder: Path, gated: int | None = None) -> Repository:
        """Add a model with the files of a folder."""
        paths = [path for path in folder.rglob("*") if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        self.repositories[name] = Repository(files, gated)
        return self.repositories[name]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run a hub on a free port of this machine."""
    hub = Hub()

    class Handler(_Handler):
        owner = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self) -> None:
        self.owner.requests += 1
        path = urlsplit(self.path).path
        if found := _API.fullmatch(path):
            return self._page(found[1], found[2], found[3])
        if found := _FILE.fullmatch(path):
            return self._file(found[1], found[2], found[3])
        self._send(404, b"", {})

    def _repository(self, name: str, revision: str | None) -> Repository | None:
        repository = self.owner.repositories.get(name)
        if repository is None:  # as the hub answers an account that is not logged in
            self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif revision not in (None, "main", repository.commit):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            repository = None
        return repository

    def _page(self, name: str, kind: str | None, revision: str | None) -> None:
        repository = self._repository(name, revision)
        if repository is None:
            return
        listing = repository.listing
        page: object = [
            {"type": "file", "path": path, "size": size, "oid": blob}
            for path, size, blob in listing
        ]
        if kind != "tree":
            files = [
                {"rfilename": path, "size": size, "blobId": blob} for path, size, blob in listing
            ]
            page = {"id": name, "sha": repository.commit, "siblings": files}
        self._send(200, json.dumps(page).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str, revision: str, path: str) -> None:
        repository = self._repository(name, revision)
        if repository is None:
            return
        if repository.gated is not None:
            return self._send(repository.gated, b"", {"X-Error-Code": "GatedRepo"})
        if path not in repository.files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = repository.files[path]
        if self.command == "GET":
            self.owner.downloads.append(path)
        etag = hashlib.sha1(data).hexdigest()
        self._send(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": repository.commit})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
