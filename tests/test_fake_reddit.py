"""FakeReddit keeps the rules that Reddit keeps, and answers in the shapes it was recorded in."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import requests

import pipeline
from fake_reddit import (
    HANG,
    INSTALLED,
    REFUSE,
    RESET,
    TRUNCATE,
    Budget,
    FakeReddit,
    listing,
    make_post,
    reply,
    thing,
    wrong_gzip,
)
from virtual import VirtualClock, fetch_from

START = 1_790_000_000


@pytest.fixture
def clock():
    return VirtualClock(START)


@pytest.fixture
def reddit(clock):
    """Give a FakeReddit without a socket, in virtual time."""
    return FakeReddit(clock)


def get(reddit, path, headers=None, **query):
    """Ask the rules for a path, without a socket."""
    return reddit.handle("GET", path, query, headers or {}, b"")


def page(reddit, names="all", **query):
    """Give a page as (ids, after)."""
    status, _, body = get(reddit, f"/r/{names}/new/.json", raw_json="1", **query)
    assert status == 200
    data = json.loads(body)["data"]
    assert data["dist"] == len(data["children"])
    return [child["data"]["id"] for child in data["children"]], data["after"]


def fill(reddit, count, subreddit="python", first=1, start=START):
    """Add posts, one for each second; give their ids, newest first."""
    posts = [make_post(n, start + n, subreddit) for n in range(first, first + count)]
    return [reddit.add(post)["id"] for post in posts][::-1]


def ask_token(reddit, user="app-id", password="app-secret", **form):
    """Ask for a token through the adaptor that simulations use."""
    fetch = fetch_from(reddit, reddit.clock, latency=0)
    form = form or {"grant_type": "client_credentials"}
    url = "http://reddit.invalid/api/v1/access_token"
    basic = base64.b64encode(f"{user}:{password}".encode()).decode()
    headers = {"User-Agent": "test", "Authorization": f"Basic {basic}"}
    return fetch(pipeline.Request("POST", url, {}, headers, form))


def bearer(reddit):
    """Give headers with a fresh token."""
    return {"authorization": f"bearer {json.loads(ask_token(reddit).body)['access_token']}"}


# -- listings


def test_a_listing_is_newest_first_and_after_leads_on_to_the_older_ones(reddit):
    ids = fill(reddit, 4)
    assert page(reddit, limit="2") == (ids[:2], f"t3_{ids[1]}")
    assert page(reddit, limit="2", after=f"t3_{ids[1]}") == (ids[2:], None)
    assert page(reddit, limit="2", after=f"t3_{ids[3]}") == ([], None)
    assert page(reddit, "pYTHON", limit="3")[0] == ids[:3]


@pytest.mark.parametrize(
    ("limit", "length"),
    [("", 25), ("x", 25), ("0", 1), ("-3", 1), ("7", 7), ("100", 100), ("101", 100)],
)
def test_limit_is_25_unless_told_and_between_1_and_100(reddit, limit, length):
    fill(reddit, 120)
    assert len(page(reddit, limit=limit)[0]) == length


@pytest.mark.parametrize("anchor", ["", "x", "t3_", "t3_zzzzzz", "t1_1tq0001", "1tq0001"])
def test_an_anchor_that_never_was_is_ignored(reddit, anchor):
    ids = fill(reddit, 3)
    assert page(reddit, after=anchor) == (ids, None)


def test_1000_places_are_listed_and_removed_posts_leave_theirs_empty(reddit):
    ids = fill(reddit, 1100)
    for removed in ids[:1000:10]:
        reddit.remove(removed)
    listed = reddit.listing_ids()
    assert len(listed) == 900
    assert listed[-1] == ids[999]
    for anchor in (ids[10], ids[1000]):  # removed, and pushed out
        assert page(reddit, after=f"t3_{anchor}") == ([], None)


def test_three_characters_come_escaped_without_raw_json(reddit):
    name = f"t3_{reddit.add(make_post(1, START, title='a < b & c > d'))['id']}"
    for path, query in (("/r/python/new", {}), ("/api/info", {"id": name})):
        assert b'"a &lt; b &amp; c &gt; d"' in get(reddit, path, bearer(reddit), **query)[2]
        raw = get(reddit, path, bearer(reddit), **query, raw_json="1")[2]
        assert b'"a < b & c > d"' in raw


def test_a_post_appears_and_goes_in_its_time_at_its_place(reddit, clock):
    late, early, top = make_post(1, START), make_post(2, START + 1), make_post(3, START - 9)
    reddit.add(early)
    reddit.add(late, visible_utc=START + 60)
    reddit.add(top, rank=START + 9)
    never = reddit.add(make_post(4, START), visible_utc=START + 60)
    reddit.remove(never["id"])
    reddit.remove(early["id"], utc=START + 70)
    assert reddit.listing_ids() == [top["id"], early["id"]]
    clock.sleep(60)
    assert reddit.listing_ids() == [top["id"], early["id"], late["id"]]
    assert reddit.listed == {early["id"]: START, top["id"]: START, late["id"]: START + 60}
    clock.sleep(10)
    assert reddit.listing_ids() == [top["id"], late["id"]]
    reddit.add(early)
    assert reddit.listing_ids() == [top["id"], early["id"], late["id"]]


def test_posts_arrive_by_themselves_and_late_as_told(reddit, clock):
    reddit.grow(2.0, ["python", "rust"], jitter=lambda dice: 3.0, seed=1)
    assert reddit.listing_ids() == []
    clock.sleep(400)
    assert 700 < len(reddit.listing_ids()) < 900
    lateness = {
        round(listed - reddit.posts[known]["created_utc"])
        for known, listed in reddit.listed.items()
    }
    assert lateness <= {3, 4}  # created_utc has no fraction
    assert {post["subreddit"] for post in reddit.posts.values()} == {"python", "rust"}
    assert 1 <= sum(post["author"] == "[deleted]" for post in reddit.posts.values()) <= 25


# -- access


def test_both_grants_give_a_token_that_opens_listings(reddit):
    ids = fill(reddit, 1)
    installed = {"grant_type": INSTALLED, "device_id": "DO_NOT_TRACK_THIS_DEVICE"}
    for answer in (ask_token(reddit), ask_token(reddit, "installed-id", "", **installed)):
        token = json.loads(answer.body)
        assert (token["token_type"], token["expires_in"]) == ("bearer", 86_400)
        headers = {"authorization": f"bearer {token['access_token']}"}
        status, _, body = get(reddit, "/r/python/new", headers)
        assert status == 200
        assert json.loads(body)["data"]["children"][0]["data"]["id"] == ids[0]


@pytest.mark.parametrize(
    ("credentials", "form", "status", "error"),
    [
        (("app-id", "wrong"), {}, 401, 401),
        (("nobody", "app-secret"), {}, 401, 401),
        (("installed-id", ""), {}, 200, "unauthorized_client"),
        (("app-id", "app-secret"), {"grant_type": "password"}, 200, "unsupported_grant_type"),
        (("installed-id", ""), {"grant_type": INSTALLED, "device_id": "x"}, 200, "invalid_request"),
    ],
)
def test_a_bad_request_for_a_token_is_refused(reddit, credentials, form, status, error):
    answer = ask_token(reddit, *credentials, **form)
    assert (answer.status, json.loads(answer.body)["error"]) == (status, error)


def test_a_listing_wants_a_token_that_has_not_ended_or_been_revoked(reddit, clock):
    fill(reddit, 1)
    reddit.token_lifetime = 3600
    headers = bearer(reddit)

    def statuses(*of):
        return [get(reddit, "/r/python/new", one)[0] for one in of]

    clock.sleep(3599)
    assert statuses({}, {"authorization": "bearer x"}, {"authorization": "x"}) == [401] * 3
    assert statuses(headers) == [200]
    clock.sleep(1)
    assert statuses(headers) == [401]
    headers = bearer(reddit)
    reddit.revoke_tokens()
    assert statuses(headers) == [401]


def test_a_missing_subreddit_leads_to_the_search_which_lists_t5(reddit):
    status, headers, _ = get(reddit, "/r/nix/new/.json")
    assert (status, headers["location"]) == (302, "/subreddits/search.json?q=nix")
    assert get(reddit, "/r/nix/new", bearer(reddit))[1]["location"] == "/subreddits/search?q=nix"
    kinds = json.loads(get(reddit, "/subreddits/search.json", q="nix")[2])["data"]["children"]
    assert [child["kind"] for child in kinds] == ["t5"]


@pytest.mark.parametrize("why", ["private", "quarantined", "gated", "banned"])
def test_a_subreddit_can_be_refused_and_opened_again(reddit, why):
    ids = fill(reddit, 1)
    reddit.refuse("Python", why)
    error = {"reason": why, "message": "Forbidden", "error": 403}
    if why == "banned":
        error |= {"message": "Not Found", "error": 404}
    for path in ("/r/python/new/.json", "/r/python/new/.rss"):
        answer = get(reddit, path)
        assert (answer[0], json.loads(answer[2])) == (error["error"], error)
    reddit.refuse("python", "")
    assert page(reddit, "python")[0] == ids


def test_anonymous_json_can_be_blocked_by_a_page_of_190_kb(reddit):
    fill(reddit, 1)
    reddit.anonymous_json_blocked = True
    status, headers, body = get(reddit, "/r/python/new/.json")
    assert (status, headers["content-type"]) == (403, "text/html; charset=UTF-8")
    assert (len(body), body[:9]) == (190_000, b"<!doctype")
    assert get(reddit, "/r/python/new/.rss")[0] == 200
    assert get(reddit, "/r/python/new", bearer(reddit))[0] == 200


def test_a_feed_token_opens_a_feed_that_is_blocked_and_has_a_budget_of_its_own(reddit):
    fill(reddit, 1)
    reddit.feed_tokens = {"secret": "Somebody"}
    reddit.feed_blocked = True
    reddit.budgets["feed"] = Budget(total=1)
    path = "/r/python/new/.rss"
    assert get(reddit, path)[0] == 403
    assert get(reddit, path, feed="wrong", user="somebody")[0] == 403
    assert get(reddit, path, feed="secret", user="nobody")[0] == 403
    answers = [get(reddit, path, feed="secret", user="somebody")[0] for _ in range(3)]
    assert answers == [200, 200, 200]


@pytest.mark.parametrize("path", ["/", "/r/python/hot", "/r/python/new/x", "/api/v1/me"])
def test_other_paths_are_404(reddit, path):
    fill(reddit, 1)
    assert get(reddit, path)[0] == 404


# -- posts by their fullnames


def info(reddit, *names, **query):
    """Ask for posts; return the status, and the data of each by its id."""
    status, _, body = get(
        reddit, "/api/info", bearer(reddit), id=",".join(names), raw_json="1", **query
    )
    children = json.loads(body)["data"]["children"] if status == 200 else []
    return status, {child["data"]["id"]: child["data"] for child in children}


def test_posts_are_given_by_their_fullnames_and_unknown_ones_left_out(reddit):
    first, second = fill(reddit, 2)
    status, found = info(reddit, f"t3_{first}", "t3_zzz", f"t3_{second}", f"t1_{first}", first, "")
    assert (status, list(found)) == (200, [first, second])
    assert found[first] == reddit.posts[first]
    assert get(reddit, "/api/info", id=f"t3_{first}")[0] == 401


def test_more_than_100_posts_at_once_are_too_many(reddit):
    names = [f"t3_{one}" for one in fill(reddit, 101)]
    assert info(reddit, *names)[0] == 400
    assert len(info(reddit, *names[:100])[1]) == 100


def test_a_post_that_is_gone_is_not_listed_and_asked_for_shows_less(reddit):
    deleted, removed, nameless, purged = fill(reddit, 4)
    reddit.take_down(deleted)
    reddit.take_down(removed, "moderator")
    reddit.forget_author(nameless)
    reddit.purge(purged)
    assert page(reddit)[0] == [nameless]
    _, found = info(reddit, *(f"t3_{one}" for one in (deleted, removed, nameless, purged)))
    keys = ("removed_by_category", "selftext", "author")
    assert {one: [post[key] for key in keys] for one, post in found.items()} == {
        deleted: ["deleted", "[deleted]", "[deleted]"],
        removed: ["moderator", "[removed]", "invented_3"],
        nameless: [None, "Nobody wrote text 2.", "[deleted]"],
    }
    assert ["author_fullname" in post for post in found.values()] == [False, True, False]


def test_the_feed_says_what_reddits_says(reddit):
    fill(reddit, 1)
    reddit.add(make_post(2, START + 2, title='<&> "quoted"', author="[deleted]"))
    status, headers, body = get(reddit, "/r/python/new/.rss", limit="2")
    assert (status, headers["content-type"]) == (200, "application/atom+xml; charset=UTF-8")
    atom = "{http://www.w3.org/2005/Atom}"
    deleted, ordinary = ElementTree.fromstring(body).findall(f"{atom}entry")
    assert deleted.findtext(f"{atom}title") == '<&> "quoted"'
    assert deleted.find(f"{atom}author") is None
    assert ordinary.findtext(f"{atom}author/{atom}name") == "/u/invented_1"
    assert ordinary.findtext(f"{atom}author/{atom}uri") == "https://www.reddit.com/user/invented_1"
    assert ordinary.findtext(f"{atom}id") == "t3_1tq0001"
    assert ordinary.findtext(f"{atom}published") == "2026-09-21T14:13:21+00:00"
    assert ordinary.find(f"{atom}category").attrib == {"term": "python", "label": "r/python"}
    assert ordinary.find(f"{atom}link").attrib == {
        "href": "https://www.reddit.com/r/python/comments/1tq0001/invented_post_number_1/"
    }
    body = get(reddit, "/r/python/new/.rss", limit="2", after="t3_1tq0002")[2].decode()
    assert re.findall("<id>t3_(.*?)</id>", body) == ["1tq0001"]


# -- the budget


def budget_of(answer):
    """Give the three headers of an answer's budget."""
    return tuple(answer[1].get(f"x-ratelimit-{word}") for word in ("used", "remaining", "reset"))


def test_the_budget_is_told_as_reddit_tells_it(reddit, clock):
    fill(reddit, 1)
    clock.set(START + 200.5)  # 400.5 s after a multiple of 600
    reddit.budgets["json"] = Budget(total=3)
    seen = [budget_of(get(reddit, "/r/python/new/.json")) for _ in range(3)]
    assert seen == [("1", "2.0", "200"), ("2", "1.0", "200"), ("3", "0.0", "200")]
    refused = get(reddit, "/r/python/new/.json")
    assert (refused[0], budget_of(refused)) == (429, ("4", "0.0", "200"))
    clock.sleep(199.5)
    assert budget_of(get(reddit, "/r/python/new/.json")) == ("1", "2.0", "600")


def test_windows_are_of_any_length_and_begin_anywhere(reddit, clock):
    fill(reddit, 1)
    reddit.budgets["json"] = Budget(total=10, window=100, phase=30.1)
    expected = [("1", "9.0", "31"), ("2", "8.0", "1"), ("1", "9.0", "100"), ("2", "8.0", "70")]
    for seconds, told in zip((0, 30.05, 0.1, 30), expected, strict=True):
        clock.sleep(seconds)
        assert budget_of(get(reddit, "/r/python/new/.json")) == told


def test_another_client_can_use_part_of_the_budget(reddit, clock):
    fill(reddit, 1)
    reddit.budgets["json"] = Budget(total=100, others=0.1)
    clock.set(START + 200)
    assert budget_of(get(reddit, "/r/python/new/.json")) == ("41", "59.0", "200")
    clock.sleep(50)
    assert budget_of(get(reddit, "/r/python/new/.json")) == ("47", "53.0", "150")
    reddit.budgets["json"].headers = False
    assert budget_of(get(reddit, "/r/python/new/.json")) == (None, None, None)


@pytest.mark.parametrize(
    ("advice", "retry_after", "budget", "length"),
    [
        ("plain", None, ("1", "0.0", "200"), 46),
        ("seconds", "200", ("1", "0.0", "200"), 46),
        ("date", "Mon, 21 Sep 2026 14:20:00 GMT", ("1", "0.0", "200"), 46),
        ("empty", None, (None, None, None), 0),
        ("zero", None, ("1", "0", "0"), 0),
    ],
)
def test_past_the_budget_the_advice_is_what_was_set(
    reddit, clock, advice, retry_after, budget, length
):
    fill(reddit, 1)
    clock.set(START + 200)
    reddit.budgets["json"] = Budget(total=0, advice=advice)
    answer = get(reddit, "/r/python/new/.json")
    assert (answer[0], answer[1].get("retry-after")) == (429, retry_after)
    assert (budget_of(answer), len(answer[2])) == (budget, length)


# -- the server


def test_the_server_keeps_a_connection_and_logs(fake_reddit):
    fake_reddit.add(make_post(1, START))
    with requests.Session() as session:
        for limit in ("1", "2"):
            address = f"{fake_reddit.url}/r/python/new/.json?limit={limit}&raw_json=1"
            answer = session.get(address, headers={"User-Agent": "a test"}, timeout=5)
            assert answer.status_code == 200
            assert answer.headers["content-encoding"] == "gzip"
            assert answer.json()["data"]["dist"] == 1
            assert fake_reddit.connections() == 1
    first, second = fake_reddit.requests("/new")
    assert (first.method, first.path, first.status) == ("GET", "/r/python/new/.json", 200)
    assert first.query == {"limit": "1", "raw_json": "1"}
    assert first.headers["user-agent"] == "a test"
    assert abs(second.time - time.time()) < 60


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        (REFUSE, requests.ConnectionError, "closed connection without response"),
        (RESET, requests.ConnectionError, "reset by peer"),
        (TRUNCATE, requests.exceptions.ChunkedEncodingError, "IncompleteRead"),
        (HANG, requests.ReadTimeout, "timed out"),
        (wrong_gzip(), requests.exceptions.ContentDecodingError, "failed to decode"),
    ],
)
def test_a_scripted_fault_happens_once(fake_reddit, fault, error, words):
    fake_reddit.add(make_post(1, START))
    fake_reddit.script(fault)
    address = f"{fake_reddit.url}/r/python/new/.json"
    with pytest.raises(error, match=words):
        requests.get(address, timeout=0.5)
    assert requests.get(address, timeout=5).status_code == 200
    assert [seen.status for seen in fake_reddit.log] == [200 if fault == wrong_gzip() else 0, 200]


def test_a_stopped_server_refuses_and_a_started_one_is_where_it_was(fake_reddit):
    fake_reddit.add(make_post(1, START))
    address = f"{fake_reddit.url}/r/python/new/.json"
    with requests.Session() as session:
        assert session.get(address, timeout=5).status_code == 200
        fake_reddit.stop()
        with pytest.raises(requests.ConnectionError, match="refused"):
            session.get(address, timeout=5)
        fake_reddit.start()
        assert session.get(address, timeout=5).status_code == 200


def test_a_script_waits_for_the_path_it_is_meant_for(reddit):
    fill(reddit, 1)
    reddit.script(None, reply(500, "broken"))
    reddit.script(reply(503), on="/access_token")
    assert [get(reddit, "/r/python/new/.json")[0] for _ in range(3)] == [200, 500, 200]
    assert [ask_token(reddit).status for _ in range(2)] == [503, 200]


def test_faults_may_be_decided_by_a_function_and_cost_time(reddit, clock):
    fill(reddit, 1)
    reddit.faults = lambda method, path, query: HANG if clock.time() < START + 30 else None
    fetch = fetch_from(reddit, clock, latency=1.0)
    request = pipeline.Request("GET", "http://reddit.invalid/r/python/new/.json", {}, {})
    with pytest.raises(pipeline.Failed, match="hang"):
        fetch(request)
    assert clock.time() == START + 11  # a second, and the 10 s a client waits
    clock.sleep(60)
    assert (fetch(request).status, clock.monotonic(), clock.slept) == (200, 72.0, 60)


def test_recorded_listings_are_served_one_a_poll_as_they_are(reddit):
    bodies = [listing([thing(make_post(n))], after="t3_1tq0009") for n in (1, 2)]
    reddit.serve_listing_bytes(*bodies)
    assert get(reddit, "/r/all/new/.json")[2] == bodies[0]
    assert page(reddit, after="t3_1tq0009") == ([], None)
    assert [get(reddit, "/r/all/new/.json")[2] for _ in range(2)] == [bodies[1], bodies[1]]


def test_it_can_be_started_by_hand():
    command = [sys.executable, Path(__file__).with_name("fake_reddit.py"), "--rate", "5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as process:
        try:
            url = process.stdout.readline().strip()
            answer = requests.get(f"{url}/r/rust/new/.json?limit=100", timeout=5)
            assert answer.json()["data"]["dist"] == 100
        finally:
            process.terminate()


# -- beside what was recorded


@pytest.fixture(scope="module")
def recorded_errors(samples):
    """Give the recorded answers to requests, those that were doctored left out."""
    answers = [json.loads(path.read_bytes()) for path in sorted(samples.glob("errors/*.json"))]
    return [answer for answer in answers if not answer["hand_edited_by_upstream"]]


@pytest.fixture(scope="module")
def recorded_listings(samples):
    return [json.loads(path.read_bytes()) for path in sorted(samples.glob("listings/*.json"))]


def kind_of(value):
    """Name the JSON type of a value; an integer is a number like any other."""
    return "number" if type(value) in (int, float) else type(value).__name__


def test_a_listing_has_the_keys_of_recorded_ones(reddit, recorded_listings):
    fill(reddit, 1)
    ours = json.loads(get(reddit, "/r/python/new/.json")[2])
    assert any(
        list(ours) == list(theirs) and set(ours["data"]) == set(theirs["data"])
        for theirs in recorded_listings
    )


def test_a_post_has_fields_and_types_that_recorded_ones_have(recorded_listings):
    kinds = {}
    for theirs in recorded_listings:
        for child in theirs["data"]["children"]:
            for key, value in child["data"].items() if child["kind"] == "t3" else ():
                kinds.setdefault(key, set()).add(kind_of(value))
    ours = {key: kind_of(value) for key, value in make_post(1).items()}
    assert {key for key, kind in ours.items() if kind not in kinds.get(key, ())} == set()


def ours_for(reddit, status):
    """Make FakeReddit answer with a status; give the answer."""
    fill(reddit, 1)
    if status == 401:
        return get(reddit, "/r/python/new")
    if status == 429:
        reddit.budgets["json"] = Budget(total=0, headers=False)
    if status in (403, 404):
        reddit.reasons = False
        reddit.refuse("python", {403: "private", 404: "banned"}[status])
    return get(reddit, "/r/python/new/.json")


@pytest.mark.parametrize("status", [401, 403, 404, 429])
def test_an_error_is_byte_for_byte_a_recorded_one(reddit, recorded_errors, status):
    _, headers, body = ours_for(reddit, status)
    theirs = [answer for answer in recorded_errors if answer["status"] == status]
    same = [answer for answer in theirs if answer["body"].encode() == body]
    assert same
    names = set(headers) - {"date"}
    assert any(
        all(recorded_header(answer, name) == headers[name] for name in names) for answer in same
    )


def recorded_header(answer, name):
    return {key.lower(): value for key, value in answer["headers"].items()}.get(name)


def test_a_redirect_has_the_form_of_the_recorded_one(reddit, recorded_errors):
    fill(reddit, 1)
    _, headers, _ = get(reddit, "/r/nix/new/.json")
    assert any(
        answer["status"] == 302
        and recorded_header(answer, "content-type") == headers["content-type"]
        and re.fullmatch(r"https://\w+\.reddit\.com/subreddits/search(\.json)?\?q=\w+", place)
        for answer in recorded_errors
        if (place := recorded_header(answer, "location"))
    )
    assert re.fullmatch(r"/subreddits/search\.json\?q=nix", headers["location"])


def test_tokens_and_budgets_are_written_as_recorded(reddit, recorded_errors):
    token = json.loads(ask_token(reddit).body)
    assert any(
        answer["status"] == 200 and list(json.loads(answer["body"])) == list(token)
        for answer in recorded_errors
        if "access_token" in answer["body"]
    )
    written = {
        name: {recorded_header(answer, f"x-ratelimit-{name}") for answer in recorded_errors}
        - {None}
        for name in ("used", "remaining", "reset")
    }
    budget = Budget()
    budget.spend(START)
    for name, values in written.items():
        form = re.sub("[0-9]+", "0", budget.as_headers(START)[f"x-ratelimit-{name}"])
        assert form in {re.sub("[0-9]+", "0", value) for value in values}
