"""Everything that Reddit answers, at random, for hours: nothing is lost and nothing is said twice.

A follower in bad weather is compared with one in calm weather that sees the same posts. The
seed is drawn anew and printed; REDPIPE_SEED=… repeats a run. `./tests/run --long` takes 10,000
requests in the place of 300 (some minutes); with -s it shows the figures.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import time
from collections import Counter
from email.utils import formatdate
from itertools import pairwise
from typing import NamedTuple

import pytest
from test_pacing import forbidden_until

from artefact import wait_for
from fake_reddit import (
    ATOM,
    DRIP,
    GIANT,
    HANG,
    HTML,
    REFUSE,
    RESET,
    TRUNCATE,
    Budget,
    FakeReddit,
    Fault,
    atom_feed,
    block_page,
    encoded,
    error_reply,
    gzipped,
    json_reply,
    login_page,
    make_post,
    moved,
    reply,
    wrong_gzip,
)
from pipeline import (
    Access,
    Cursor,
    Database,
    Reddit,
    http_fetch,
    load,
    stream,
    transform,
)
from virtual import VirtualClock, fetch_from

START = 1_790_000_000
COLUMNS = "id, created_utc, subreddit, title, author, author_name, permalink"
SHARE = 0.25
"""How many of the requests go wrong."""


def too_many(body=b'{"message": "Too Many Requests", "error": 429}', **headers):
    """Answer 429; `_` in a header's name stands for `-`."""
    return reply(429, body, {name.replace("_", "-"): text for name, text in headers.items()})


def used_up(reset):
    return {"x_ratelimit_remaining": "0", "x_ratelimit_reset": reset}


OF_COMMENTS = atom_feed([make_post(1, START)], "python", START).replace(b"t3_", b"t1_")
HARMLESS = {
    "in members": lambda answer: gzipped(answer, 3),
    "with bytes behind": lambda answer: gzipped(answer, 1, b"\0rubbish"),
    "in identity": lambda answer: encoded(answer, "identity"),
    "behind a mark": lambda answer: (*answer[:2], b"\xef\xbb\xbf" + answer[2]),
    "spoilt": lambda answer: (*answer[:2], b"\n " + spoilt(answer[2])),
}
"""What changes nothing of an answer's meaning."""


def spoilt(body):
    """Put what no XML may hold into the texts of a feed, which are not kept."""
    return body.replace(b"Nobody", b"\x1b \xff & &nbsp; &#0; <!DOCTYPE> <b>")


WEATHER = {
    "401": lambda now: error_reply(401, "Unauthorized"),
    "401 HTML": lambda now: reply(401, "<html>", HTML),
    "403": lambda now: error_reply(403, "Forbidden"),
    "403 private": lambda now: error_reply(403, "Forbidden", reason="private"),
    "404": lambda now: error_reply(404, "Not Found"),
    "404 HTML": lambda now: reply(404, "<html>", HTML),
    "block page": lambda now: block_page(),
    "to the search": lambda now: reply(302, headers={"location": "/subreddits/search?q=x"}),
    "elsewhere": lambda now: reply(302, headers={"location": "https://www.reddit.com/"}),
    "400": lambda now: error_reply(400, "Bad Request"),
    "429": lambda now: too_many(),
    "429 empty": lambda now: too_many(b""),
    "429 seconds": lambda now: too_many(retry_after="4"),
    "429 minutes": lambda now: too_many(retry_after="120"),
    "429 date": lambda now: too_many(retry_after=formatdate(now + 20, usegmt=True)),
    "429 reset": lambda now: too_many(**used_up("33")),
    "429 reset 0": lambda now: too_many(b"", **used_up("0")),
    "503 seconds": lambda now: reply(503, headers={"retry-after": "15"}),
    "500 JSON": lambda now: error_reply(500, "Internal Server Error"),
    **{
        str(status): lambda now, status=status: reply(status, "<html>", HTML)
        for status in (408, 451, 500, 501, 502, 503, 504, 520, 522)
    },
    "login": lambda now: login_page(),
    "nothing": lambda now: reply(200),
    "error": lambda now: json_reply(200, {"error": 503}),
    "invalid": lambda now: json_reply(200, {"error": "invalid_grant"}),
    "null children": lambda now: json_reply(200, {"kind": "Listing", "data": {"children": None}}),
    "half": lambda now: reply(200, '{"kind": "Listing", "data": {"children": [{"kind": "t3"'),
    "t5": lambda now: json_reply(
        200,
        {
            "kind": "Listing",
            "data": {"after": None, "children": [{"kind": "t5", "data": {"id": "2zzzz"}}]},
        },
    ),
    "empty": lambda now: json_reply(
        200, {"kind": "Listing", "data": {"after": None, "children": []}}
    ),
    "others": lambda now: reply(200, OF_COMMENTS, ATOM),
    "gzip": lambda now: wrong_gzip(),
    "br": lambda now: encoded(reply(200, "?"), "br"),
    "429 gzip": lambda now: too_many(b"", retry_after="6", content_encoding="gzip"),
    "429 rubbish": lambda now: too_many(b"?", retry_after="6", content_encoding="deflate"),
    "403 br": lambda now: encoded(block_page(), "br"),
    "403 empty": lambda now: encoded(reply(403), "gzip"),
    "404 empty": lambda now: encoded(reply(404), "zstd"),
    "410": lambda now: reply(410, "<html>", HTML),
    "to the login": lambda now: moved("https://www.reddit.com/login/?dest=x"),
    "to the login, JSON": lambda now: (302, {"location": "/login.json"}, b"{}"),
    "another's DOCTYPE": lambda now: reply(200, b"<!DOCTYPE feed []>" + OF_COMMENTS, ATOM),
    "refuse": lambda now: REFUSE,
    "reset": lambda now: RESET,
    "truncate": lambda now: TRUNCATE,
    "giant": lambda now: GIANT,
    "hang": lambda now: HANG,
    "drip": lambda now: DRIP,
}
SLOW = {"hang", "drip"}


def draw_seed():
    """Take REDPIPE_SEED, or draw a seed; print it."""
    seed = os.environ.get("REDPIPE_SEED") or str(random.SystemRandom().randrange(10**9))
    print(f"\nREDPIPE_SEED={seed}")
    return seed


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
        self.disguised = Counter()
        self.injected = []

    def __call__(self, method, path, query):
        if self.dice.random() >= self.share:
            return None
        kind = self.dice.choice(self.kinds)
        self.seen[kind] += 1
        answer = WEATHER[kind](self.clock.time())
        if not isinstance(answer, Fault) and answer[0] == 429:
            self.injected.append(self.clock.time())
        return answer

    def disguise(self, answer):
        """Give a good answer in another form."""
        if answer[0] != 200 or self.dice.random() >= self.share:
            return answer
        kind = self.dice.choice(sorted(HARMLESS))
        self.disguised[kind] += 1
        return HARMLESS[kind](answer)


def guarded(fetch, clock):
    """Ask through `fetch`, and fail when an answer has forbidden it."""
    forbidden = 0.0

    def ask(request):
        nonlocal forbidden
        assert clock.elapsed >= forbidden - 1e-6, f"{forbidden - clock.elapsed} s too early"
        answer = fetch(request)
        date = answer.headers.get("date")
        forbidden = forbidden_until(answer, clock.elapsed, clock.time() if not date else clock.now)
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
    respond = world.respond
    world.respond = lambda *request: sky.disguise(respond(*request))
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


def compare(tmp_path, caplog, requests, **how):
    """Run the weather and the calm, and check all that is promised."""
    seed = draw_seed()
    with caplog.at_level(logging.WARNING, "redpipe"):
        stormy = follow(tmp_path / "stormy.db", seed, requests, **how)
    said = [record.getMessage() for record in caplog.records]
    hours = (stormy.ended - START) / 3600
    figures = (
        f"{len(stormy.log)} requests in {hours:.1f} h, {stormy.sky.seen.total()} of them faulty"
        f" ({len(stormy.sky.seen)} kinds), {stormy.sky.disguised.total()} disguised,"
        f" {len(own_429s(stormy))} own 429s,"
        f" {len(stormy.rows)} rows, {len(said)} messages"
    )
    print(figures)
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


def alternate(said):
    """Tell whether each trouble is said once, and its end once."""
    end = "r/python can be read again"
    return all((message == end) == bool(index % 2) for index, message in enumerate(said))


@pytest.mark.parametrize("source", ["oauth", "feed"])
def test_a_storm_of_300_requests_changes_nothing(source, tmp_path, caplog):
    compare(tmp_path, caplog, 300, source=source)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("source", ["oauth", "feed"])
def test_a_storm_of_10_000_requests_changes_nothing(source, tmp_path, caplog):
    stormy = compare(tmp_path, caplog, 10_000, source=source)
    assert stormy.sky.seen.keys() == WEATHER.keys()
    assert stormy.sky.disguised.keys() == HARMLESS.keys()


def test_a_storm_over_a_real_connection_changes_nothing(tmp_path, caplog):
    compare(tmp_path, caplog, 150, kinds=WEATHER.keys() - SLOW, real=True)


QUICK = ("408", "500 JSON", "502", "nothing", "half", "refuse", "reset")


def test_the_built_file_survives_a_storm_without_a_traceback(redpipe, fake_reddit, tmp_path):
    fake_reddit.grow(50.0, ["python"], start=time.time() - 60, seed=1)
    fake_reddit.budgets["json"] = Budget(total=10_000)
    process = redpipe.start("--interval=1", tmp_path / "posts.db", "python")
    wait_for(lambda: len(fake_reddit.log) >= 3)
    fake_reddit.faults = sky = Sky(draw_seed(), time, QUICK)
    sky.share = 1.0
    wait_for(lambda: len(fake_reddit.log) >= 12, 60)
    fake_reddit.faults = None
    good = sum(seen.status == 200 for seen in fake_reddit.log) + 25  # the end of a walk and more
    wait_for(lambda: sum(seen.status == 200 for seen in fake_reddit.log) >= good, 60)
    done = redpipe.stop(process)
    assert (done.status, done.out) == (-signal.SIGTERM, "")
    lines = done.err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("redpipe: ") for line in lines)
    assert alternate([line.removeprefix("redpipe: ") for line in lines])


# Tokens


def follow_quietly(lifetime, seconds, interval, at=None):
    """Follow a quiet r/python; call `at` after the second poll; give the world."""
    clock = VirtualClock(START)
    world = FakeReddit(clock)
    world.token_lifetime = lifetime
    world.add(make_post(1, START - 60))
    access = Access("", "app-id", "app-secret")
    reddit = Reddit(access, fetch_from(world, clock), clock)
    for polls, _ in enumerate(stream(reddit, ["python"], Known(clock), interval=interval), 1):
        if polls == 2 and at:
            at(world)
        if clock.elapsed >= seconds:
            return world
    return None


class Known:
    """Remember that the one post is stored."""

    def __init__(self, clock):
        self.clock = clock

    def cursor(self, name):
        return Cursor(name, START - 60, START - 60, int(self.clock.time()))

    def rates(self):
        return {}

    def unstored(self, posts):
        return []


@pytest.mark.parametrize(("lifetime", "interval"), [(3600.0, 25.0), (86_400.0, 900.0), (60.0, 7.0)])
def test_a_token_is_renewed_before_it_ends(lifetime, interval):
    world = follow_quietly(lifetime, 3 * lifetime, interval)
    assert {seen.status for seen in world.log} == {200}
    assert 3 <= len(world.requests("access_token")) <= 4


def test_a_token_that_is_revoked_early_costs_one_extra_request(caplog):
    world = follow_quietly(86_400.0, 45, 25.0, at=FakeReddit.revoke_tokens)
    asked = [(seen.path, seen.status) for seen in world.log]
    assert asked == [
        ("/api/v1/access_token", 200),
        ("/r/python/new", 200),
        ("/r/python/new", 200),
        ("/r/python/new", 401),
        ("/api/v1/access_token", 200),
        ("/r/python/new", 200),
    ]
    assert caplog.records == []
