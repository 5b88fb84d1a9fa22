"""Let time pass only when somebody sleeps, and ask a FakeReddit without a socket.

clock = VirtualClock()
reddit = FakeReddit(clock)
source = pipeline.Reddit(access, fetch_from(reddit, clock), clock)
"""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import pipeline
from fake_reddit import FakeReddit, Fault

LIMITS = {"hang": 10.0, "drip": 30.0, "giant": 2.0}
"""How long, in seconds, a client waits for an answer that never comes to its end."""


class VirtualClock:
    """Stand in for the module `time`: `sleep` returns at once, and moves the time."""

    def __init__(self, start: float = 1_790_000_000.0) -> None:
        """Begin at a time in UTC; the monotonic clock begins at 0."""
        self.now = start
        self.elapsed = 0.0
        self.slept = 0.0
        """Seconds spent in `sleep`; those of requests are not among them."""

    def time(self) -> float:
        """Give the time of day, in seconds since 1970."""
        return self.now

    def monotonic(self) -> float:
        """Give the seconds since the clock was made."""
        return self.elapsed

    def sleep(self, seconds: float) -> None:
        """Let seconds pass."""
        if seconds < 0:
            raise ValueError("sleep length must be non-negative")
        self.slept += seconds
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        """Let seconds pass that nobody asked for: a request, an outage."""
        self.now += seconds
        self.elapsed += seconds

    def set(self, now: float) -> None:
        """Set the time of day, as an administrator or NTP does."""
        self.now = now


def fetch_from(
    reddit: FakeReddit, clock: VirtualClock, latency: float | Callable[[], float] = 0.35
) -> Callable[[pipeline.Request], pipeline.Answer]:
    """Give a `fetch` that asks a FakeReddit directly.

    latency: virtual seconds that each request takes, half of them before it is answered.
    """

    def fetch(request: pipeline.Request) -> pipeline.Answer:
        seconds = latency() if callable(latency) else latency
        clock.advance(seconds / 2)
        answer = reddit.handle(*as_http(request))
        clock.advance(seconds / 2)
        if isinstance(answer, Fault):
            clock.advance(min(answer.seconds, LIMITS.get(answer.kind, 0.0)))
            raise pipeline.Failed(f"invented fault: {answer.kind}")
        status, headers, body = answer
        encoding = headers.get("content-encoding", "")
        return pipeline.Answer(status, headers, pipeline.decoded(body, encoding))

    return fetch


def as_http(request: pipeline.Request) -> tuple[str, str, dict[str, str], dict[str, str], bytes]:
    """Turn a request into what arrives at a server: method, path, query, headers, body."""
    target = urlsplit(request.url)
    query = dict(parse_qsl(target.query, keep_blank_values=True)) | dict(request.params or {})
    headers = {name.lower(): value for name, value in request.headers.items()}
    body = urlencode(request.data or {}).encode()
    return request.method, unquote(target.path), query, headers, body
