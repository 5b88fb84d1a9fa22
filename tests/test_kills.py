"""Kill the built file at random moments: nothing listed is lost, nothing comes twice."""

from __future__ import annotations

import random
import time

import pytest

from conftest import stored
from fake_reddit import Budget, make_post


@pytest.fixture
def kill_often(redpipe, fake_reddit, database, seed):
    """Give what starts a follower and kills it, again and again, and lets the last end in peace.

    Before each start 20 to 400 posts are listed, and a page takes 30 ms, so that most are
    killed in the middle of a catch-up. The listing is never longer than what Reddit lists.
    """
    dice = random.Random(seed)
    fake_reddit.budgets["json"] = Budget(total=1_000_000)
    fake_reddit.faults = lambda method, path, query: time.sleep(0.03)
    asked = fake_reddit.requests

    def kill(times):
        midway, now = 0, time.time() - 3600 * 24
        for _ in range(times):
            for _ in range(dice.randrange(20, 400)):
                now += 0.5
                fake_reddit.add(make_post(len(fake_reddit.posts), now, "python"))
            for post_id in fake_reddit.listing_ids("python")[900:]:
                fake_reddit.remove(post_id)
            number = len(asked()) + dice.randrange(10)
            process = redpipe.start("--interval=1", database, "python")
            ends = time.monotonic() + 1.5  # a walk may have fewer pages
            while len(asked()) < number and time.monotonic() < ends:
                time.sleep(0.002)
            time.sleep(dice.uniform(0.0, 0.04))
            assert process.poll() is None
            process.kill()
            process.communicate()
            midway += bool(asked()) and "after" in asked()[-1].query
        print(f"{midway} of {times} kills came between two pages")
        # Many kills in a row can push posts out of the listing: then it warns of a gap.
        assert redpipe("--once", database, "python").status == 0
        assert not set(fake_reddit.listing_ids("python")) - set(stored(database))
        return midway

    return kill


def test_five_kills_lose_nothing_that_is_listed(kill_often):
    kill_often(5)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_hundred_kills_lose_nothing_that_is_listed(kill_often):
    assert kill_often(200) > 60


@pytest.fixture
def follow_many(redpipe, fake_reddit, database):
    """Give what follows names of a post a minute, and five of one a second, and kills it twice."""
    fake_reddit.budgets["json"] = Budget(total=1_000_000)

    def follow(number, seconds):
        names = [f"name{n}" for n in range(number)]
        weights = names[:5] * 60 + names[5:]
        fake_reddit.grow(len(weights) / 60, weights, start=time.time() - 300)
        for _ in range(2):
            process = redpipe.start(database, *names)
            time.sleep(seconds / 2)
            assert process.poll() is None
            process.kill()
            process.communicate()
        listed = {post_id for name in names for post_id in fake_reddit.listing_ids(name)}
        assert redpipe("--once", database, *names, timeout=300) == (0, "", "")
        assert listed <= set(stored(database))
        assert len(listed) > 1000 + seconds * 4

    return follow


def test_many_names_lose_nothing_to_two_kills(follow_many):
    follow_many(20, seconds=4)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_three_hundred_names_lose_nothing_in_five_minutes_with_two_kills(follow_many):
    follow_many(300, seconds=300)
