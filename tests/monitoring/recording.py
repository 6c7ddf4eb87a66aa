"""Record scrapes as a file for ``promtool tsdb create-blocks-from openmetrics``.

usage: recording.py FILE.gz SECONDS INTERVAL POD=URL[,URL…] …

Scrapes all URLs of each pod every INTERVAL seconds. Adds the labels that a PodMonitor would add: namespace and pod.
"""

from __future__ import annotations

import gzip
import re
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

NAMESPACE = "recorded"
SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
EXCLUDED = re.compile(r"^python_|_created$|^http_(request|response)_size|^http_request_duration")


def samples(text: str, labels: str, at: float) -> Iterator[str]:
    """Yield lines of OpenMetrics from a text of the exposition format 0.0.4."""
    for name, own_labels, value in SAMPLE.findall(text):
        if not EXCLUDED.search(name):
            yield f"{name}{{{f'{own_labels},' if own_labels else ''}{labels}}} {value} {at:.3f}\n"


def scrape(url: str) -> str:
    """Return the metrics text of ``url``, or "" if the server does not answer, as during start-up."""
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
            return response.read().decode()
    except OSError:
        return ""


def main() -> None:
    file, seconds, interval, *pods = sys.argv[1:]
    targets = [(pod, url) for pod, _, urls in (argument.partition("=") for argument in pods) for url in urls.split(",")]
    deadline = time.time() + float(seconds)
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    stop = threading.Event()
    with gzip.open(file, "wt") as out, ThreadPoolExecutor(len(targets)) as pool:
        while (now := time.time()) < deadline and not stop.is_set():
            for (pod, url), text in zip(targets, pool.map(scrape, [url for _, url in targets]), strict=True):
                labels = f'namespace="{NAMESPACE}",pod="{pod}",instance="{url.removeprefix("http://")}"'
                out.writelines(samples(text, labels, now))
            stop.wait(max(now + float(interval) - time.time(), 0))
        out.write("# EOF\n")


if __name__ == "__main__":
    main()
