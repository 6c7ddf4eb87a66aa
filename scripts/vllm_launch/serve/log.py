"""Copies vLLM's output to the launcher's, byte for byte, and writes the launcher's own log lines. Touches pipes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import re
import threading
import time
from collections import deque

from vllm_launch.serve.cause import Evidence

KEPT_LINES = 400
KEPT_LINE_BYTES = 4096

LOGGER = logging.getLogger("vllm-launch")
"""Logger of the launcher's own lines. vLLM's lines pass unchanged, in vLLM's format."""

TIME_FORMAT = "%Y-%m-%dT%H:%M:%S%z"


class _JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object per line. ``extra={"plan": …}`` adds the field "plan"."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {"time": self.formatTime(record, TIME_FORMAT), "level": record.levelname}
        fields |= {"logger": record.name, "message": record.getMessage()}
        if plan := getattr(record, "plan", None):  # instead of the table for people
            fields["plan"] = plan
        return json.dumps(fields, ensure_ascii=False)


FORMATTERS = {
    "text": logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", TIME_FORMAT),
    "json": _JsonFormatter(),
}
"""Formatter by value of the setting ``log_format``."""


def send_to(handler: logging.Handler, log_format: str) -> None:
    """Write LOGGER's lines only to ``handler``, in ``log_format``: "text" or "json"."""
    handler.setFormatter(FORMATTERS[log_format])
    LOGGER.handlers[:] = [handler]
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False


class Log(logging.Handler):
    """Copies the child's stdout and stderr to the launcher's and keeps their last lines in ``last``.

    ``evidence`` has what all lines say about the child's end.

    A slow reader of the log slows the child down, as without the launcher, so no byte is lost or buffered. If the
    reader has gone away, the child's log is read and dropped, and the child continues.
    """

    def __init__(self) -> None:
        super().__init__()
        self.last: deque[str] = deque(maxlen=KEPT_LINES)
        self.evidence = Evidence()
        self._fresh: deque[str] = deque(maxlen=KEPT_LINES)  # lines for the next take()
        self._threads: list[threading.Thread] = []
        self._stderr = threading.Lock()  # lock for stderr, to which the launcher and the child write
        self._mid_line = False
        self._own: queue.Queue[str | None] = queue.Queue(maxsize=1000)
        self._speaker = threading.Thread(target=self._speak, name="own lines", daemon=True)
        self._speaker.start()

    def copy(self, source: int, target: int) -> None:
        """Copy file descriptor ``source`` to ``target`` until its end, and close it."""
        thread = threading.Thread(target=self._copy, args=(source, target), name=f"log to {target}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def take(self) -> list[str]:
        """Return the lines since the last call, at most the last KEPT_LINES."""
        return [self._fresh.popleft() for _ in range(len(self._fresh))]

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record to stderr. Never wait: drop the line if 1,000 others are unwritten."""
        self.say(self.format(record))

    def say(self, line: str) -> None:
        """Write ``line`` to stderr unformatted. Never wait, as ``emit``."""
        with contextlib.suppress(queue.Full):
            self._own.put_nowait(f"\n{line}\n")

    def say_part(self, text: str) -> None:
        """Write a part of a line to stderr, without a line end."""
        with contextlib.suppress(queue.Full):
            self._own.put_nowait(text)

    def close_streams(self, timeout: float) -> None:
        """Wait for the end of the child's streams, at most ``timeout`` seconds for each."""
        for thread in self._threads:
            thread.join(timeout)

    def end(self, timeout: float) -> None:
        """Wait at most ``timeout`` seconds until the launcher's lines are written."""
        with contextlib.suppress(queue.Full):
            self._own.put(None, timeout=timeout)
        self._speaker.join(timeout)

    def _speak(self) -> None:
        while (text := self._own.get()) is not None:
            with self._stderr:
                line = text if self._mid_line else text.removeprefix("\n")
                self._mid_line = not line.endswith("\n")
                _write(2, line.encode())

    def _copy(self, source: int, target: int) -> None:
        part, alive = b"", True
        try:
            while data := os.read(source, 65536):
                if alive and target == 2:  # noqa: PLR2004 - stderr
                    with self._stderr:
                        alive = _write(target, data)
                        self._mid_line = not data.endswith((b"\n", b"\r"))
                elif alive:
                    alive = _write(target, data)
                *lines, part = re.split(rb"[\r\n]+", part + data)
                part = part[:KEPT_LINE_BYTES]
                self._keep(lines, target)
            self._keep([part], target)
        finally:
            os.close(source)

    def _keep(self, lines: list[bytes], target: int) -> None:
        for line in lines:
            if line:
                text = line[:KEPT_LINE_BYTES].decode(errors="replace")
                self.evidence.add(text, time.monotonic(), target)
                self.last.append(text)
                self._fresh.append(text)


def _write(target: int, data: bytes) -> bool:
    """Write all of ``data``. Return whether the reader still exists."""
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(target, view) :]
    except OSError:
        return False
    return True
