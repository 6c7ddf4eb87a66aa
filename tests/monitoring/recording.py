"""What Prometheus would have scraped, as a file that ``promtool tsdb create-blocks-from openmetrics`` reads.

usage: recording.py FILE.gz SECONDS EVERY POD=URL[,URL…] …

Scrapes all URLs of each pod EVERY so many seconds and adds the labels that a PodMonitor would: namespace and pod.
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
LEFT_OUT = re.compile(r"^python_|_created$|^http_(request|response)_size|^http_request_duration")


def samples(text: str, labels: str, at: float) -> Iterator[str]:
    """Lines of OpenMetrics from an exposition of 0.0.4."""
    for name, own, value in SAMPLE.findall(text):
        if not LEFT_OUT.search(name):
            yield f"{name}{{{f'{own},' if own else ''}{labels}}} {value} {at:.3f}\n"


def scrape(url: str) -> str:
    """An exposition; nothing where nobody answers, as while a replica starts."""
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def main() -> None:
    file, seconds, every, *pods = sys.argv[1:]
    targets = [(pod, url) for pod, _, urls in (one.partition("=") for one in pods) for url in urls.split(",")]
    ends = time.time() + float(seconds)
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    ended = threading.Event()
    with gzip.open(file, "wt") as out, ThreadPoolExecutor(len(targets)) as pool:
        while (now := time.time()) < ends and not ended.is_set():
            for (pod, url), text in zip(targets, pool.map(scrape, [url for _, url in targets]), strict=True):
                labels = f'namespace="{NAMESPACE}",pod="{pod}",instance="{url.removeprefix("http://")}"'
                out.writelines(samples(text, labels, now))
            ended.wait(max(now + float(every) - time.time(), 0))
        out.write("# EOF\n")


if __name__ == "__main__":
    main()
