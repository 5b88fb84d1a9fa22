"""Let time pass only when somebody sleeps, and ask a FakeReddit without a socket.

clock = VirtualClock()
reddit = FakeReddit(clock)
source = pipeline.Reddit(access, fetch_from(reddit, clock), clock)

A `World` holds all that, and a real database file. T is the time at which it begins; 300 s
later r/python's first full walk is due. `listed("a", -60)` is a post of r/python that was
created 60 s before T.
"""

from __future__ import annotations

import io
import sqlite3
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import urllib3

import pipeline
from fake_reddit import FakeReddit, Fault, Post

# The turns of full walks follow from clock and name; this makes T the beginning of r/python's.
T = 1_789_200_000 - (1_789_200_000 + zlib.crc32(b"python")) % (300 * 2**10)
ACCESS = pipeline.Access(client_id="app-id", client_secret="app-secret")

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


def stream(
    reddit: pipeline.Reddit,
    names: pipeline.Names,
    database: pipeline.Database,
    interval: float = 25.0,
    **options: Any,
) -> Iterator[pipeline.Batch]:
    """Follow as the program does; `options` are the Asker's."""
    asker = pipeline.Asker(reddit, **{"once": False, **options})
    return pipeline.stream(asker, names, database, interval)


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


def listed(identifier: str, age: float, subreddit: str = "python", **more: Any) -> Post:
    """Invent a post with few fields, created `age` seconds after T (before, if negative)."""
    post = {"id": identifier, "created_utc": float(T + age), "subreddit": subreddit}
    return {**post, "title": identifier, "author_fullname": "t2_x", "author": "x", **more}


class World:
    """A listing, a clock and a database; requests take no time."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.clock = VirtualClock(T)
        self.reddit = FakeReddit(self.clock)
        self.reddit.create("python", "rust")
        self.serve = fetch_from(self.reddit, self.clock, 0.0)
        self.database = pipeline.Database(path, clock=self.clock)
        self.before_request: dict[int, Any] = {}
        self.requests = 0
        self.access = ACCESS

    def fetch(self, request: pipeline.Request) -> pipeline.Answer:
        """Do what is to happen before this listing request, then answer it."""
        if "/new" in request.url:
            self.requests += 1
            self.before_request.get(self.requests, lambda: None)()
        return self.serve(request)

    def before(self, number: int, action: Any) -> None:
        """Let something happen before the listing request of that number from now on."""
        self.before_request = {self.requests + number: action}

    def list_posts(self, first: str, count: int, start: float, step: float, **more: Any) -> None:
        """List posts first0, first1, … of which each is `step` seconds newer."""
        for n in range(count):
            self.reddit.add(listed(f"{first}{n}", start + n * step, **more))

    def remove(self, first: str, count: int) -> None:
        """Remove what `list_posts` has listed."""
        for n in range(count):
            self.reddit.remove(f"{first}{n}")

    def follow(self, *names: str, **options: Any) -> Iterator[pipeline.Batch]:
        """Follow names (r/python unless told), and store each batch when it has come."""
        source = pipeline.Reddit(self.access, self.fetch, self.clock)
        options = {"chance": lambda: 0.5, **options}
        for batch in stream(source, names or ("python",), self.database, **options):
            self.load(batch.posts, batch.cursors, batch.gaps)
            yield batch

    def started(self, *names: str, **options: Any) -> Iterator[pipeline.Batch]:
        """Follow names that have been polled once each."""
        batches = self.follow(*names, **options)
        for _ in names or ("python",):
            next(batches)
        return batches

    def run(self, batches: Iterator[pipeline.Batch], until: float) -> None:
        """Store what comes until so many seconds after T."""
        while self.clock.time() < T + until:
            next(batches)

    def load(self, posts: list[Post], *more: Any) -> None:
        pipeline.load(self.database, map(pipeline.transform, posts), *more)

    def once(self, *names: str) -> list[pipeline.Batch]:
        """Poll once to the end."""
        return list(self.follow(*names, once=True))

    def rows(self, sql: str) -> list[Any]:
        with closing(sqlite3.connect(self.path)) as connection:
            return connection.execute(sql).fetchall()

    def stored(self) -> list[str]:
        return [row[0] for row in self.rows("SELECT id FROM posts ORDER BY created_utc, id")]

    def cursor(self, name: str = "python") -> int:
        return self.rows(f"SELECT newest_utc FROM cursors WHERE subreddit = '{name}'")[0][0]

    def gaps(self) -> list[Any]:
        return self.rows("SELECT subreddit, after_utc, before_utc FROM gaps ORDER BY 1, 2")

    def asked(self, start: int = 0) -> list[str]:
        """Give the listing requests since that number, as `python` or `python after x`."""
        seen = [(r.path.split("/")[2], r.query.get("after")) for r in self.reddit.requests()]
        return [f"{names} after {after[3:]}" if after else names for names, after in seen[start:]]

    def asked_by(self, poll: Callable[[], Any]) -> list[str]:
        """Poll; give the listing requests that took."""
        start = len(self.asked())
        poll()
        return self.asked(start)


def as_http(request: pipeline.Request) -> tuple[str, str, dict[str, str], dict[str, str], bytes]:
    """Turn a request into what arrives at a server: method, path, query, headers, body."""
    target = urlsplit(request.url)
    query = dict(parse_qsl(target.query, keep_blank_values=True)) | dict(request.params or {})
    headers = {name.lower(): value for name, value in request.headers.items()}
    body = urlencode(request.data or {}).encode()
    return request.method, unquote(target.path), query, headers, body
