"""Follow an invented Reddit on a virtual clock: each promise of the stream has its test."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

import pipeline
from fake_reddit import Budget, Fault, Post, error_reply, listing, thing
from virtual import ACCESS, T, World, fetch_from, listed, stream

FEED = {"permalink": "/r/python/comments/x/"}
EMPTY = (200, {}, listing([]))


def child(identifier: str, age: float) -> str:
    """Write such a post as a listing's child."""
    return thing(listed(identifier, age))


def ids_of(posts: list[Post]) -> list[str]:
    return [post["id"] for post in posts]


def leave_only_the_feed(world: World) -> None:
    """Let the process have no app; a feed shows posts that have a permalink."""
    world.access = pipeline.Access()
    world.reddit.anonymous_json_blocked = True


def another(world: World) -> World:
    """Give another process on the same database and the same Reddit."""
    other = World(world.path)
    other.reddit, other.serve = world.reddit, world.serve
    return other


@pytest.fixture
def world(tmp_path) -> Iterator[World]:
    world = World(str(tmp_path / "posts.db"))
    with world.database:
        yield world


@pytest.fixture
def told(caplog):
    """Give a function that returns the warnings so far."""
    caplog.set_level(logging.DEBUG, "redpipe")
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def grow(world: World, new: int, seconds: float = 300, **more: Any) -> None:
    """Poll when 20 posts are listed, then list new ones."""
    world.list_posts("old", 20, -100, 1, **more)
    world.once()
    world.clock.advance(seconds)
    world.list_posts("new", new, 1, 1, **more)


class KilledError(BaseException):
    """The process died."""


def die() -> None:
    raise KilledError


# A poll


def test_a_poll_reads_older_pages_until_it_is_past_the_cursor(world):
    grow(world, 250, 290)
    assert world.asked_by(world.once) == ["python", "python after new150", "python after new50"]
    assert len(world.stored()) == 270


def test_posts_come_oldest_first_and_those_of_a_second_by_their_ids(world):
    for identifier, age in (("c", -10), ("zz", -30), ("100", -30), ("9", -30), ("b", -20)):
        world.reddit.add(listed(identifier, age))
    assert [ids_of(batch.posts) for batch in world.once()] == [["9", "zz", "100", "b", "c"]]


def test_a_post_is_given_only_once_and_a_second_start_goes_on(world):
    world.reddit.add(listed("a", -20))
    stream = world.follow()
    assert ids_of(next(stream).posts) == ["a"]
    world.reddit.add(listed("b", -10))
    assert ids_of(next(stream).posts) == ["b"]
    assert next(stream).posts == []
    world.reddit.add(listed("c", -5))
    assert [ids_of(batch.posts) for batch in world.once()] == [["c"]]


# The stop rule


@pytest.mark.parametrize(("old", "pages"), [(1, 3), (9, 3), (10, 2)])
def test_a_page_ends_the_walk_when_its_last_ten_posts_are_old(world, old, pages):
    world.reddit.add(listed("first", -500))
    world.once()
    world.clock.advance(290)
    # Two pages and a half; at the end of the second one stand old posts.
    world.list_posts("p", 50, 1, 1)
    for n in range(old):
        world.reddit.add(listed(f"old{n}", -1000 + n), rank=T + 60 + n / 100)
    world.list_posts("q", 200 - old, 70, 1)
    assert len(world.asked_by(world.once)) == pages


def test_an_old_post_on_top_ends_nothing(world):
    grow(world, 150)
    world.reddit.add(listed("approved", -80_000), rank=T + 299)
    world.once()
    assert len(world.stored()) == 171


def test_a_short_page_ends_the_walk_when_all_its_posts_are_old(world):
    world.list_posts("old", 120, -500, 1)
    world.once()
    page = listing([child("x", -500)], "t3_x")
    world.reddit.serve_listing_bytes(page)
    assert world.asked_by(world.once) == ["python"]


def test_posts_of_another_source_move_no_cursor_and_end_no_walk(world):
    grow(world, 250)
    world.load([listed(f"new{n}", 1 + n) for n in range(60, 250)])
    assert world.cursor() == T - 81
    world.once()
    assert len(world.stored()) == 270


def test_a_page_that_is_shorter_than_asked_for_is_no_end(world):
    serve = world.serve
    world.serve = lambda request: serve(request._replace(params={**request.params, "limit": "40"}))
    grow(world, 150)
    world.once()
    assert len(world.stored()) == 170


# Killed


@pytest.mark.parametrize("request_number", [1, 2, 3, 4, 5])
def test_a_walk_that_does_not_finish_stores_nothing_and_moves_nothing(world, request_number):
    grow(world, 450, 600)
    world.before(request_number, die)
    with pytest.raises(KilledError):
        world.once()
    assert (len(world.stored()), world.cursor()) == (20, T - 81)
    world.once()
    assert (len(world.stored()), world.cursor()) == (470, T + 450)


def test_after_a_kill_between_walk_and_transaction_the_next_poll_gives_the_same(world):
    world.list_posts("p", 3, -100, 1)
    source = pipeline.Reddit(ACCESS, world.fetch, world.clock)
    lost = next(stream(source, ["python"], world.database, once=True))
    assert world.once() == [lost]


def test_posts_gaps_and_cursors_are_one_transaction(world):
    world.reddit.add(listed("a", -50))
    world.once()
    cursor = pipeline.Cursor("python", T, T, T)
    impossible = pipeline.Gap("python", 0, object(), T)  # SQLite cannot store it
    with pytest.raises(pipeline.StorageFailed):
        world.load([listed("b", 0)], [cursor], [impossible])
    assert (world.stored(), world.cursor()) == (["a"], T - 50)


# Late posts


def test_what_appears_within_the_look_back_is_not_missed(world):
    world.list_posts("p", 1000, -1000, 1)
    stream = world.started()
    world.reddit.add(listed("late", -28))
    world.list_posts("new", 95, 1, 0.1)
    assert "late" in ids_of(next(stream).posts)


@pytest.mark.parametrize(("lateness", "pages"), [(0, range(2, 3)), (12, range(4, 10))])
def test_the_look_back_adapts_to_the_lateness_seen(world, lateness, pages):
    world.reddit.budgets["oauth"] = Budget(100_000)
    polls = pages_of_each_poll(world, lateness)
    assert polls[0] >= 4  # 10 posts a second, 30 s of look-back and what is new
    assert polls[-1] in pages  # what is new, or that and twice 12 s


def test_the_look_back_is_half_of_the_listing_at_most(world):
    world.list_posts("p", 1000, -25, 0.025)
    stream = world.started()
    assert len(world.asked_by(stream.__next__)) == 5  # 500 posts, of which 40 come a second


def pages_of_each_poll(world: World, lateness: float, polls: int = 40) -> list[int]:
    """Follow 10 posts a second, of which each fiftieth is listed late."""
    start = world.clock.time() - T

    def more() -> None:
        for n in range(int(start * 10), int((start + 600) * 10)):
            at = n / 10
            late = lateness if n % 50 == 0 else 0
            world.reddit.add(listed(f"r{n}", at), visible_utc=T + at + late)

    more()
    world.clock.advance(120)
    asked = len(world.asked())
    counts = [len(world.asked()) for _ in itertools.islice(world.follow(), polls)]
    pages = [after - before for before, after in itertools.pairwise([asked, *counts])]
    return [count for count in pages if count < 10]  # the others were full walks


def test_what_is_approved_later_is_stored_by_a_full_walk_within_five_minutes(world):
    world.list_posts("p", 900, -900, 1)
    stream = world.started()
    world.reddit.add(listed("approved", -500))
    full_walks = []
    for n in range(30):  # 750 s
        world.list_posts(f"n{n}x", 25, n * 25, 1)
        if len(world.asked_by(stream.__next__)) == 10:
            full_walks.append(world.clock.time() - T)
    assert full_walks == [300, 600]
    assert "approved" in world.stored()


def test_a_walk_that_goes_on_into_a_turn_does_not_use_it_up(world):
    world.list_posts("p", 900, -900, 1)
    stream = world.started(interval=23)
    for n in range(13):
        world.list_posts(f"n{n}x", 20 if n < 12 else 150, n * 23, 0.1)
        if n == 12:  # at 299 s, and the full walk is due at 300 s
            world.before(2, lambda: world.clock.advance(5))
        next(stream)
    world.reddit.add(listed("approved", -500))
    assert world.clock.time() == T + 304
    next(stream)
    assert "approved" in world.stored()


def test_a_feed_is_walked_in_full_though_the_budget_makes_it_wait(world):
    leave_only_the_feed(world)
    world.list_posts("p", 900, -9000, 10, **FEED)
    stream = world.started()
    world.reddit.add(listed("approved", -5000, **FEED))
    world.run(stream, 1300)
    assert "approved" in world.stored()


def test_a_quiet_listing_is_hardly_ever_walked_in_full(world):
    world.list_posts("p", 500, -500 * 300, 300)  # a post in five minutes
    full_walks = []
    stream = world.follow(interval=300)
    for n in range(288):  # a day
        if len(world.asked_by(stream.__next__)) > 1:
            full_walks.append(n)
        world.reddit.add(listed(f"n{n}", n * 300))
    assert len(full_walks) == 3


def test_no_full_walk_begins_when_the_window_cannot_carry_it(world):
    world.reddit.budgets["oauth"] = Budget(40)
    world.list_posts("p", 1000, -2000, 2)
    stream = world.follow()
    ended = []
    while world.clock.time() < T + 3000:
        next(stream)
        ended.append(world.clock.time())
    assert [seen.status for seen in world.reddit.requests() if seen.status != 200] == []
    assert max(later - earlier for earlier, later in itertools.pairwise(ended)) < 120


# Lost anchors


@pytest.mark.parametrize("removed", [1, 2, 3, 10, 50, 99, 100])
def test_a_lost_anchor_is_no_end(world, removed):
    grow(world, 250)
    remove = [f"new{n}" for n in range(150, 150 + removed)]  # the first page ends with new150
    world.before(2, lambda: [world.reddit.remove(identifier) for identifier in remove])
    world.once()
    assert (len(world.stored()), world.gaps()) == (270, [])


def test_an_anchor_that_reddit_does_not_know_is_no_end(world):
    grow(world, 250)
    # Reddit drops an `after` that it does not know, and answers with the newest page again.
    world.before(2, lambda: world.reddit.purge("new150"))
    world.once()
    assert (len(world.stored()), world.gaps()) == (270, [])


@pytest.mark.parametrize(
    "removed",
    [
        pytest.param((0, 1, 8, 64), id="the next one shows only what is known"),
        pytest.param((0, 1, 8, 64, 512), id="all of them, so that the walk begins anew"),
    ],
)
def test_lost_anchors_far_up_the_listing_are_no_end(world, removed):
    world.list_posts("old", 20, -300, 10)
    world.once()
    world.clock.advance(900)
    world.list_posts("new", 850, 1, 1)
    # Six pages have been read, to new250; tried are the anchors so many items above it.
    world.before(7, lambda: [world.reddit.remove(f"new{250 + step}") for step in removed])
    world.once()
    assert (len(world.stored()), world.gaps()) == (870, [])


def leave_out(world: World, ids: set[str]) -> None:
    """Show no posts of those ids, whose places on their pages stay empty."""
    serve = world.serve

    def thinned(request: pipeline.Request) -> pipeline.Answer:
        answer = serve(request)
        page = pipeline.parse_json(answer.body)
        if pipeline.is_listing(page):
            children = page["data"]["children"]
            page["data"]["children"] = [c for c in children if c["data"]["id"] not in ids]
        return answer._replace(body=json.dumps(page).encode())

    world.serve = thinned


@pytest.mark.parametrize("removed", [1, 30, 60])
@pytest.mark.parametrize("empty", [1, 3, 6, 10])
def test_a_silence_behind_a_page_with_some_room_is_no_end(world, empty, removed):
    grow(world, 250)
    leave_out(world, {f"new{160 + n}" for n in range(removed)})
    world.reddit.script(None, *[EMPTY] * empty)
    world.once()
    assert (len(world.stored()), world.gaps()) == (270 - removed, [])


@pytest.mark.parametrize("count", [1, 2, 99, 100, 101])
def test_a_feed_ends_where_nothing_comes_behind_an_anchor_that_is_still_listed(world, count):
    world.list_posts("old", 20, -100, 1, **FEED)
    leave_only_the_feed(world)
    world.once()
    world.remove("old", 20)
    world.clock.advance(400)
    world.list_posts("new", count, 1, 1, **FEED)
    world.once()
    assert (len(world.stored()), world.gaps()) == (20 + count, [])


def test_the_end_of_a_feed_is_found_though_new_posts_push_it_out(world):
    leave_only_the_feed(world)
    grow(world, 1200, 2000, **FEED)

    def push_out(*_: object) -> None:
        world.list_posts(f"more{len(world.asked())}x", 3, world.clock.time() - T, 0, **FEED)

    world.reddit.faults = push_out
    assert len(world.asked_by(world.once)) <= 16
    assert len(world.gaps()) == 1


def test_ten_pages_in_a_row_are_the_whole_of_a_feed(world):
    leave_only_the_feed(world)  # ten requests a minute: the next one would wait
    world.list_posts("old", 20, -100, 1, **FEED)
    stream = world.started()
    world.clock.advance(2000)
    world.list_posts("new", 1200, 801, 1, **FEED)
    assert len(world.asked_by(stream.__next__)) == 10
    assert world.gaps() == [("python", T - 81 - 30, T + 1001 + 9)]


@pytest.mark.parametrize(("old", "new", "removed"), [(0, 2, 1), (0, 11, 10), (2, 1, 2)])
def test_a_feed_of_which_one_post_is_left_is_no_gap(world, old, new, removed):
    leave_only_the_feed(world)
    world.list_posts("first", 3, -100, 1, **FEED)
    world.once()
    world.remove("first", 3)
    world.list_posts("old", old, -60, 1, **FEED)
    world.clock.advance(300)
    world.list_posts("new", new, 100, 1, **FEED)
    ids = [f"old{n}" for n in range(old)] + [f"new{n}" for n in range(new)]
    world.before(2, lambda: [world.reddit.remove(i) for i in ids[:removed]])
    world.once()
    assert world.gaps() == []


def test_a_walk_that_has_to_begin_anew_moves_the_cursor_to_its_first_beginning_only(world):
    grow(world, 150, 200)

    def be_slow() -> None:
        world.clock.advance(2000)
        world.list_posts("more", 1200, 300, 1)

    world.before(2, be_slow)
    world.once()
    assert world.cursor() == T + 150
    first = ("python", T - 81 - 30, T + 51 + 9)  # below the only page of the first beginning
    assert world.gaps() == [first]
    world.once()
    assert world.cursor() == T + 1499
    assert world.gaps() == [first, ("python", T + 150 - 30, T + 500 + 9)]


def test_a_page_that_comes_again_and_again_ends_the_walk(world):
    grow(world, 0, 1000)
    page = listing([child(f"x{n}", n) for n in range(100, 0, -1)], "t3_x1")
    world.reddit.faults = lambda method, path, query: (
        (200, {"content-type": "application/json"}, page) if "/new" in path else None
    )
    assert len(world.asked_by(world.once)) <= 10


# Gaps


def lose_posts(world: World) -> None:
    """Store 20 posts, then list so many that those after them have left the listing."""
    grow(world, 200, 2000)
    world.list_posts("kept", 1000, 501, 1)


@pytest.mark.parametrize("removed", [0, 100])  # a listing of 900 odd posts may have been cut, too
def test_a_gap_is_named_once_with_both_bounds_inclusive_and_what_is_listed_is_stored(
    world, removed
):
    lose_posts(world)
    for n in range(removed):
        world.reddit.remove(f"kept{500 + n}")
    world.once()
    world.once()
    # The cursor less 30 s of lateness; the newest of the last ten posts.
    assert world.gaps() == [("python", T - 81 - 30, T + 501 + 9)]
    assert world.rows("SELECT noticed_utc FROM gaps") == [(T + 2000,)]
    assert (world.cursor(), len(world.stored())) == (T + 1500, 1020 - removed)


def test_a_gap_inside_one_that_has_been_named_is_not_named(world):
    world.reddit.add(listed("a", -50))
    world.once()
    for lag, before in ((30, 10), (30, 10), (20, 5), (30, 11)):
        world.load([], [], [pipeline.Gap("python", lag, T + before, T)])
    assert world.gaps() == [("python", T - 80, T + 10), ("python", T - 80, T + 11)]


def test_a_listing_well_short_of_the_horizon_is_complete(world):
    grow(world, 740, 2000)
    world.remove("old", 20)
    world.once()
    assert (world.gaps(), world.cursor()) == ([], T + 740)


@pytest.mark.parametrize(("new", "gaps"), [(960, []), (961, [("python", T - 81 - 30, T - 110)])])
def test_a_full_listing_that_ends_above_the_lateness_seen_is_a_gap(world, new, gaps):
    world.list_posts("old", 60, -140, 1)  # the newest at T - 81
    world.once()
    world.clock.advance(2000)
    world.list_posts("new", new, 1, 1)  # the other places are taken down to T - 120
    world.once()
    assert world.gaps() == gaps


@pytest.mark.parametrize("seconds", [2, 8, 60])
def test_a_listing_that_has_moved_on_during_a_slow_walk_may_have_been_cut(world, seconds):
    grow(world, 900, 1000)

    def be_slow() -> None:
        world.clock.advance(seconds)
        world.list_posts("more", 600, 1001, seconds / 600)

    world.before(2, be_slow)  # 300 posts are left below the first page, of 800
    world.once()
    assert world.gaps() == [("python", T - 81 - 30, T + 1 + 500 + 9)]


@pytest.mark.parametrize("empty", [0, 1, 3])
def test_a_short_listing_walked_slowly_is_no_gap(world, empty):
    """Whether it was short, the newest page tells, and as ever an empty one is asked again."""
    world.list_posts("old", 3, -100, 1)
    world.once()
    world.clock.advance(200)
    world.list_posts("new", 130, 195, 0)
    world.before(2, lambda: (world.clock.advance(60), world.list_posts("more", 120, 250, 0)))
    world.reddit.script(None, None, *[EMPTY] * empty)
    world.once()
    assert (world.gaps(), len(world.stored())) == ([], 253)


def test_a_listing_that_holds_nothing_of_the_walk_any_more_is_not_known_to_be_short():
    newest = [listed(f"n{n}", -n) for n in range(50)]
    ends = pipeline.Page(newest[-1:], "t3_n49", 1)
    pages = {None: pipeline.Page(newest, "t3_n49", 50), "t3_n48": ends}
    walked = {f"w{n}": listed(f"w{n}", -1000 - n) for n in range(200)}
    assert not pipeline.is_short(walked, lambda after: pages.get(after, pipeline.Page([])))


def test_a_post_that_reddit_keeps_on_top_does_not_show_that_nothing_was_pushed_out(world):
    world.list_posts("old", 300, -100, 0)
    world.reddit.add(listed("top", 86_400))
    world.once()
    world.clock.advance(30)
    world.list_posts("new", 250, 25, 0)
    world.before(2, lambda: (world.clock.advance(60), world.list_posts("more", 900, 80, 0)))
    world.once()
    lost = 300 + 250 + 900 + 1 - len(world.stored())
    assert lost >= 0
    assert bool(world.gaps()) == (lost > 0)


def test_the_lateness_seen_makes_a_gap_begin_closer_to_the_cursor(world):
    world.list_posts("p", 20, -100, 1)
    stream = world.started()
    for n in range(1300):
        age = world.clock.time() - T
        world.reddit.add(listed(f"n{n}", age))
        if n % 20 == 0:
            next(stream)
    next(stream)
    cursor = world.cursor()
    age = world.clock.time() - T
    world.clock.advance(5000)
    world.list_posts("lost", 500, age + 1, 1)
    world.list_posts("kept", 1000, age + 2000, 1)
    next(stream)
    # Nothing came late, but five seconds are always allowed for.
    assert world.gaps() == [("python", cursor - 5, int(T + age) + 2009)]


def test_gaps_are_told_at_the_first_and_then_once_an_hour_with_names_and_number(world, told):
    world.list_posts("p", 20, -100, 1)
    stream = world.started()
    hours = []
    for n in range(8):
        world.list_posts(f"g{n}x", 1060, world.clock.time() - T, 1)
        world.clock.advance(1060)
        next(stream)
        next(stream)
        hours.append([text.split(",")[0] for text in told()])
    assert len(world.gaps()) == 8
    assert hours[0] == ["r/python: 1 gap(s)"]
    assert hours[3] == ["r/python: 1 gap(s)"]
    assert hours[7] == ["r/python: 1 gap(s)", "r/python: 3 gap(s)"]


def test_a_single_run_tells_the_gaps_of_all_its_names(world, told):
    for name in ("python", "rust"):
        world.list_posts(f"{name}old", 20, -100, 1, subreddit=name)
    world.once("python", "rust")
    for name in ("python", "rust"):
        world.list_posts(f"{name}new", 1000, 501, 1, subreddit=name)
    world.clock.advance(2000)
    world.once("python", "rust")
    assert [text.split(",")[0] for text in told()] == ["r/python: 1 gap(s)", "r/rust: 1 gap(s)"]


# Several names


def test_each_name_is_a_listing_of_its_own_with_its_cursor(world):
    world.reddit.add(listed("p", -50))
    world.once("python")
    world.reddit.add(listed("r", -70, "rust"))
    assert world.asked_by(lambda: world.once("python", "rust")) == ["python", "rust"]
    rows = "SELECT subreddit, since_utc, newest_utc FROM cursors ORDER BY 1"
    assert world.rows(rows) == [("python", T - 50, T - 50), ("rust", T - 70, T - 70)]


def test_a_gap_of_a_busy_name_is_none_of_a_quiet_one(world):
    world.list_posts("p", 2, -50, 1)
    world.list_posts("r", 2, -70, 1, subreddit="rust")
    world.once("python", "rust")
    world.clock.advance(2000)
    world.list_posts("quiet", 3, 100, 1, subreddit="rust")
    world.list_posts("busy", 1200, 200, 1)
    world.once("python", "rust")
    assert world.gaps() == [("python", T - 49 - 30, T + 400 + 9)]
    assert len(world.stored()) == 4 + 1000 + 3


def quiet_names(world: World, count: int, **more: Any) -> list[str]:
    """List 20 posts, one in 100 s, in each of so many subreddits."""
    names = [f"quiet{n}" for n in range(count)]
    for name in names:
        world.list_posts(f"{name}x", 20, -9000, 100, subreddit=name, **more)
    return names


def test_a_name_that_turns_private_keeps_none_of_many_from_being_walked(world):
    names = quiet_names(world, 40)
    world.access = pipeline.Access()  # ten requests a minute
    world.once(*names)
    world.reddit.refuse("quiet39", "private")
    world.clock.advance(300)
    for name in names:
        world.list_posts(f"{name}y", 1, 290, 1, subreddit=name)
    stream = world.follow(*names)
    for _ in range(39):
        next(stream)
    assert len([i for i in world.stored() if "y" in i]) == 39


def test_what_is_approved_later_is_found_by_single_runs_beside_a_name_that_is_private(world):
    world.list_posts("p", 300, -3000, 10)
    world.list_posts("r", 300, -3000, 10, subreddit="rust")
    world.reddit.create("closed")
    world.once("python", "rust", "closed")
    world.reddit.refuse("closed", "private")
    world.reddit.add(listed("approved", -2500))
    world.reddit.add(listed("too", -2500, "rust"))
    for _ in range(10):
        world.clock.advance(300)
        with contextlib.suppress(pipeline.Gone):
            world.once("python", "rust", "closed")
    assert {"approved", "too"} <= set(world.stored())


@pytest.mark.parametrize("backwards", [False, True])
def test_the_turns_of_full_walks_do_not_depend_on_how_many_names_are_left(world, backwards):
    names = [f"name{n}" for n in range(8)]
    for name in names:
        world.list_posts(f"{name}x", 150, -300, 2, subreddit=name)
    world.once(*names)
    world.clock.advance(300)
    asked = len(world.asked())
    world.once(*(names[::-1] if backwards else names))
    walked = sorted(request.split()[0] for request in world.asked(asked) if "after" in request)
    # By an eighth of the budget a turn takes 600 s. By all of it: 300 s, and each had its own.
    assert walked == ["name0", "name1", "name2", "name5"]


# Whose turn it is


def store_last_poll(world: World, name: str, age: float, posts: int) -> None:
    """Store what a poll of that age has left: a cursor, and so many posts of the last hour."""
    world.reddit.add(listed(f"{name}x", age, name))
    rows = [listed(f"{name}{n}", -1000 - n / 2, name) for n in range(posts)]
    world.load(rows, [pipeline.Cursor(name, T - 9000, int(T + age), int(T + age))])


@pytest.mark.parametrize(
    ("busy", "order"), [(3000, ["busy", "older", "quiet"]), (0, ["older", "quiet", "busy"])]
)
def test_after_a_restart_the_busiest_by_what_is_stored_comes_first(world, busy, order):
    store_last_poll(world, "quiet", -700, 3)
    store_last_poll(world, "older", -800, 3)
    store_last_poll(world, "busy", -100, busy)
    world.once("quiet", "busy", "older")
    assert world.asked() == order


def test_with_nothing_stored_in_the_last_hour_the_one_polled_longest_ago_comes_first(world):
    for n in (3, 1, 4, 2):
        store_last_poll(world, f"name{n}", -100_000 + n, 0)
    world.once("name4", "name3", "name2", "name1")
    assert world.asked() == ["name1", "name2", "name3", "name4"]


def test_when_the_budget_is_short_a_name_a_hundred_times_as_busy_is_walked_ten_times_as_often(
    world,
):
    world.reddit.budgets["oauth"] = Budget(20, phase=T % 600)
    world.list_posts("p", 1000, -1000, 1)
    world.list_posts("r", 200, -20_000, 100, subreddit="rust")
    world.reddit.grow(1.0, ["python"])
    world.reddit.grow(0.01, ["rust"], seed=1)
    world.run(world.follow("python", "rust"), 3600)
    walks = [request for request in world.asked() if "after" not in request]
    runs = [len(list(run)) for name, run in itertools.groupby(walks) if name == "python"]
    assert len(runs) >= 10
    assert all(5 <= run <= 11 for run in runs[1:-1])


# A new name


@pytest.mark.parametrize(
    ("listed", "budget", "pages", "since"),
    [(250, 1000, 3, -250), (1200, 1000, 10, -991), (1200, 3, 3, -291), (1200, 1, 1, -91)],
)
def test_a_new_name_is_walked_as_deep_as_listing_and_budget_allow_without_waiting(
    world, listed, budget, pages, since
):
    world.reddit.budgets["oauth"] = Budget(budget)
    world.list_posts("p", listed, -listed, 1)
    (batch,) = world.once()
    assert (len(world.asked()), len(batch.posts)) == (pages, min(listed, 100 * pages))
    assert batch.cursors == [pipeline.Cursor("python", T + since, T - 1, T)]
    assert (world.clock.time(), batch.gaps) == (T, [])


@pytest.mark.parametrize("once", [False, True])
def test_a_new_name_leaves_the_budget_for_a_first_page_of_each_other_one(world, once):
    world.reddit.budgets["oauth"] = Budget(8)
    names = ("python", "rust", "perl")
    for name in names:
        world.list_posts(name, 1200, -1200, 1, subreddit=name)
    stream = world.follow(*names, once=once)
    assert [len(next(stream).posts) for _ in names] == [600, 100, 100]
    assert world.clock.time() == T


# The primary key


def test_a_missing_author_is_filled_in_by_a_later_walk_and_then_never_lost(world):
    world.load([listed("a", -50, author_fullname=None)])
    world.reddit.add(listed("a", -50))
    world.once()
    world.load([{"id": "a", "author": "[deleted]", "created_utc": None}])
    rows = "SELECT id, created_utc, author, author_name, title FROM posts"
    assert world.rows(rows) == [("a", T - 50, "t2_x", "x", "a")]


def test_another_redpipe_that_was_faster_leaves_no_duplicate(world):
    world.list_posts("p", 300, -300, 1)
    other = another(world)
    world.before(3, other.once)
    with other.database:
        world.once()
    assert len(world.stored()) == 300


def overtaken(world: World) -> None:
    """Start a poll; before its first answer another one ends, then many posts come."""
    other = another(world)

    def overtake() -> None:
        with other.database:
            other.once()
        world.clock.advance(3000)
        world.list_posts("lost", 300, 1001, 1)
        world.list_posts("kept", 1000, 2001, 1)

    world.before(1, overtake)
    world.once()


def test_a_slow_poll_names_the_gap_behind_the_poll_that_overtook_it(world):
    grow(world, 50, 100)
    overtaken(world)
    assert world.gaps() == [("python", T + 50 - 30, T + 2001 + 9)]


def test_a_slow_first_poll_that_was_overtaken_claims_only_what_it_has_read(world):
    world.list_posts("old", 20, -100, 1)
    overtaken(world)
    assert world.rows("SELECT since_utc, newest_utc FROM cursors") == [(T + 2010, T + 3000)]
    assert world.gaps() == []


def test_a_slow_poll_repeats_no_gap_of_the_poll_that_overtook_it(world):
    lose_posts(world)
    other = another(world)
    world.before(3, other.once)
    with other.database:
        world.once()
    assert world.gaps() == [("python", T - 81 - 30, T + 501 + 9)]


def test_a_walk_that_began_anew_names_no_gap_that_its_first_pages_had_passed(world):
    world.list_posts("p", 1000, -200, 0.2)
    other = another(world)

    def overtake() -> None:
        with other.database:
            other.once()
        world.clock.advance(170)
        world.list_posts("more", 800, 1, 0.2)

    world.before(6, overtake)
    world.once()
    assert world.gaps() == []


# Odd listings and times


def test_an_empty_newest_page_is_asked_for_three_times_more(world):
    grow(world, 1)
    asked = len(world.asked())
    world.reddit.script(*[EMPTY] * 3)
    assert [ids_of(batch.posts) for batch in world.once()] == [["new0"]]
    assert world.asked(asked) == ["python"] * 4


def test_an_empty_newest_page_is_believed_the_fourth_time_and_then_at_once(world):
    world.list_posts("a", 2, -50, 1)
    world.once()
    world.remove("a", 2)
    stream = world.follow()
    asked = len(world.asked())
    batch = next(stream)
    assert world.asked(asked) == ["python"] * 4
    assert batch == pipeline.Batch([], [pipeline.Cursor("python", T - 50, T - 49, T)], [])
    next(stream)
    next(stream)
    assert world.asked(asked) == ["python"] * 6


def test_an_empty_page_that_was_believed_is_taken_for_nothing_read(world):
    world.list_posts("a", 2, -50, 1)
    stream = world.started()
    world.clock.advance(200)
    world.list_posts("b", 120, 10, 1)
    world.reddit.script(*[EMPTY] * 4)
    assert [len(next(stream).posts) for _ in range(2)] == [0, 120]
    assert (world.cursor(), world.gaps()) == (T + 129, [])


def test_without_a_cursor_an_empty_newest_page_is_believed_at_once(world):
    world.once()
    world.once()
    assert world.asked() == ["python"] * 2


@pytest.mark.parametrize("source", ["oauth", "feed"])
def test_a_listing_of_one_post_costs_a_handful_of_requests_and_is_no_gap(world, source):
    world.list_posts("old", 3, -100, 1, **FEED)
    if source == "feed":
        leave_only_the_feed(world)
    world.once()
    world.remove("old", 3)
    world.clock.advance(2000)
    world.reddit.add(listed("one", 1500, **FEED))
    if source == "oauth":  # it names an `after`, behind which an empty page comes
        world.reddit.serve_listing_bytes(listing([child("one", 1500)], "t3_one"))
    asked = len(world.asked())
    stream = world.follow()
    for _ in range(4):
        next(stream)
    requests = [r for r in world.reddit.requests()[asked:] if r.status == 200]
    assert len(requests) == 4 * 3
    assert (world.gaps(), world.stored()[-1]) == ([], "one")


def test_a_time_in_the_future_never_moves_a_cursor(world):
    grow(world, 0)
    world.reddit.add(listed("tomorrow", 86_400))
    world.reddit.add(listed("b", -40))
    world.once()
    assert world.stored()[-2:] == ["b", "tomorrow"]
    assert world.cursor() == T - 40


@pytest.mark.parametrize("posts", [0, 1])
def test_a_new_name_without_posts_or_with_future_ones_is_covered_from_now_on(world, posts):
    world.list_posts("tomorrow", posts, 86_400, 1)
    (batch,) = world.once()
    assert batch.cursors == [pipeline.Cursor("python", T, T, T)]


def test_a_cursor_never_moves_back_and_posts_without_a_time_move_nothing(world):
    world.list_posts("p", 3, -50, 1)
    world.once()
    world.reddit.remove("p2")
    world.once()
    assert world.cursor() == T - 48
    world.reddit.serve_listing_bytes(listing(['{"kind": "t3", "data": {"id": "bare"}}']))
    world.once()
    assert sorted(world.stored()) == ["bare", "p0", "p1", "p2"]
    assert world.cursor() == T - 48


# Pacing of walks


def test_a_walk_starts_only_when_the_window_carries_what_the_last_one_took(world):
    world.reddit.budgets["oauth"] = Budget(12, phase=T % 600)
    world.list_posts("p", 20, -100, 1)
    stream = world.started(interval=60)
    for n in range(3):
        age = world.clock.time() - T
        world.list_posts(f"n{n}x", 370, age - 50, 0.001)
        world.reddit.add(listed(f"last{n}", age))
        next(stream)
    times = [seen.time - T for seen in world.reddit.requests()]
    # 12 a window: one page, four, four; a window that has three left is waited out.
    assert [times.count(at) for at in dict.fromkeys(times)] == [1, 4, 4, 4]
    assert 600 <= times[-1] <= 605
    assert [seen.status for seen in world.reddit.requests() if seen.status != 200] == []


# Failures


def test_a_name_that_fails_three_times_is_told_once_and_so_is_its_end(world, told):
    stream = world.started()
    for failures in (1, 2):
        world.reddit.script(*[error_reply(503, "down")] * failures)
        next(stream)
    assert told() == []
    world.reddit.script(*[error_reply(503, "down")] * 30)
    next(stream)
    assert told() == [
        "r/python: HTTP 503 (down) instead of a listing; will keep trying",
        "r/python can be read again",
    ]


def test_an_outage_that_several_names_see_is_told_once(world, told):
    names = quiet_names(world, 5)
    stream = world.started(*names)
    world.reddit.script(*[Fault("refuse")] * 60)
    for _ in names:
        next(stream)
    assert told() == [
        "r/quiet0: invented fault: refuse; will keep trying",
        "r/quiet0 can be read again",
    ]


def test_an_outage_is_told_though_a_name_was_failing_before(world, told):
    outage = range(0)

    def faults(method: str, path: str, query: dict[str, str]) -> Any:
        nonlocal outage
        if "/broken/" not in path:
            return Fault("refuse") if int(world.clock.time()) in outage else None
        if not outage and world.clock.time() > T + 100:  # it begins right behind this request
            outage = range(int(world.clock.time()), T + 700)
        return error_reply(500, "broken")

    world.reddit.faults = faults
    world.run(world.follow("python", "broken"), 1000)
    assert len(outage) > 500
    assert [text.split()[0] for text in told()] == ["r/broken:", "r/python:", "r/python"]


def break_names(world: World, *names: str) -> None:
    """Let those names answer 500 for ever."""
    world.reddit.faults = lambda method, path, query: (
        error_reply(500, "broken") if path.split("/")[2] in names else None
    )


def test_a_name_that_always_fails_takes_nothing_from_one_that_is_well(world, tmp_path, told):
    def times_polled(world: World, *names: str) -> list[float]:
        break_names(world, "broken")
        world.reddit.grow(7.0, ["python"], start=T - 100)
        world.run(world.follow(*names), 300)
        return [seen.time for seen in world.reddit.requests("/r/python/")]

    alone = World(str(tmp_path / "alone.db"))
    with alone.database:
        expected = times_polled(alone, "python")
    assert times_polled(world, "python", "broken") == expected
    assert told() == ["r/broken: HTTP 500 (broken) instead of a listing; will keep trying"]


def test_a_name_that_fails_is_asked_again_in_the_next_window(world):
    world.reddit.budgets["oauth"] = Budget(20, phase=T % 600)
    break_names(world, "broken")
    world.list_posts("p", 1000, -100_000, 100)
    world.run(world.follow("python", "broken"), 4000)
    tries = [seen.time for seen in world.reddit.requests("/r/broken/")]
    assert max(later - earlier for earlier, later in itertools.pairwise(tries)) <= 600


def test_once_comes_back_to_a_name_that_fails_after_the_others(world, told):
    break_names(world, "broken")
    world.list_posts("p", 250, -250, 1)
    world.list_posts("r", 3, -100, 1, subreddit="rust")
    with pytest.raises(pipeline.Failed) as caught:
        world.once("broken", "python", "rust")
    assert caught.value.exit_status == 75
    assert str(caught.value) == "r/broken: HTTP 500 (broken) instead of a listing"
    assert len(world.stored()) == 253
    walks = [request for request in world.asked() if "after" not in request]
    assert walks[:4] == ["broken", "python", "rust", "broken"]
    assert world.clock.time() - T == 120  # s after the last good answer
    assert told() == []


def test_once_gives_up_on_a_name_whose_second_page_always_fails(world):
    world.list_posts("p", 250, -250, 1)
    world.list_posts("r", 3, -100, 1, subreddit="rust")
    world.reddit.faults = lambda method, path, query: (
        error_reply(500, "broken") if "after" in query and world.clock.time() < T + 3600 else None
    )
    with pytest.raises(pipeline.Failed, match=r"^r/python: .* 500"):
        world.once("python", "rust")
    assert world.clock.time() < T + 600
    assert world.stored() == ["r0", "r1", "r2"]


def test_once_comes_back_to_a_busy_name_that_fails_after_quiet_ones_too(world):
    world.serve = fetch_from(world.reddit, world.clock, 1.0)
    break_names(world, "busy")
    store_last_poll(world, "busy", -100, 3000)
    quiet = ["quiet0", "quiet1", "quiet2"]
    for name in quiet:
        store_last_poll(world, name, -50, 0)
    with pytest.raises(pipeline.Failed):
        world.once("busy", *quiet)
    assert world.asked()[:5] == ["busy", *quiet, "busy"]


def test_once_ends_well_when_a_name_that_failed_answers_in_the_end(world):
    world.reddit.script(*[error_reply(500, "broken")] * 5, on="/r/python/")
    world.list_posts("p", 3, -100, 1)
    world.list_posts("r", 3, -100, 1, subreddit="rust")
    assert [ids_of(batch.posts) for batch in world.once("python", "rust")] == [
        ["r0", "r1", "r2"],
        ["p0", "p1", "p2"],
    ]


def test_once_with_a_name_that_is_gone_and_one_that_fails_names_both(world):
    break_names(world, "broken")
    world.list_posts("p", 3, -100, 1)
    with pytest.raises(pipeline.Failed, match=r"^r/broken: .* 500.*; r/nowhere does not exist$"):
        world.once("nowhere", "broken", "python")
    assert len(world.stored()) == 3


def test_following_never_gives_up(world):
    stream = world.started()
    world.reddit.script(*[Fault("refuse")] * 500)
    next(stream)
    assert world.clock.time() - T > 1000


def test_waits_after_failures_grow_to_five_seconds_on_a_busy_listing(world):
    world.list_posts("p", 200, -20, 0.1)
    stream = world.started()
    start = len(world.asked())
    world.reddit.script(*[Fault("refuse")] * 9)
    next(stream)
    times = [seen.time for seen in world.reddit.requests()[start:]]
    waits = [round(later - earlier, 2) for earlier, later in itertools.pairwise(times)]
    # Three tries for the page, then the name is put off.
    assert waits[:9] == [0.75, 1.5, 0.75, 1.5, 3.0, 6.0, 7.5, 7.5, 7.5]


def test_once_gives_up_after_two_minutes_with_its_last_try_at_their_end(world):
    world.reddit.faults = lambda method, path, query: Fault("refuse")
    with pytest.raises(pipeline.Failed):
        world.once()
    assert world.clock.time() == T + 120
    assert world.reddit.log[-1].time == T + 120


def test_a_good_answer_gives_once_two_minutes_more(world):
    world.list_posts("p", 250, -250, 1)

    def faults(method: str, path: str, query: dict[str, str]) -> Fault | None:
        well = T + (210 if "after" in query else 100)
        return Fault("refuse") if world.clock.time() < well and "/new" in path else None

    world.reddit.faults = faults
    world.once()
    assert len(world.stored()) == 250


def test_waiting_for_the_budget_is_no_failure_up_to_eight_minutes(world):
    world.reddit.budgets["oauth"] = Budget(1, window=450, phase=T % 450)
    world.list_posts("p", 3, -100, 1)
    world.once()
    assert len(world.once()) == 1
    assert world.clock.time() - T <= 480


def test_once_does_not_wait_longer_than_eight_minutes_for_the_budget(world):
    world.reddit.budgets["oauth"] = Budget(0, window=4800, phase=T % 4800)
    with pytest.raises(pipeline.Failed, match=r"allows no request for 4801 s .* nothing but 429"):
        world.once()
    assert world.clock.time() == T
