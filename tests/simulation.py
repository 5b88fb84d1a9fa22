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
import logging
import math
import random
import sqlite3
import sys
import tempfile
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fake_reddit
import pipeline
from fake_reddit import HTML, PLACE, FakeReddit, Item, Reply, base36, error_reply, reply
from virtual import Ended, VirtualClock, fetch_from, stream

AT_ONCE = 4.0  # seconds; no look-back is shorter
ON_TIME = 30.0  # seconds; a post listed later than this counts as late
LATENCY = 0.35  # seconds a request takes
PATIENCE = 10.0  # seconds until a request that hangs is given up
HORIZON = 1000
EPOCH = 1_790_000_000

Jitter = Callable[[random.Random], float]


# The clock


class Killed(BaseException):
    """Say that the follower was killed; nothing in the product may catch it."""


class Clock(VirtualClock):
    """A virtual clock that says when the run has come to its end."""

    end = math.inf

    def advance(self, seconds: float) -> None:
        super().advance(seconds)
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


class Scenario(NamedTuple):
    """A world and a follower in it; rates are posts a second."""

    title: str
    rates: dict[str, float]
    minutes: float  # whose posts count
    bars: dict[str, float]  # what columns of the table must show, see `figures`
    jitter: Jitter = exponential(1)
    follow: tuple[str, ...] = ()  # none: all that have posts, and r/all for all of Reddit
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

    @property
    def names(self) -> tuple[str, ...]:
        """Give the names that are followed."""
        return self.follow or tuple(name.removesuffix("_of_reddit") for name in self.rates)


# What holds in every scenario that asks for nothing else.
ALWAYS = {"false": 0, "twice": 0, "holes": 0, "caught up": 100, "429/h": 1}
AT_LEAST = {"captured", "late", "inside", "caught up"}  # the other bars are upper ones
EVERY_POST = {"captured": 99.995}
LATE_TOO = EVERY_POST | {"late": 99.9}
NONE_IDLE = EVERY_POST | {"idle": 0}
TWO_429S = EVERY_POST | {"429/h": 2}
NAMED = {"inside": 99}

EVERYTHING = {"all_of_reddit": 17.0}
ONE_A_SECOND = {"busy": 1.0}
FIVE_A_SECOND = {"busy": 5.0}
YOUNG = {"young": 1 / 20}
STILL = {f"still{n}": 1 / 864_000 for n in range(10)}
SLOW = {f"slow{n}": 1 / 600 for n in range(30)}
FORTY = {f"q{n}": 1 / 600 for n in range(40)}
QUIET = {f"q{n}": 1 / 600 for n in range(200)}
MIXED = {"busy": 0.25} | {f"q{n}": 1 / 600 for n in range(39)}
BROKEN = {"busy": 17.0, "broken": 0.1, "quiet": 1 / 300}

BROKEN_FIRST = ("broken", "busy", "quiet")
ANONYMOUS: dict[str, Any] = {"token": False, "headers": False, "budget": 10, "window": 60.0}
FEED = ANONYMOUS | {"feed": True}
SLOW_FEED = FEED | {"budget": 1}
DOWN: dict[str, Any] = {"kills": 1, "life": (30, 80)}

SCENARIOS = {
    "all": Scenario(
        "all of Reddit: 17/s, jitter mean 1 s, 600/600 s",
        EVERYTHING,
        20,
        {"captured": 99.995, "req/min": 40, "median": 5},
    ),
    "log-normal": Scenario(
        "the same, jitter log-normal", EVERYTHING, 20, {"captured": 99.9, "req/min": 80}
    )._replace(jitter=log_normal),
    "refused": Scenario(
        "17/s, 45 s of outage, refused", EVERYTHING, 20, {"captured": 99.9}, outages=(Outage(45),)
    ),
    "hanging": Scenario(
        "17/s, 45 s of outage, hanging", EVERYTHING, 20, {"captured": 99.5}
    )._replace(outages=(Outage(45, hanging=True),)),
    "down": Scenario(
        "10 min down at 1/s, newest stored post deleted",
        ONE_A_SECOND,
        30,
        {"captured": 99.995, "catch-up": 12},
    )._replace(**DOWN, down=(600, 600), drop_newest=True),
    "scarce": Scenario(
        "17/s, 10 requests a minute", EVERYTHING, 60, {"captured": 92, "inside": 99}, budget=100
    ),
    "quiet": Scenario(
        "a quiet subreddit: 1 in 5 min",
        {"quiet": 1 / 300},
        360,
        {"captured": 99.995, "req/min": 3, "median": 15},
    ),
    # No bar of the design from here on, but its promises.
    "no-jitter": Scenario("17/s without jitter", EVERYTHING, 20, {}, jitter=no_jitter),
    "mean-3": Scenario("17/s, jitter mean 3 s", EVERYTHING, 20, {}, jitter=exponential(3)),
    "budget-1000": Scenario(
        "log-normal, 1000/600 s", EVERYTHING, 20, {}, jitter=log_normal, budget=1000
    ),
    "budget-10000": Scenario(
        "log-normal, 10000/600 s", EVERYTHING, 20, {}, jitter=log_normal, budget=10000
    ),
    "five": Scenario(
        "5/s, 10 requests a minute", FIVE_A_SECOND, 60, {}, budget=100, follow=("all",)
    ),
    "one": Scenario("1/s for an hour", ONE_A_SECOND, 60, EVERY_POST),
    "late": Scenario(
        "1/s, every tenth post approved late", ONE_A_SECOND, 120, EVERY_POST, late=0.1
    ),
    "on-top": Scenario(
        "1/s, every tenth late and then on top", ONE_A_SECOND, 120, LATE_TOO, late=0.1, on_top=True
    ),
    "kills": Scenario("1/s, 8 kills, 1 to 20 min down", ONE_A_SECOND, 180, NAMED, kills=8),
    "thinned": Scenario(
        "the same, removed items keep their place", ONE_A_SECOND, 180, NAMED, kills=8, thinned=True
    ),
    "young": Scenario("a young subreddit, 8 kills", YOUNG, 180, NONE_IDLE, kills=8, history=30),
    "anchors": Scenario(
        "5/s, a third of the anchors vanish, 3 outages of 2 min", FIVE_A_SECOND, 60, EVERY_POST
    )._replace(lost_anchors=0.33, outages=(Outage(120),) * 3),
    "outage": Scenario("1/s, 10 min of outage, hanging", ONE_A_SECOND, 60, EVERY_POST)._replace(
        outages=(Outage(600, hanging=True),)
    ),
    "bare-429s": Scenario(
        "5/s, 3 times a minute of 429s that say nothing", FIVE_A_SECOND, 120, EVERY_POST
    )._replace(outages=(Outage(60, too_many=True),) * 3),
    "cut": Scenario(
        "5/s, 6 kills, the network cut for 2 min in some walks", FIVE_A_SECOND, 60, NAMED
    )._replace(kills=6, life=(10, 60), down=(60.0, 180.0), cuts=0.02),
    # The other client can use up a window at any moment; that costs a 429 now and then.
    "other": Scenario(
        "5/s, another client takes half of 100/600 s",
        FIVE_A_SECOND,
        60,
        {"captured": 90, "inside": 99, "429/h": 6},
    )._replace(budget=100, other=0.5, tail=720),
    "other-600": Scenario(
        "17/s, another client takes half of 600/600 s", EVERYTHING, 20, {"captured": 99, "429/h": 6}
    )._replace(other=0.5, tail=720),
    "three": Scenario(
        "5/s, 1 in 30 s and 1 in 5 min, 6 kills",
        {"busy": 5.0, "slow": 1 / 30, "quiet": 1 / 300},
        120,
        NAMED,
    )._replace(kills=6, down=(60.0, 900.0)),
    "beside": Scenario(
        "1 in a minute beside 1 in 10 days",
        {"busy": 1 / 60, "still": 1 / 864_000},
        180,
        {"captured": 99.995, "req/min": 6},
    ),
    "beside-ten": Scenario(
        "the feed: 3/s beside ten of 1 in 10 days", {"busy": 3.0} | STILL, 60, EVERY_POST, **FEED
    ),
    "thirty": Scenario(
        "the feed: 5/s beside 30 of 1 in 10 min, 10 min outage",
        FIVE_A_SECOND | SLOW,
        60,
        {"captured": 80, "inside": 99.9},
    )._replace(**FEED, history=200, outages=(Outage(600),), tail=2400),
    "approved": Scenario(
        "the feed: 1 in 10 s, every tenth approved late", {"slow": 0.1}, 240, LATE_TOO
    )._replace(**FEED, late=0.1, tail=3000),
    "approved-beside": Scenario(
        "4 an hour, every fourth approved late, beside 1/s",
        {"busy": 1.0, "slow": 1 / 900},
        360,
        LATE_TOO,
    )._replace(late=0.25, late_in=("slow",), tail=3000),
    "slow": Scenario(
        "17/s, 3 min down, 1.5 s a request, a tenth removed", EVERYTHING, 20, NAMED
    )._replace(**DOWN, down=(180, 180), latency=1.5, vanish_after=1.0, thinned=True),
    "bursts": Scenario(
        "1/s, ten times that for 3 min", ONE_A_SECOND, 60, EVERY_POST, burst=(10.0, 180.0)
    ),
    "stall": Scenario(
        "5/s, nothing new listed for 25 s", FIVE_A_SECOND, 30, {"captured": 99.9}, stall=25.0
    ),
    "anonymous": Scenario(
        "1/s, no token, no headers, 10 requests a minute", ONE_A_SECOND, 60, EVERY_POST, **ANONYMOUS
    ),
    "feed": Scenario(
        "the feed: 3/s, a tenth of the anchors vanish", {"busy": 3.0}, 60, EVERY_POST
    )._replace(**FEED, lost_anchors=0.1),
    # A first walk that was killed may come less deep the second time.
    "feed-kills": Scenario(
        "the feed: 1/s, 8 kills, 1 to 20 min down", ONE_A_SECOND, 180, NAMED
    )._replace(**FEED, kills=8, life=(15, 40)),
    "feed-young": Scenario(
        "the feed: a young subreddit, 8 kills", YOUNG, 180, NONE_IDLE, **FEED, kills=8, history=30
    ),
    "many": Scenario(
        "200 of 1 in 10 min and 2 of 1/s, 600/600 s",
        {"busy1": 1.0, "busy2": 1.0} | QUIET,
        60,
        EVERY_POST,
    )._replace(follow=("busy1", *QUIET, "busy2"), history=150, tail=900),
    "forty": Scenario(
        "the feed: 40 of 1 in 10 min, 10 requests a minute", FORTY, 180, TWO_429S
    )._replace(**FEED, history=150, tail=900),
    "forty-slow": Scenario(
        "the feed: 40 of 1 in 10 min, 1 request a minute", FORTY, 360, TWO_429S
    )._replace(**SLOW_FEED, history=150, tail=7200),
    "forty-mixed": Scenario(
        "the feed: 1 in 4 s and 39 of 1 in 10 min, 1 request a minute", MIXED, 360, TWO_429S
    )._replace(**SLOW_FEED, follow=(*list(MIXED)[1:], "busy"), history=150, tail=10800),
    "private": Scenario(
        "1 in 4 s private for 30 min, beside 1/s and 1 in 5 min",
        {"busy": 1.0, "closed": 0.25, "quiet": 1 / 300},
        120,
        EVERY_POST,
    )._replace(follow=("closed", "busy", "quiet"), private=("closed", 30, 60)),
    "broken": Scenario(
        "17/s and 1 in 5 min beside one that always fails", BROKEN, 20, EVERY_POST
    )._replace(follow=BROKEN_FIRST, broken="broken"),
    "broken-hanging": Scenario("the same, and it never answers", BROKEN, 20, EVERY_POST)._replace(
        follow=BROKEN_FIRST, broken="broken", hanging=True
    ),
    "restart": Scenario(
        "17/s behind 200 of 1 in 10 min, 3 kills, 10 s down",
        QUIET | {"busy": 17.0},
        30,
        {"captured": 99.9},
    )._replace(kills=3, life=(500, 700), down=(10.0, 10.0), history=150, tail=900),
    "windows": Scenario(
        "17/s, windows of 10 s with 6 requests", EVERYTHING, 20, {"captured": 99.9, "inside": 99}
    )._replace(budget=6, window=10.0),
    # From 60 it takes three 429s to learn of 10; then one doubling an hour is taken back.
    "headless": Scenario(
        "1/s, token, no headers, 10 requests a minute", ONE_A_SECOND, 180, TWO_429S
    )._replace(budget=10, window=60.0, headers=False),
    "cron": Scenario("1/s, --once every 5 min", ONE_A_SECOND, 120, NONE_IDLE, cron=300, tail=420),
    "cron-17": Scenario("17/s, --once every minute", EVERYTHING, 20, NAMED, cron=60, tail=180),
}


# The world


class Post(NamedTuple):
    """What becomes of a post; ordered by its place in the listing."""

    place: float
    id: str
    created: float
    listed: float
    vanishes: float
    subreddit: str

    @property
    def is_late(self) -> bool:
        return self.listed - self.created > ON_TIME

    def data(self) -> dict[str, Any]:
        """Give what Reddit says of it."""
        return {
            "id": self.id,
            "name": f"t3_{self.id}",
            "title": f"Title of {self.id}",
            "subreddit": self.subreddit,
            "author": "somebody",
            "author_fullname": "t2_abc",
            "created_utc": float(int(self.created)),
            "permalink": f"/r/{self.subreddit}/comments/{self.id}/title/",
        }


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


class Budget(fake_reddit.Budget):
    """A budget that another client uses, too; the rest of a window is told rounded down."""

    other = seed = 0.0

    def used(self, now: float) -> int:
        """Let the other client take half of its share evenly, half at one moment."""
        window, into = divmod(now - self.phase, self.window)
        progress = into / self.window
        moment = random.Random(f"{self.seed} {int(window)}").random()
        return self.spent + int(self.total * self.other * (progress + (progress > moment)) / 2)

    def reset(self, now: float) -> int:
        return int(self.window - (now - self.phase) % self.window)


class Walk(NamedTuple):
    """How far the pages since the last newest page have come."""

    place: float = math.inf
    complete: bool = False


class Model(FakeReddit):
    """A FakeReddit that lives a scenario, and the network to it.

    `asked`, `refusals` count what was asked for and answered with 429; `walks` maps a listing
    to how far back the pages of its last walk went; `plan` holds every post by its id.
    """

    depth = sys.maxsize  # where removed posts leave no place, older ones come back

    def __init__(self, scenario: Scenario, rng: random.Random) -> None:
        self.scenario, self.rng = scenario, rng
        self.start = EPOCH + rng.uniform(0, 86400)
        super().__init__(Clock(self.start))
        self.serve = fetch_from(self, self.clock, scenario.latency)
        self.plan = {post.id: post for post in write_posts(rng, scenario, self.start)}
        self.create(*scenario.rates, *scenario.names)
        events = [(post.listed, "appears", post) for post in self.plan.values()]
        events += [(post.vanishes, "vanishes", post) for post in self.plan.values()]
        self.events = sorted(events, reverse=True)
        budget = Budget(scenario.budget, scenario.window, headers=scenario.headers)
        budget.phase = -rng.random() * scenario.window
        budget.other, budget.seed = scenario.other, rng.random()
        self.budgets = dict.fromkeys(("oauth", "json", "feed"), budget)
        self.outages = self._draw_outages()
        self.token_lifetime = 3600.0
        self.asked = self.refusals = 0
        self.walks: dict[str, Walk] = {}
        self.kill_at = math.inf
        self.kill_where = "before"

    # What is listed

    def _advance(self) -> None:
        """Let everything happen that is due by now."""
        while self.events and self.events[-1][0] <= self.clock.time():
            moment, what, post = self.events.pop()
            if what == "vanishes":
                self.remove(post.id)
            elif post.id not in self.removed:
                self.add(post.data(), visible_utc=moment, rank=post.place)

    def remove(self, identifier: str, *, utc: float | None = None) -> None:
        """Take a post out of every listing, and its place with it."""
        super().remove(identifier)
        if not self.scenario.thinned and (item := self._items.get(identifier)):
            for name in ("all", item.post["subreddit"]):
                window = self._windows[name]
                del window[bisect_left(window, item.key, key=PLACE)]

    def _listed_items(self, name: str) -> list[Item]:
        return [item for item in self._windows[name][: -HORIZON - 1 : -1] if not item.removed]

    def held(self, name: str) -> int:
        """Count the places of a listing, those beyond the horizon too."""
        return len(self._windows[name])

    def _slice(self, name: str, query: dict[str, str]) -> tuple[list[Item], str | None]:
        """Cut a page, and note how far back the walk through this listing has come."""
        anchor = query.get("after", "")[3:]
        if anchor in self.plan and self.rng.random() < self.scenario.lost_anchors:
            self.remove(anchor)
        page, more = super()._slice(name, query)
        walk = self.walks.get(name, Walk()) if anchor in self.plan else Walk()
        place = min(walk.place, page[-10:][0].key[0]) if page else walk.place
        ends = not more and anchor not in self.removed and self.held(name) <= HORIZON
        self.walks[name] = Walk(place, walk.complete or ends)
        return page, more

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
        self.asked += 1
        self._cut(request)
        for begin, end, outage in self.outages:
            if begin <= self.clock.now < end:
                self.clock.sleep(PATIENCE if outage.hanging else 0.01)
                if outage.too_many:
                    return pipeline.Answer(429, {}, b"")
                raise pipeline.Failed("the network is down")
        answer = self.serve(request)
        self.refusals += answer.status == 429
        self._die("after")
        return answer

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
        if self.asked >= self.kill_at and self.kill_where == where:
            raise Killed

    def die_before_commit(self) -> None:
        """Kill the follower between a finished walk and its transaction."""
        self._die("commit")

    def _page_of(self, source: str, name: str, query: dict[str, str]) -> Reply:
        """Answer with one page, if that is what the scenario has here."""
        scenario = self.scenario
        if scenario.feed and source == "json":
            return reply(403, "<html>blocked</html>", HTML)
        assert (source == "feed") <= scenario.feed
        closed, begins, ends = scenario.private
        if name == closed and begins <= (self.clock.time() - self.start) / 60 < ends:
            return error_reply(403, "Forbidden", reason="private")
        if self.rng.random() < scenario.failing:
            return reply(503, "<html>down</html>", HTML)
        if name == scenario.broken and scenario.hanging:
            self.clock.sleep(PATIENCE)
            raise pipeline.Failed("read timed out")
        if name == scenario.broken:
            return error_reply(500, "Server Error")
        return super()._page_of(source, name, query)


# A run


class Result(Counter[str]):
    """What came of one run: numbers of posts, gaps, requests and minutes, and seconds of delay.

    careful: those of the false gaps whose listing held more than three quarters of its places.
    holes: losses outside every gap, from before the cursor, of posts listed at once.
    """

    delays: Sequence[float] = ()


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
        self.result.delays = self.delays = list[float]()
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
        self.model.kill_at = self.model.asked + life
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
            access = pipeline.Access(client_id="app-id", client_secret="app-secret")
        reddit = pipeline.Reddit(access, model.fetch, self.clock)
        with pipeline.Database(str(self.path), clock=self.clock) as database:
            for batch in stream(
                reddit,
                scenario.names,
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
            self.result["twice"] += post["id"] in self.committed
            self.committed.setdefault(post["id"], self.clock.now)
        for gap in gaps:
            self.gaps.append((gap, self.got_back(gap)))
            held = self.model.held(gap.subreddit)
            self.result["careful"] += self.gaps[-1][1] and held > 3 * HORIZON / 4
        self.model.walks.clear()
        for cursor in batch.cursors:
            self._check_owed(cursor.subreddit)

    def got_back(self, gap: Named) -> bool:
        """Tell whether a walk did reach what the gap says it did not."""
        walk = self.model.walks.get(gap.subreddit, Walk())
        return walk.complete or walk.place < gap.after_utc

    def _stay_down(self) -> None:
        """Let time pass without a follower, and note what is then owed to the next."""
        left = self.end - self.clock.now  # the last life must see the end
        seconds = min(self.rng.uniform(*self.scenario.down), max(0.0, left - 60))
        stopped = max(self.committed.values(), default=self.model.start)
        if self.scenario.drop_newest:
            kept = self.committed.keys() - self.model.removed
            self.model.remove(max(self.model.plan[post_id] for post_id in kept).id)
        self.clock.sleep(seconds)
        self.down += seconds
        self.owed = {name: self._owed_to(name, stopped) for name in self.scenario.names}
        self.owed_since = self.model.asked

    def _owed_to(self, name: str, stopped: float) -> list[Post]:
        """Give what a name lists now that the last life cannot have seen."""
        listing = [self.model.plan[post_id] for post_id in self.model.listing_ids(name)]
        return [post for post in listing if post.listed > stopped and not post.is_late]

    def _check_owed(self, name: str) -> None:
        """Compare the first transaction of a life with what was listed before it."""
        self.model._advance()
        if not (owed := self.owed.pop(name, [])):
            return
        listing = self.model.listing_ids(name)
        # At the horizon's edge items fall off and come back when others are removed.
        edge = 20 * (self.model.held(name) > HORIZON)
        still = set(listing[: len(listing) - edge])
        owed = [post for post in owed if post.id in still]
        self.result["owed"] += len(owed)
        self.result["caught_up"] += sum(post.id in self.committed for post in owed)
        if owed:
            requests = self.model.asked - self.owed_since
            self.result["catch_up"] = max(self.result["catch_up"], requests)

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
        result["requests"], result["refusals"] = model.asked, model.refusals
        result["minutes"] = (self.clock.now - model.start - self.down) / 60
        for post in model.plan.values():
            begins = since.get(post.subreddit, since.get("all", math.inf))
            if post.created < max(model.start, begins + 1) or post.listed > self.end:
                continue
            self._count_post(post, post.id in stored, rows)
            passed = post.created + AT_ONCE < until.get(post.subreddit, until.get("all", 0.0))
            if passed and not post.is_late and post.listed - post.created <= AT_ONCE:
                result["holes"] += self._is_hole(post, stored, rows)
        self._count_gaps(stored)

    def _is_hole(self, post: Post, stored: set[str], gaps: list[tuple[str, int, int]]) -> bool:
        """Tell whether a post that is listed is neither stored nor in a gap."""
        known = post.id in stored or post.id in self.model.removed
        return not known and not any(is_inside(post, *row) for row in gaps)

    def _count_post(self, post: Post, stored: bool, gaps: list[tuple[str, int, int]]) -> None:
        result = self.result
        gone = post.id in self.model.removed
        if post.is_late:
            result["late"] += not gone
            result["late_captured"] += stored and not gone
            return
        result["all_counted"] += 1
        result["all_captured"] += stored
        if gone:
            return
        result["counted"] += 1
        result["captured"] += stored
        if stored:
            self.delays.append(self.committed[post.id] - post.listed)
        else:
            result["lost_inside"] += any(is_inside(post, *row) for row in gaps)

    def _count_gaps(self, stored: set[str]) -> None:
        """Tell true gaps from idle and false ones."""
        missing = [
            post
            for post in self.model.plan.values()
            if post.id not in stored and post.id not in self.model.removed
        ]
        for gap, false in self.gaps:
            hit = any(
                post.listed <= gap.noticed_utc
                and is_inside(post, gap.subreddit, gap.after_utc, gap.before_utc)
                for post in missing
            )
            self.result["false"] += false
            self.result["true"] += hit and not false
            self.result["idle"] += not hit and not false


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


def draw_scenario(rng: random.Random, longest: float = 180.0) -> Scenario:
    """Draw a world: names from a post a second to one a day, failures, kills and the rest.

    longest: minutes.
    """
    names = [f"n{number}" for number in range(rng.choice([1, 1, 2, 3, 6, 12, 40]))]
    rates = {name: 10 ** rng.uniform(-5, 0) for name in names}
    if rng.random() < 0.5:
        rates["busy"] = rng.choice([1.0, 3.0, 8.0, 17.0])
    follow = rng.sample(sorted(rates), len(rates))
    source = rng.choice(SOURCES)
    minutes = min(longest, 20_000 / sum(rates.values()) / 60)
    outages = [
        Outage(rng.uniform(5, 400), rng.random() < 0.5) for _ in range(rng.choice([0, 0, 2]))
    ]
    cron = rng.choice([0.0, 0.0, 0.0, 60.0, 300.0])
    return Scenario(
        f"{len(rates)} names",
        rates,
        minutes,
        {},
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


def search(worlds: int, seed: int, longest: float = 180.0) -> int:
    """Live in drawn worlds; print those that have holes or false gaps, and give their number."""
    sums, faulty = Counter[str](), 0
    for world in range(worlds):
        rng = random.Random(f"{seed} drawn {world}")
        result = simulate(draw_scenario(rng, longest), f"{seed} world {world}")
        # Where it cannot be known, a gap is named to be safe.
        result["false"] -= result["careful"]
        found = {name: result[name] for name in ("holes", "false", "twice")}
        for name in (*found, "careful", "idle", "true", "counted", "captured", "requests"):
            sums[name] += result[name]
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
        return float(sum(result[name] for result in results))

    lost = total("counted") - total("captured")
    delays = [delay for result in results for delay in result.delays]
    return {
        "captured": percent(total("captured"), total("counted")),
        "least": min(percent(result["captured"], result["counted"]) for result in results),
        "of all": percent(total("all_captured"), total("all_counted")),
        "late": percent(total("late_captured"), total("late")),
        "req/min": total("requests") / total("minutes"),
        "median": quantile(delays, 0.5),
        "p99": quantile(delays, 0.99),
        "true": total("true"),
        "idle": total("idle"),
        "false": total("false"),
        "lost": lost,
        "inside": percent(total("lost_inside"), lost),
        "caught up": percent(total("caught_up"), total("owed")),
        "catch-up": max(float(result["catch_up"]) for result in results),
        "429/h": total("refusals") / total("minutes") * 60,
        "twice": total("twice"),
        "holes": total("holes"),
    }


DECIMALS = {"captured": 3, "least": 3, "of all": 3, "late": 1, "req/min": 1, "median": 1, "p99": 1}
DECIMALS |= {"inside": 2, "caught up": 2, "429/h": 2}


def missed_bars(scenario: Scenario, values: dict[str, float]) -> list[str]:
    """Name every bar that the figures miss."""
    missed = []
    for column, limit in (ALWAYS | scenario.bars).items():
        value, least = values[column], column in AT_LEAST
        if value < limit if least else value > limit:
            missed.append(f"{column} {value:.4f}, not {'>=' if least else '<='} {limit:g}")
    return missed


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
