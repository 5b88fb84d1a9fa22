"""Everything that Reddit answers, at random, for hours: nothing is lost and nothing is said twice.

A follower in bad weather is compared with one in calm weather that sees the same posts. The
seed is drawn anew and printed; REDPIPE_SEED=… repeats a run. `./tests/run --long` takes 10,000
requests in the place of 150 (some minutes); with -s it shows the figures.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from itertools import pairwise
from typing import NamedTuple

import pytest
from test_answers import CASES, GOOD
from test_pacing import forbidden_until

from fake_reddit import (
    ATOM,
    DRIP,
    GIANT,
    HANG,
    REFUSE,
    RESET,
    TRUNCATE,
    Budget,
    FakeReddit,
    Fault,
    atom_feed,
    make_post,
    reply,
)
from pipeline import Access, Database, Reddit, http_date, http_fetch, load, transform
from virtual import VirtualClock, fetch_from, stream

START = 1_790_000_000
COLUMNS = "id, created_utc, subreddit, title, author, author_name, permalink"
SHARE = 0.25
"""How many of the requests go wrong."""
OF_COMMENTS = atom_feed([make_post(1, START)], "python", START).replace(b"t3_", b"t1_")
WEATHER = {
    **{
        name: answer
        for name, (_, answer, expected) in CASES.items()
        if expected != GOOD and b"t3_" not in answer[2]
    },
    "a feed of comments": reply(200, OF_COMMENTS, ATOM),
    "a minute and more": reply(429, "", {"retry-after": "120"}),
    "refuse": REFUSE,
    "reset": RESET,
    "truncate": TRUNCATE,
    "giant": GIANT,
    "hang": HANG,
    "drip": DRIP,
}
"""Everything that test_answers.py has and that holds no post, and what connections do."""
SLOW = {"hang", "drip"}
CREDENTIALS = {"oauth": ("app-id", "app-secret"), "feed": ()}
# So slow that what is listed outlasts the waits: 429s without advice are doubled up to minutes.
RATE = {"oauth": 0.05, "feed": 0.02}
INTERVAL = {"oauth": 25.0, "feed": 120.0}


class Sky:
    """Decide what goes wrong, and remember it."""

    def __init__(self, seed, clock, kinds):
        self.dice = random.Random(seed)
        self.clock = clock
        self.kinds = sorted(kinds)
        self.share = 0.0
        self.seen = Counter()
        self.injected = []

    def __call__(self, method, path, query):
        if self.dice.random() >= self.share:
            return None
        kind = self.dice.choice(self.kinds)
        self.seen[kind] += 1
        answer = WEATHER[kind]
        if not isinstance(answer, Fault) and answer[0] == 429:
            self.injected.append(self.clock.time())
        return answer


def guarded(fetch, clock):
    """Ask through `fetch`, and fail when an answer has forbidden it."""
    forbidden = 0.0

    def ask(request):
        nonlocal forbidden
        assert clock.elapsed >= forbidden - 1e-6, f"{forbidden - clock.elapsed} s too early"
        answer = fetch(request)
        utc = http_date(answer.headers.get("date")) or clock.time()  # by their clock
        forbidden = forbidden_until(answer, clock.elapsed, utc)
        return answer

    return ask


class Followed(NamedTuple):
    """Hold what a run left: the rows, the gaps, the end, the log of the server."""

    rows: list
    gaps: list
    cursors: list
    ended: float
    log: list
    sky: Sky


def follow(path, seed, requests, *, until=0.0, source="oauth", kinds=WEATHER, real=False):
    """Follow r/python through so many requests of weather, then through ten calm minutes.

    until: the time at which calm weather ends; requests is 0 then.
    """
    clock = VirtualClock(START)
    world = FakeReddit(clock)
    world.anonymous_json_blocked = source == "feed"
    world.budgets["feed"] = Budget(10, 60, 17, headers=False, advice="empty")
    world.budgets["oauth"] = Budget(20, phase=200)
    world.grow(RATE[source], ["python"], 1.0, start=START - 3600, seed=seed)
    world.faults = sky = Sky(seed, clock, kinds)
    fetch = http_fetch() if real else fetch_from(world, clock)
    access = Access(world.start().url if real else "", *CREDENTIALS[source])
    reddit = Reddit(access, guarded(fetch, clock), clock)
    with world, Database(str(path), clock=clock) as database:
        for batch in stream(
            reddit, ["python"], database, interval=INTERVAL[source], chance=sky.dice.random
        ):
            load(database, map(transform, batch.posts), batch.cursors, batch.gaps)
            sky.share = SHARE if len(world.log) < requests else 0.0
            until = until or (clock.time() + 600 if not sky.share else 0.0)
            if until and clock.time() > until:
                break
        read = [
            f"SELECT {COLUMNS} FROM posts WHERE created_utc < {int(until) - 700} ORDER BY id",
            "SELECT * FROM gaps",
            "SELECT subreddit, since_utc FROM cursors",
        ]
        return Followed(*(list(database.execute(sql)) for sql in read), until, world.log, sky)


def own_429s(followed):
    """Give when the server's own budget was overdrawn."""
    refused = [seen.time for seen in followed.log if seen.status == 429]
    return sorted((Counter(refused) - Counter(followed.sky.injected)).elements())


@pytest.fixture
def compare(tmp_path, caplog, seed):
    """Give what runs the weather and the calm, and checks all that is promised."""

    def run(requests, **how):
        with caplog.at_level(logging.WARNING, "redpipe"):
            stormy = follow(tmp_path / "stormy.db", seed, requests, **how)
        said = caplog.messages
        print(
            f"{len(stormy.log)} requests in {(stormy.ended - START) / 3600:.1f} h,"
            f" {stormy.sky.seen.total()} of them faulty ({len(stormy.sky.seen)} kinds),"
            f" {len(own_429s(stormy))} own 429s, {len(stormy.rows)} rows, {len(said)} messages"
        )
        calm = follow(tmp_path / "calm.db", seed, 0, until=stormy.ended, **how)
        assert len(stormy.log) >= requests
        assert stormy.rows == calm.rows
        assert len(calm.rows) > 100
        assert stormy.gaps == calm.gaps == []
        assert stormy.cursors == calm.cursors
        assert all(b - a > 3000 for a, b in pairwise(own_429s(stormy)))
        assert own_429s(calm) == []
        assert not any(record.exc_info for record in caplog.records)
        assert alternate(said), said
        return stormy

    return run


def alternate(said):
    """Tell whether each trouble is said once, and its end once."""
    end = "r/python can be read again"
    return all((message == end) == bool(index % 2) for index, message in enumerate(said))


@pytest.mark.parametrize("source", ["oauth", "feed"])
def test_a_storm_of_150_requests_changes_nothing(source, compare):
    compare(150, source=source)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("source", ["oauth", "feed"])
def test_a_storm_of_10_000_requests_changes_nothing(source, compare):
    stormy = compare(10_000, source=source)
    assert stormy.sky.seen.keys() == WEATHER.keys()


def test_a_storm_over_a_real_connection_changes_nothing(compare):
    compare(100, kinds=WEATHER.keys() - SLOW, real=True)


@pytest.mark.parametrize(("lifetime", "interval"), [(3600.0, 25.0), (86_400.0, 900.0), (60.0, 7.0)])
def test_a_token_is_renewed_before_it_ends(lifetime, interval, database):
    clock = VirtualClock(START)
    world = FakeReddit(clock)
    world.token_lifetime = lifetime
    world.add(make_post(1, START - 60))
    reddit = Reddit(Access("", *CREDENTIALS["oauth"]), fetch_from(world, clock), clock)
    with Database(str(database), clock=clock) as memory:
        for batch in stream(reddit, ["python"], memory, interval=interval):
            load(memory, map(transform, batch.posts), batch.cursors)
            if clock.elapsed >= 3 * lifetime:
                break
    assert {seen.status for seen in world.log} == {200}
    assert 3 <= len(world.requests("access_token")) <= 4
