"""A hub of models at the HTTP boundary of huggingface_hub: ``hub.py FOLDER``, in a pod, on port 8080.

some/model has the files of FOLDER, some/gated is gated, some/other is not there; any token but "right" is refused. There is
one file more, which has no end until /tmp/quick is there, so that whoever fetches it can be ended in the middle. What was
asked for is printed, and what was sent whole.
"""

import hashlib
import http.server
import json
import sys
import time
import urllib.parse
from pathlib import Path

FOLDER = Path(sys.argv[1])
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SLOW, QUICK = "large.data", Path("/tmp/quick")
FILES = {file.name: file.read_bytes() for file in sorted(FOLDER.iterdir())} | {SLOW: bytes(1_000_000)}


REFUSED = {
    "some/gated": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}),
    "some/other": (404, {"X-Error-Code": "RepoNotFound"}),
}


def tell(what, path):
    """One line in one write: requests come in threads, and print writes the words of a line one by one."""
    sys.stdout.write(f"{what} {path}\n")
    sys.stdout.flush()


class Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = urllib.parse.urlparse(self.path).path
        tell(self.command, path)
        name = path.rpartition("/")[2]
        refused = [answer for model, answer in REFUSED.items() if model in path]
        if self.headers.get("Authorization", "Bearer right") != "Bearer right":
            self.answer(401, b'{"error": "Invalid credentials in Authorization header"}')
        elif refused:
            status, headers = refused[0]
            self.answer(status, b"{}", headers)
        elif "/tree/" in path:
            self.say([{"type": "file", "path": file, "size": len(data), "oid": file} for file, data in FILES.items()])
        elif path.startswith("/api/models/"):
            self.say({"id": "some/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]})
        elif name in FILES:
            data = FILES[name]
            self.answer(200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'}, slowly=name == SLOW)
        else:
            self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def do_HEAD(self):
        self.do_GET()

    def say(self, document):
        self.answer(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def answer(self, status, body=b"", headers=(), *, slowly=False):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        begin = 0
        while slowly and not QUICK.exists():  # a byte at a time: a client that receives nothing would ask again
            self.wfile.write(body[begin : begin + 1])
            begin += 1
            time.sleep(0.5)
        self.wfile.write(body[begin:])
        tell("SENT", urllib.parse.urlparse(self.path).path)

    def log_message(self, *_):
        pass


http.server.ThreadingHTTPServer(("", 8080), Hub).serve_forever()
