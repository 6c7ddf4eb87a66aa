"""What a Prometheus answers about a stretch of time, for those who draw it."""

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

POINTS_MAX: Final = 250
"""Of a series."""


class DrawError(Exception):
    """What was given cannot be drawn; one sentence."""


class Series(msgspec.Struct, frozen=True):
    """One of Prometheus' answer: pairs of unix seconds and value, ``value`` of the last moment."""

    metric: dict[str, str]
    values: list[tuple[float, str]] = []
    value: tuple[float, str] = (0, "nan")


class Window(msgspec.Struct, frozen=True):
    """What is looked at, in unix seconds, of series scraped each ``interval_s``."""

    begin: float
    end: float
    interval_s: float

    def __post_init__(self) -> None:
        if not (self.begin < self.end and self.interval_s > 0):
            raise DrawError("--from must be before --to, and --interval above 0")

    @property
    def step_s(self) -> float:
        """A multiple of the interval, so that a panel has at most POINTS_MAX."""
        return self.interval_s * math.ceil((self.end - self.begin) / self.interval_s / POINTS_MAX)

    @property
    def times(self) -> NDArray[np.float64]:
        """Of every step."""
        steps = int((self.end - self.begin) / self.step_s)
        return np.linspace(self.begin, self.begin + steps * self.step_s, steps + 1)

    def placed(self, series: Series) -> NDArray[np.float64]:
        """Its values at ``times``, NaN where it has none: there Grafana's line breaks."""
        row = np.full(len(self.times), np.nan)
        for time, value in series.values:
            row[round((time - self.begin) / self.step_s)] = float(value)
        row[np.isinf(row)] = np.nan
        return row


class _Found(msgspec.Struct):
    result: list[Series]


class _Answer(msgspec.Struct):
    data: _Found


def asked(url: str, window: Window, expr: str, instant: bool) -> list[Series]:  # noqa: FBT001 - an Ask has no names
    """What the Prometheus at ``url`` answers.

    Raises:
        DrawError: none is there, or it cannot evaluate ``expr``.
    """
    when = {"time": window.end} if instant else {"start": window.begin, "end": window.end, "step": window.step_s}
    query = f"query{'' if instant else '_range'}?{urllib.parse.urlencode({'query': expr, **when})}"
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/api/v1/{query}", timeout=30) as answer:  # noqa: S310 - as told
            return msgspec.json.decode(answer.read(), type=_Answer).data.result
    except urllib.error.HTTPError as error:
        raise DrawError(f"{url}: {error.code} {error.reason}, asked for {expr}") from None
    except (OSError, ValueError, http.client.HTTPException, msgspec.MsgspecError) as error:
        raise DrawError(
            f"{url}: no Prometheus answers there: {getattr(error, 'reason', type(error).__name__)}"
        ) from None
