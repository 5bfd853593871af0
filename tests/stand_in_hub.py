"""Both hubs on loopback, for downloads: lists of files, the files, and what can go wrong.

The answers follow the hubs' public documentation: the first hub redirects to another host, its
store; the second sends the files itself.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

MODEL, REVISION = "Qwen/Qwen3.5-tiny", "0123456789abcdef0123456789abcdef01234567"
LARGE = 10_000  # bytes from which the first hub gives a sha256, and not the one of git


class StandIn:
    """Serves the files of a folder; what is set here makes it misbehave."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.token: str | None = None  # asked for
        self.refuse: dict[str, list[int]] = {}  # name -> status codes of the next answers
        self.cut: dict[str, list[int]] = {}  # name -> after so many bytes the next answers end
        self.corrupt: dict[str, int] = {}  # name -> how many answers have one byte wrong
        self.no_range = False
        self.hold: dict[str, int] = {}  # name -> after so many bytes it sends nothing more, and does not end
        self.extra: dict[str, bytes] = {}  # listed and served, but not in the folder
        self.without_checksums = False
        self.asked: list[tuple[str, str | None, str | None]] = []  # of files: name, Range, Authorization
        self.sent: dict[str, int] = {}  # name -> bytes of all answers
        self.listed = 0
        self.released = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.store = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.store_address = f"http://localhost:{self.store.server_port}"

    def content(self, name: str) -> bytes | None:
        path = self.folder / name
        return self.extra.get(name) or (path.read_bytes() if path.is_file() else None)

    def names(self) -> list[str]:
        paths = {p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file()}
        return sorted(paths | self.extra.keys())


@contextmanager
def serving(folder: Path) -> Iterator[StandIn]:
    hub = StandIn(folder)
    threads = [threading.Thread(target=s.serve_forever, args=(0.02,), daemon=True) for s in (hub.server, hub.store)]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        for server in (hub.server, hub.store):
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: StandIn

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        """What the first hub says of a file before it is sent, on the hub itself."""
        _, _, name = unquote(urlsplit(self.path).path).partition(f"/{MODEL}/resolve/{REVISION}/")
        content = self.hub.content(name)
        self.send_response(404 if content is None else 200)
        self.send_header("X-Repo-Commit", REVISION)
        if content is not None:
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.end_headers()

    def do_GET(self) -> None:
        hub, url = self.hub, urlsplit(self.path)
        at_store = self.server is hub.store
        if not at_store and hub.token is not None and self.headers["Authorization"] != f"Bearer {hub.token}":
            return self._answer(401, b"{}")
        revisions = [f"/api/models/{MODEL}/revision/{revision}" for revision in ("main", REVISION)]
        if url.path in revisions:
            return self._answer(200, json.dumps(self._first_list()).encode())
        if url.path == f"/api/models/{MODEL}/tree/{REVISION}":
            return self._answer(200, json.dumps(self._tree()).encode())
        if url.path == f"/api/v1/models/{MODEL}/repo/files":
            return self._answer(200, json.dumps(self._second_list()).encode())
        if url.path == f"/api/v1/models/{MODEL}/repo":
            return self._file(parse_qs(url.query)["FilePath"][0])
        prefix = f"/{MODEL}/resolve/{REVISION}/"
        if url.path.startswith(prefix):
            name = unquote(url.path.removeprefix(prefix))
            content = hub.content(name) or b""
            # a large file is in the store, a small one on another path of the hub itself
            target = f"{hub.store_address}/store/{name}" if len(content) >= LARGE else f"/cache/{name}"
            self.send_response(302 if len(content) >= LARGE else 307)
            self.send_header("Location", target)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        for start, here in (("/store/", at_store), ("/cache/", not at_store)):
            if url.path.startswith(start) and here:
                return self._file(unquote(url.path.removeprefix(start)))
        return self._answer(404, b"{}")

    def _answer(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _first_list(self) -> dict:
        self.hub.listed += 1
        siblings = []
        for name in self.hub.names():
            content = self.hub.content(name)
            entry = {"rfilename": name, "size": len(content)}
            if len(content) >= LARGE:
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            siblings.append({"rfilename": name, "size": len(content)} if self.hub.without_checksums else entry)
        return {"id": MODEL, "sha": REVISION, "siblings": siblings}

    def _tree(self) -> list[dict]:
        entries = self._first_list()["siblings"]
        for entry in entries:
            entry |= {"type": "file", "path": entry.pop("rfilename"), "oid": entry.pop("blobId", "")}
            if "lfs" in entry:
                entry["lfs"]["oid"] = entry["lfs"].pop("sha256")
        return entries

    def _second_list(self) -> dict:
        self.hub.listed += 1
        files = [{"Name": "a", "Path": "a", "Type": "tree", "Size": 0, "Sha256": ""}]
        for name in self.hub.names():
            content = self.hub.content(name)
            sha256 = "" if self.hub.without_checksums else hashlib.sha256(content).hexdigest()
            files.append(
                {"Name": Path(name).name, "Path": name, "Type": "blob", "Size": len(content), "Sha256": sha256}
            )
        return {"Code": 200, "Success": True, "Message": "success", "Data": {"Files": files}}

    def _file(self, name: str) -> None:
        hub, wanted = self.hub, self.headers["Range"]
        hub.asked.append((name, wanted, self.headers["Authorization"]))
        if hub.refuse.get(name):
            return self._answer(hub.refuse[name].pop(0), b"")
        content = hub.content(name)
        if content is None:
            return self._answer(404, b"")
        total = len(content)
        if hub.corrupt.get(name):
            hub.corrupt[name] -= 1
            content = content[:-1] + bytes([content[-1] ^ 1])
        if wanted and not hub.no_range:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            content = content[start:]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        held = name in hub.hold
        end = hub.hold[name] if held else hub.cut[name].pop(0) if hub.cut.get(name) else len(content)
        self.wfile.write(content[:end])
        self.wfile.flush()
        hub.sent[name] = hub.sent.get(name, 0) + len(content[:end])
        if held:
            hub.released.wait(60)
        self.close_connection = True
        return None
