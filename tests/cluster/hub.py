"""Simulates the Hugging Face hub over HTTP: ``hub.py FOLDER``, in a pod, on port 8080.

some/model has the files of FOLDER, some/gated is gated, some/other does not exist. The hub refuses any token but
"right". some/model has one more file. Its transfer does not end until /tmp/quick exists, so that a test can kill a
client in the middle. Prints a line for each request, and a SENT line for each file that was sent completely.
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


def print_line(event, path):
    """Print a line in one write. Requests run in threads, and print() writes the parts of a line one by one."""
    sys.stdout.write(f"{event} {path}\n")
    sys.stdout.flush()


class Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = urllib.parse.urlparse(self.path).path
        print_line(self.command, path)
        name = path.rpartition("/")[2]
        refusals = [refusal for model, refusal in REFUSED.items() if model in path]
        if self.headers.get("Authorization", "Bearer right") != "Bearer right":
            self.answer(401, b'{"error": "Invalid credentials in Authorization header"}')
        elif refusals:
            status, headers = refusals[0]
            self.answer(status, b"{}", headers)
        elif "/tree/" in path:
            self.answer_json(
                [{"type": "file", "path": file, "size": len(data), "oid": file} for file, data in FILES.items()]
            )
        elif path.startswith("/api/models/"):
            self.answer_json({"id": "some/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]})
        elif name in FILES:
            data = FILES[name]
            self.answer(200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'}, slowly=name == SLOW)
        else:
            self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def do_HEAD(self):
        self.do_GET()

    def answer_json(self, document):
        self.answer(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def answer(self, status, body=b"", headers=(), *, slowly=False):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        begin = 0
        while slowly and not QUICK.exists():  # byte by byte: a client that receives nothing would repeat the request
            self.wfile.write(body[begin : begin + 1])
            begin += 1
            time.sleep(0.5)
        self.wfile.write(body[begin:])
        print_line("SENT", urllib.parse.urlparse(self.path).path)

    def log_message(self, *_):
        pass


http.server.ThreadingHTTPServer(("", 8080), Hub).serve_forever()
