"""As much of the W&B service as its real client needs to start, resume and fill a run. It keeps the rows of one run."""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OWNER = {"id": "e", "name": "me"}


class Service:
    """What it has got so far: `rows`, each a JSON object with W&B's "_step"."""

    def __init__(self) -> None:
        self.address = ""
        self.rows: list[dict[str, Any]] = []

    def answer(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        """To one request of the client."""
        if path.endswith("/file_stream"):
            history = request.get("files", {}).get("wandb-history.jsonl")
            if history:
                self.rows[history["offset"] :] = [json.loads(line) for line in history["content"]]
            return {}
        return {"data": self._data(request.get("query", ""), request.get("variables", {}))} if path == "/graphql" else {}

    def _data(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        bucket = {"id": "b", "name": "abcd1234", "displayName": "run-x", "config": "{}", "historyLineCount": len(self.rows)}
        if "query RunResumeStatus" in query:
            tail = json.dumps([json.dumps(row) for row in self.rows[-1:]])
            bucket |= {
                "logLineCount": 0,
                "eventsLineCount": 0,
                "historyTail": tail,
                "eventsTail": "[]",
                "tags": [],
                "wandbConfig": '{"t": 1}',
            }
            bucket |= {"summaryMetrics": json.dumps(self.rows[-1]) if self.rows else "{}"}
            return {"model": {"id": "m", "name": "tracknet", "entity": OWNER, "bucket": bucket if self.rows else None}}
        if "mutation UpsertBucket" in query:
            project = {"id": "p", "name": "tracknet", "entity": OWNER}
            return {"upsertBucket": {"bucket": bucket | {"project": project}, "inserted": not self.rows}}
        if "mutation CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.address}/files/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "abcd1234", "uploadHeaders": [], "files": files}}
        return {}


@contextmanager
def wandb_service() -> Iterator[Service]:
    """Runs the service on a free port of this machine."""
    service = Service()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
            is_json = self.path == "/graphql" or self.path.endswith("/file_stream")
            answer = json.dumps(service.answer(self.path, json.loads(body) if is_json else {})).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_PUT = do_POST

        def log_message(self, format: str, *args: Any) -> None:
            """Keeps the console of the tests clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        service.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield service
        server.shutdown()
