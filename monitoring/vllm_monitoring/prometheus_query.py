"""Query a Prometheus over a time window, for drawing dashboards."""

from __future__ import annotations

import http.client
import math
import urllib.error
import urllib.parse
import urllib.request
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

STEPS_MAX: Final = 250
"""Largest number of query steps in a window."""


class DrawError(Exception):
    """A dashboard that cannot be drawn. The message is one sentence for the user."""


class Series(msgspec.Struct, frozen=True):
    """One series of a Prometheus response.

    ``values`` is the result of a range query, ``value`` that of an instant query: pairs of Unix time in seconds and
    value.
    """

    metric: dict[str, str]
    values: list[tuple[float, str]] = []
    value: tuple[float, str] = (0, "nan")


class Window(msgspec.Struct, frozen=True):
    """The time window to query, in Unix seconds. ``interval_s`` is the scrape interval.

    Raises:
        DrawError: the window is empty, or the interval is not above 0.
    """

    begin: float
    end: float
    interval_s: float

    def __post_init__(self) -> None:
        if not (self.begin < self.end and self.interval_s > 0):
            raise DrawError("--from must be before --to, and --interval must be above 0")

    @property
    def step_s(self) -> float:
        """Return the query step in seconds, a multiple of the interval: at most STEPS_MAX steps fit."""
        return self.interval_s * math.ceil((self.end - self.begin) / self.interval_s / STEPS_MAX)

    @property
    def times(self) -> NDArray[np.float64]:
        """Return the Unix time of every step."""
        steps = int((self.end - self.begin) / self.step_s)
        return np.linspace(self.begin, self.begin + steps * self.step_s, steps + 1)

    def aligned(self, series: Series) -> NDArray[np.float64]:
        """Return a series' values at ``times``. A missing or infinite value is NaN, where Grafana breaks the line."""
        row = np.full(len(self.times), np.nan)
        for time, value in series.values:
            row[round((time - self.begin) / self.step_s)] = float(value)
        row[np.isinf(row)] = np.nan
        return row


class _Data(msgspec.Struct):
    """The field ``data`` of a response."""

    result: list[Series]


class _Response(msgspec.Struct):
    """The body of a Prometheus response."""

    data: _Data


def query(url: str, window: Window, expr: str, instant: bool) -> list[Series]:  # noqa: FBT001 - positional call
    """Return the series of a range query over ``window``, or of an instant query at its end.

    Raises:
        DrawError: no Prometheus answers at ``url``, or it cannot evaluate ``expr``.
    """
    when = {"time": window.end} if instant else {"start": window.begin, "end": window.end, "step": window.step_s}
    path = f"query{'' if instant else '_range'}?{urllib.parse.urlencode({'query': expr, **when})}"
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/api/v1/{path}", timeout=30) as response:  # noqa: S310
            return msgspec.json.decode(response.read(), type=_Response).data.result
    except urllib.error.HTTPError as error:
        raise DrawError(f"{url}: {error.code} {error.reason} for the query {expr}") from None
    except (OSError, ValueError, http.client.HTTPException, msgspec.MsgspecError) as error:
        reason = getattr(error, "reason", type(error).__name__)
        raise DrawError(f"{url}: no Prometheus answers there: {reason}; check --prometheus") from None
