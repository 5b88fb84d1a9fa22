"""Let time pass only when somebody sleeps, and ask a FakeReddit without a socket.

clock = VirtualClock()
reddit = FakeReddit(clock)
source = pipeline.Reddit(access, fetch_from(reddit, clock), clock)
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from types import SimpleNamespace
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import urllib3

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


class Ended(BaseException):
    """Say that the time is over; nothing in the product may catch it."""


class SharedClock(VirtualClock):
    """Let several threads live on one clock: one runs at a time, whose time comes first.

    Each begins with `sleep`, and the first of them runs when `threads` have; in the end `sleep`
    raises `Ended`, and each says `leave`. So a run is the same every time.
    """

    def __init__(self, threads: int, seconds: float) -> None:
        super().__init__()
        self.expected = threads
        self.end = self.now + seconds
        self.wakes: dict[int, float] = {}
        self.turn = 0
        self.passed = threading.Condition()

    def sleep(self, seconds: float) -> None:
        """Let the others run until it is this thread's time again."""
        me = threading.get_ident()
        with self.passed:
            self.wakes[me] = self.now + seconds
            self._pass_on()
            assert self.passed.wait_for(lambda: self.turn == me, 60)
            self._set(self.wakes[me])
        if self.now >= self.end:
            raise Ended

    advance = sleep
    """A request takes time, in which others run."""

    def leave(self) -> None:
        """Take part no longer."""
        with self.passed:
            self.expected -= 1
            del self.wakes[threading.get_ident()]
            self._pass_on()

    def _pass_on(self) -> None:
        if self.wakes and len(self.wakes) == self.expected:
            self.turn = min(self.wakes, key=lambda thread: self.wakes[thread])
            self.passed.notify_all()

    def _set(self, now: float) -> None:
        self.elapsed += now - self.now
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
        raw = urllib3.HTTPResponse(io.BytesIO(body), preload_content=False)
        response = SimpleNamespace(status_code=status, headers=headers, raw=raw)
        try:
            return pipeline.Answer(status, headers, pipeline.read_body(response))
        except urllib3.exceptions.HTTPError as exc:
            raise pipeline.Failed("decode error") from exc

    return fetch


def as_http(request: pipeline.Request) -> tuple[str, str, dict[str, str], dict[str, str], bytes]:
    """Turn a request into what arrives at a server: method, path, query, headers, body."""
    target = urlsplit(request.url)
    query = dict(parse_qsl(target.query, keep_blank_values=True)) | dict(request.params or {})
    headers = {name.lower(): value for name, value in request.headers.items()}
    body = urlencode(request.data or {}).encode()
    return request.method, unquote(target.path), query, headers, body
