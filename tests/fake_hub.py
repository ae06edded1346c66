"""A hub of small files for the real clients: as much of its interface as loading data sets and models takes.

    with FakeHub(folder) as address:        # folder/datasets/OWNER/NAME/REVISION/FILE, folder/models/...
        ...                                 # in a process started with HF_ENDPOINT=address

A revision's folder is named after it with / as --: refs--convert--parquet.  Its commit is a digest of that name.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ASK = re.compile(r"/api/(?P<kind>datasets|models)/(?P<repo>[^/]+/[^/]+)(/(?P<what>revision|tree|paths-info)/"
                 r"(?P<rest>.+))?")
FILE = re.compile(r"/((?P<kind>datasets)/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<rest>.+)")
SPECIAL = re.compile(r"(refs/convert/[^/]+|[^/]+)(/.*)?")


def commit_of(kind: str, repo: str, revision: str = "main") -> str:
    """The commit that a revision stands for."""
    return hashlib.sha1(f"{kind} {repo} {revision}".encode()).hexdigest()


class FakeHub:
    """The server; `requests` are (method, path) of all that was asked."""

    def __init__(self, folder: Path):
        self.requests: list[tuple[str, str]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {
            "folder": folder, "requests": self.requests}))

    def __enter__(self) -> str:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path
    requests: list[tuple[str, str]]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def _answer(self, body: bytes = b"") -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        self.requests.append((self.command, path))
        if asked := ASK.fullmatch(path):
            return self._about(asked["kind"], asked["repo"], asked["what"] or "revision", asked["rest"] or "main", body)
        if asked := FILE.fullmatch(path):
            return self._file(asked["kind"] or "models", asked["repo"], asked["rest"])
        return self._send(200 if path == "/" else 404, b"")

    def _revision(self, kind: str, repo: str, rest: str) -> tuple[Path | None, str, str]:
        """Folder, commit and what follows of REVISION[/PATH]; the folder is None where there is no such revision."""
        name, path = SPECIAL.fullmatch(rest).groups()
        for there in sorted((self.folder / kind / repo).glob("*")):
            revision = there.name.replace("--", "/")
            commit = commit_of(kind, repo, revision)
            if name in (revision, commit):
                return there, commit, (path or "").strip("/")
        return None, "", ""

    def _about(self, kind: str, repo: str, what: str, rest: str, body: bytes) -> None:
        root, commit, path = self._revision(kind, repo, rest)
        if root is None:
            return self._error("RepoNotFound" if not (self.folder / kind / repo).is_dir() else "RevisionNotFound")
        files = {file.relative_to(root).as_posix(): file for file in sorted(root.rglob("*")) if file.is_file()}
        if what == "revision":
            siblings = [{"rfilename": name} for name in files]
            return self._json({"id": repo, "sha": commit, "private": False, "tags": [], "siblings": siblings})
        if what == "paths-info":
            fields = urllib.parse.parse_qs(body.decode())
            paths = fields["paths"] if "paths" in fields else json.loads(body)["paths"]
            names = [name for name in files if name in paths]
            folders = [name for name in paths if (root / name).is_dir()]
        else:
            inside = f"{path}/" if path else ""
            names = [name for name in files if name.startswith(inside)]
            folders = sorted({str(Path(name).parent) for name in names if str(Path(name).parent) not in (".", path)})
            if not names:
                return self._error("EntryNotFound")
            if "recursive=true" not in self.path.lower():
                names = [name for name in names if "/" not in name[len(inside):]]
                folders = sorted({inside + folder[len(inside):].split("/")[0] for folder in folders})
        return self._json([{"type": "file", "path": name, "size": files[name].stat().st_size,
                            "oid": hashlib.sha1(files[name].read_bytes()).hexdigest()} for name in names]
                          + [{"type": "directory", "path": name, "oid": "0" * 40} for name in folders])

    def _file(self, kind: str, repo: str, rest: str) -> None:
        root, commit, path = self._revision(kind, repo, rest)
        if root is None:
            return self._error("RepoNotFound" if not (self.folder / kind / repo).is_dir() else "RevisionNotFound")
        if not (root / path).is_file():
            return self._error("EntryNotFound", commit)
        data = (root / path).read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self._send(200, data, headers)
        start, end = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
        return self._send(206, data[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"})

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _error(self, code: str, commit: str = "") -> None:
        self._send(404, b"", {"X-Error-Code": code, "X-Error-Message": code, "X-Repo-Commit": commit})

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
