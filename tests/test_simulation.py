"""The small version of tests/simulation.py, and tests of its model.

Every scenario runs once, shortened, with a fresh seed; the message of a failure repeats it.
Bars whose figure swings in so small a sample are left to the whole version. What costs seconds
and is near another scenario waits for `./tests/run --long`.
"""

from __future__ import annotations

import json
import math
import os
import random
from typing import Any

import pytest

import pipeline
from simulation import (
    FEED,
    SCENARIOS,
    Model,
    Named,
    Outage,
    Post,
    Result,
    Run,
    Scenario,
    figures,
    is_inside,
    log_normal,
    missed_bars,
    no_jitter,
    search,
    simulate,
)
from virtual import Ended

MINUTES = {
    3: "no-jitter mean-3 budget-1000 budget-10000 many",
    4: "log-normal refused hanging other-600 broken broken-hanging restart windows",
    5: "cron-17",
    6: "slow stall",
    15: "five anchors bursts",
    20: "all down scarce one cut beside-ten anonymous feed",
    30: "outage bare-429s three thirty forty cron",
    40: "late on-top",
    60: "kills thinned young feed-kills feed-young forty-slow forty-mixed private headless beside"
    " approved other",
    120: "approved-beside",
    180: "quiet",
}
KILLS = {1: "restart", 2: "three", 3: "kills thinned young cut feed-kills feed-young"}
LIVES = {(15, 40): "down", (10, 20): "slow"}
LONG = "thirty approved-beside restart beside-ten forty forty-mixed other-600 budget-10000 mean-3"
TOO_FEW = {
    # One outage of 45 s in 4 min weighs five times as much; one of 10 min is a third of the time.
    "captured": "refused hanging scarce thirty log-normal other other-600 restart windows",
    "median": "quiet",  # some 36 posts
    "429/h": "forty-slow forty-mixed headless",  # the first three teach it the pace
}


def short(name: str) -> Scenario:
    """Give a scenario that lasts for minutes only."""
    tables: dict[str, dict[Any, str]] = {"minutes": MINUTES, "kills": KILLS, "life": LIVES}
    shorter = {
        field: value
        for field, table in tables.items()
        for value, names in table.items()
        if name in names.split()
    }
    assert "minutes" in shorter
    return SCENARIOS[name]._replace(**shorter)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.long] * (name in LONG.split())) for name in SCENARIOS],
)
def test_every_scenario_meets_its_bars_in_a_short_run(name: str) -> None:
    scenario = short(name)
    seed = f"{os.environ.get('REDPIPE_SEED') or random.SystemRandom().randrange(10**9)} {name}"
    values = figures([simulate(scenario, seed)])
    missed = missed_bars(scenario, values)
    missed = [line for line in missed if name not in TOO_FEW.get(line.split()[0], "").split()]
    assert not missed, f"seed {seed!r}: {values}"


def test_drawn_worlds_have_no_holes_and_no_false_gaps() -> None:
    seed = int(os.environ.get("REDPIPE_SEED") or random.SystemRandom().randrange(10**9))
    assert search(1, seed, longest=30) == 0


# The model, where it is more than a FakeReddit


STILL = Scenario(
    "posts that are listed at once and stay",
    {"a": 1.0},
    10,
    {},
    no_jitter,
    token=False,
    late=0.0,
    vanish=0.0,
)


def model_of(**more: Any) -> Model:
    """Make a world without tokens, that is still but for what is said."""
    return Model(STILL._replace(**more), random.Random(1))


def ask(model: Model, **params: str) -> pipeline.Answer:
    """Ask for a page as a client without a token does."""
    url = "https://www.reddit.com/r/a/new/.json"
    return model.fetch(pipeline.Request("GET", url, {"limit": "100", **params}, {}))


def ids(answer: pipeline.Answer) -> list[str]:
    """Give the ids of a page as listed."""
    return [child["data"]["id"] for child in json.loads(answer.body)["data"]["children"]]


def test_an_anchor_can_vanish_between_two_pages() -> None:
    for chance, length in ((0.0, 100), (1.0, 0)):
        model = model_of(lost_anchors=chance)
        assert len(ids(ask(model, after=f"t3_{ids(ask(model))[-1]}"))) == length


@pytest.mark.parametrize(("thinned", "left"), [(False, 1000), (True, 900)])
def test_where_a_post_was_removed_an_older_one_comes_back_or_its_place_stays_empty(
    thinned: bool, left: int
) -> None:
    model = model_of(thinned=thinned)
    removed = model.listing_ids("a")[400:500]
    for post_id in removed:
        model.remove(post_id)
    listed = model.listing_ids("a")
    assert len(listed) == left
    assert not set(listed) & set(removed)
    assert listed == sorted(listed, reverse=True)


@pytest.mark.parametrize("on_top", [False, True])
def test_a_late_post_appears_at_the_place_of_its_creation_or_on_top(on_top: bool) -> None:
    model = model_of(late=0.5, history=50, on_top=on_top)
    posts = model.plan.values()
    late = next(post for post in posts if post.is_late and post.created > model.start)
    model.clock.set(late.listed - 1)
    assert late.id not in model.listing_ids("a")
    model.clock.set(late.listed)
    listed = model.listing_ids("a")
    assert (late.id in listed, late.id in listed[:10]) == (True, on_top)
    assert (listed == sorted(listed, reverse=True)) is not on_top


def test_the_feed_holds_what_the_listing_does_where_anonymous_json_is_blocked() -> None:
    model = model_of(**FEED)
    request = pipeline.Request("GET", "https://www.reddit.com/r/a/new/.rss", {"limit": "100"}, {})
    feed = pipeline.read_feed(model.fetch(request).body, 0.0)
    assert feed
    assert [post["id"] for post in feed.posts] == model.listing_ids("a")[:100]
    assert ask(model).status == 403


def test_another_client_takes_its_share_by_the_end_of_the_window() -> None:
    model = model_of(budget=100, other=0.5)
    reset = int(ask(model).headers["x-ratelimit-reset"])
    model.clock.advance(reset - 2)
    assert 48 <= int(ask(model).headers["x-ratelimit-used"]) - 2 <= 50


def test_past_the_budget_a_request_is_refused_and_counted() -> None:
    model = model_of(budget=2)
    assert [ask(model).status for _ in range(3)] == [200, 200, 429]
    assert (model.asked, model.refusals) == (3, 1)


@pytest.mark.parametrize(("hanging", "seconds"), [(False, 0.01), (True, 10.0)])
def test_an_outage_costs_what_it_says(hanging: bool, seconds: float) -> None:
    model = model_of(outages=(Outage(45, hanging),))
    begin, end, _ = model.outages[0]
    assert end - begin == 45
    model.clock.set(begin)
    with pytest.raises(pipeline.Failed):
        ask(model)
    assert math.isclose(model.clock.now - begin, seconds, abs_tol=1e-5)
    model.clock.set(end)
    assert ask(model).status == 200


def test_the_log_normal_jitter_has_the_quantiles_it_promises() -> None:
    rng = random.Random(1)
    drawn = sorted(log_normal(rng) for _ in range(100_000))
    assert 0.95 < drawn[50_000] < 1.05
    assert 15 < drawn[99_000] < 17


def test_a_tenth_of_the_posts_vanishes_and_some_come_late() -> None:
    posts = Model(Scenario("by default", {"a": 10.0}, 60, {}), random.Random(1)).plan.values()
    assert 0.09 < sum(post.vanishes < math.inf for post in posts) / len(posts) < 0.11
    assert 0.015 < sum(post.is_late for post in posts) / len(posts) < 0.020


def test_the_clock_ends_the_run() -> None:
    model = model_of()
    model.clock.end = model.start + 10
    with pytest.raises(Ended):
        model.clock.sleep(11)
    assert model.clock.now == model.start + 10


# The figures


def post_at(created: float, listed: float) -> Post:
    """Make a post of the subreddit `a`."""
    return Post(created, "x", created, listed, math.inf, "a")


def test_a_gap_covers_its_bounds_and_its_name_and_one_of_all_every_name() -> None:
    found = [is_inside(post_at(at, at), "a", 100, 200) for at in (99.9, 100.0, 200.9, 201.0)]
    assert found == [False, True, True, False]
    found = [is_inside(post_at(150, 150), name, 100, 200) for name in ("a", "all", "b")]
    assert found == [True, True, False]


def test_a_gap_is_false_if_a_walk_got_back_behind_it_or_the_listing_hides_nothing(
    tmp_path: Any,
) -> None:
    run = Run(STILL, "1", tmp_path)
    after = {}
    for _ in range(10):
        after = {"after": f"t3_{ids(ask(run.model, **after))[-1]}"}
    oldest = int(run.model.plan[after["after"][3:]].created)
    gap = Named("a", oldest + 60, oldest + 80, 0)
    assert run.got_back(gap)
    assert not run.got_back(gap._replace(after_utc=oldest - 10))
    run = Run(STILL._replace(history=50, minutes=1), "1", tmp_path)
    ask(run.model)
    assert run.got_back(Named("a", 0, 20, 0))


def test_a_lost_post_outside_every_gap_shows_in_the_table() -> None:
    values = figures([Result(counted=100, captured=98, lost_inside=1, minutes=1.0)])
    assert (values["captured"], values["lost"], values["inside"]) == (98.0, 2.0, 50.0)


def test_a_missed_bar_is_named() -> None:
    values = figures([Result(minutes=60.0, refusals=2, false=1)])
    missed = missed_bars(STILL, values)
    assert missed == ["false 1.0000, not <= 0", "429/h 2.0000, not <= 1"]


def test_the_same_seed_gives_the_same_run() -> None:
    scenario = SCENARIOS["kills"]._replace(minutes=20, kills=1)
    first, again = (simulate(scenario, "7") for _ in range(2))
    assert (first, first.delays) == (again, again.delays)
