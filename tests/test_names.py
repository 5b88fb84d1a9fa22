"""Several subreddits, of which one cannot be read: from the start, or from some time on."""

from __future__ import annotations

import logging
import signal
import time

import pytest

from artefact import wait_for
from fake_reddit import FakeReddit, make_post
from pipeline import Access, Database, Gone, Reddit, load, stream, transform
from virtual import VirtualClock, fetch_from

NOW = 1_789_132_800  # the first full walks are due 300 s later
WRONG = {
    "private": "r/closed cannot be read: private (403)",
    "quarantined": "r/closed cannot be read: quarantined (403)",
    "banned": "r/closed cannot be read: banned (404)",
    "mistyped": "r/closed does not exist",
}
OPEN: list[Database] = []


@pytest.fixture
def clock():
    return VirtualClock(NOW)


@pytest.fixture
def world(clock):
    """Give a FakeReddit without a socket, with three posts in each of r/python and r/rust."""
    return with_posts(FakeReddit(clock), NOW)


def with_posts(reddit, now):
    for n in range(6):
        reddit.add(make_post(n, now - 600 + n, ("python", "rust")[n % 2]))
    return reddit


def spoil(reddit, why):
    """Make r/closed unreadable."""
    if why != "mistyped":
        reddit.refuse("closed", why)


class Follower:
    """Follow some names into a database, poll by poll."""

    def __init__(self, world, path, *names, once=False, interval=25.0):
        self.clock = world.clock
        self.database = Database(str(path), clock=self.clock)
        OPEN.append(self.database)
        access = Access("", "app-id", "app-secret")
        reddit = Reddit(access, fetch_from(world, self.clock), self.clock)
        self.batches = stream(reddit, names, self.database, once=once, interval=interval)

    def run(self, seconds):
        """Store what comes in so many seconds."""
        ends = self.clock.elapsed + seconds
        for batch in self.batches:
            load(self.database, map(transform, batch.posts), batch.cursors, batch.gaps)
            if self.clock.elapsed >= ends:
                break

    def stored(self):
        """Give the ids stored, without what all invented ids begin with."""
        rows = self.database.execute("SELECT id FROM posts ORDER BY id")
        return " ".join(row[0].removeprefix("1tq000") for row in rows)


@pytest.fixture(autouse=True)
def nothing_left_open():
    yield
    while OPEN:
        OPEN.pop().__exit__()


def paths(world):
    """Give the listings that were asked for, without repetitions in a row."""
    asked = [seen.path.split("/")[2] for seen in world.requests()]
    return [name for index, name in enumerate(asked) if asked[index - 1 : index] != [name]]


@pytest.fixture
def said(caplog):
    """Give what was said to the user so far."""
    caplog.set_level(logging.WARNING, "redpipe")
    return lambda: [record.getMessage() for record in caplog.records]


def test_each_name_is_a_listing_of_its_own(world, tmp_path):
    Follower(world, tmp_path / "posts.db", "python", "rust").run(60)
    assert paths(world)[:6] == ["python", "rust"] * 3


def test_a_name_that_is_added_later_is_walked_beside_the_others(world, tmp_path):
    Follower(world, tmp_path / "posts.db", "python").run(30)
    world.log.clear()
    Follower(world, tmp_path / "posts.db", "python", "rust").run(60)
    assert paths(world)[:6] == ["python", "rust"] * 3


@pytest.mark.parametrize("why", WRONG)
def test_the_others_are_followed_and_the_wrong_one_is_told_once(why, world, tmp_path, said):
    spoil(world, why)
    follower = Follower(world, tmp_path / "posts.db", "python", "closed", "rust")
    follower.run(60)
    world.add(make_post(6, NOW + 60, "rust"))
    follower.run(3600)
    assert follower.stored() == "0 1 2 3 4 5 6"
    assert said() == [f"{WRONG[why]}; continuing with the others"]
    assert paths(world).count("closed") == 1


@pytest.mark.parametrize("why", WRONG)
def test_once_stores_the_others_and_ends_with_69(why, world, tmp_path, said):
    spoil(world, why)
    follower = Follower(world, tmp_path / "posts.db", "closed", "python", "rust", once=True)
    with pytest.raises(Gone) as caught:
        follower.run(60)
    assert (caught.value.exit_status, str(caught.value)) == (69, WRONG[why])
    assert follower.stored() == "0 1 2 3 4 5"
    assert said() == []


@pytest.mark.parametrize("once", [False, True])
def test_when_all_are_wrong_it_ends_with_69_and_names_them_all(once, world, tmp_path, said):
    world.refuse("closed")
    follower = Follower(world, tmp_path / "posts.db", "closed", "pyhton", once=once)
    with pytest.raises(Gone, match=r"^r/closed cannot .*; r/pyhton does not exist$"):
        follower.run(60)


def fill_closed(world, *numbers):
    """Add posts to r/closed that were made now."""
    for n in numbers:
        world.add(make_post(n, int(world.clock.now), "closed"))


@pytest.mark.parametrize("why", ["private", "banned"])
def test_one_that_turns_private_holds_up_none_and_comes_back(why, world, tmp_path, said):
    fill_closed(world, 6)
    follower = Follower(world, tmp_path / "posts.db", "python", "closed", "rust", interval=120.0)
    follower.run(60)
    world.refuse("closed", why)
    fill_closed(world, 7)
    world.add(make_post(8, int(world.clock.now), "rust"))
    follower.run(600)
    assert follower.stored() == "0 1 2 3 4 5 6 8"
    world.refuse("closed", "")
    fill_closed(world, 9)
    world.add(make_post(10, int(world.clock.now), "python"))
    follower.run(300)
    assert follower.stored() == "0 1 2 3 4 5 6 7 8 9 a"
    assert said() == [f"{WRONG[why]}; will keep trying", "r/closed can be read again"]


def test_one_that_stays_private_is_asked_for_about_once_a_minute(world, tmp_path, said):
    fill_closed(world, 6)
    follower = Follower(world, tmp_path / "posts.db", "python", "closed", "rust")
    follower.run(60)
    world.refuse("closed")
    world.log.clear()
    follower.run(3600)
    alone = [seen for seen in world.requests() if seen.path == "/r/closed/new"]
    assert 50 <= len(alone) <= 100
    assert len(world.log) <= 100 + 2 * 145  # the two others are polled every 25 s
    assert len(said()) == 1


def test_one_that_was_stored_before_and_is_private_now_ends_once_with_69(world, tmp_path, said):
    fill_closed(world, 6)
    Follower(world, tmp_path / "posts.db", "python", "closed", once=True).run(60)
    world.refuse("closed")
    world.add(make_post(7, NOW + 1, "python"))
    follower = Follower(world, tmp_path / "posts.db", "python", "closed", once=True)
    with pytest.raises(Gone, match=r"^r/closed cannot be read: private \(403\)$"):
        follower.run(60)
    assert follower.stored() == "0 2 4 6 7"


# The built file


@pytest.mark.parametrize("why", WRONG)
def test_the_built_file_stores_the_others_and_ends_with_one_line(
    why, redpipe, fake_reddit, tmp_path
):
    with_posts(fake_reddit, int(time.time()))
    spoil(fake_reddit, why)
    path = tmp_path / "posts.db"
    assert redpipe("--once", path, "python+closed", "r/rust") == (
        69,
        "",
        f"redpipe: {WRONG[why]}\n",
    )
    with Database(str(path)) as database:
        assert list(database.execute("SELECT count(*) FROM posts")) == [(6,)]


def test_the_built_file_goes_on_with_the_others(redpipe, fake_reddit, tmp_path):
    with_posts(fake_reddit, int(time.time()))
    command = ("--interval=1", tmp_path / "posts.db", "python", "closed", "rust")
    process = redpipe.start(*command, REDDIT_CLIENT_ID="app-id", REDDIT_CLIENT_SECRET="app-secret")
    wait_for(lambda: len(fake_reddit.requests("/r/python/")) > 1)
    wait_for(lambda: len(fake_reddit.requests("/r/rust/")) > 1)
    done = redpipe.stop(process)
    assert done == (
        -signal.SIGTERM,
        "",
        "redpipe: r/closed does not exist; continuing with the others\n",
    )
