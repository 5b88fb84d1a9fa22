"""Run the real pipeline against a model of Reddit's listing, in virtual time.

    python tests/simulation.py [--seeds N] [--seed SEED] [--list] [SCENARIO...]

`pipeline.stream` asks the model for pages, `pipeline.load` writes a real SQLite file; only the
clock and the network are made up, so that hours pass in seconds. The seed is drawn at the start
and printed; `--seed` repeats a run. The exit status is 1 if a bar of any scenario is missed.

The model. Posts arrive at random (Poisson) and are listed after some index jitter at the place
of their creation; 1.73 % are held back and appear there 1 to 60 minutes late; 10 % vanish,
600 s later on average. A listing shows its 1000 newest items, 100 a page; an `after` that is not
in it gives an empty page. A request takes 0.35 s. Budgets are counted in windows of the wall
clock, whose phase is random.

What counts. A post is on time if it was listed within 30 s of its creation. `captured` is taken
over the on-time posts that were created after the start (after coverage began, if the first walk
was killed), listed two minutes or more before the end, and not removed until then: a post that
vanished between two polls is no fault of the follower, and posts vanish without regard to it, so
leaving them all out favours nobody. `of all` counts the vanished ones too. A loss is such an
on-time post that is not stored.

A gap is false if the walk that named it did get back behind its `after_utc` (with ten posts, as
one old post proves nothing), or to the end of a listing that hides nothing; true if a post that
was listed is missing from inside it; idle if neither: the walk could not know.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import random
import sqlite3
import sys
import tempfile
import time
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import formatdate
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pipeline

AT_ONCE = 4.0  # seconds; no look-back is shorter
ON_TIME = 30.0  # seconds; a post listed later than this counts as late
LATENCY = 0.35  # seconds a request takes
PATIENCE = 10.0  # seconds until a request that hangs is given up
PAGE, HORIZON = 100, 1000
EPOCH = 1_790_000_000

Jitter = Callable[[random.Random], float]


# The clock


class Ended(BaseException):
    """Say that the run is over; nothing in the product may catch it."""


class Killed(BaseException):
    """Say that the follower was killed; nothing in the product may catch it."""


class VirtualClock:
    """Stand in for the `time` module; to sleep is to set it forward."""

    def __init__(self, start: float) -> None:
        self.start = self.now = start
        self.end = math.inf

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now - self.start + 1000

    def sleep(self, seconds: float) -> None:
        """Pass the time; raise `Ended` at the end of the run."""
        if seconds < 0:
            raise ValueError("sleep length must be non-negative")
        self.now += seconds
        if self.now >= self.end:
            self.now = self.end
            raise Ended


# Scenarios


def no_jitter(_: random.Random) -> float:
    """List every post at once."""
    return 0.0


def exponential(mean: float) -> Jitter:
    """Make a jitter of that mean, in seconds."""
    return lambda rng: rng.expovariate(1 / mean)


def log_normal(rng: random.Random) -> float:
    """Draw a jitter with a median of 1 s and a 99th percentile of 16 s."""
    return rng.lognormvariate(0, math.log(16) / 2.326348)


class Outage(NamedTuple):
    """A time without network; a request is refused at once, or hangs; or with bare 429s."""

    seconds: float
    hanging: bool = False
    too_many: bool = False


class Bar(NamedTuple):
    """What a column of the table must show; see `figures`."""

    column: str
    relation: str
    limit: float

    def holds(self, value: float) -> bool:
        return value >= self.limit if self.relation == ">=" else value <= self.limit


class Scenario(NamedTuple):
    """A world and a follower in it; rates are posts a second."""

    title: str
    rates: dict[str, float]
    minutes: float  # whose posts count
    jitter: Jitter = exponential(1)
    follow: tuple[str, ...] = ("all",)
    budget: int = 600
    window: float = 600.0
    headers: bool = True
    token: bool = True
    feed: bool = False  # anonymous JSON is blocked, the feed is not
    latency: float = LATENCY
    other: float = 0.0  # share of the budget that another client takes
    late: float = 0.0173
    late_in: tuple[str, ...] = ()  # names whose posts come late; none: all
    on_top: bool = False  # a late post stands where it appears, above newer ones
    tail: float = 120.0  # seconds that the follower lives on, until all that counts is its to get
    vanish: float = 0.10
    vanish_after: float = 600.0
    lost_anchors: float = 0.0  # chance that the `after` post vanishes just before it is used
    thinned: bool = False  # removed items keep their place among the 1000
    history: int = 1300  # posts of each name before the follower starts
    burst: tuple[float, float] = (1.0, 0.0)  # factor and seconds
    stall: float = 0.0  # seconds for which, once, nothing new is listed
    outages: tuple[Outage, ...] = ()
    cuts: float = 0.0  # chance that the network fails for 2 min in the middle of a walk
    kills: int = 0
    life: tuple[int, int] = (1, 30)  # requests until a kill
    down: tuple[float, float] = (60.0, 1200.0)  # seconds
    drop_newest: bool = False  # the newest stored post vanishes while the follower is down
    cron: float = 0.0  # seconds between two starts with --once, instead of following
    failing: float = 0.0  # chance that a request is answered with 503
    private: tuple[str, float, float] = ("", 0.0, 0.0)  # a name; from and until, in minutes
    broken: str = ""  # a name that is always answered with 500, or
    hanging: bool = False  # not at all
    bars: tuple[Bar, ...] = ()


# What holds in every scenario, whatever else it asks.
ALWAYS = (
    Bar("false", "<=", 0),
    Bar("twice", "<=", 0),
    Bar("holes", "<=", 0),
    Bar("caught up", ">=", 100),
    Bar("429/h", "<=", 1),
)

EVERYTHING = {"all_of_reddit": 17.0}
ONE_A_SECOND = {"busy": 1.0}
STILL = {f"still{number}": 1 / 864_000 for number in range(10)}

ANONYMOUS: dict[str, Any] = {"token": False, "headers": False, "budget": 10, "window": 60.0}

SCENARIOS = {
    "all": Scenario(
        "all of Reddit: 17/s, jitter mean 1 s, 600/600 s",
        EVERYTHING,
        20,
        bars=(
            Bar("captured", ">=", 99.995),  # 100.00 %
            Bar("req/min", "<=", 40),
            Bar("median", "<=", 5),
        ),
    ),
    "log-normal": Scenario(
        "the same, jitter log-normal",
        EVERYTHING,
        20,
        jitter=log_normal,
        bars=(Bar("captured", ">=", 99.9), Bar("req/min", "<=", 80)),
    ),
    "refused": Scenario(
        "17/s, 45 s of outage, refused",
        EVERYTHING,
        20,
        outages=(Outage(45),),
        bars=(Bar("captured", ">=", 99.9),),
    ),
    "hanging": Scenario(
        "17/s, 45 s of outage, hanging",
        EVERYTHING,
        20,
        outages=(Outage(45, hanging=True),),
        bars=(Bar("captured", ">=", 99.5),),
    ),
    "down": Scenario(
        "10 min down at 1/s, newest stored post deleted",
        ONE_A_SECOND,
        30,
        follow=("busy",),
        kills=1,
        life=(30, 80),
        down=(600, 600),
        drop_newest=True,
        bars=(Bar("captured", ">=", 99.995), Bar("catch-up", "<=", 12)),
    ),
    "scarce": Scenario(
        "17/s, 10 requests a minute",
        EVERYTHING,
        60,
        budget=100,
        bars=(Bar("captured", ">=", 92), Bar("inside", ">=", 99)),
    ),
    "quiet": Scenario(
        "a quiet subreddit: 1 in 5 min",
        {"quiet": 1 / 300},
        360,
        follow=("quiet",),
        bars=(
            Bar("captured", ">=", 99.995),
            Bar("req/min", "<=", 3),
            Bar("median", "<=", 15),
        ),
    ),
    # No bar of the design from here on, but its promises.
    "no-jitter": Scenario("17/s without jitter", EVERYTHING, 20, jitter=no_jitter),
    "mean-3": Scenario("17/s, jitter mean 3 s", EVERYTHING, 20, jitter=exponential(3)),
    "budget-1000": Scenario("log-normal, 1000/600 s", EVERYTHING, 20, log_normal, budget=1000),
    "budget-10000": Scenario("log-normal, 10000/600 s", EVERYTHING, 20, log_normal, budget=10000),
    "five": Scenario("5/s, 10 requests a minute", {"busy": 5.0}, 60, budget=100),
    "one": Scenario(
        "1/s for an hour",
        ONE_A_SECOND,
        60,
        follow=("busy",),
        bars=(Bar("captured", ">=", 99.995),),
    ),
    "late": Scenario(
        "1/s, every tenth post approved late",
        ONE_A_SECOND,
        120,
        follow=("busy",),
        late=0.1,
        bars=(Bar("captured", ">=", 99.995),),
    ),
    "on-top": Scenario(
        "1/s, every tenth late and then on top",
        ONE_A_SECOND,
        120,
        follow=("busy",),
        late=0.1,
        on_top=True,
        bars=(Bar("captured", ">=", 99.995), Bar("late", ">=", 99.9)),
    ),
    "kills": Scenario(
        "1/s, 8 kills, 1 to 20 min down",
        ONE_A_SECOND,
        180,
        follow=("busy",),
        kills=8,
        bars=(Bar("inside", ">=", 99),),
    ),
    "thinned": Scenario(
        "the same, removed items keep their place",
        ONE_A_SECOND,
        180,
        follow=("busy",),
        kills=8,
        thinned=True,
        bars=(Bar("inside", ">=", 99),),
    ),
    "young": Scenario(
        "a young subreddit, 8 kills",
        {"young": 1 / 20},
        180,
        follow=("young",),
        kills=8,
        history=30,
        bars=(Bar("captured", ">=", 99.995), Bar("idle", "<=", 0)),
    ),
    "anchors": Scenario(
        "5/s, a third of the anchors vanish, 3 outages of 2 min",
        {"busy": 5.0},
        60,
        follow=("busy",),
        lost_anchors=0.33,
        outages=(Outage(120),) * 3,
        bars=(Bar("captured", ">=", 99.995),),
    ),
    "outage": Scenario(
        "1/s, 10 min of outage, hanging",
        ONE_A_SECOND,
        60,
        follow=("busy",),
        outages=(Outage(600, hanging=True),),
        bars=(Bar("captured", ">=", 99.995),),
    ),
    "bare-429s": Scenario(
        "5/s, 3 times a minute of 429s that say nothing",
        {"busy": 5.0},
        120,
        follow=("busy",),
        outages=(Outage(60, too_many=True),) * 3,
        bars=(Bar("captured", ">=", 99.995),),
    ),
    "cut": Scenario(
        "5/s, 6 kills, the network cut for 2 min in some walks",
        {"busy": 5.0},
        60,
        follow=("busy",),
        kills=6,
        life=(10, 60),
        down=(60.0, 180.0),
        cuts=0.02,
        bars=(Bar("inside", ">=", 99),),
    ),
    # The other client can use up a window at any moment; that costs a 429 now and then.
    "other": Scenario(
        "5/s, another client takes half of 100/600 s",
        {"busy": 5.0},
        60,
        follow=("busy",),
        budget=100,
        other=0.5,
        tail=720,
        bars=(Bar("captured", ">=", 90), Bar("inside", ">=", 99), Bar("429/h", "<=", 6)),
    ),
    "other-600": Scenario(
        "17/s, another client takes half of 600/600 s",
        EVERYTHING,
        20,
        other=0.5,
        tail=720,
        bars=(Bar("captured", ">=", 99), Bar("429/h", "<=", 6)),
    ),
    "three": Scenario(
        "5/s, 1 in 30 s and 1 in 5 min, 6 kills",
        {"busy": 5.0, "slow": 1 / 30, "quiet": 1 / 300},
        120,
        follow=("busy", "slow", "quiet"),
        kills=6,
        down=(60.0, 900.0),
        bars=(Bar("inside", ">=", 99),),
    ),
    "beside": Scenario(
        "1 in a minute beside 1 in 10 days",
        {"busy": 1 / 60, "still": 1 / 864_000},
        180,
        follow=("busy", "still"),
        bars=(Bar("captured", ">=", 99.995), Bar("req/min", "<=", 6)),  # 3 a name
    ),
    "beside-ten": Scenario(
        "the feed: 3/s beside ten of 1 in 10 days",
        {"busy": 3.0} | STILL,
        60,
        follow=("busy", *STILL),
        feed=True,
        **ANONYMOUS,
        bars=(Bar("captured", ">=", 99.995),),
    ),
    "thirty": Scenario(
        "the feed: 5/s beside 30 of 1 in 10 min, 10 min outage",
        {"busy": 5.0} | {f"slow{number}": 1 / 600 for number in range(30)},
        60,
        follow=("busy", *(f"slow{number}" for number in range(30))),
        **ANONYMOUS,
        feed=True,
        history=200,
        outages=(Outage(600),),
        tail=2400,  # the names that were behind are walked alone, one after the other
        bars=(Bar("captured", ">=", 80), Bar("inside", ">=", 99.9)),
    ),
    "approved": Scenario(
        "the feed: 1 in 10 s, every tenth approved late",
        {"slow": 0.1},
        240,
        follow=("slow",),
        feed=True,
        **ANONYMOUS,
        late=0.1,
        tail=3000,
        bars=(Bar("captured", ">=", 99.995), Bar("late", ">=", 99.9)),
    ),
    "approved-beside": Scenario(
        "4 an hour, every fourth approved late, beside 1/s",
        {"busy": 1.0, "slow": 1 / 900},
        360,
        follow=("busy", "slow"),
        late=0.25,
        late_in=("slow",),
        tail=3000,
        bars=(Bar("captured", ">=", 99.995), Bar("late", ">=", 99.9)),
    ),
    "slow": Scenario(
        "17/s, 3 min down, 1.5 s a request, a tenth removed",
        EVERYTHING,
        20,
        latency=1.5,
        vanish_after=1.0,
        thinned=True,
        kills=1,
        life=(30, 80),
        down=(180, 180),
        bars=(Bar("inside", ">=", 99),),
    ),
    "bursts": Scenario(
        "1/s, ten times that for 3 min",
        ONE_A_SECOND,
        60,
        follow=("busy",),
        burst=(10.0, 180.0),
        bars=(Bar("captured", ">=", 99.995),),
    ),
    "stall": Scenario(
        "5/s, nothing new listed for 25 s",
        {"busy": 5.0},
        30,
        follow=("busy",),
        stall=25.0,
        bars=(Bar("captured", ">=", 99.9),),
    ),
    "anonymous": Scenario(
        "1/s, no token, no headers, 10 requests a minute",
        ONE_A_SECOND,
        60,
        follow=("busy",),
        **ANONYMOUS,
        bars=(Bar("captured", ">=", 99.995),),
    ),
    "feed": Scenario(
        "the feed: 3/s, a tenth of the anchors vanish",
        {"busy": 3.0},
        60,
        follow=("busy",),
        **ANONYMOUS,
        feed=True,
        lost_anchors=0.1,
        bars=(Bar("captured", ">=", 99.995),),
    ),
    "feed-kills": Scenario(
        "the feed: 1/s, 8 kills, 1 to 20 min down",
        ONE_A_SECOND,
        180,
        follow=("busy",),
        **ANONYMOUS,
        feed=True,
        kills=8,
        life=(15, 40),  # a first walk that was killed may come less deep the second time
        bars=(Bar("inside", ">=", 99),),
    ),
    "feed-young": Scenario(
        "the feed: a young subreddit, 8 kills",
        {"young": 1 / 20},
        180,
        follow=("young",),
        **ANONYMOUS,
        feed=True,
        kills=8,
        history=30,
        bars=(Bar("captured", ">=", 99.995), Bar("idle", "<=", 0)),
    ),
    "many": Scenario(
        "200 of 1 in 10 min and 2 of 1/s, 600/600 s",
        {"busy1": 1.0, "busy2": 1.0} | {f"q{n}": 1 / 600 for n in range(200)},
        60,
        follow=("busy1", *(f"q{n}" for n in range(200)), "busy2"),
        history=150,
        tail=900,
        bars=(Bar("captured", ">=", 99.995),),
    ),
    "forty": Scenario(
        "the feed: 40 of 1 in 10 min, 10 requests a minute",
        {f"q{n}": 1 / 600 for n in range(40)},
        180,
        follow=tuple(f"q{n}" for n in range(40)),
        **ANONYMOUS,
        feed=True,
        history=150,
        tail=900,
        bars=(Bar("captured", ">=", 99.995), Bar("429/h", "<=", 2)),
    ),
    "forty-slow": Scenario(
        "the feed: 40 of 1 in 10 min, 1 request a minute",
        {f"q{n}": 1 / 600 for n in range(40)},
        360,
        follow=tuple(f"q{n}" for n in range(40)),
        **(ANONYMOUS | {"budget": 1}),
        feed=True,
        history=150,
        tail=7200,
        bars=(Bar("captured", ">=", 99.995), Bar("429/h", "<=", 2)),
    ),
    "forty-mixed": Scenario(
        "the feed: 1 in 4 s and 39 of 1 in 10 min, 1 request a minute",
        {"busy": 0.25} | {f"q{n}": 1 / 600 for n in range(39)},
        360,
        follow=(*(f"q{n}" for n in range(39)), "busy"),
        **(ANONYMOUS | {"budget": 1}),
        feed=True,
        history=150,
        tail=10800,
        bars=(Bar("captured", ">=", 99.995), Bar("429/h", "<=", 2)),
    ),
    "private": Scenario(
        "1 in 4 s private for 30 min, beside 1/s and 1 in 5 min",
        {"busy": 1.0, "closed": 0.25, "quiet": 1 / 300},
        120,
        follow=("closed", "busy", "quiet"),
        private=("closed", 30, 60),
        bars=(Bar("captured", ">=", 99.995),),
    ),
    "broken": Scenario(
        "17/s and 1 in 5 min beside one that always fails",
        {"busy": 17.0, "broken": 0.1, "quiet": 1 / 300},
        20,
        follow=("broken", "busy", "quiet"),
        broken="broken",
        bars=(Bar("captured", ">=", 99.995),),
    ),
    "broken-hanging": Scenario(
        "the same, and it never answers",
        {"busy": 17.0, "broken": 0.1, "quiet": 1 / 300},
        20,
        follow=("broken", "busy", "quiet"),
        broken="broken",
        hanging=True,
        bars=(Bar("captured", ">=", 99.995),),
    ),
    "restart": Scenario(
        "17/s behind 200 of 1 in 10 min, 3 kills, 10 s down",
        {f"q{n}": 1 / 600 for n in range(200)} | {"busy": 17.0},
        30,
        follow=(*(f"q{n}" for n in range(200)), "busy"),
        kills=3,
        life=(500, 700),
        down=(10.0, 10.0),
        history=150,
        tail=900,
        bars=(Bar("captured", ">=", 99.9),),
    ),
    "windows": Scenario(
        "17/s, windows of 10 s with 6 requests",
        EVERYTHING,
        20,
        budget=6,
        window=10.0,
        bars=(Bar("captured", ">=", 99.9), Bar("inside", ">=", 99)),
    ),
    "headless": Scenario(
        "1/s, token, no headers, 10 requests a minute",
        ONE_A_SECOND,
        180,
        follow=("busy",),
        budget=10,
        window=60.0,
        headers=False,
        # From 60 it takes three 429s to learn of 10; then one doubling an hour is taken back.
        bars=(Bar("captured", ">=", 99.995), Bar("429/h", "<=", 2)),
    ),
    "cron": Scenario(
        "1/s, --once every 5 min",
        ONE_A_SECOND,
        120,
        follow=("busy",),
        cron=300,
        tail=420,
        bars=(Bar("captured", ">=", 99.995), Bar("idle", "<=", 0)),
    ),
    "cron-17": Scenario(
        "17/s, --once every minute",
        EVERYTHING,
        20,
        cron=60,
        tail=180,
        bars=(Bar("inside", ">=", 99),),
    ),
}


# The world


class Post(NamedTuple):
    """A post of the model; ordered by its place in the listing."""

    place: float
    id: str
    created: float
    listed: float
    vanishes: float
    subreddit: str

    @property
    def is_late(self) -> bool:
        return self.listed - self.created > ON_TIME


def base36(number: int) -> str:
    """Write a number as Reddit writes ids."""
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return digits or "0"


def json_listing(posts: Sequence[Post], more: str) -> bytes:
    """Encode a page as a listing."""
    children = [
        {
            "kind": "t3",
            "data": {
                "id": post.id,
                "name": f"t3_{post.id}",
                "title": f"Title of {post.id}",
                "subreddit": post.subreddit,
                "author": "somebody",
                "author_fullname": "t2_abc",
                "created_utc": float(int(post.created)),
                "permalink": f"/r/{post.subreddit}/comments/{post.id}/title/",
            },
        }
        for post in posts
    ]
    data = {"after": more or None, "before": None, "children": children}
    return json.dumps({"kind": "Listing", "data": data}).encode()


def atom_feed(posts: Sequence[Post]) -> bytes:
    """Encode a page as a feed, which does not tell whether more comes."""
    entries = "".join(
        f"<entry><author><name>/u/somebody</name></author><category term='{post.subreddit}'/>"
        f"<id>t3_{post.id}</id><title>Title of {post.id}</title>"
        f"<link href='https://www.reddit.com/r/{post.subreddit}/comments/{post.id}/title/'/>"
        f"<published>{datetime.fromtimestamp(int(post.created), timezone.utc).isoformat()}"
        "</published></entry>"
        for post in posts
    )
    return f"<feed xmlns='http://www.w3.org/2005/Atom'>{entries}</feed>".encode()


def arrivals(rng: random.Random, scenario: Scenario, rate: float, start: float) -> Iterator[float]:
    """Draw the creation times of one name, its history before the start included."""
    factor, length = scenario.burst
    burst = start + rng.uniform(0.2, 0.8) * scenario.minutes * 60
    moment = start - scenario.history / rate
    while moment < start + scenario.minutes * 60 + scenario.tail:
        yield moment
        in_burst = burst <= moment < burst + length
        moment += rng.expovariate(rate * factor if in_burst else rate)


def appears(
    rng: random.Random, scenario: Scenario, name: str, created: float, stall: float
) -> float:
    """Draw when a post is listed."""
    if rng.random() < scenario.late and name in (scenario.late_in or scenario.rates):
        return created + rng.uniform(60, 3600)
    listed = created + scenario.jitter(rng)
    return stall + scenario.stall if stall <= listed < stall + scenario.stall else listed


def lifetime(rng: random.Random, scenario: Scenario) -> float:
    """Draw for how many seconds a post is listed before it vanishes."""
    if rng.random() < scenario.vanish:
        return rng.expovariate(1 / scenario.vanish_after)
    return math.inf


def write_posts(rng: random.Random, scenario: Scenario, start: float) -> list[Post]:
    """Draw everything that will ever be posted, oldest first."""
    created = sorted(
        (moment, name)
        for name, rate in scenario.rates.items()
        for moment in arrivals(rng, scenario, rate, start)
    )
    stall = start + rng.uniform(0.2, 0.8) * scenario.minutes * 60
    number, posts = 36**6, []
    for moment, name in created:
        number += rng.randrange(1, 4)
        post_id = base36(number)
        listed = appears(rng, scenario, name, moment, stall)
        vanishes = listed + lifetime(rng, scenario)
        place = listed if scenario.on_top and listed - moment > ON_TIME else moment
        posts.append(Post(place, post_id, moment, listed, vanishes, name))
    return posts


class Budget:
    """Count requests in fixed windows of the wall clock, as Reddit does."""

    def __init__(self, scenario: Scenario, rng: random.Random) -> None:
        self.total, self.window = scenario.budget, scenario.window
        self.other = scenario.other
        self.phase = rng.random() * self.window
        self.seed = rng.random()
        self.current, self.own = -1, 0

    def spend(self, now: float) -> tuple[bool, dict[str, str]]:
        """Count one request; tell whether it is allowed, and the headers."""
        window, into = divmod(now + self.phase, self.window)
        if window != self.current:
            self.current, self.own = int(window), 0
        self.own += 1
        used = self.own + self._used_by_other(int(window), into / self.window)
        headers = {
            "x-ratelimit-used": str(used),
            "x-ratelimit-remaining": f"{max(0, self.total - used)}.0",
            "x-ratelimit-reset": str(int(self.window - into)),
        }
        return used <= self.total, headers

    def _used_by_other(self, window: int, progress: float) -> int:
        """Take half of the other client's share evenly, half at one moment."""
        moment = random.Random(f"{self.seed} {window}").random()
        return int(self.total * self.other * (progress + (progress > moment)) / 2)


class Walk(NamedTuple):
    """How far the pages since the last newest page have come."""

    place: float = math.inf
    complete: bool = False


class Model:
    """Reddit: the listings, the token endpoint, the budget, the network.

    `requests`, `refusals` count what was asked for and answered with 429; `walks` maps a listing
    (the names in its address) to how far back the pages of its last walk went.
    """

    def __init__(self, scenario: Scenario, rng: random.Random) -> None:
        self.scenario, self.rng = scenario, rng
        self.clock = VirtualClock(EPOCH + rng.uniform(0, 86400))
        self.start = self.clock.now
        self.posts = write_posts(rng, scenario, self.start)
        self.by_name = {f"t3_{post.id}": post for post in self.posts}
        self.removed: dict[str, float] = {}
        self.shown: dict[frozenset[str], list[Post]] = {frozenset(["all"]): []}
        self.budget = Budget(scenario, rng)
        self.events = self._plan()
        self.next_event = 0
        self.outages = self._draw_outages()
        self.token, self.token_ends = "", 0.0
        self.requests = self.refusals = 0
        self.walks: dict[frozenset[str], Walk] = {}
        self.kill_at = math.inf
        self.kill_where = "before"
        self.advance()

    # What is listed

    def _plan(self) -> list[tuple[float, bool, Post]]:
        """List every appearance and every disappearance in order of time."""
        events = [(post.listed, False, post) for post in self.posts]
        events += [(post.vanishes, True, post) for post in self.posts if post.vanishes < math.inf]
        return sorted(events)

    def advance(self) -> None:
        """Let everything happen that is due by now."""
        while self.next_event < len(self.events):
            moment, vanishes, post = self.events[self.next_event]
            if moment > self.clock.now:
                return
            self.next_event += 1
            if vanishes:
                self.remove(post, moment)
            elif post.id not in self.removed:
                self._show(post)

    def _show(self, post: Post) -> None:
        for names, shown in self.shown.items():
            if post.subreddit in names or "all" in names:
                insort(shown, post)

    def remove(self, post: Post, moment: float) -> None:
        """Take a post out of every listing."""
        if post.id in self.removed:
            return
        self.removed[post.id] = moment
        if self.scenario.thinned:
            return
        for shown in self.shown.values():
            index = bisect_left(shown, post)
            if index < len(shown) and shown[index].id == post.id:
                del shown[index]

    def everything(self, names: frozenset[str]) -> list[Post]:
        """Give all that is listed under these names, beyond the horizon too."""
        if names not in self.shown:
            every = self.shown[frozenset(["all"])]
            self.shown[names] = [post for post in every if post.subreddit in names]
        return self.shown[names]

    def listing(self, names: frozenset[str]) -> list[Post]:
        """Give what a client can page through, oldest first."""
        listing = self.everything(names)[-HORIZON:]
        if self.scenario.thinned:
            return [post for post in listing if post.id not in self.removed]
        return listing

    def is_whole(self, names: frozenset[str]) -> bool:
        """Tell whether the listing hides nothing behind its horizon."""
        return len(self.everything(names)) <= HORIZON

    def page(self, names: frozenset[str], after: str, limit: int) -> tuple[list[Post], str]:
        """Cut a page, newest first, and say what comes after it."""
        listing = self.listing(names)
        end = len(listing)
        if after in self.by_name:
            anchor = self.by_name[after]
            end = bisect_left(listing, anchor)
            if end == len(listing) or listing[end].id != anchor.id:
                return [], ""
        begin = max(0, end - limit)
        posts = listing[begin:end][::-1]
        more = f"t3_{posts[-1].id}" if begin and posts else ""
        self._record(names, posts, newest=after not in self.by_name, last=not more)
        return posts, more

    def _record(self, names: frozenset[str], posts: list[Post], newest: bool, last: bool) -> None:
        """Note how far back the walk through this listing has come."""
        walk = Walk() if newest else self.walks.get(names, Walk())
        place = min(walk.place, posts[-10:][0].place) if posts else walk.place
        complete = walk.complete or (last and self.is_whole(names))
        self.walks[names] = Walk(place, complete)

    # What a request meets

    def _draw_outages(self) -> list[tuple[float, float, Outage]]:
        """Spread the outages over the middle of the run."""
        counted = self.scenario.minutes * 60
        share = counted * 0.8 / max(1, len(self.scenario.outages))
        drawn = []
        for number, outage in enumerate(self.scenario.outages):
            earliest = self.start + counted * 0.1 + number * share
            begin = earliest + self.rng.uniform(0, max(0.0, share - outage.seconds))
            drawn.append((begin, begin + outage.seconds, outage))
        return drawn

    def fetch(self, request: pipeline.Request) -> pipeline.Answer:
        """Answer a request, or fail as a network does."""
        self._die("before")
        self.requests += 1
        self._cut(request)
        for begin, end, outage in self.outages:
            if begin <= self.clock.now < end:
                self.clock.sleep(PATIENCE if outage.hanging else 0.01)
                if outage.too_many:
                    return pipeline.Answer(429, {}, b"")
                raise pipeline.Failed("the network is down")
        self.clock.sleep(self.scenario.latency / 2)
        self.advance()
        answer = self._answer(request)
        self.clock.sleep(self.scenario.latency / 2)
        self._die("after")
        return answer

    def _lose_anchor(self, after: str) -> None:
        """Let the `after` post vanish just before it is used, if chance will have it."""
        if after in self.by_name and self.rng.random() < self.scenario.lost_anchors:
            self.remove(self.by_name[after], self.clock.now)

    def _cut(self, request: pipeline.Request) -> None:
        """Cut the network in the middle of a walk, if chance will have it."""
        in_walk, ends = bool(request.params.get("after")), self.clock.now + 120
        if (
            in_walk
            and ends < self.clock.end - self.scenario.tail
            and self.rng.random() < self.scenario.cuts
        ):
            self.outages.append((self.clock.now, ends, Outage(120)))

    def _die(self, where: str) -> None:
        """Kill the follower here, if that is what was drawn."""
        if self.requests >= self.kill_at and self.kill_where == where:
            raise Killed

    def die_before_commit(self) -> None:
        """Kill the follower between a finished walk and its transaction."""
        self._die("commit")

    def _answer(self, request: pipeline.Request) -> pipeline.Answer:
        url = urlsplit(request.url)
        query = dict(parse_qsl(url.query)) | dict(request.params)
        if url.path == "/api/v1/access_token":
            return self._new_token(request)
        if self.scenario.token and not self._knows(request.headers):
            return pipeline.Answer(401, {}, b'{"message": "Unauthorized", "error": 401}')
        allowed, headers = self.budget.spend(self.clock.now)
        if not self.scenario.headers:
            headers = {}
        headers["date"] = formatdate(self.clock.now, usegmt=True)
        if not allowed:
            self.refusals += 1
            return pipeline.Answer(429, headers, b'{"message": "Too Many Requests", "error": 429}')
        if self.scenario.feed and url.path.endswith(".json"):
            return pipeline.Answer(403, headers, b"<html>blocked</html>")
        names = url.path.strip("/").split("/")[1].split("+")
        closed, begins, ends = self.scenario.private
        if closed in names and begins <= (self.clock.now - self.start) / 60 < ends:
            return pipeline.Answer(403, headers, b'{"reason": "private", "error": 403}')
        if self.rng.random() < self.scenario.failing:
            return pipeline.Answer(503, headers, b"<html>down</html>")
        if self.scenario.broken in names:
            if self.scenario.hanging:
                self.clock.sleep(PATIENCE)
                raise pipeline.Failed("read timed out")
            return pipeline.Answer(500, headers, b'{"message": "Server Error", "error": 500}')
        return pipeline.Answer(200, headers, self._listing_body(url.path, query))

    def _new_token(self, request: pipeline.Request) -> pipeline.Answer:
        """Hand out a token that lasts an hour."""
        assert request.method == "POST"
        assert request.headers["Authorization"]
        self.token, self.token_ends = f"token-{self.requests}", self.clock.now + 3600
        body = {
            "access_token": self.token,
            "token_type": "bearer",
            "expires_in": 3600,
            "scope": "*",
        }
        return pipeline.Answer(200, {}, json.dumps(body).encode())

    def _knows(self, headers: Any) -> bool:
        given = {key.lower(): value for key, value in headers.items()}.get("authorization", "")
        return self.clock.now < self.token_ends and given.lower() == f"bearer {self.token}"

    def _listing_body(self, path: str, query: dict[str, str]) -> bytes:
        """Encode the page that an address names."""
        unknown = set(query) - {"limit", "after", "raw_json"}
        parts = path.strip("/").split("/")
        end = ".rss" if self.scenario.feed else ".json"
        assert not unknown, query
        assert parts[::2] == ["r", "new"], path
        assert parts[3:] == ([] if self.scenario.token else [end]), path
        limit = min(PAGE, max(1, int(query.get("limit", "25"))))
        names = frozenset(parts[1].lower().split("+"))
        self._lose_anchor(query.get("after", ""))
        posts, more = self.page(names, query.get("after", ""), limit)
        return atom_feed(posts) if self.scenario.feed else json_listing(posts, more)


# A run


@dataclass
class Result:
    """What came of one run."""

    counted: int = 0
    captured: int = 0
    all_counted: int = 0
    all_captured: int = 0
    late: int = 0
    late_captured: int = 0
    requests: int = 0
    minutes: float = 0.0
    delays: list[float] = field(default_factory=list)
    true: int = 0
    idle: int = 0
    false: int = 0
    careful: int = 0  # of the false ones: the listing held more than three quarters of its places
    lost_inside: int = 0
    holes: int = 0  # losses outside every gap, from before the cursor, of posts listed at once
    owed: int = 0
    caught_up: int = 0
    catch_up: int = 0
    refusals: int = 0
    twice: int = 0

    @property
    def lost(self) -> int:
        return self.counted - self.captured


class Named(NamedTuple):
    """A gap as it stands in the database."""

    subreddit: str
    after_utc: int
    before_utc: int
    noticed_utc: int


def named(gap: pipeline.Gap, cursor: pipeline.Cursor | None) -> Named:
    """Give the bounds that a gap gets when it is stored."""
    assert cursor
    after_utc = cursor.newest_utc - gap.lag
    return Named(gap.subreddit, after_utc, gap.before_utc, gap.noticed_utc)


class Run:
    """One follower, its lives and its database, in one world."""

    def __init__(self, scenario: Scenario, seed: str, directory: Path) -> None:
        self.rng = random.Random(seed)
        self.model = Model(scenario, self.rng)
        self.clock = self.model.clock
        self.scenario = scenario
        self.end = self.model.start + scenario.minutes * 60
        self.clock.end = self.end + scenario.tail
        self.path = directory / "posts.db"
        self.committed: dict[str, float] = {}
        self.gaps: list[tuple[Named, bool]] = []  # with: it is false
        self.result = Result()
        self.owed: dict[str, list[Post]] = {}
        self.owed_since = 0
        self.down = 0.0

    def live(self) -> Result:
        """Follow until the end, through every kill."""
        with contextlib.suppress(Ended):
            for _ in range(self.scenario.kills):
                with contextlib.suppress(Killed):
                    self._follow(self.rng.randint(*self.scenario.life))
                self._stay_down()
            self._follow(math.inf)
        self._count()
        return self.result

    def _follow(self, life: float) -> None:
        """Live one life: one long process, or one after the other."""
        self.model.kill_at = self.model.requests + life
        self.model.kill_where = self.rng.choice(["before", "after", "commit"])
        self.model.walks.clear()
        every = self.scenario.cron or 60.0  # one that ends is started again
        while True:
            with contextlib.suppress(pipeline.Gone, pipeline.Failed):
                self._run_process()
            self.clock.sleep(every - self.clock.now % every)

    def _run_process(self) -> None:
        """Do what `main` does, with a note of every commit."""
        scenario, model = self.scenario, self.model
        access = pipeline.Access()
        if scenario.token:
            access = pipeline.Access(client_id="id", client_secret="secret")
        reddit = pipeline.Reddit(access, model.fetch, self.clock)
        with pipeline.Database(str(self.path), clock=self.clock) as database:
            for batch in pipeline.stream(
                reddit,
                scenario.follow,
                database,
                once=bool(scenario.cron),
                chance=self.rng.random,
            ):
                model.die_before_commit()
                gaps = [named(gap, database.cursor(gap.subreddit)) for gap in batch.gaps]
                rows = map(pipeline.transform, batch.posts)
                pipeline.load(database, rows, batch.cursors, batch.gaps)
                self._note(batch, gaps)

    def _note(self, batch: pipeline.Batch, gaps: Sequence[Named]) -> None:
        """Write down what a transaction has stored, and when."""
        for post in batch.posts:
            self.result.twice += post["id"] in self.committed
            self.committed.setdefault(post["id"], self.clock.now)
        for gap in gaps:
            self.gaps.append((gap, self.got_back(gap)))
            held = len(self.model.everything(frozenset([gap.subreddit])))
            self.result.careful += self.gaps[-1][1] and held > 3 * HORIZON / 4
        self.model.walks.clear()
        for cursor in batch.cursors:
            self._check_owed(cursor.subreddit)

    def got_back(self, gap: Named) -> bool:
        """Tell whether a walk did reach what the gap says it did not."""
        walks = [
            walk
            for names, walk in self.model.walks.items()
            if gap.subreddit in names or "all" in names
        ]
        return any(walk.complete or walk.place < gap.after_utc for walk in walks)

    def _stay_down(self) -> None:
        """Let time pass without a follower, and note what is then owed to the next."""
        left = self.end - self.clock.now  # the last life must see the end
        seconds = min(self.rng.uniform(*self.scenario.down), max(0.0, left - 60))
        stopped = max(self.committed.values(), default=self.model.start)
        if self.scenario.drop_newest:
            stored = [post for post in self.model.posts if post.id in self.committed]
            kept = [post for post in stored if post.id not in self.model.removed]
            self.model.remove(max(kept), self.clock.now)
        self.clock.sleep(seconds)
        self.down += seconds
        self.model.advance()
        self.owed = {name: self._owed_to(name, stopped) for name in self.scenario.follow}
        self.owed_since = self.model.requests

    def _owed_to(self, name: str, stopped: float) -> list[Post]:
        """Give what a name lists now that the last life cannot have seen."""
        listing = self.model.listing(frozenset([name]))
        return [post for post in listing if post.listed > stopped and not post.is_late]

    def _check_owed(self, name: str) -> None:
        """Compare the first transaction of a life with what was listed before it."""
        owed = self.owed.pop(name, [])
        self.model.advance()
        listing = self.model.listing(frozenset([name]))
        # At the horizon's edge items fall off and come back when others are removed.
        edge = 0 if self.model.is_whole(frozenset([name])) else 20
        still = {post.id for post in listing[edge:]}
        owed = [post for post in owed if post.id in still]
        self.result.owed += len(owed)
        self.result.caught_up += sum(post.id in self.committed for post in owed)
        if owed:
            requests = self.model.requests - self.owed_since
            self.result.catch_up = max(self.result.catch_up, requests)

    def _count(self) -> None:
        """Compare the database with the world."""
        with contextlib.closing(sqlite3.connect(self.path)) as database:
            stored = {post_id for (post_id,) in database.execute("SELECT id FROM posts")}
            rows = list(database.execute("SELECT subreddit, after_utc, before_utc FROM gaps"))
            since = dict(database.execute("SELECT subreddit, since_utc FROM cursors"))
            until = dict(database.execute("SELECT subreddit, newest_utc FROM cursors"))
        assert stored == set(self.committed), "the database differs from what was committed"
        for gap, _ in self.gaps:  # one that lies inside another is not repeated
            assert any(
                row[0] == gap.subreddit and row[1] <= gap.after_utc and row[2] >= gap.before_utc
                for row in rows
            ), "the database lacks a gap that was named"
        result, model = self.result, self.model
        result.requests, result.refusals = model.requests, model.refusals
        result.minutes = (self.clock.now - model.start - self.down) / 60
        for post in model.posts:
            begins = since.get(post.subreddit, since.get("all", math.inf))
            if post.created < max(model.start, begins + 1) or post.listed > self.end:
                continue
            self._count_post(post, post.id in stored, rows)
            passed = post.created + AT_ONCE < until.get(post.subreddit, until.get("all", 0.0))
            if passed and not post.is_late and post.listed - post.created <= AT_ONCE:
                result.holes += self._is_hole(post, stored, rows)
        self._count_gaps(stored)

    def _is_hole(self, post: Post, stored: set[str], gaps: list[tuple[str, int, int]]) -> bool:
        """Tell whether a post that is listed is neither stored nor in a gap."""
        known = post.id in stored or post.id in self.model.removed
        return not known and not any(is_inside(post, *row) for row in gaps)

    def _count_post(self, post: Post, stored: bool, gaps: list[tuple[str, int, int]]) -> None:
        result = self.result
        gone = post.id in self.model.removed
        if post.is_late:
            result.late += not gone
            result.late_captured += stored and not gone
            return
        result.all_counted += 1
        result.all_captured += stored
        if gone:
            return
        result.counted += 1
        result.captured += stored
        if stored:
            result.delays.append(self.committed[post.id] - post.listed)
        else:
            result.lost_inside += any(is_inside(post, *row) for row in gaps)

    def _count_gaps(self, stored: set[str]) -> None:
        """Tell true gaps from idle and false ones."""
        missing = [
            post
            for post in self.model.posts
            if post.id not in stored and post.id not in self.model.removed
        ]
        for gap, false in self.gaps:
            hit = any(
                post.listed <= gap.noticed_utc
                and is_inside(post, gap.subreddit, gap.after_utc, gap.before_utc)
                for post in missing
            )
            self.result.false += false
            self.result.true += hit and not false
            self.result.idle += not hit and not false


def is_inside(post: Post, name: str, after: int, before: int) -> bool:
    """Tell whether a gap row covers a post; both its bounds are inclusive."""
    return name in ("all", post.subreddit) and after <= int(post.created) <= before


def simulate(scenario: Scenario, seed: str) -> Result:
    """Run a scenario once, on a database of its own."""
    with tempfile.TemporaryDirectory(prefix="redpipe-simulation-") as directory:
        return Run(scenario, seed, Path(directory)).live()


# Drawn worlds


SOURCES: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"budget": 1000},
    {"budget": 100},
    {"budget": 6, "window": 10.0},
    {"budget": 60, "window": 60.0},
    {"budget": 600, "headers": False, "window": 60.0},
    ANONYMOUS,
    ANONYMOUS | {"feed": True},
    ANONYMOUS | {"feed": True, "budget": 2},
    {"token": False, "headers": False, "budget": 60, "window": 60.0, "feed": True},
)


def draw_scenario(rng: random.Random) -> Scenario:
    """Draw a world: names from a post a second to one a day, failures, kills and the rest."""
    names = [f"n{number}" for number in range(rng.choice([1, 1, 2, 3, 6, 12, 40]))]
    rates = {name: 10 ** rng.uniform(-5, 0) for name in names}
    if rng.random() < 0.5:
        rates["busy"] = rng.choice([1.0, 3.0, 8.0, 17.0])
    follow = rng.sample(sorted(rates), len(rates))
    source = rng.choice(SOURCES)
    minutes = min(180.0, 20_000 / sum(rates.values()) / 60)
    outages = [
        Outage(rng.uniform(5, 400), rng.random() < 0.5) for _ in range(rng.choice([0, 0, 2]))
    ]
    cron = rng.choice([0.0, 0.0, 0.0, 60.0, 300.0])
    return Scenario(
        f"{len(rates)} names",
        rates,
        minutes,
        jitter=rng.choice([no_jitter, exponential(1)]),
        follow=tuple(follow),
        **source,
        latency=rng.choice([0.05, LATENCY, LATENCY, 1.5]),
        other=rng.choice([0.0, 0.0, 0.0, 0.3]),
        late=rng.choice([0.0, 0.0173, 0.1]),
        on_top=rng.random() < 0.3,
        tail=rng.choice([120.0, 1200.0]),
        vanish_after=rng.choice([5.0, 600.0]),
        lost_anchors=rng.choice([0.0, 0.0, 0.05, 0.3]),
        thinned=rng.random() < 0.3,
        history=rng.choice([1, 8, 30, 150, 700, 1300]),
        burst=rng.choice([(1.0, 0.0), (1.0, 0.0), (10.0, 180.0)]),
        stall=rng.choice([0.0, 0.0, 25.0]),
        outages=tuple(outages),
        cuts=rng.choice([0.0, 0.0, 0.02]),
        kills=0 if cron else rng.choice([0, 0, 3, 8]),
        down=rng.choice([(1.0, 10.0), (60.0, 1200.0)]),
        cron=cron,
        failing=rng.choice([0.0, 0.0, 0.02, 0.2]),
        private=rng.choice([("", 0.0, 0.0), (follow[0], minutes / 4, minutes / 2)]),
        broken=rng.choice(["", "", "", follow[-1]]) if len(follow) > 1 else "",
        hanging=rng.random() < 0.5,
    )


def search(worlds: int, seed: int) -> int:
    """Live in drawn worlds; print those that have holes or false gaps, and give their number."""
    sums, faulty = Counter[str](), 0
    for world in range(worlds):
        rng = random.Random(f"{seed} drawn {world}")
        result = simulate(draw_scenario(rng), f"{seed} world {world}")
        false = result.false - result.careful  # where it cannot be known, one is named to be safe
        found = {"holes": result.holes, "false": false, "twice": result.twice}
        sums.update(found, careful=result.careful, idle=result.idle, true=result.true)
        sums.update(posts=result.counted)
        sums.update(lost=result.lost, requests=result.requests)
        if any(found.values()):
            faulty += 1
            print(f"world {world} of seed {seed}: {found}", flush=True)
    print(f"{worlds} worlds, {faulty} faulty: {dict(sums)}")
    return faulty


# The table


def percent(part: float, whole: float) -> float:
    """Give the share as a percentage; all of nothing is 100."""
    return 100 * part / whole if whole else 100.0


def quantile(values: Sequence[float], share: float) -> float:
    """Give the value that this share of all does not exceed."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else 0.0


def figures(results: Sequence[Result]) -> dict[str, float]:
    """Pool the runs of a scenario into the columns of the table.

    captured, of all, late: %; least: `captured` of the worst run; median, p99: seconds from first
    listed to committed; true, idle, false: gaps; lost: posts; inside: % of them in a gap row;
    caught up: % of what was listed after a downtime; catch-up: requests that took, at most.
    """

    def total(name: str) -> float:
        return float(sum(getattr(result, name) for result in results))

    delays = [delay for result in results for delay in result.delays]
    return {
        "captured": percent(total("captured"), total("counted")),
        "least": min(percent(result.captured, result.counted) for result in results),
        "of all": percent(total("all_captured"), total("all_counted")),
        "late": percent(total("late_captured"), total("late")),
        "req/min": total("requests") / total("minutes"),
        "median": quantile(delays, 0.5),
        "p99": quantile(delays, 0.99),
        "true": total("true"),
        "idle": total("idle"),
        "false": total("false"),
        "lost": total("lost"),
        "inside": percent(total("lost_inside"), total("lost")),
        "caught up": percent(total("caught_up"), total("owed")),
        "catch-up": max(float(result.catch_up) for result in results),
        "429/h": total("refusals") / total("minutes") * 60,
        "twice": total("twice"),
        "holes": total("holes"),
    }


DECIMALS = {"captured": 3, "least": 3, "of all": 3, "late": 1, "req/min": 1, "median": 1, "p99": 1}
DECIMALS |= {"inside": 2, "caught up": 2, "429/h": 2}


def bars_of(scenario: Scenario) -> tuple[Bar, ...]:
    """Give what a scenario must show: its own bars, and the general ones it says nothing of."""
    own = {bar.column for bar in scenario.bars}
    return scenario.bars + tuple(bar for bar in ALWAYS if bar.column not in own)


def missed_bars(scenario: Scenario, values: dict[str, float]) -> list[str]:
    """Name every bar that the figures miss."""
    return [
        f"{bar.column} {values[bar.column]:.4f}, not {bar.relation} {bar.limit:g}"
        for bar in bars_of(scenario)
        if not bar.holds(values[bar.column])
    ]


def row_of(title: str, cells: Sequence[str]) -> str:
    """Lay out a line of the table (it is Markdown, too)."""
    return f"| {title:<54} | " + " | ".join(f"{cell:>8}" for cell in cells) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the scenarios, print the table, and tell whether every bar holds."""
    parser = argparse.ArgumentParser(description="Measure the pipeline on a model of Reddit.")
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help="all of them, if none")
    parser.add_argument("--seeds", type=int, default=10, help="runs of each scenario (10)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    parser.add_argument("--drawn", type=int, metavar="N", help="search N drawn worlds for holes")
    parser.add_argument("--list", action="store_true", help="name the scenarios")
    options = parser.parse_args(arguments)
    logging.getLogger("redpipe").setLevel(logging.CRITICAL)
    unknown = set(options.scenarios) - set(SCENARIOS)
    if unknown or options.list:
        for name, scenario in SCENARIOS.items():
            print(f"{name:14} {scenario.title}")
        return 64 if unknown else 0
    if options.drawn:
        return 1 if search(options.drawn, options.seed) else 0
    print(f"seed {options.seed}, {options.seeds} runs of each scenario")
    missed = run_all(options.scenarios or list(SCENARIOS), options.seed, options.seeds)
    for line in missed:
        print(f"MISSED {line}")
    return 1 if missed else 0


def run_all(names: Sequence[str], seed: int, seeds: int) -> list[str]:
    """Print a line of the table for each scenario; give the bars missed."""
    missed: list[str] = []
    columns: list[str] = []
    for name in names:
        scenario, began = SCENARIOS[name], time.monotonic()
        results = []
        for run in range(seeds):
            if sys.stderr.isatty():
                print(f"{name}: run {run + 1} of {seeds}  ", end="\r", file=sys.stderr, flush=True)
            results.append(simulate(scenario, f"{seed} {name} {run}"))
        values = figures(results)
        if not columns:
            columns = list(values)
            print(
                row_of("", [*columns, "took"]),
                row_of("---", ["---:"] * (len(columns) + 1)),
                sep="\n",
            )
        cells = [f"{values[column]:.{DECIMALS.get(column, 0)}f}" for column in columns]
        print(row_of(scenario.title, [*cells, f"{time.monotonic() - began:.0f} s"]), flush=True)
        missed += [f"{name}: {line}" for line in missed_bars(scenario, values)]
    return missed


if __name__ == "__main__":
    sys.exit(main())
