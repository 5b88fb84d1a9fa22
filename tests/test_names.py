"""Several subreddits, of which one cannot be read: from the start, or from some time on."""

from __future__ import annotations

import itertools
import logging
import signal

import pytest

from artefact import wait_for
from conftest import APP, add_posts, count_posts
from pipeline import Gone
from virtual import T, World, listed

WRONG = {
    "private": "r/closed cannot be read: private (403)",
    "quarantined": "r/closed cannot be read: quarantined (403)",
    "banned": "r/closed cannot be read: banned (404)",
    "mistyped": "r/closed does not exist",
}


def spoil(reddit, why):
    """Make r/closed unreadable."""
    if why != "mistyped":
        reddit.refuse("closed", why)


@pytest.fixture
def world(tmp_path):
    """Give a world with three posts in each of r/python and r/rust."""
    world = World(str(tmp_path / "posts.db"))
    world.list_posts("p", 3, -600, 1)
    world.list_posts("r", 3, -500, 1, subreddit="rust")
    with world.database:
        yield world


def run(world, batches, seconds):
    """Store what comes in so many seconds."""
    ends = world.clock.time() + seconds
    while world.clock.time() < ends:
        next(batches)


def list_now(world, identifier, subreddit="python"):
    world.reddit.add(listed(identifier, world.clock.time() - T, subreddit))


@pytest.fixture
def said(caplog):
    """Give what was said to the user so far."""
    caplog.set_level(logging.WARNING, "redpipe")
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_name_that_is_added_later_is_walked_beside_the_others(world):
    run(world, world.follow("python"), 30)
    asked = len(world.asked())
    run(world, world.follow("python", "rust"), 60)
    turns = [name for name, _ in itertools.groupby(world.asked(asked))]
    assert turns[:6] == ["python", "rust"] * 3


@pytest.mark.parametrize("why", WRONG)
def test_the_others_are_followed_and_the_wrong_one_is_told_once(why, world, said):
    spoil(world.reddit, why)
    batches = world.follow("python", "closed", "rust")
    run(world, batches, 60)
    list_now(world, "new", "rust")
    run(world, batches, 3600)
    assert world.stored() == ["p0", "p1", "p2", "r0", "r1", "r2", "new"]
    assert said() == [f"{WRONG[why]}; continuing with the others"]
    assert world.asked().count("closed") == 1


@pytest.mark.parametrize("once", [False, True])
def test_when_all_are_wrong_it_ends_with_69_and_names_them_all(once, world):
    world.reddit.refuse("closed")
    with pytest.raises(Gone, match=r"^r/closed cannot .*; r/pyhton does not exist$") as caught:
        run(world, world.follow("closed", "pyhton", once=once), 60)
    assert caught.value.exit_status == 69


@pytest.mark.parametrize("why", ["private", "banned"])
def test_one_that_turns_private_holds_up_none_and_comes_back(why, world, said):
    list_now(world, "c0", "closed")
    batches = world.follow("python", "closed", "rust", interval=120.0)
    run(world, batches, 60)
    world.reddit.refuse("closed", why)
    list_now(world, "c1", "closed")
    list_now(world, "r3", "rust")
    run(world, batches, 600)
    assert set(world.stored()) == {"p0", "p1", "p2", "r0", "r1", "r2", "c0", "r3"}
    world.reddit.refuse("closed", "")
    list_now(world, "c2", "closed")
    list_now(world, "p3")
    run(world, batches, 300)
    assert set(world.stored()[-5:]) == {"c1", "r3", "c2", "p3", "c0"}
    assert said() == [f"{WRONG[why]}; will keep trying", "r/closed can be read again"]


def test_one_that_stays_private_is_asked_for_about_once_a_minute(world, said):
    list_now(world, "c0", "closed")
    batches = world.follow("python", "closed", "rust")
    run(world, batches, 60)
    world.reddit.refuse("closed")
    asked = len(world.asked())
    run(world, batches, 3600)
    assert 50 <= world.asked(asked).count("closed") <= 100
    assert len(world.asked(asked)) <= 100 + 2 * 145  # the two others are polled every 25 s
    assert len(said()) == 1


def test_one_that_was_stored_before_and_is_private_now_ends_once_with_69(world):
    list_now(world, "c0", "closed")
    world.once("python", "closed")
    world.reddit.refuse("closed")
    list_now(world, "p3")
    with pytest.raises(Gone, match=r"^r/closed cannot be read: private \(403\)$"):
        world.once("python", "closed")
    assert set(world.stored()) == {"p0", "p1", "p2", "c0", "p3"}


# The built file


@pytest.mark.parametrize("why", WRONG)
def test_once_stores_the_others_and_ends_with_one_line(why, redpipe, fake_reddit, database):
    add_posts(fake_reddit, range(3))
    add_posts(fake_reddit, range(3, 6), "rust")
    spoil(fake_reddit, why)
    done = redpipe("--once", database, "python+closed", "r/rust")
    assert done == (69, "", f"redpipe: {WRONG[why]}\n")
    assert count_posts(database) == 6


def test_the_built_file_goes_on_with_the_others(redpipe, fake_reddit, database):
    fake_reddit.create("python", "rust")
    process = redpipe.start("--interval=1", database, "python", "closed", "rust", **APP)
    wait_for(lambda: len(fake_reddit.requests("/r/python/")) > 1)
    wait_for(lambda: len(fake_reddit.requests("/r/rust/")) > 1)
    told = "redpipe: r/closed does not exist; continuing with the others\n"
    assert redpipe.stop(process) == (-signal.SIGTERM, "", told)
