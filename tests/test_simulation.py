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
    SCENARIOS,
    Ended,
    Model,
    Named,
    Outage,
    Post,
    Result,
    Run,
    Scenario,
    base36,
    figures,
    is_inside,
    log_normal,
    missed_bars,
    search,
    simulate,
)

SHORT: dict[str, dict[str, Any]] = {
    "all": {},
    "log-normal": {"minutes": 4},
    "refused": {"minutes": 4},
    "hanging": {"minutes": 4},
    "down": {"minutes": 20, "life": (15, 40)},
    "scarce": {"minutes": 20},
    "quiet": {"minutes": 180},
    "no-jitter": {"minutes": 3},
    "mean-3": {"minutes": 3},
    "budget-1000": {"minutes": 3},
    "budget-10000": {"minutes": 3},
    "five": {"minutes": 15},
    "one": {"minutes": 20},
    "late": {"minutes": 40},
    "on-top": {"minutes": 40},
    "kills": {"minutes": 60, "kills": 3},
    "thinned": {"minutes": 60, "kills": 3},
    "young": {"minutes": 60, "kills": 3},
    "anchors": {"minutes": 15},
    "outage": {"minutes": 30},
    "bare-429s": {"minutes": 30},
    "cut": {"minutes": 20, "kills": 3},
    "other": {"minutes": 15},
    "other-600": {"minutes": 4},
    "three": {"minutes": 30, "kills": 2},
    "beside": {"minutes": 120},
    "beside-ten": {"minutes": 20},
    "thirty": {"minutes": 30},
    "approved": {"minutes": 120},
    "approved-beside": {"minutes": 120},
    "slow": {"minutes": 6, "life": (10, 20)},
    "bursts": {"minutes": 15},
    "stall": {"minutes": 6},
    "anonymous": {"minutes": 20},
    "feed": {"minutes": 20},
    "feed-kills": {"minutes": 60, "kills": 3},
    "feed-young": {"minutes": 60, "kills": 3},
    "many": {"minutes": 3},
    "forty": {"minutes": 30},
    "forty-slow": {"minutes": 60},
    "forty-mixed": {"minutes": 60},
    "private": {"minutes": 60},
    "broken": {"minutes": 4},
    "broken-hanging": {"minutes": 4},
    "restart": {"minutes": 4, "kills": 1},
    "windows": {"minutes": 4},
    "headless": {"minutes": 60},
    "cron": {"minutes": 30},
    "cron-17": {"minutes": 5},
}

LONG = {
    "thirty",
    "approved-beside",
    "restart",
    "beside-ten",
    "forty-mixed",
    "other-600",
    "budget-10000",
    "mean-3",
}

TOO_FEW = {
    "refused": "captured",  # one outage of 45 s in 4 min weighs five times as much
    "hanging": "captured",
    "scarce": "captured",
    "thirty": "captured",  # the outage is a fourth of the time
    "quiet": "median",  # some 36 posts
    "log-normal": "captured",
    "other": "captured",
    "other-600": "captured",
    "restart": "captured",
    "windows": "captured",
    "forty-slow": "429/h",
    "forty-mixed": "429/h",
    "headless": "429/h",  # the first three teach it the pace, within the hour
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in SCENARIOS],
)
def test_every_scenario_meets_its_bars_in_a_short_run(name: str) -> None:
    scenario = SCENARIOS[name]._replace(**SHORT[name])
    seed = f"{os.environ.get('REDPIPE_SEED') or random.SystemRandom().randrange(10**9)} {name}"
    values = figures([simulate(scenario, seed)])
    missed = missed_bars(scenario, values)
    missed = [line for line in missed if not line.startswith(TOO_FEW.get(name, "none"))]
    assert not missed, f"seed {seed!r}: {values}"


def test_a_busy_name_hides_no_quiet_one(tmp_path: Any) -> None:
    seed = f"{random.SystemRandom().randrange(10**9)} three"
    scenario = SCENARIOS["three"]._replace(minutes=60, kills=2, life=(20, 40))
    scenario = scenario._replace(down=(400.0, 600.0))
    run = Run(scenario, seed, tmp_path)
    run.live()
    assert {gap.subreddit for gap, _ in run.gaps} == {"busy"}, f"seed {seed!r}"
    lost = [
        post
        for post in run.model.posts
        if run.model.start + 60 < post.created < post.listed < run.end
        and post.id not in run.committed
        and post.id not in run.model.removed
        and not post.is_late
    ]
    assert {post.subreddit for post in lost} == {"busy"}, f"seed {seed!r}"


def test_drawn_worlds_have_no_holes_and_no_false_gaps() -> None:
    seed = int(os.environ.get("REDPIPE_SEED") or random.SystemRandom().randrange(10**9))
    assert search(1, seed) == 0


# The model


STILL = Scenario(
    "posts that are listed at once and stay",
    {"a": 1.0},
    10,
    jitter=lambda _: 0.0,
    follow=("a",),
    late=0.0,
    vanish=0.0,
)


def model_of(scenario: Scenario, seed: int = 1) -> Model:
    """Make a world whose network has no outage but those of the scenario."""
    return Model(scenario, random.Random(seed))


def ask(model: Model, names: str = "a", **params: str) -> pipeline.Answer:
    """Ask for a page with a token that was just handed out."""
    token = pipeline.Request(
        "POST", "https://www.reddit.com/api/v1/access_token", {}, {"Authorization": "Basic"}, {}
    )
    headers = {"Authorization": f"bearer {json.loads(model.fetch(token).body)['access_token']}"}
    url = f"https://oauth.reddit.com/r/{names}/new"
    return model.fetch(pipeline.Request("GET", url, {"limit": "100", **params}, headers))


def ids(answer: pipeline.Answer) -> list[str]:
    """Give the ids of a page as listed."""
    return [child["data"]["id"] for child in json.loads(answer.body)["data"]["children"]]


def walk(model: Model, names: str = "a") -> list[str]:
    """Page to the end of a listing, newest first, while no time passes."""
    model.advance()
    walked: list[str] = []
    after = "t3_newest"
    while after:
        posts, after = model.page(frozenset(names.split("+")), after, 100)
        walked += [post.id for post in posts]
    return walked


def test_base36_counts_as_reddit_does() -> None:
    assert [base36(number) for number in (0, 35, 36, 36**6)] == ["0", "z", "10", "1000000"]


def test_a_listing_shows_the_thousand_newest_posts_newest_first() -> None:
    model = model_of(STILL)
    walked = walk(model)
    shown = [post.id for post in model.posts if post.listed <= model.clock.now]
    assert len(walked) == 1000
    assert walked[0] in shown[-10:]
    assert walked == sorted(walked, reverse=True)


def test_a_page_is_a_hundred_posts_at_the_most() -> None:
    assert len(ids(ask(model_of(STILL), limit="500"))) == 100


def test_an_anchor_that_vanished_gives_an_empty_page() -> None:
    model = model_of(STILL)
    first = ids(ask(model))
    model.remove(model.by_name[f"t3_{first[-1]}"], model.clock.now)
    assert ids(ask(model, after=f"t3_{first[-1]}")) == []
    assert len(ids(ask(model, after=f"t3_{first[-2]}"))) == 100


def test_an_anchor_can_vanish_between_two_pages() -> None:
    model = model_of(STILL._replace(lost_anchors=1.0))
    last = ids(ask(model))[-1]
    assert ids(ask(model, after=f"t3_{last}")) == []


def test_an_anchor_that_was_never_posted_gives_the_newest_page() -> None:
    assert len(ids(ask(model_of(STILL), after="t3_zzz"))) == 100


def test_the_feed_holds_what_the_listing_does_where_anonymous_json_is_blocked() -> None:
    model = model_of(STILL._replace(token=False, headers=False, feed=True))

    def get(end: str) -> pipeline.Answer:
        url = f"https://www.reddit.com/r/a/new/{end}"
        return model.fetch(pipeline.Request("GET", url, {"limit": "100"}, {}))

    feed = pipeline.read_feed(get(".rss").body, 0.0)
    assert get(".json").status == 403
    assert feed
    assert [post["id"] for post in feed.posts] == walk(model)[:100]


def test_a_removed_post_is_listed_no_more_and_an_older_one_comes_back() -> None:
    model = model_of(STILL)
    before = walk(model)
    model.remove(model.by_name[f"t3_{before[500]}"], model.clock.now)
    after = walk(model)
    assert before[500] not in after
    assert len(after) == 1000


def test_a_thinned_listing_is_shorter_by_what_was_removed() -> None:
    model = model_of(STILL._replace(thinned=True))
    for post_id in walk(model)[400:500]:
        model.remove(model.by_name[f"t3_{post_id}"], model.clock.now)
    assert len(walk(model)) == 900


def test_a_late_post_appears_at_the_place_of_its_creation() -> None:
    model = model_of(STILL._replace(late=0.5, history=50))
    late = next(post for post in model.posts if post.is_late and post.created > model.start)
    model.clock.now = late.listed - 1
    early = walk(model)
    model.clock.now = late.listed
    walked = walk(model)
    assert late.id not in early
    assert late.id in walked
    assert walked == sorted(walked, reverse=True)


def test_a_late_post_on_top_stands_above_newer_ones() -> None:
    model = model_of(STILL._replace(late=0.5, history=50, on_top=True))
    late = next(post for post in model.posts if post.is_late and post.created > model.start)
    model.clock.now = late.listed
    assert late.id in walk(model)[:10]


def test_the_headers_are_those_of_reddit_and_the_budget_ends_in_429() -> None:
    model = model_of(STILL._replace(budget=2))
    answers = [ask(model) for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-used"] for answer in answers] == ["1", "2", "3"]
    remaining = [answer.headers["x-ratelimit-remaining"] for answer in answers]
    assert remaining == ["1.0", "0.0", "0.0"]
    assert model.refusals == 1


def test_a_new_window_gives_the_budget_back() -> None:
    model = model_of(STILL._replace(budget=1))
    reset = int(ask(model).headers["x-ratelimit-reset"])
    assert 0 <= reset <= 600
    assert ask(model).status == 429
    model.clock.now += reset + 1
    assert ask(model).status == 200


def test_another_client_takes_its_share_by_the_end_of_the_window() -> None:
    model = model_of(STILL._replace(budget=100, other=0.5))
    reset = int(ask(model).headers["x-ratelimit-reset"])
    model.clock.now += reset - 2
    assert 48 <= int(ask(model).headers["x-ratelimit-used"]) - 2 <= 50


def test_without_headers_the_budget_still_counts() -> None:
    model = model_of(STILL._replace(budget=1, headers=False))
    assert [dict(ask(model).headers).keys() & {"x-ratelimit-used"} for _ in range(2)] == [set()] * 2
    assert ask(model).status == 429


@pytest.mark.parametrize(("hanging", "seconds"), [(False, 0.01), (True, 10.0)])
def test_an_outage_costs_what_it_says(hanging: bool, seconds: float) -> None:
    model = model_of(STILL._replace(outages=(Outage(45, hanging),)))
    begin, end, _ = model.outages[0]
    assert end - begin == 45
    model.clock.now = begin
    with pytest.raises(pipeline.Failed):
        ask(model)
    assert math.isclose(model.clock.now - begin, seconds, abs_tol=1e-5)
    model.clock.now = end
    assert ask(model).status == 200


def test_an_unknown_token_is_refused() -> None:
    model = model_of(STILL)
    headers = {"authorization": "bearer old"}
    request = pipeline.Request("GET", "https://oauth.reddit.com/r/a/new", {}, headers)
    assert model.fetch(request).status == 401


def test_the_log_normal_jitter_has_the_quantiles_it_promises() -> None:
    rng = random.Random(1)
    drawn = sorted(log_normal(rng) for _ in range(100_000))
    assert 0.95 < drawn[50_000] < 1.05
    assert 15 < drawn[99_000] < 17


def test_the_clock_ends_the_run() -> None:
    model = model_of(STILL)
    model.clock.end = model.start + 10
    with pytest.raises(Ended):
        model.clock.sleep(11)
    assert model.clock.now == model.start + 10


def test_a_tenth_of_the_posts_vanishes_and_some_come_late() -> None:
    model = model_of(Scenario("by default", {"a": 10.0}, 60))
    posts = len(model.posts)
    assert 0.09 < sum(post.vanishes < math.inf for post in model.posts) / posts < 0.11
    assert 0.015 < sum(post.is_late for post in model.posts) / posts < 0.020


# The figures


def post_at(created: float, listed: float) -> Post:
    """Make a post of the subreddit `a`."""
    return Post(created, "x", created, listed, math.inf, "a")


def test_both_bounds_of_a_gap_are_inside_it() -> None:
    found = [is_inside(post_at(at, at), "a", 100, 200) for at in (99.9, 100.0, 200.9, 201.0)]
    assert found == [False, True, True, False]


def test_a_gap_of_all_covers_every_name_and_another_name_none() -> None:
    post = post_at(150, 150)
    assert is_inside(post, "all", 100, 200)
    assert not is_inside(post, "b", 100, 200)


def test_a_gap_is_false_if_a_walk_got_back_behind_it(tmp_path: Any) -> None:
    run = Run(STILL, "1", tmp_path)
    walk(run.model)
    oldest = int(run.model.listing(frozenset("a"))[0].created)
    gap = Named("a", oldest + 60, oldest + 80, 0)
    assert run.got_back(gap)
    assert not run.got_back(gap._replace(after_utc=oldest - 10))


def test_a_gap_is_false_if_the_listing_hides_nothing(tmp_path: Any) -> None:
    run = Run(STILL._replace(history=50, minutes=1), "1", tmp_path)
    walk(run.model)
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
    assert simulate(scenario, "7") == simulate(scenario, "7")
