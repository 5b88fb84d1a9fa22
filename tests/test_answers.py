"""What each answer of Reddit leads to: waiting, a new token, the feed, an end, or posts.

CASES is the table: each of its rows is asked for through a real server, while the waiting is
done by a virtual clock. With REDPIPE_SAMPLES the recorded answers go through it as well.
"""

from __future__ import annotations

import gzip
import json
import logging
import re
import secrets
import socket
import threading
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from email.utils import formatdate
from typing import NamedTuple

import pytest

import pipeline
from fake_reddit import (
    ATOM,
    GIANT,
    HANG,
    HTML,
    REFUSE,
    RESET,
    TRUNCATE,
    FakeReddit,
    atom_feed,
    block_page,
    encoded,
    error_reply,
    gzip_bomb,
    gzipped,
    json_reply,
    login_page,
    make_post,
    moved,
    reply,
    thing,
)
from pipeline import (
    COLUMNS,
    RULES,
    Access,
    Answer,
    AskAgain,
    Database,
    Failed,
    Gone,
    Reddit,
    RedpipeError,
    Refused,
    Request,
    decoded,
    http_fetch,
    kind_of,
    load,
    read_value,
    transform,
)
from virtual import VirtualClock, fetch_from, stream

NOW = 1_790_000_000
POSTS = [make_post(n, NOW - 100 + n) for n in range(3)]
IDS = [post["id"] for post in POSTS]
DOCTYPE = '<?xml version="1.0"?><!DOCTYPE feed [<!ENTITY a "aaaaaaaaaa">]>'


class Nothing:
    """Remember no post and no cursor, as an empty database does."""

    def cursor(self, name):
        return None

    def rates(self):
        return {}

    def unstored(self, posts):
        return list(posts)


AGAIN = "the same source again, and for a token the listing"


class Outcome(NamedTuple):
    """Hold what an answer leads to.

    asked: who was asked after it, until posts came; waited: seconds for the budget;
    end: the exit status, when it was final; said: what the errors say that are failures.
    """

    asked: tuple[str, ...] | str = ()
    waited: float = 0.0
    end: int = 0
    said: tuple[str, ...] = ()
    posts: tuple[str, ...] = tuple(IDS[::-1])

    def of(self, source):
        """Say who is asked again, and what for."""
        again = ("token", "oauth") if source == "token" else (source,)
        wanted = "a token" if source == "token" else "a listing"
        said = tuple(sentence.replace("WANTED", wanted) for sentence in self.said)
        return self._replace(asked=again if self.asked == AGAIN else self.asked, said=said)


def waits(seconds):
    return Outcome(AGAIN, seconds)


def fails(sentence, seconds=0.0):
    return Outcome(AGAIN, seconds, said=(sentence,))


def came(what, seconds=0.0):
    return fails(f"HTTP {what} instead of WANTED", seconds)


def gone(sentence):
    return Outcome(end=69, said=(sentence,), posts=())


def closed(why):
    return gone(f"cannot be read: {why}")


def refused(sentence):
    return Outcome(end=77, said=(f"{sentence}; see README, Credentials",), posts=())


GOOD = Outcome()
RENEWED = Outcome(("token", "oauth"))
TAKEN = Outcome(("feed",))
LEGAL = gone("cannot be read for legal reasons (451)")
NO_NAME = gone("does not exist")
NOT_THERE = gone("does not exist, or is banned (404)")
BLOCKED = refused("Reddit blocks this address, or the app (403)")
FEED_BLOCKED = refused(
    "Reddit blocks this address, or the subreddit is private or quarantined (403)"
)
NO_POSTS = fails("a listing without posts")
NO_LISTING = came("200 (no reason given)")
NO_JSON = came("200 (application/json)")
NO_ATOM = came("200 (application/atom+xml)")


def page_of(*children, **data):
    head = {"after": None, "children": list(children), **data}
    return json_reply(200, {"kind": "Listing", "data": head})


def too_many(**headers):
    return json_reply(429, {"message": "Too Many Requests", "error": 429}, **headers)


def used_up(reset):
    return too_many(x_ratelimit_used="600", x_ratelimit_remaining="0.0", x_ratelimit_reset=reset)


def dated(offset, theirs=NOW):
    """Refuse until a date, by a clock of their own."""
    date = formatdate(theirs, usegmt=True)
    return too_many(date=date, retry_after=formatdate(theirs + offset, usegmt=True))


def html(status):
    return reply(status, "<html>", HTML)


def typed(body, content_type):
    return reply(200, body, {"content-type": content_type})


def search(form=""):
    return moved(f"https://www.reddit.com/subreddits/search{form}?q=pyhton")


def described(status, error, description):
    return json_reply(status, {"error": error, "error_description": description})


CHILDREN = [json.loads(thing(post)) for post in POSTS]
WHOLE = page_of(*CHILDREN[::-1])
FEED = reply(200, atom_feed(POSTS[::-1], "python", NOW), ATOM)
T5 = page_of({"kind": "t5", "data": {"id": "2zzzz", "name": "t5_2zzzz"}})
UNAUTHORIZED = error_reply(401, "Unauthorized")
PRIVATE = error_reply(403, "Forbidden", reason="private")
BANNED = error_reply(404, "Not Found", reason="banned")
SERVER_ERROR = error_reply(500, "Internal Server Error")
IN_20_S = {"retry-after": "20"}
IN_6_S = {"retry-after": "6"}
DEEP = '{"kind": "Listing", "data": ' + "[" * 100_000
NO_WORD = {"reason": "x" * 21, "message": ["a"], "error": "a1b2c3"}
TWO_LINES = {"access_token": "a\r\nHost: b", "expires_in": 3600}

OAUTH = {
    "a listing": (WHOLE, GOOD),
    "401 JSON": (UNAUTHORIZED, RENEWED),
    "401 HTML": (html(401), RENEWED),
    "403 JSON with a reason": (PRIVATE, closed("private (403)")),
    "403 JSON in gzip": (gzipped(PRIVATE), closed("private (403)")),
    "403 JSON without a reason": (error_reply(403, "Forbidden"), closed("Forbidden (403)")),
    "403 with its number alone": (json_reply(403, {"error": 403}), closed("Forbidden (403)")),
    "403 without a word": (json_reply(403, {}), closed("no reason given (403)")),
    "403, no word": (json_reply(403, NO_WORD), closed("no reason given (403)")),
    "404 JSON with a reason": (BANNED, closed("banned (404)")),
    "404 HTML": (html(404), came("404 (text/html)")),
    "the block page": (block_page(), BLOCKED),
    "403 in zstd": (encoded(reply(403, "?"), "zstd"), BLOCKED),
    "403 with a JSON list": (json_reply(403, []), BLOCKED),
    "403 with a listing": ((403, *WHOLE[1:]), came("403 (application/json)")),
    "302 to the search": (search(), NO_NAME),
    "302 to the search, relative": (moved("/subreddits/search.json?q=pyhton"), NO_NAME),
    "302 elsewhere": (moved("https://www.reddit.com/"), came("302 (redirect to /)")),
    "302 to a login that mentions the search": (
        moved("https://www.reddit.com/login/?dest=/subreddits/search"),
        came("302 (redirect to /login/)"),
    ),
    "302 to nowhere": (moved("http://[broken"), came("302 (redirect to another page)")),
    "302 to no name": (moved("/" + "x" * 22), came("302 (redirect to another page)")),
    "400 JSON": (error_reply(400, "Bad Request"), came("400 (Bad Request)")),
    "408": (reply(408), came("408 (empty)")),
    "429 with Retry-After in seconds": (too_many(retry_after="4"), waits(4.0)),
    "429 with Retry-After 0": (too_many(retry_after="0"), waits(2.0)),
    "429 with a date, an hour ahead": (dated(7, theirs=NOW + 3600), waits(7.0)),
    "429 with a date that is over": (dated(-60), waits(2.0)),
    "429 without advice": (too_many(), waits(2.0)),
    "429 with advice that makes no sense": (too_many(retry_after="soon"), waits(2.0)),
    "429 with zero bytes": (reply(429), waits(2.0)),
    "429 HTML": (html(429), waits(2.0)),
    "429 with the window's rest": (used_up("77"), waits(78.0)),
    "429 with remaining 0 and reset 0": (used_up("0"), waits(2.0)),
    **{
        f"429, {len(body)} bytes in {encoding}": (
            encoded(reply(429, body, IN_6_S), encoding),
            waits(6.0),
        )
        for encoding in ("gzip", "br", "zstd", "identity", "deflate", "compress")
        for body in (b"", b"\x1f\x8b\0rubbish")
    },
    "451": (reply(451), LEGAL),
    **{f"{n}": (html(n), came(f"{n} (text/html)")) for n in (500, 501, 502, 503, 504, 520, 522)},
    "500 JSON": (SERVER_ERROR, came("500 (Internal Server Error)")),
    "503 with Retry-After": (reply(503, headers=IN_20_S), came("503 (empty)", 20.0)),
    "200 with HTML": (login_page(), came("200 (text/html)")),
    "200 with nothing": (reply(200), came("200 (empty)")),
    "200 with an error's name": (json_reply(200, {"error": "oops"}), came("200 (oops)")),
    "200 with its number": (json_reply(200, {"error": 503}), came("200 (Service Unavailable)")),
    "200 with an unknown number": (json_reply(200, {"error": 520}), came("200 (error 520)")),
    "200 with a long number": (json_reply(200, {"error": 4711}), came("200 (no reason given)")),
    "200 with a token": (json_reply(200, {"access_token": "x"}), NO_LISTING),
    "200 with a JSON list": (json_reply(200, [{"kind": "Listing"}]), NO_JSON),
    "a type that is none": (typed("?", "a-s3cret"), came("200 (of unknown type)")),
    "a listing of t5": (T5, NO_POSTS),
    "children that are null": (page_of(children=None), NO_LISTING),
    "no children": (json_reply(200, {"kind": "Listing", "data": {}}), NO_LISTING),
    "data that is null": (json_reply(200, {"kind": "Listing", "data": None}), NO_LISTING),
    "a child that is null": (page_of(None, CHILDREN[0]), Outcome(posts=(IDS[0],))),
    "a child without data": (page_of({"kind": "t3", "data": None}), NO_POSTS),
    "half a listing": (reply(200, WHOLE[2][:999]), NO_JSON),
    "JSON that nests without end": (reply(200, DEEP), NO_JSON),
    "bytes that are no UTF-8": (reply(200, b'{"kind": "\xff\xfe"}'), NO_JSON),
    "a listing in gzip": (gzipped(WHOLE), GOOD),
    "a listing in three members": (gzipped(WHOLE, 3), GOOD),
    "a listing with bytes behind it": (gzipped(WHOLE, 1, b"\0" * 9 + b"rubbish"), GOOD),
    "a listing with a newline behind it": (gzipped(WHOLE, 2, b"\r\n"), GOOD),
    "a listing in identity": (encoded(WHOLE, "identity"), GOOD),
    "a listing in no encoding": (encoded(WHOLE, ""), GOOD),
    "a listing in capitals": (encoded(WHOLE, "GZIP", gzip.compress(WHOLE[2])), GOOD),
    "a listing in deflate": (encoded(WHOLE, "deflate", zlib.compress(WHOLE[2])), GOOD),
    "a listing behind a byte-order mark": (reply(200, b"\xef\xbb\xbf" + WHOLE[2]), GOOD),
    "a listing of another type": (typed(WHOLE[2], "text/plain"), GOOD),
}
TOKEN = {
    "401": (UNAUTHORIZED, refused("Reddit refuses the credentials (401)")),
    "401 in br": (encoded(reply(401), "br"), refused("Reddit refuses the credentials (401)")),
    "400": (error_reply(400, "No"), refused("Reddit refuses the credentials (400)")),
    "403": (block_page(), refused("Reddit refuses or blocks the app (403)")),
    "200 with an error": (
        json_reply(200, {"error": "unauthorized_client"}),
        refused("Reddit refuses the credentials (unauthorized_client)"),
    ),
    "400 with a description": (
        described(400, "invalid_grant", "The app is unknown."),
        refused("Reddit refuses the credentials (invalid_grant: The app is unknown.)"),
    ),
    "503 with a description": (
        described(503, "server_error", "Try later (busy)."),
        came("503 (server_error: Try later (busy).)"),
    ),
    "429 with Retry-After": (too_many(retry_after="4"), waits(4.0)),
    "429 in gzip": (encoded(reply(429, "", IN_6_S), "gzip"), waits(6.0)),
    "302 to a login": (moved("/login/"), came("302 (redirect to /login/)")),
    "404": (error_reply(404, "Not Found"), came("404 (Not Found)")),
    "500": (SERVER_ERROR, came("500 (Internal Server Error)")),
    "503 with Retry-After": (reply(503, headers=IN_20_S), came("503 (empty)", 20.0)),
    "200 with HTML": (login_page(), came("200 (text/html)")),
    "an empty 200": (encoded(reply(200), "gzip"), came("200 (empty)")),
    "an empty token": (json_reply(200, {"access_token": ""}), came("200 (no reason given)")),
    "a token of two lines": (json_reply(200, TWO_LINES), came("200 (no reason given)")),
    "a token that does not say how long it lasts": (
        json_reply(200, {"access_token": "of-another"}),
        Outcome(("oauth", "token", "oauth")),  # the server does not know it
    ),
}
ANONYMOUS = {
    "the block page": (block_page(), TAKEN),
    "the block page in br": (encoded(block_page(), "br"), TAKEN),
    "the block page in rubbish": (encoded(block_page(), "gzip"), TAKEN),
    "an empty 403": (reply(403), TAKEN),
    "an empty 403 in gzip": (encoded(reply(403), "gzip"), TAKEN),
    "200 with HTML": (login_page(), TAKEN),
    "200 with text": (typed("OK", "text/plain"), TAKEN),
    "200 with a JSON list": (json_reply(200, []), TAKEN),
    "200 in br": (encoded(page_of(), "br", b"\x8b\x05\x80rubbish"), TAKEN),
    "a feed": (FEED, TAKEN),
    "302 to a login": (moved("https://www.reddit.com/login/?dest=%2Fr%2Fpython"), TAKEN),
    "302 with an empty object": ((302, {"location": "/login.json"}, b"{}"), TAKEN),
    "301 without a body": (reply(301, "", {"location": "/account/login"}), TAKEN),
    "307 to elsewhere": (moved("https://www.reddit.com/", 307), TAKEN),
    "401 HTML": (html(401), TAKEN),
    "404 HTML": (html(404), TAKEN),
    "404 with nothing": (reply(404), TAKEN),
    "an empty 404 in br": (encoded(reply(404), "br"), TAKEN),
    "410 HTML": (html(410), TAKEN),
    "410 JSON": (error_reply(410, "Gone"), came("410 (Gone)")),
    "401 JSON": (UNAUTHORIZED, refused("Reddit wants credentials (401)")),
    "403 JSON": (PRIVATE, closed("private (403)")),
    "404 JSON": (BANNED, closed("banned (404)")),
    "451 HTML": (html(451), LEGAL),
    "429 without advice": (reply(429), waits(12.0)),
    "200 with nothing": (reply(200), came("200 (empty)")),
    "200 with nothing in gzip": (encoded(reply(200), "gzip"), came("200 (empty)")),
    "200 that cannot be decoded": (encoded(page_of(), "gzip"), fails("decode error")),
    "200 with an object": (json_reply(200, {"error": 403}), came("200 (Forbidden)")),
    "half a listing": (reply(200, page_of()[2][:30]), NO_JSON),
    "408 HTML": (html(408), came("408 (text/html)")),
    "500 HTML": (html(500), came("500 (text/html)")),
    "503 in br": (encoded(html(503), "br"), came("503 (text/html)")),
}
OF_FEED = {
    "a feed": (FEED, GOOD),
    "the block page": (block_page(), FEED_BLOCKED),
    "403 with nothing": (reply(403), FEED_BLOCKED),
    "302 to the search": (search(".rss"), NO_NAME),
    "404 HTML": (html(404), NOT_THERE),
    "404 with nothing": (reply(404), NOT_THERE),
    "404 JSON": (BANNED, closed("banned (404)")),
    "401 HTML": (html(401), refused("Reddit wants credentials (401)")),
    "451 JSON": (error_reply(451, "x"), LEGAL),
    "429 with Retry-After": (too_many(retry_after="60"), waits(60.0)),
    "429 without advice": (reply(429), waits(12.0)),
    "a login page": (login_page(), came("200 (text/html)")),
    "a DOCTYPE": (reply(200, DOCTYPE.encode() + FEED[2].partition(b"?>")[2], ATOM), NO_ATOM),
    "half of it": (reply(200, FEED[2][:999], ATOM), NO_ATOM),
    "another XML": (typed("<rss><channel/></rss>", "text/xml"), came("200 (text/xml)")),
    "a listing": (page_of(), NO_LISTING),
    "200 with nothing": (reply(200), came("200 (empty)")),
}
ANSWERS = {"oauth": OAUTH, "token": TOKEN, "json": ANONYMOUS, "feed": OF_FEED}
CASES = {
    f"{source}: {name}": (source, answer, expected.of(source))
    for source, rows in ANSWERS.items()
    for name, (answer, expected) in rows.items()
}
ON = {"token": "access_token", "oauth": "/new", "json": ".json", "feed": ".rss"}


def source_of(path):
    """Give the source that a request went to."""
    return next((name for name in ("token", "json", "feed") if ON[name] in path), "oauth")


@pytest.fixture
def world():
    """Serve three posts in r/python; it is always the same second."""
    with FakeReddit(VirtualClock(NOW)) as reddit:
        for post in POSTS:
            reddit.add(post)
        yield reddit


def access_to(world, source):
    """Give the access with which a source is the first to be asked."""
    world.anonymous_json_blocked = source == "feed"
    with_token = source in {"token", "oauth"}
    return Access(world.url, *("app-id", "app-secret") if with_token else ())


def outcome(world, source):
    """Ask for r/python until posts or the end come; tell all that was seen of it."""
    reddit = Reddit(access_to(world, source), http_fetch(), world.clock)
    posts, end, said = [], 0, []
    began = world.clock.time()
    while not (posts or end):
        world.clock.sleep(reddit.budget.wait(1, world.clock.monotonic()))
        try:
            posts = reddit.page("python").posts
        except AskAgain:
            pass
        except RedpipeError as exc:
            said.append(str(exc))
            end = exc.exit_status if isinstance(exc, (Gone, Refused)) else 0
    asked = [source_of(seen.path) for seen in world.log]
    after = tuple(asked[asked.index(source) + 1 :])
    waited = round(world.clock.time() - began, 3)
    return Outcome(after, waited, end, tuple(said), tuple(post["id"] for post in posts))


@pytest.mark.parametrize(("source", "answer", "expected"), CASES.values(), ids=CASES)
def test_every_answer_has_its_consequence(source, answer, expected, world):
    world.script(answer, on=ON[source])
    assert outcome(world, source) == expected


FAULTS = {
    "closed without a word": (REFUSE, "connection error"),
    "reset": (RESET, "Connection reset by peer"),
    "cut short": (TRUNCATE, "protocol error"),
    "a body of 1 GB": (GIANT, "response larger than 16 MiB"),
    "a small body that unpacks to 64 MiB": (gzip_bomb(64), "response larger than 16 MiB"),
}


@pytest.mark.parametrize(("fault", "sentence"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("source", ["token", "oauth", "json", "feed"])
def test_a_connection_that_fails_is_tried_again(source, fault, sentence, world):
    expected = fails(sentence).of(source)
    if source in {"oauth", "feed"} and fault in (REFUSE, RESET):
        # A used connection that was dropped is tried once more at once, and no oftener.
        world.script(fault, on=ON[source])
        expected = expected._replace(asked=(source, source))
    world.script(fault, on=ON[source])
    assert outcome(world, source) == expected


# Without any row of RULES some answer has another consequence


def kind(source, answer):
    """Give what RULES are asked with."""
    answer, source = Answer(*answer), "grant" if source == "token" else source
    value = read_value(answer.body, source, NOW)
    return f"{answer.status} {kind_of(answer, source, value)} {source}"


KINDS = [kind(source, answer) for source, answer, _ in CASES.values()]
KINDS += [kind("own feed", login_page())]


def first_fit(rules, answer):
    """Give what the first row that fits says."""
    return next((rule[1:] for rule in rules if re.fullmatch(rule.answers, answer)), None)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.answers)
def test_no_row_of_the_table_can_be_spared(rule):
    shorter = [other for other in RULES if other is not rule]
    assert [one for one in KINDS if first_fit(shorter, one) != first_fit(RULES, one)]


# Answers that are given too slowly, or are too long


@contextmanager
def raw_server(talk):
    """Serve one request by `talk(connection, stop)`; give the address."""

    def serve():
        connection = listener.accept()[0]
        with connection, suppress(OSError):
            connection.recv(65536)
            talk(connection, stop)

    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        pool.submit(serve)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        stop.set()


def ask(talk):
    """Tell what a server's answer to one request leads to."""
    with raw_server(talk) as url:
        try:
            return f"no failure: {http_fetch()(Request('GET', url, {}, {})).status}"
        except Failed as exc:
            return str(exc)


PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 1000"
REDIRECT = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 1000"
PACKED = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1000"
ENDLESS = b"\x1f\x8b\x08\x08" + bytes(6) + b"a name without end"
"""A gzip that unpacks to nothing, however much of it has come."""
SLOW = {
    "nothing at all": (b"", b"", "timeout"),
    "a listing": (PLAIN, b" " * 1000, "response took longer than 1 s"),
    "a redirect": (REDIRECT, b" " * 1000, "no failure: 302"),
    "a gzip": (PACKED, gzip.compress(secrets.token_bytes(999)), "response took longer than 1 s"),
    "a gzip of nothing": (PACKED, ENDLESS + b"a" * 1000, "response took longer than 1 s"),
}


def test_connecting_may_take_5_seconds_a_part_10_and_the_whole_30():
    assert pipeline.TIMEOUTS == (5, 10)
    assert pipeline.BODY_TIMEOUT == 30


@pytest.mark.parametrize(("head", "body", "expected"), SLOW.values(), ids=SLOW)
@pytest.mark.timeout(20)
def test_an_answer_that_is_too_slow_is_given_up(head, body, expected, monkeypatch):
    monkeypatch.setattr(pipeline, "TIMEOUTS", (5, 1))
    monkeypatch.setattr(pipeline, "BODY_TIMEOUT", 1)

    def drip(connection, stop):
        connection.sendall(head + b"\r\n\r\n" if head else b"")
        for byte in body:
            connection.sendall(bytes([byte]))
            stop.wait(0.1)
        stop.wait()

    assert ask(drip).endswith(expected)


def test_a_redirect_with_a_body_of_1_gb_is_not_read_to_its_end():
    sent = 0

    def talk(connection, stop):
        nonlocal sent
        connection.sendall(REDIRECT.replace(b"1000", b"1000000000") + b"\r\n\r\n")
        while sent < 1_000_000_000:
            sent += connection.send(b" " * 1_000_000)

    assert ask(talk) == "no failure: 302"
    assert sent < 50_000_000


def test_a_gzip_of_nothing_without_end_is_not_read_to_its_end():
    def talk(connection, stop):
        connection.sendall(PACKED.replace(b"1000", b"1000000000") + b"\r\n\r\n" + ENDLESS)
        while True:
            connection.send(b"a" * 1_000_000)

    assert ask(talk) == "response larger than 16 MiB"


@pytest.mark.timeout(60)
def test_very_many_gzip_members_of_nothing_take_a_second():
    assert decoded(gzip.compress(b"") * 150_000, "gzip") == b""


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (b"Content-Length: 100", b"abc"),
        (b"Transfer-Encoding: chunked", b"64\r\nabc"),
        (b"Transfer-Encoding: chunked", b"no length\r\n"),
        (b"Content-Encoding: gzip\r\nContent-Length: 100", b"\x1f\x8b"),
        (b"Content-Length: 20000000", b" " * 20_000_000),
        (b"Content-Encoding: gzip\r\nConnection: close", gzip.compress(b" " * 20_000_000)),
    ],
)
def test_status_and_headers_count_if_the_body_beside_an_error_is_no_good(head, body):
    def talk(connection, stop):
        connection.sendall(b"HTTP/1.1 429 No\r\nRetry-After: 6\r\n" + head + b"\r\n\r\n" + body)

    with raw_server(talk) as url:
        status, headers, body = http_fetch()(Request("GET", url, {}, {}))
    assert (status, headers["retry-after"], body) == (429, "6", b"")


# Connections that were used before


def listing_of(world):
    return Request("GET", f"{world.url}/r/python/new/.json", {"raw_json": "1"}, {})


ADDRESSES = {
    "app-id": [
        "https://www.reddit.com/api/v1/access_token Basic",
        "https://oauth.reddit.com/r/python/new bearer",
    ],
    "": ["https://www.reddit.com/r/python/new/.json ", "https://www.reddit.com/r/python/new/.rss "],
}


@pytest.mark.parametrize(("client_id", "expected"), ADDRESSES.items())
def test_reddits_own_addresses_get_no_more_than_they_need(client_id, expected, clock):
    reddit, asked = FakeReddit(clock), []
    reddit.anonymous_json_blocked = True
    reddit.create("python")

    def fetch(request):
        kind = request.headers.get("Authorization", "").partition(" ")[0]
        asked.append(f"{request.url} {kind}")
        return fetch_from(reddit, clock)(request)

    source = Reddit(Access("", client_id, client_id and "app-secret"), fetch, clock)
    with suppress(AskAgain):
        source.page("python")
    if not client_id:
        source.page("python")
    assert asked == expected


@pytest.mark.parametrize(("idle", "connections"), [(0, 1), (49, 1), (50, 2), (3600, 2)])
def test_a_connection_that_was_idle_for_50_seconds_is_not_used_again(idle, connections, world):
    ports, handle = [], world.handle

    def noted(*request):
        ports.append(next(iter(world._server.connections)).getpeername()[1])
        return handle(*request)

    world.handle = noted
    fetch = http_fetch(world.clock)
    fetch(listing_of(world))
    world.clock.sleep(idle)
    assert fetch(listing_of(world)).status == 200
    assert len(ports) == 2
    assert len(set(ports)) == connections


@pytest.mark.parametrize("fault", [RESET, REFUSE])
def test_a_used_connection_that_was_dropped_costs_no_failure(fault, world, caplog):
    fetch = http_fetch(world.clock)
    world.script(None, fault)
    with caplog.at_level(logging.DEBUG, "redpipe"):
        assert [fetch(listing_of(world)).status, fetch(listing_of(world)).status] == [200, 200]
    assert caplog.records == []
    assert [seen.status for seen in world.log] == [200, 0, 200]


# Final answers


FINAL = {name: case[:2] for name, case in CASES.items() if case[2].end}


@pytest.mark.parametrize(("source", "answer"), FINAL.values(), ids=FINAL)
def test_what_is_final_at_first_is_retried_after_a_good_answer(source, answer, world):
    reddit = Reddit(access_to(world, source), http_fetch(), world.clock)
    batches = stream(reddit, ["python"], Nothing(), chance=lambda: 0.0)
    assert len(next(batches).posts) == 3
    if source == "token":
        world.revoke_tokens()
    world.script(answer, answer, answer, on=ON[source])
    world.add(make_post(3, NOW + 9))
    assert len(next(batches).posts) == 4


def test_a_second_401_in_a_row_is_final(world):
    world.script(UNAUTHORIZED, html(401))
    expected = refused("Reddit refuses the token (401)")
    assert outcome(world, "oauth") == expected._replace(asked=("token", "oauth"))


def test_two_401s_that_are_not_in_a_row_are_two_renewals(world):
    world.script(UNAUTHORIZED, None, html(401))
    reddit = Reddit(access_to(world, "oauth"), http_fetch(), world.clock)
    batches = stream(reddit, ["python"], Nothing())
    assert [len(next(batches).posts), len(next(batches).posts)] == [3, 3]
    asked = [source_of(seen.path) for seen in world.log]
    assert asked == ["token", "oauth", "token", "oauth", "oauth", "token", "oauth"]


# --once, without a socket


class Once:
    """Let r/python be walked once, and tell how many seconds that takes."""

    def __init__(self):
        self.clock = VirtualClock(NOW)
        self.reddit = FakeReddit(self.clock)
        for post in POSTS:
            self.reddit.add(post)

    def posts(self):
        access = Access("", "app-id", "app-secret")
        source = Reddit(access, fetch_from(self.reddit, self.clock, latency=0), self.clock)
        return [len(batch.posts) for batch in stream(source, ["python"], Nothing(), once=True)]


@pytest.fixture
def once():
    return Once()


@pytest.mark.parametrize("answer", [SERVER_ERROR, RESET, login_page(), error_reply(408, "")])
def test_once_gives_up_after_two_minutes_of_failures_with_a_last_try(answer, once, caplog):
    once.reddit.faults = lambda *request: answer
    with caplog.at_level(logging.WARNING, "redpipe"), pytest.raises(Failed) as caught:
        once.posts()
    assert caught.value.exit_status == 75
    assert once.reddit.log[-1].time - NOW == pytest.approx(120)
    assert once.clock.elapsed == pytest.approx(120)
    assert caplog.records == []


def test_once_gives_up_after_two_minutes_of_silence(once):
    once.reddit.faults = lambda *request: HANG
    with pytest.raises(Failed, match="hang"):
        once.posts()
    assert 105 < round(once.reddit.log[-1].time - NOW, 3) <= 120
    assert once.clock.now == once.reddit.log[-1].time + 10


def test_once_survives_failures_that_end_within_two_minutes(once):
    once.reddit.faults = lambda *request: SERVER_ERROR if once.clock.elapsed < 119 else None
    assert once.posts() == [3]
    assert once.clock.elapsed < 120.01


def test_once_waits_8_minutes_for_the_budget_and_no_longer(once):
    once.reddit.script(too_many(retry_after="300"), too_many(retry_after="170"))
    assert once.posts() == [3]
    assert once.clock.elapsed == 470
    once.reddit.script(too_many(retry_after="300"), too_many(retry_after="181"))
    with pytest.raises(Failed, match="allows no request") as caught:
        once.posts()
    assert caught.value.exit_status == 75
    assert once.clock.elapsed == 470 + 300


def test_waiting_for_the_budget_takes_nothing_from_the_two_minutes(once):
    once.reddit.script(SERVER_ERROR, SERVER_ERROR, too_many(retry_after="400"))
    once.reddit.faults = lambda method, path, query: (
        SERVER_ERROR if once.clock.elapsed < 515 and "/new" in path else None
    )
    assert once.posts() == [3]


@pytest.mark.parametrize("answer", [T5, page_of(), login_page(), page_of(None)])
def test_a_page_without_posts_ends_no_walk(answer, once):
    for n in range(3, 303):
        once.reddit.add(make_post(n, NOW - 1000 + n))
    once.reddit.script(None, answer)
    assert once.posts() == [303]


# The feed


@pytest.fixture
def feed_rows(world, tmp_path):
    """Give what stores r/python from the feed once, and gives the columns that redpipe fills."""

    def store():
        reddit = Reddit(Access(world.url), http_fetch(), world.clock)
        with Database(str(tmp_path / "posts.db"), clock=world.clock) as database:
            for batch in stream(reddit, ["python"], database, once=True):
                load(database, map(transform, batch.posts), batch.cursors, batch.gaps)
            columns = ", ".join((*COLUMNS, "stored_utc"))
            return database.execute(f"SELECT {columns} FROM posts ORDER BY created_utc")

    world.anonymous_json_blocked = True
    return store


def test_the_feed_gives_every_column_but_the_account_id(world, feed_rows, caplog):
    title = '<b> & "it" &amp; \u202e\U0001f600'
    world.add(make_post(3, NOW - 10, author="[deleted]", title=title))
    with caplog.at_level(logging.INFO, "redpipe"):
        rows = feed_rows()
    link = "/r/python/comments/1tq0003/invented_post_number_3/"
    assert rows[3] == ("1tq0003", NOW - 10, "python", title, None, None, link, NOW)
    link = "/r/python/comments/1tq0002/invented_post_number_2/"
    title = "Invented post number 2"
    assert rows[2] == ("1tq0002", NOW - 98, "python", title, None, "invented_2", link, NOW)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["Reddit blocks anonymous JSON (403); taking the feed, which has no account ids"]


def test_the_feed_is_paged_to_its_end(world, feed_rows):
    ids = IDS + [world.add(make_post(n, NOW - 1000 + n))["id"] for n in range(3, 253)]
    rows = feed_rows()
    assert {row[0] for row in rows} == set(ids)
    assert [(source_of(seen.path), seen.query.get("after")) for seen in world.log][:4] == [
        ("json", None),
        ("feed", None),
        ("feed", f"t3_{rows[-100][0]}"),
        ("feed", f"t3_{rows[-200][0]}"),
    ]
    assert len(world.log) <= 6


def test_an_entry_without_an_id_ends_no_page(world, feed_rows):
    posts = [make_post(n, NOW - n) for n in range(100)]
    first = atom_feed(posts, "python", NOW).replace(b"</feed>", b"<entry/></feed>")
    world.script(None, (200, ATOM, first), on="/new")
    feed_rows()
    anchors = [seen.query.get("after") for seen in world.log]
    assert anchors[:3] == [None, None, f"t3_{posts[-1]['id']}"]
    assert len(anchors) <= 6


def test_a_page_that_repeats_itself_is_the_end(world, feed_rows):
    page = atom_feed([make_post(n, NOW - n) for n in range(100)], "python", NOW)
    world.faults = lambda method, path, query: (200, ATOM, page) if ".rss" in path else None
    assert len(feed_rows()) == 100
    assert [source_of(seen.path) for seen in world.log] == ["json", "feed", "feed"]


def test_an_entry_without_any_field_but_its_id_is_stored(world, feed_rows):
    entry = "<entry><id>t3_abc</id></entry><entry><id>t1_abd</id></entry><entry/>"
    feed = f'<feed xmlns="http://www.w3.org/2005/Atom">{entry}</feed>'
    world.script(reply(200, feed, ATOM), on=".rss")
    rows = feed_rows()
    assert rows[0] == ("abc", None, None, None, None, None, None, NOW)
    assert [row[0] for row in rows[1:]] == IDS  # what later pages hold


# The built file


NO_BUDGET = (
    "r/python: Reddit allows no request for 900 s more;"
    " it answered nothing but 429 (too many requests)"
)
ENDS = {
    "private": (lambda fake: fake.refuse("python"), 69, "r/python cannot be read: private (403)"),
    "mistyped": (lambda fake: None, 69, "r/python does not exist"),
    "blocked": (lambda fake: fake.script(*[block_page()] * 2), 77, *FEED_BLOCKED.said),
    "no budget": (lambda fake: fake.script(too_many(retry_after="900")), 75, NO_BUDGET),
}


@pytest.mark.parametrize(("arrange", "status", "sentence"), ENDS.values(), ids=ENDS)
def test_the_built_file_ends_with_one_line_and_the_exit_status(
    arrange, status, sentence, redpipe, fake_reddit
):
    arrange(fake_reddit)
    assert redpipe("--once", "posts.db", "python") == (status, "", f"redpipe: {sentence}\n")


@pytest.mark.parametrize("wrong", ["a-wrong-one", "no-utf-8-\udcff"])
def test_the_built_file_ends_with_77_when_the_credentials_are_refused(wrong, redpipe):
    done = redpipe("posts.db", REDDIT_CLIENT_ID="app-id", REDDIT_CLIENT_SECRET=wrong)
    sentence = "Reddit refuses the credentials (401); see README, Credentials"
    assert done == (77, "", f"redpipe: {sentence}\n")


# Recorded answers


@pytest.fixture(scope="module")
def recorded(samples):
    """Give the recorded errors as (address, Answer)."""
    found = []
    for path in sorted(samples.glob("errors/*.json")):
        error = json.loads(path.read_bytes())
        headers = {
            name.lower(): ", ".join(value) if isinstance(value, list) else value
            for name, value in error["headers"].items()
        }
        answer = Answer(error["status"], headers, error["body"].encode())
        found.append((error["request"]["url"], answer))
    return found


def verdict(answer, source):
    """Let a source answer with nothing else; tell what becomes of the second request."""
    usual = {
        "token": Answer(200, {}, b'{"access_token": "x", "expires_in": 3600}'),
        "oauth": Answer(*page_of()),
        "json": Answer(*block_page()),
        source: answer,
    }
    access = Access("", "id", "secret") if source in {"token", "oauth"} else Access()
    reddit = Reddit(access, lambda request: usual[source_of(request.url)], VirtualClock(NOW))
    if source != "json":  # the block page or the first 401 comes first
        with suppress(RedpipeError):
            reddit.page("python")
    try:
        reddit.page("python")
    except RedpipeError as exc:
        return next(k for k in (Gone, Refused, AskAgain, Failed) if isinstance(exc, k)).__name__
    return "good"


def verdicts(answers, source):
    """Count by verdict and by status."""
    counted = {}
    for answer in answers:
        counted.setdefault(verdict(answer, source), Counter())[answer.status] += 1
    return counted


GONE = {302: 2, 403: 20, 404: 11, 451: 1}  # 302: to the search
FAILED = {200: 62, 409: 3, 415: 1, 500: 2, 502: 1, 503: 2, 504: 1, 520: 1, 522: 1}
"""Of 200: what other requests were answered with, and tokens."""
ELSEWHERE = {301: 4, 302: 20, 413: 2, 414: 1}
ALWAYS = {"Gone": GONE, "Refused": {401: 7}}
OF_LISTING = {**ALWAYS, "AskAgain": {429: 2}, "Failed": {**FAILED, **ELSEWHERE, 400: 33}}
OF_JSON = {
    **ALWAYS,
    "AskAgain": {**ELSEWHERE, 400: 2, 429: 2},  # those two are no JSON
    "Failed": {**FAILED, 400: 31},
}
OF_TOKEN = {"AskAgain": {429: 1}, "Refused": {200: 5, 400: 2, 401: 1}, "good": {200: 17}}
RECORDED = {"oauth": OF_LISTING, "feed": OF_LISTING, "json": OF_JSON, "token": OF_TOKEN}


@pytest.mark.parametrize(("source", "expected"), RECORDED.items(), ids=RECORDED)
def test_every_recorded_error_has_a_sensible_consequence(source, expected, recorded):
    of_token = source == "token"
    answers = [answer for url, answer in recorded if not of_token or "access_token" in url]
    assert verdicts(answers, source) == expected
