"""A soak: virtual months of following, in minutes, on a clock that jumps ahead.

Tokens end and are renewed, windows of the budget change, listings go quiet and busy, the
machine's clock steps forward and back, requests fail. Meanwhile memory, open files and the
database's -wal stay flat, and at the end every post is there once.

By default six virtual days, in some seconds; `./tests/run --long` takes a virtual year, in
about five minutes.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import pipeline
from fake_reddit import Budget, FakeReddit, Fault, Reply, make_post, reply
from virtual import VirtualClock, fetch_from

HOUR = 3600.0
DAY = 24 * HOUR
QUIET, CALM, BUSY = 1 / 7200, 1 / 300, 0.3  # posts a second


class SteppedClock:
    """The machine's clock: its time of day is stepped now and then, its seconds are true."""

    def __init__(self, true: VirtualClock) -> None:
        self.true = true
        self.ahead = 0.0

    def time(self) -> float:
        return self.true.time() + self.ahead

    def monotonic(self) -> float:
        return self.true.monotonic()

    def sleep(self, seconds: float) -> None:
        self.true.sleep(seconds)


@dataclass
class Measures:
    """What must stay flat, taken once a virtual day."""

    blocks: list[int] = field(default_factory=list)
    """Memory blocks in use by Python."""
    files: list[int] = field(default_factory=list)
    wal: list[int] = field(default_factory=list)
    """Bytes."""
    resident: list[int] = field(default_factory=list)
    """Bytes of memory of the whole process."""

    def take(self, database: Path) -> None:
        gc.collect()
        self.blocks.append(sys.getallocatedblocks())
        self.files.append(len(list(Path("/proc/self/fd").iterdir())))
        self.wal.append(Path(f"{database}-wal").stat().st_size)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.resident.append(pages * os.sysconf("SC_PAGE_SIZE"))


class Soak:
    """An invented Reddit in changing weather, and a follower of two subreddits."""

    def __init__(self, database: Path, seed: int) -> None:
        self.dice = random.Random(seed)
        self.clock = VirtualClock()
        self.machine = SteppedClock(self.clock)
        self.database = database
        self.reddit = FakeReddit(self.clock)
        self.reddit.depth = 400  # longer listings would be most of the work
        self.reddit.create("python", "rust")
        self.reddit.token_lifetime = 2 * HOUR
        self.reddit.faults = self.fault
        self.last = self.clock.time()
        self.rate, self.rate_ends = BUSY, self.last + HOUR  # fills the listings
        self.posts = 0
        self.tokens = 0
        self.revoked = 0
        self.refused = 0
        self.unauthorized = 0
        self.asked = 0
        self.measures = Measures()

    def fault(self, method: str, path: str, query: dict[str, str]) -> Fault | Reply | None:
        """Let one request in fifty fail."""
        if self.dice.random() > 0.02:
            return None
        return self.dice.choice([reply(503), reply(500, "<html>"), Fault("reset"), Fault("hang")])

    def arrive(self, utc: float) -> None:
        """Put the next post after a time on the agenda; it then puts the one after it there."""
        if utc >= self.rate_ends:
            self.rate = self.dice.choice([QUIET, QUIET, CALM, CALM, CALM, BUSY])
            longest = 1 if self.rate == BUSY else 12
            self.rate_ends = utc + self.dice.uniform(0.2, longest) * HOUR
        next_utc = utc + self.dice.expovariate(self.rate)

        def happen(_: float) -> None:
            self.posts += 1
            late = self.dice.expovariate(1.0)
            self.reddit.add(self.short_post(next_utc), visible_utc=next_utc + late)
            self.arrive(next_utc)

        if next_utc < self.last:
            self.reddit._later(next_utc, happen)

    def short_post(self, utc: float) -> dict[str, Any]:
        """Invent a post with no more fields than redpipe reads."""
        keys = ("id", "name", "title", "author", "author_fullname", "permalink", "subreddit")
        post = make_post(self.posts, subreddit=self.dice.choice(["python", "rust"]))
        return {key: post[key] for key in keys} | {"created_utc": int(utc)}

    def change_the_weather(self) -> None:
        """Step the clock, change the budget, end a token."""
        if self.dice.random() < 0.3:
            self.machine.ahead = self.dice.choice([0.0, 0.0, -3.0, 40.0, -HOUR, HOUR, -DAY, DAY])
        total = self.dice.choice([12, 60, 100, 600, 996, 10_000])
        advice = self.dice.choice(["plain", "seconds", "date", "empty", "zero"])
        others = self.dice.choice([0, 0, 0.5]) * total / 600  # requests a second
        self.reddit.budgets["oauth"] = Budget(total=total, advice=advice, others=others)
        if self.dice.random() < 0.2:
            self.revoked += 1
            self.reddit.revoke_tokens()

    def forget(self) -> None:
        """Let the invented Reddit keep no more than it lists, so that its memory is flat too."""
        for seen in self.reddit.log:
            self.tokens += "access_token" in seen.path
            self.refused += seen.status == 429
            self.unauthorized += seen.status == 401
        self.asked += len(self.reddit.log)
        self.reddit.log.clear()
        listed = {item.post["id"] for items in self.reddit._windows.values() for item in items}
        for identifier in set(self.reddit.listed) - listed:
            for kept in (self.reddit.posts, self.reddit.listed, self.reddit._items):
                del kept[identifier]
        tokens = self.reddit._tokens
        for token in [t for t, ends in tokens.items() if ends < self.clock.time()]:
            del tokens[token]

    def follow(self, days: float) -> Iterator[float]:
        """Follow so many virtual days; yield the hours as they pass."""
        access = pipeline.Access(client_id="app-id", client_secret="app-secret")
        fetch = fetch_from(self.reddit, self.clock)
        source = pipeline.Reddit(access, fetch, self.machine)
        hour, ends = self.clock.monotonic(), self.clock.monotonic() + days * DAY
        names, moved = ["python", "rust"], set[str]()
        with pipeline.Database(str(self.database), clock=self.machine) as memory:
            for batch in pipeline.stream(
                source, names, memory, interval=300, chance=self.dice.random
            ):
                rows = [pipeline.transform(post) for post in batch.posts]
                pipeline.load(memory, rows, batch.cursors, batch.gaps)
                moved.update(cursor.subreddit for cursor in batch.cursors)
                if len(moved) < len(names):  # the poll goes on, with a name alone
                    continue
                moved.clear()
                if self.clock.monotonic() >= hour + HOUR:
                    hour = self.clock.monotonic()
                    yield hour
                if self.clock.monotonic() >= ends:
                    return

    def run(self, days: int) -> None:
        """Follow for days, and measure after each."""
        self.last = self.clock.time() + days * DAY
        self.arrive(self.clock.time())
        for hour in self.follow(days + 0.5):  # at the end nothing new comes, and all is listed
            self.change_the_weather()
            self.forget()
            for newest, cursor, furthest in last_times(self.database):
                assert newest <= cursor <= furthest  # whatever the machine's clock says
            if hour >= (len(self.measures.blocks) + 1) * DAY:
                self.measures.take(self.database)


def stored(database: Path) -> tuple[int, int]:
    """Give the numbers of posts and gaps of a database that must be sound."""
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        sql = "SELECT (SELECT count(*) FROM posts), (SELECT count(*) FROM gaps)"
        posts, gaps = connection.execute(sql).fetchone()
        return posts, gaps


def last_times(database: Path) -> list[tuple[int, int, int]]:
    """Give each name's newest post, how far it is stored, and the newest post of all."""
    with closing(sqlite3.connect(database)) as connection:
        newest = "SELECT max(created_utc) FROM posts"
        own = f"{newest} WHERE lower(subreddit) = cursors.subreddit"
        return connection.execute(f"SELECT ({own}), newest_utc, ({newest}) FROM cursors").fetchall()


def growth(values: list[int]) -> float:
    """Give what the last third takes more than the second, on the average."""
    third = len(values) // 3
    early, late = values[third : 2 * third], values[2 * third :]
    return sum(late) / len(late) - sum(early) / len(early)


def check(soak: Soak, days: int, *, most_blocks: int) -> None:
    """Check what was stored, how Reddit was treated, and what was used meanwhile.

    most_blocks: how many more memory blocks may be in use in the last third of the time.
    """
    measures = soak.measures
    assert stored(soak.database) == (soak.posts, 0)
    assert soak.unauthorized <= soak.revoked  # tokens are renewed before their end
    assert soak.tokens >= days * 12
    assert soak.refused <= days * 24
    assert len(measures.blocks) >= days
    assert growth(measures.blocks) <= most_blocks
    assert max(measures.files) == min(measures.files)
    assert max(measures.wal) <= 8 * 2**20


def soak_for(days: int, directory: Path) -> Soak:
    """Run a soak whose seed is told when it fails."""
    seed = random.randrange(10**6)
    print("seed", seed)
    soak = Soak(directory / "posts.db", seed)
    soak.run(days)
    print(soak.posts, "posts,", soak.asked, "requests,", soak.tokens, "tokens,", soak.measures)
    return soak


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")


@pytest.fixture(autouse=True)
def nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Keep pytest from keeping what is logged: that grows."""
    caplog.set_level(logging.CRITICAL + 1, logger="redpipe")


@needs_proc
def test_virtual_days_leave_memory_and_files_flat(tmp_path):
    check(soak_for(6, tmp_path), 6, most_blocks=2500)


@needs_proc
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_virtual_year_leaves_memory_and_files_flat(tmp_path):
    soak = soak_for(365, tmp_path)
    check(soak, 365, most_blocks=1000)
    assert growth(soak.measures.resident) <= 2 * 2**20
