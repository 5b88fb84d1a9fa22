"""A soak: virtual months of following, in minutes, on a clock that jumps ahead.

Tokens end and are renewed, windows of the budget change, listings go quiet and busy, the
machine's clock steps forward and back, requests fail. Meanwhile memory, open files and the
database's -wal stay flat, and at the end every post is there once.

By default three virtual days, in some seconds; `./tests/run --long` takes a virtual year, in
about five minutes.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import sys
from pathlib import Path

import pytest

import pipeline
from conftest import query, stored
from fake_reddit import Budget, FakeReddit, Fault, make_post, reply
from virtual import VirtualClock, fetch_from, stream

HOUR = 3600.0
DAY = 24 * HOUR
QUIET, CALM, BUSY = 1 / 7200, 1 / 300, 0.3  # posts a second
NAMES = ["python", "rust"]


class SteppedClock:
    """The machine's clock: its time of day is stepped now and then, its seconds are true."""

    def __init__(self, true):
        self.true, self.ahead = true, 0.0
        self.monotonic, self.sleep = true.monotonic, true.sleep

    def time(self):
        return self.true.time() + self.ahead


class Soak:
    """An invented Reddit in changing weather, and a follower of two subreddits."""

    def __init__(self, database, seed):
        self.dice = random.Random(seed)
        self.clock = VirtualClock()
        self.machine = SteppedClock(self.clock)
        self.database = database
        self.reddit = FakeReddit(self.clock)
        self.reddit.depth = 400  # longer listings would be most of the work
        self.reddit.create(*NAMES)
        self.reddit.token_lifetime = 2 * HOUR
        self.reddit.faults = self.fault
        self.last = self.clock.time()
        self.rate, self.rate_ends = BUSY, self.last + HOUR  # fills the listings
        self.posts = self.tokens = self.revoked = self.refused = self.unauthorized = 0
        # Taken once a virtual day: memory blocks in use, open files, bytes of -wal, of memory.
        self.blocks, self.files, self.wal, self.resident = [], [], [], []

    def fault(self, method, path, query):
        """Let one request in fifty fail."""
        if self.dice.random() > 0.02:
            return None
        return self.dice.choice([reply(503), reply(500, "<html>"), Fault("reset"), Fault("hang")])

    def arrive(self, utc):
        """Put the next post after a time on the agenda; it then puts the one after it there."""
        if utc >= self.rate_ends:
            self.rate = self.dice.choice([QUIET, QUIET, CALM, CALM, CALM, BUSY])
            longest = 1 if self.rate == BUSY else 12
            self.rate_ends = utc + self.dice.uniform(0.2, longest) * HOUR
        next_utc = utc + self.dice.expovariate(self.rate)

        def happen(_):
            self.posts += 1
            late = self.dice.expovariate(1.0)
            self.reddit.add(self.short_post(next_utc), visible_utc=next_utc + late)
            self.arrive(next_utc)

        if next_utc < self.last:
            self.reddit._later(next_utc, happen)

    def short_post(self, utc):
        """Invent a post with no more fields than redpipe reads."""
        keys = ("id", "name", "title", "author", "author_fullname", "permalink", "subreddit")
        post = make_post(self.posts, subreddit=self.dice.choice(NAMES))
        return {key: post[key] for key in keys} | {"created_utc": int(utc)}

    def change_the_weather(self):
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

    def forget(self):
        """Let the invented Reddit keep no more than it lists, so that its memory is flat too."""
        for seen in self.reddit.log:
            self.tokens += "access_token" in seen.path
            self.refused += seen.status == 429
            self.unauthorized += seen.status == 401
        self.reddit.log.clear()
        listed = {item.post["id"] for items in self.reddit._windows.values() for item in items}
        for identifier in set(self.reddit.listed) - listed:
            for kept in (self.reddit.posts, self.reddit.listed, self.reddit._items):
                del kept[identifier]
        tokens = self.reddit._tokens
        for token in [t for t, ends in tokens.items() if ends < self.clock.time()]:
            del tokens[token]

    def measure(self):
        gc.collect()
        self.blocks.append(sys.getallocatedblocks())
        self.files.append(len(list(Path("/proc/self/fd").iterdir())))
        self.wal.append(Path(f"{self.database}-wal").stat().st_size)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.resident.append(pages * os.sysconf("SC_PAGE_SIZE"))

    def follow(self, days):
        """Follow so many virtual days; yield the hours as they pass."""
        access = pipeline.Access(client_id="app-id", client_secret="app-secret")
        fetch = fetch_from(self.reddit, self.clock)
        source = pipeline.Reddit(access, fetch, self.machine)
        hour, ends = self.clock.monotonic(), self.clock.monotonic() + days * DAY
        moved = set()
        with pipeline.Database(str(self.database), clock=self.machine) as memory:
            for batch in stream(source, NAMES, memory, interval=300, chance=self.dice.random):
                rows = [pipeline.transform(post) for post in batch.posts]
                pipeline.load(memory, rows, batch.cursors, batch.gaps)
                moved.update(cursor.subreddit for cursor in batch.cursors)
                if len(moved) < len(NAMES):  # the poll goes on, with a name alone
                    continue
                moved.clear()
                if self.clock.monotonic() >= hour + HOUR:
                    hour = self.clock.monotonic()
                    yield hour
                if self.clock.monotonic() >= ends:
                    return

    def run(self, days):
        """Follow for days, and measure after each."""
        self.last = self.clock.time() + days * DAY
        self.arrive(self.clock.time())
        newest = "SELECT max(created_utc) FROM posts"
        own = f"{newest} WHERE lower(subreddit) = cursors.subreddit"
        last_times = f"SELECT ({own}), newest_utc, ({newest}) FROM cursors"
        for hour in self.follow(days + 0.5):  # at the end nothing new comes, and all is listed
            self.change_the_weather()
            self.forget()
            for of_name, cursor, of_all in query(self.database, last_times):
                assert of_name <= cursor <= of_all  # whatever the machine's clock says
            if hour >= (len(self.blocks) + 1) * DAY:
                self.measure()


def growth(values):
    """Give what the last third takes more than the second, on the average."""
    third = len(values) // 3
    early, late = values[third : 2 * third], values[2 * third :]
    return sum(late) / len(late) - sum(early) / len(early)


@pytest.fixture
def soak(database, seed, caplog):
    """Give what soaks for some days and checks all that is promised.

    most_blocks: how many more memory blocks may be in use in the last third of the time.
    """
    caplog.set_level(logging.CRITICAL + 1, logger="redpipe")  # what pytest keeps of it grows

    def soak_for(days, most_blocks):
        soak = Soak(database, seed)
        soak.run(days)
        print(soak.posts, "posts,", soak.tokens, "tokens,", soak.blocks, soak.resident)
        assert len(stored(database)) == soak.posts
        assert query(database, "SELECT * FROM gaps") == []
        assert soak.unauthorized <= soak.revoked  # tokens are renewed before their end
        assert soak.tokens >= days * 12
        assert soak.refused <= days * 24
        assert len(soak.blocks) >= days
        assert growth(soak.blocks) <= most_blocks
        assert max(soak.files) == min(soak.files)
        assert max(soak.wal) <= 8 * 2**20
        return soak

    return soak_for


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")


@needs_proc
def test_virtual_days_leave_memory_and_files_flat(soak):
    soak(3, most_blocks=1250)


@needs_proc
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_virtual_year_leaves_memory_and_files_flat(soak):
    assert growth(soak(365, most_blocks=1000).resident) <= 2 * 2**20
