"""A real Prometheus and Alertmanager on this machine, with what we ship, and the pages that they send."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml
from machine import ROOT, free_port
from promtool import program

SHIPPED = ROOT / "monitoring/prometheus"
BOARDS = {
    path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "monitoring/grafana/dashboards").glob("*.json"))
}
SHIPPED_RULES = [SHIPPED / path for path in yaml.safe_load((SHIPPED / "prometheus.yml").read_text())["rule_files"]]
INTERVAL_S = 5


class Prometheus:
    """One that runs until ``close``; of the config that Compose is given only targets and intervals are others.

    ``rules``: paths of files of rules; None: those that are shipped.
    """

    def __init__(self, folder, targets=(), *, alertmanager=None, rules=None, data=None):
        config = yaml.safe_load((SHIPPED / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": f"{INTERVAL_S}s", "evaluation_interval": f"{INTERVAL_S}s"}
        config["rule_files"] = [str(path) for path in (SHIPPED_RULES if rules is None else rules)]
        config["alerting"]["alertmanagers"] = (
            [{"static_configs": [{"targets": [alertmanager]}]}] if alertmanager else []
        )
        config["scrape_configs"] = [
            {
                "job_name": "vllm",
                "file_sd_configs": [{"files": [str(folder / "targets.json")], "refresh_interval": "1s"}],
            }
        ]
        self.folder, self.port = folder, free_port()
        self.watch(targets)
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.log = (folder / "prometheus.log").open("wb")
        self.process = subprocess.Popen(
            [program("prometheus"), f"--config.file={folder / 'prometheus.yml'}",
             f"--storage.tsdb.path={data or folder / 'data'}", "--storage.tsdb.retention.time=100y",
             f"--web.listen-address=127.0.0.1:{self.port}", "--query.max-samples=200000000"],
            stdout=self.log, stderr=self.log,
        )  # fmt: skip
        self.url = f"http://127.0.0.1:{self.port}"
        answers(f"{self.url}/-/ready", self.process, folder / "prometheus.log")

    def watch(self, targets):
        """From now on scrape these: pairs of a pod's name and a port of this machine."""
        found = [
            {"targets": [f"127.0.0.1:{port}"], "labels": {"namespace": "tests", "pod": pod}} for pod, port in targets
        ]
        (self.folder / "targets.json").write_text(json.dumps(found))

    def ask(self, route, **words):
        url = f"{self.url}/api/v1/{route}?{urllib.parse.urlencode(words)}"
        with urllib.request.urlopen(url, timeout=60) as answer:
            return json.load(answer)["data"]["result"]

    def query(self, expr, at=None):
        """The instant vector."""
        return self.ask("query", query=expr, **({"time": at} if at else {}))

    def values(self, expr, begin, end, step):
        """Every number that ``expr`` has in that time, of all series; NaN, a quotient of nothing, is none."""
        found = self.ask("query_range", query=expr, start=begin, end=end, step=step)
        return [float(value) for one in found for _, value in one["values"] if value != "NaN"]

    def close(self):
        self.process.terminate()
        self.process.wait(30)
        self.log.close()


def answers(url, process, log):
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        assert process.poll() is None, log.read_text(errors="replace")[-2000:]
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-2000:]
        time.sleep(0.1)


class Pager:
    """An Alertmanager that sends every alert at once to us; ``pages`` has the time of the first of each."""

    def __init__(self, folder):
        self.pages = {}
        pages = self.pages

        class Receiver(BaseHTTPRequestHandler):
            def do_POST(self):
                told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                for alert in told["alerts"]:
                    if alert["status"] == "firing":
                        labels = alert["labels"]
                        key = labels["alertname"], labels.get("pod") or labels["model_name"]
                        pages.setdefault(key, (time.monotonic(), alert))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.receiver = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
        threading.Thread(target=self.receiver.serve_forever, daemon=True).start()
        config = {
            "route": {"receiver": "us", "group_by": ["..."], "group_wait": "0s", "group_interval": "1s"},
            "receivers": [
                {
                    "name": "us",
                    "webhook_configs": [{"url": f"http://127.0.0.1:{self.receiver.server_port}/"}],
                }
            ],
        }
        (folder / "alertmanager.yml").write_text(yaml.safe_dump(config))
        self.port = free_port()
        self.log = (folder / "alertmanager.log").open("wb")
        self.process = subprocess.Popen(
            [program("alertmanager", "prometheus-alertmanager"), f"--config.file={folder / 'alertmanager.yml'}",
             f"--storage.path={folder / 'alertmanager'}", f"--web.listen-address=127.0.0.1:{self.port}",
             "--cluster.listen-address="],
            stdout=self.log, stderr=self.log,
        )  # fmt: skip
        self.address = f"127.0.0.1:{self.port}"
        answers(f"http://{self.address}/-/ready", self.process, folder / "alertmanager.log")

    def close(self):
        self.process.terminate()
        self.process.wait(30)
        self.receiver.shutdown()
        self.receiver.server_close()
        self.log.close()
