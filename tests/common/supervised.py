"""A run of the supervisor with a small process in place of vLLM."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from machine import free_port

RUN = Path(__file__).parents[1] / "unit/serve/run_supervisor.py"
SERVER = """
import http.server, signal, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'vllm:cache_config_info{engine="0",kv_cache_size_tokens="900"} 1.0\\n'
        self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
def end(*_): sys.exit(0)
signal.signal(signal.SIGTERM, end)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""


class Run:
    def __init__(self, tmp_path, command, **options):
        self.mark = f"LAUNCH_TEST_MARK={tmp_path}"
        self.port = options.pop("api_port", None) or free_port()
        self.termination_log = tmp_path / "termination-log"
        settings = {
            "api_host": "127.0.0.1", "api_port": self.port, "health_host": "127.0.0.1", "health_port": free_port(),
            "drain_delay": 0.2, "shutdown_timeout": 5, "exit_margin": 5, "drain_flag": str(tmp_path / "draining"), "refuse_flag": str(tmp_path / "refusing"),
            "api_url": f"http://127.0.0.1:{self.port}",
            "termination_log": str(self.termination_log), **options,
        }  # fmt: skip
        name, _, value = self.mark.partition("=")
        self.process = subprocess.Popen(
            [
                sys.executable,
                str(RUN),
                json.dumps(settings),
                *[word.replace("PORT", str(self.port)) for word in command],
            ],
            env={**os.environ, name: value},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.err = ""

    def read_until(self, text):
        while text not in self.err:
            line = self.process.stderr.readline()
            assert line, f"ended before printing {text!r}: {self.err}"
            self.err += line

    def end(self):
        """Return exit code, stdout and stderr. No process may be left."""
        try:
            out, err = self.process.communicate(timeout=60)
        finally:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGQUIT)
        assert self.left_over() == []
        return self.process.returncode, out, self.err + err

    def left_over(self):
        """Return the command lines of the run's processes that still exist."""
        command_lines = []
        for folder in Path("/proc").iterdir():
            try:
                if self.mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    command_lines.append((folder / "cmdline").read_bytes())
            except OSError:
                continue
        return command_lines


def shell(script):
    return ["bash", "-c", script]


SERVING = [sys.executable, "-c", SERVER, "PORT"]
