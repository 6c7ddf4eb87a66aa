"""A real Prometheus and Alertmanager with the shipped rules, and a receiver of their notifications."""

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
DASHBOARDS = {
    path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "monitoring/grafana/dashboards").glob("*.json"))
}
SHIPPED_RULES = [SHIPPED / path for path in yaml.safe_load((SHIPPED / "prometheus.yml").read_text())["rule_files"]]
INTERVAL_S = 5


class Prometheus:
    """A Prometheus process that runs until ``close``.

    Its configuration is Compose's with other targets and intervals. ``rules``: paths of rules files, or None for the
    shipped ones. ``data``: folder of existing data.
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
        wait_until_ready(f"{self.url}/-/ready", self.process, folder / "prometheus.log")

    def watch(self, targets):
        """Scrape these targets from now on: pairs of a pod's name and a port of this machine."""
        groups = [
            {"targets": [f"127.0.0.1:{port}"], "labels": {"namespace": "tests", "pod": pod}} for pod, port in targets
        ]
        (self.folder / "targets.json").write_text(json.dumps(groups))

    def ask(self, route, **parameters):
        """Return the result of a request to the HTTP API."""
        url = f"{self.url}/api/v1/{route}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=60) as response:
            return json.load(response)["data"]["result"]

    def query(self, expr, at=None):
        """Return the instant vector of ``expr``, now or at a Unix time."""
        return self.ask("query", query=expr, **({"time": at} if at else {}))

    def values(self, expr, begin, end, step):
        """Return the values of all series of ``expr`` in that time, without NaN (0 / 0)."""
        result = self.ask("query_range", query=expr, start=begin, end=end, step=step)
        return [float(value) for series in result for _, value in series["values"] if value != "NaN"]

    def close(self):
        self.process.terminate()
        self.process.wait(30)
        self.log.close()


def wait_until_ready(url, process, log):
    """Wait until ``url`` answers. Fail if the process ends or after 60 s."""
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        assert process.poll() is None, log.read_text(errors="replace")[-2000:]
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-2000:]
        time.sleep(0.1)


class Pager:
    """An Alertmanager that notifies this test of every alert at once.

    ``pages``: the time and the content of the first notification, by (alert name, pod or model).
    """

    def __init__(self, folder):
        self.pages = {}
        pages = self.pages

        class Receiver(BaseHTTPRequestHandler):
            def do_POST(self):
                notification = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                for alert in notification["alerts"]:
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
        wait_until_ready(f"http://{self.address}/-/ready", self.process, folder / "alertmanager.log")

    def close(self):
        self.process.terminate()
        self.process.wait(30)
        self.receiver.shutdown()
        self.receiver.server_close()
        self.log.close()
