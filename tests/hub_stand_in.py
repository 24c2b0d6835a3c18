"""A stand-in for the Hugging Face hub on this machine: what `huggingface_hub` asks of it to make a repository, commit and read it."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"


class Hub(ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
        files: by repository, then by path.
        asked: method and path of each request.
        large_from: files of so many bytes go through LFS; those named *.safetensors always do, as on the hub.
        refuses: part of a path -> status with which requests of such a path are answered.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.large: dict[str, bytes] = {}  # by sha256
        self.large_from = 10 * 2**20
        self.refuses: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        body = self._body()
        for part, status in self.server.refuses.items():
            if part in path:
                return self._answer(status, {"error": "refused"})
        if self.command in ("POST", "PUT") and "/lfs-put/" not in path and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        match [self.command, *path.strip("/").split("/")]:
            case ["POST", "api", "repos", "create"]:
                asked = json.loads(body)
                name = "/".join(part for part in (asked.get("organization") or "me", asked["name"]) if part)
                status = 409 if name in self.server.files else 200
                self.server.files.setdefault(name, {})
                return self._answer(status, {"url": f"{self.server.url}/{name}", "name": name, "id": "1"})
            case ["POST", "api", "validate-yaml"]:
                assert json.loads(body)["content"].startswith("---\n")
                return self._answer(200, {"errors": [], "warnings": []})
            case ["POST", "api", "models", owner, repo, "preupload", "main"]:
                files = [self._mode(f"{owner}/{repo}", file) for file in json.loads(body)["files"]]
                return self._answer(200, {"files": files})
            case ["POST", _, _, "info", "lfs", "objects", "batch"]:
                return self._answer(200, {"transfer": "basic", "objects": [self._place(one) for one in json.loads(body)["objects"]]})
            case ["PUT", "lfs-put", sha256]:
                assert hashlib.sha256(body).hexdigest() == sha256
                self.server.large[sha256] = body
                return self._answer(200, {}, {"ETag": '"1"'})
            case ["POST", "api", "models", owner, repo, "commit", "main"]:
                self._commit(f"{owner}/{repo}", [json.loads(line) for line in body.splitlines()])
                return self._answer(200, {"commitUrl": f"{self.server.url}/{owner}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40})
            case ["GET" | "HEAD", owner, repo, "resolve", _, *name]:
                return self._file(f"{owner}/{repo}", "/".join(name))
        return self._answer(404, {"error": f"the stand-in does not know {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _mode(self, repo: str, file: dict[str, Any]) -> dict[str, Any]:
        large = file["size"] >= self.server.large_from or file["path"].endswith(".safetensors")
        assert repo in self.server.files
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": None}

    def _place(self, one: dict[str, Any]) -> dict[str, Any]:
        return one | {"actions": {"upload": {"href": f"{self.server.url}/lfs-put/{one['oid']}"}}}

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    assert value["encoding"] == "base64"
                    self.server.files[repo][value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    self.server.files[repo][value["path"]] = self.server.large[value["oid"]]
                case "header":
                    pass
                case other:
                    raise AssertionError(other)

    def _file(self, repo: str, name: str) -> None:
        content = self.server.files.get(repo, {}).get(name)
        if content is None:
            code = "EntryNotFound" if repo in self.server.files else "RepoNotFound"
            return self._answer(404, {"error": "not found"}, {"X-Error-Code": code, "X-Repo-Commit": "0" * 40})
        etag = hashlib.sha256(content).hexdigest()
        return self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": "0" * 40, "X-Linked-Size": str(len(content))})


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub for as long as it is entered."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()
