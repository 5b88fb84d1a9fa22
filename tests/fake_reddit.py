"""An invented Reddit that answers as the real one does.

    with FakeReddit() as reddit:                  # a server on a free port of the loopback
        reddit.add(make_post(1, created_utc=1_790_000_000))
        ... REDPIPE_URL=reddit.url ...
        assert reddit.log[0].path == "/r/python/new"

    FakeReddit   state and rules; `respond` knows neither sockets nor faults,
                 `handle` adds the log and the scripted faults
    Budget       the requests one source may make in a window
    Fault        something that no complete answer can say: a reset, a hang

By hand: `python3 tests/fake_reddit.py --help`. All text in here is made up.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import contextlib
import gzip
import heapq
import itertools
import json
import math
import operator
import os
import random
import re
import socket
import socketserver
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from typing import Any, NamedTuple, Protocol
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape, quoteattr

Post = dict[str, Any]
Reply = tuple[int, dict[str, str], bytes]
"""status, headers with lower-case names, body"""

JSON = {"content-type": "application/json; charset=UTF-8"}
HTML = {"content-type": "text/html; charset=UTF-8"}
ATOM = {"content-type": "application/atom+xml; charset=UTF-8"}
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
FIRST_ID = int("1tq0000", 36)


class Clock(Protocol):
    """Tell the time; the module `time` does."""

    def time(self) -> float: ...


class Fault(NamedTuple):
    """Say what happens to the connection in the place of an answer."""

    kind: str
    seconds: float = 60.0
    """The longest that a fault lasts."""
    reply: Reply = (200, {}, b"")
    """The answer that goes wrong on its way; `handle` fills it in."""


REFUSE = Fault("refuse")  # closed without a word
RESET = Fault("reset")  # closed by RST
HANG = Fault("hang")  # silent until `release()`, `stop()` or the end of its seconds
TRUNCATE = Fault("truncate")  # half of the body that was announced, then closed
DRIP = Fault("drip")  # a byte of the body a second
GIANT = Fault("giant")  # a body of 1 GB


class Seen(NamedTuple):
    """Hold one request as the log keeps it."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes
    time: float
    status: int
    """0 for a `Fault`."""


# ---------------------------------------------------------------- replies


def reply(status: int, body: bytes | str = b"", headers: Mapping[str, str] = JSON) -> Reply:
    """Put together one answer."""
    return status, dict(headers), body.encode() if isinstance(body, str) else body


def json_reply(status: int, value: object, **headers: str) -> Reply:
    """Answer with a value as JSON; `_` in a header's name stands for `-`."""
    names = {name.replace("_", "-"): text for name, text in headers.items()}
    return reply(status, json.dumps(value), {**JSON, **names})


def error_reply(status: int, message: str, **more: object) -> Reply:
    """Answer with Reddit's usual error object."""
    return json_reply(status, {**more, "message": message, "error": status})


def block_page() -> Reply:
    """Answer 403 with the page of 190 kB that blocked clients get."""
    text = "<!doctype html>\n<html><head><title>Blocked</title></head><body>"
    text += "<h1>whoa there, pardner!</h1><p>This invented page blocks you.</p>\n"
    filler = "".join(f"<div class='shell-{n:06}'></div>\n" for n in range(6000))
    return reply(403, text + filler[: 190_000 - len(text) - 14] + "</body></html>", HTML)


def login_page() -> Reply:
    """Answer 200 with a page that asks for a login."""
    return reply(200, "<!DOCTYPE html><html><title>Log in</title><form></form></html>", HTML)


def wrong_gzip() -> Reply:
    """Answer with a body that claims to be gzip and is not."""
    return reply(200, b"no gzip at all" * 50, {**JSON, "content-encoding": "gzip"})


def encoded(answer: Reply, encoding: str, body: bytes | None = None) -> Reply:
    """Say that an answer's body is encoded, and send it, or another one, as it is."""
    status, headers, plain = answer
    return status, {**headers, "content-encoding": encoding}, plain if body is None else body


def gzipped(answer: Reply, members: int = 1, behind: bytes = b"") -> Reply:
    """Compress an answer's body in so many members, and put something behind it."""
    body = answer[2]
    size = -(-len(body) // members)
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return encoded(answer, "gzip", b"".join(map(gzip.compress, parts)) + behind)


def moved(location: str, status: int = 302) -> Reply:
    """Send a client elsewhere."""
    return reply(status, f"<html>{status}</html>", {**HTML, "location": location})


def gzip_bomb(mebibytes: int = 64) -> Reply:
    """Answer with a small body that unpacks to a large one."""
    packed = gzip.compress(b" " * (mebibytes << 20), 1)
    return reply(200, packed, {**JSON, "content-encoding": "gzip"})


def thing(post: Post) -> str:
    """Write a post as the JSON of a t3."""
    return json.dumps({"kind": "t3", "data": post})


def listing(children: Iterable[str], after: str | None = None, before: str | None = None) -> bytes:
    """Write a listing around children that are JSON already, as `thing` makes them."""
    children = list(children)
    head = {"after": after, "dist": len(children), "modhash": None, "geo_filter": ""}
    start = json.dumps({"kind": "Listing", "data": head})[:-2]
    end = json.dumps({"before": before})[1:]
    return f'{start}, "children": [{", ".join(children)}], {end}}}'.encode()


# ------------------------------------------------------------------ posts


def base36(number: int) -> str:
    """Write a number as Reddit writes ids."""
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = DIGITS[digit] + digits
    return digits or "0"


NOTHING = """
    approved_at_utc secure_media link_flair_text removed_by_category likes distinguished media
"""
NO = """
    saved hidden quarantine author_premium edited archived over_18 spoiler locked stickied
    is_video
"""
ZERO = "gilded downs num_comments num_crossposts"
SAME_IN_ALL: Post = {
    **dict.fromkeys(NOTHING.split()),
    **dict.fromkeys(NO.split(), False),
    **dict.fromkeys(ZERO.split(), 0),
    "link_flair_richtext": [],
    "upvote_ratio": 1.0,
    "subreddit_type": "public",
    "ups": 1,
    "media_embed": {},
    "score": 1,
    "thumbnail": "self",
    "author_flair_richtext": [],
    "gildings": {},
    "is_self": True,
    "author_flair_type": "text",
    "all_awardings": [],
    "send_replies": True,
    "subreddit_subscribers": 1_234_567,
}


def make_post(
    n: int, created_utc: float = 1_790_000_000, subreddit: str = "python", **extra: Any
) -> Post:
    """Invent the n-th post; `extra` replaces fields, `...` leaves one out.

    With author="[deleted]" the fields that Reddit then omits are omitted.
    """
    identifier = base36(FIRST_ID + n)
    permalink = f"/r/{subreddit}/comments/{identifier}/invented_post_number_{n}/"
    post = {
        **SAME_IN_ALL,
        "id": identifier,
        "name": f"t3_{identifier}",
        "title": f"Invented post number {n}",
        "author": f"invented_{n % 1000}",
        "author_fullname": f"t2_{base36(40_000 + n % 1000)}",
        "subreddit": subreddit,
        "subreddit_id": f"t5_{base36(sum(map(ord, subreddit.lower())) + 90_000)}",
        "subreddit_name_prefixed": f"r/{subreddit}",
        "domain": f"self.{subreddit}",
        "permalink": permalink,
        "url": f"https://www.reddit.com{permalink}",
        "selftext": f"Nobody wrote text {n}.",
        "selftext_html": f'<!-- SC_OFF --><div class="md"><p>Nobody wrote text {n}.</p>\n</div>',
        "created_utc": float(created_utc),
        "created": float(created_utc) + 28_800,
    }
    if extra.get("author") == "[deleted]":
        for key in ("author_fullname", "author_premium", "author_flair_type"):
            del post[key]
    post.update(extra)
    return {key: value for key, value in post.items() if value is not ...}


@dataclass(eq=False, slots=True)
class Item:
    """Keep one post of the listings and where it stands in them."""

    key: tuple[float, int]
    post: Post
    removed: bool = False
    json: str = ""
    atom: str = ""

    def as_json(self) -> str:
        """Give the child for a listing, written only once."""
        self.json = self.json or thing(self.post)
        return self.json

    def as_atom(self) -> str:
        """Give the entry for a feed, written only once."""
        self.atom = self.atom or atom_entry(self.post)
        return self.atom


PLACE = operator.attrgetter("key")
"""Tell where an item stands."""


def iso(utc: float) -> str:
    """Write a time as the feed does."""
    return datetime.fromtimestamp(int(utc), timezone.utc).isoformat()


def xml_text(text: str) -> str:
    """Escape text for the feed; XML 1.0 has no control characters."""
    return escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]", "", text))


def atom_author(post: Post) -> str:
    """Write the author of an entry; a deleted one has none."""
    name = post.get("author", "[deleted]")
    if name == "[deleted]":
        return ""
    uri = f"https://www.reddit.com/user/{quote(name)}"
    return f"<author><name>/u/{xml_text(name)}</name><uri>{uri}</uri></author>"


def atom_entry(post: Post) -> str:
    """Write one post as the feed does."""
    subreddit = post.get("subreddit", "")
    link = f"https://www.reddit.com{post['permalink']}"
    anchor = f"<a href={quoteattr(link)}>[link]</a>"
    content = f"{post.get('selftext_html') or ''} &#32; submitted by &#32; {anchor}"
    when = iso(post["created_utc"])
    return (
        f"<entry>{atom_author(post)}"
        f"<category term={quoteattr(subreddit)} label={quoteattr('r/' + subreddit)}/>"
        f'<content type="html">{xml_text(content)}</content><id>t3_{post["id"]}</id>'
        f"<link href={quoteattr(link)} /><updated>{when}</updated><published>{when}</published>"
        f"<title>{xml_text(post['title'])}</title></entry>"
    )


def atom_feed(posts: Iterable[Post], names: str, now: float) -> bytes:
    """Write a feed of posts."""
    return atom_around(map(atom_entry, posts), names, now)


def atom_around(entries: Iterable[str], names: str, now: float) -> bytes:
    """Write a feed around entries, as `atom_entry` makes them."""
    site = f"https://www.reddit.com/r/{names}/new/"
    return (
        '<?xml version="1.0" encoding="UTF-8"?><feed xmlns="http://www.w3.org/2005/Atom"'
        ' xmlns:media="http://search.yahoo.com/mrss/">'
        f"<category term={quoteattr(names)} label={quoteattr('r/' + names)}/>"
        f"<updated>{iso(now)}</updated><icon>https://www.redditstatic.com/icon.png/</icon><id>/r/{names}/new/.rss</id>"
        f'<link rel="self" href="{site}.rss" type="application/atom+xml" />'
        f'<link rel="alternate" href="{site}" type="text/html" />'
        f"<subtitle>An invented place</subtitle><title>newest submissions : {names}</title>"
        f"{''.join(entries)}</feed>"
    ).encode()


# ----------------------------------------------------------------- budget


@dataclass
class Budget:
    """Count the requests of one source in windows that are aligned to the clock.

    advice, past the total:
        "plain"    JSON, with the budget's headers as ever
        "seconds"  Retry-After in seconds; "date": as a date
        "empty"    zero bytes and no header that helps
        "zero"     zero bytes, remaining 0 and reset 0
    """

    total: int = 1000
    window: float = 600.0
    phase: float = 0.0
    """Where the windows begin, in seconds after a multiple of their length."""
    headers: bool = True
    advice: str = "plain"
    others: float = 0.0
    """Requests a second that another client makes on the same budget."""
    spent: int = 0
    began: float = field(default=-math.inf)

    def spend(self, now: float, requests: int = 1) -> bool:
        """Count requests made now; tell whether the budget still allows them."""
        began = (now - self.phase) // self.window * self.window + self.phase
        if began != self.began:
            self.began, self.spent = began, 0
        self.spent += requests
        return self.used(now) <= self.total

    def used(self, now: float) -> int:
        """Give the requests of this window, the other client's included."""
        return self.spent + int(self.others * (now - self.began))

    def reset(self, now: float) -> int:
        """Give the whole seconds to the end of the window, rounded up."""
        return math.ceil(self.began + self.window - now)

    def as_headers(self, now: float) -> dict[str, str]:
        """Write the budget as Reddit does."""
        if not self.headers:
            return {}
        remaining = float(max(0, self.total - self.used(now)))
        return {
            "x-ratelimit-used": str(self.used(now)),
            "x-ratelimit-remaining": str(remaining),
            "x-ratelimit-reset": str(self.reset(now)),
        }

    def refusal(self, now: float) -> Reply:
        """Answer a request that is past the budget."""
        if self.advice == "empty":
            return reply(429)
        if self.advice == "zero":
            told = {"used": str(self.used(now)), "remaining": "0", "reset": "0"}
            return reply(429, headers={f"x-ratelimit-{name}": told[name] for name in told})
        status, headers, body = error_reply(429, "Too Many Requests")
        if self.advice == "seconds":
            headers["retry-after"] = str(self.reset(now))
        if self.advice == "date":
            headers["retry-after"] = formatdate(now + self.reset(now), usegmt=True)
        return status, {**headers, **self.as_headers(now)}, body


# ----------------------------------------------------------------- Reddit


REFUSALS = {
    "private": (403, "Forbidden"),
    "quarantined": (403, "Forbidden"),
    "gated": (403, "Forbidden"),
    "banned": (404, "Not Found"),
}
INSTALLED = "https://oauth.reddit.com/grants/installed_client"


class FakeReddit:
    """Answer as Reddit does, from posts that a test adds and removes.

    Attributes to set at will:
        clients             {app id: secret}
        token_lifetime      seconds that a token lasts, told as `expires_in`
        budgets             {"oauth" | "json" | "feed" | "token feed": Budget or None for no limit}
        anonymous_json_blocked  403 with the block page for /new/.json
        closed_json         what /new/.json is answered then, if not with the block page
        feed_blocked        the same for /new/.rss without a valid feed token
        feed_login          a wrong feed token gets a login page
        feed_filter         called with each feed, gives the bytes to send in its place
        refusals_in_html    refusals of a subreddit are pages for people, not JSON
        feed_tokens         {feed token: user name}
        reasons             whether refusals of a subreddit carry their `reason`
        faults              called with (method, path, query), gives a Fault, a Reply, or None
    """

    depth = 1000
    """Reddit lists this many items, the places of removed ones included."""

    def __init__(self, clock: Clock = time) -> None:
        """Begin with no posts, no subreddits, and no limits but Reddit's 1000 in 10 minutes."""
        self.clock = clock
        self.clients = {"app-id": "app-secret", "installed-id": ""}
        self.token_lifetime = 86_400.0
        self.budgets: dict[str, Budget | None] = {"oauth": Budget()}
        self.anonymous_json_blocked = False
        self.closed_json: Reply | None = None
        self.feed_blocked = False
        self.feed_login = False
        self.feed_filter: Callable[[bytes], bytes] | None = None
        self.refusals_in_html = False
        self.feed_tokens: dict[str, str] = {}
        self.reasons = True
        self.faults: Callable[[str, str, dict[str, str]], Fault | Reply | None] | None = None
        self.log: list[Seen] = []
        self.posts: dict[str, Post] = {}
        """Every post ever added, by id."""
        self.listed: dict[str, float] = {}
        """When each post was first listed, by id."""
        self.removed: set[str] = set()
        self.recorded: deque[bytes] = deque()
        """Whole listings that are still to be served."""
        self._lock = threading.RLock()
        self._sequence = itertools.count()
        self._windows: dict[str, list[Item]] = {"all": []}
        self._items: dict[str, Item] = {}
        self._agenda: list[tuple[float, int, Callable[[float], None]]] = []
        self._tokens: dict[str, float] = {}
        self._refused: dict[str, str] = {}
        self._script: list[tuple[str, Fault | Reply | None]] = []
        self._page: bytes = b""
        self._server: _Server | None = None
        self._port = 0

    # -- the server

    def start(self, port: int = 0) -> FakeReddit:
        """Listen on the loopback; a second start takes the port of the first again."""
        self._server = _Server(self, port or self._port)
        self._port = self._server.server_address[1]
        return self

    def stop(self) -> None:
        """Cut every connection and stop listening: from now on they are refused."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    def release(self) -> None:
        """Let every hanging, dripping and giant answer end."""
        if self._server is not None:
            self._server.release()

    def connections(self) -> int:
        """Count the connections that are open now."""
        return len(self._server.connections) if self._server else 0

    @property
    def url(self) -> str:
        """Give the address for REDPIPE_URL."""
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> FakeReddit:
        """Start, unless it has been started."""
        return self if self._server else self.start()

    def __exit__(self, *exc: object) -> None:
        """Stop."""
        self.stop()

    # -- posts

    def create(self, *subreddits: str) -> None:
        """Let subreddits exist, without posts; adding a post does it as well."""
        for name in subreddits:
            self._windows.setdefault(name.lower(), [])

    def add(
        self, post: Post, *, visible_utc: float | None = None, rank: float | None = None
    ) -> Post:
        """List a post, now or once the clock reaches `visible_utc`.

        rank: its place, among the `created_utc` of the others; its own by default. Index lag
        and late approval let a post appear below newer ones; with rank=visible_utc it stands
        above them. A post that was removed is listed again.
        """
        with self._lock:
            key = (post["created_utc"] if rank is None else rank, next(self._sequence))
            self.posts[post["id"]] = post
            self.removed.discard(post["id"])
            if visible_utc is None or visible_utc <= self.clock.time():
                self._list(Item(key, post), visible_utc or self.clock.time())
            else:
                self._later(visible_utc, lambda utc: self._list(Item(key, post), utc))
        return post

    def remove(self, identifier: str, *, utc: float | None = None) -> None:
        """Take a post out of the listings, now or at a time to come; its place stays empty."""
        with self._lock:
            if utc is not None and utc > self.clock.time():
                self._later(utc, lambda _: self.remove(identifier))
                return
            self.removed.add(identifier)
            if identifier in self._items:
                self._items[identifier].removed = True

    def take_down(self, identifier: str, category: str = "deleted") -> None:
        """Let a post be deleted or removed: no listing has it, and asked for it shows less.

        category: what Reddit then says in `removed_by_category`.
        """
        self.remove(identifier)
        by_author = category in {"deleted", "author"}
        word = "[deleted]" if by_author else "[removed]"
        with self._lock:
            self.posts[identifier].update(removed_by_category=category, selftext=word)
        if by_author:
            self.forget_author(identifier)

    def forget_author(self, identifier: str) -> None:
        """Let the account of a post's author be deleted."""
        with self._lock:
            self.posts[identifier]["author"] = "[deleted]"
            self.posts[identifier].pop("author_fullname", None)

    def purge(self, identifier: str) -> None:
        """Let a post be gone without a trace."""
        self.remove(identifier)
        with self._lock:
            del self.posts[identifier]

    def grow(
        self,
        rate: float,
        subreddits: Iterable[str] = ("python",),
        jitter: float | Callable[[random.Random], float] = 0.0,
        *,
        start: float | None = None,
        seed: int = 0,
    ) -> None:
        """Let posts arrive by themselves, `rate` a second, from `start` (default: now) on.

        jitter: how late they are listed: the mean of an exponential distribution, in seconds,
        or a function of a Random. 1.2 % of them have a deleted author.
        """
        names = list(subreddits)
        self.create(*names)
        arrivals = _arrivals(rate, names, jitter, random.Random(seed))
        with self._lock:
            self._arrive(arrivals, self.clock.time() if start is None else start)

    def listing_ids(self, name: str = "all") -> list[str]:
        """Give the ids that a listing holds now, newest first."""
        with self._lock:
            self._advance()
            return [item.post["id"] for item in self._listed_items(name.lower())]

    def _arrive(self, arrivals: Iterator[tuple[float, float, Post]], began: float) -> None:
        """Put the next arrival on the agenda, which then puts the one after it there."""
        wait, late, post = next(arrivals)
        utc = began + wait
        post["created_utc"], post["created"] = float(int(utc)), float(int(utc)) + 28_800

        def happen(_: float) -> None:
            self.add(post, visible_utc=utc + late)
            self._arrive(arrivals, utc)

        self._later(utc, happen)

    def _later(self, utc: float, action: Callable[[float], None]) -> None:
        heapq.heappush(self._agenda, (utc, next(self._sequence), action))

    def _advance(self) -> None:
        """Do what has become due."""
        while self._agenda and self._agenda[0][0] <= self.clock.time():
            utc, _, action = heapq.heappop(self._agenda)
            action(utc)

    def _list(self, item: Item, utc: float) -> None:
        """Show an item; one beyond the depth falls off at once."""
        identifier = item.post["id"]
        if identifier in self.removed:
            return  # before it was ever seen
        if identifier in self._items:
            self._items[identifier].removed = True
        self._items[identifier] = item
        self.listed.setdefault(identifier, utc)
        for name in {"all", str(item.post.get("subreddit", "all")).lower()}:
            window = self._windows.setdefault(name, [])
            bisect.insort(window, item, key=PLACE)
            del window[: -self.depth]

    def _listed_items(self, name: str) -> list[Item]:
        """Give what is listed, newest first."""
        return [item for item in reversed(self._windows.get(name, [])) if not item.removed]

    # -- access

    def refuse(self, subreddit: str, why: str = "private") -> None:
        """Refuse a subreddit from now on; with why="" serve it again."""
        self.create(subreddit)
        self._refused[subreddit.lower()] = why

    def revoke_tokens(self) -> None:
        """End every token before its time."""
        self._tokens.clear()

    def script(self, *faults: Fault | Reply | None, on: str = "/new") -> None:
        """Queue what the next requests get whose path holds `on`; None is the usual answer."""
        with self._lock:
            self._script += [(on, fault) for fault in faults]

    def serve_listing_bytes(self, *bodies: bytes) -> None:
        """Serve whole listings, one for each poll of a newest page, in the place of posts.

        The last one stays. Below its last item there is nothing: `after=` gives an empty page.
        """
        self.recorded.extend(bodies)

    def requests(self, on: str = "/new") -> list[Seen]:
        """Give those requests of the log whose path holds `on`."""
        return [seen for seen in self.log if on in seen.path]

    # -- answering

    def handle(
        self, method: str, path: str, query: dict[str, str], headers: dict[str, str], body: bytes
    ) -> Fault | Reply:
        """Answer one request, faults and all, and log it."""
        with self._lock:
            answer = self._fault(method, path, query)
            if answer is None:
                answer = self.respond(method, path, query, headers, body)
            elif isinstance(answer, Fault) and answer.kind in {"truncate", "drip"}:
                answer = answer._replace(reply=self.respond(method, path, query, headers, body))
            status = 0 if isinstance(answer, Fault) else answer[0]
            self.log.append(Seen(method, path, query, headers, body, self.clock.time(), status))
        return answer

    def respond(
        self, method: str, path: str, query: dict[str, str], headers: dict[str, str], body: bytes
    ) -> Reply:
        """Answer one request by the rules alone."""
        with self._lock:
            self._advance()
            status, answer, content = self._route(method, path, query, headers, body)
        now = formatdate(self.clock.time(), usegmt=True)
        return status, {"date": now, "server": "snooserv", **answer}, content

    def _fault(self, method: str, path: str, query: dict[str, str]) -> Fault | Reply | None:
        """Take what the script has for this request, or ask `faults`."""
        for index, (on, fault) in enumerate(self._script):
            if on in path:
                del self._script[index]
                return fault
        return self.faults(method, path, query) if self.faults else None

    def _route(
        self, method: str, path: str, query: dict[str, str], headers: dict[str, str], body: bytes
    ) -> Reply:
        """Find the endpoint that a path means."""
        if path.rstrip("/") == "/api/v1/access_token":
            return self._token(method, headers, body)
        if path.startswith("/subreddits/search"):
            t5 = {"kind": "t5", "data": {"id": "2zzzz", "name": "t5_2zzzz", "title": "A place"}}
            return reply(200, listing([json.dumps(t5)]))
        if path == "/api/info":
            return self._within_budget("oauth", "", query, headers)
        found = re.fullmatch(r"/r/([^/]+)/new(?:/?|/?\.(json|rss))", path)
        if found is None or method != "GET":
            return error_reply(404, "Not Found")
        source = {None: "oauth", "json": "json", "rss": "feed"}[found[2]]
        if source == "feed" and self._has_feed_token(query):
            source = "token feed"
        elif source == "feed" and "feed" in query and self.feed_login:
            return login_page()
        return self._within_budget(source, found[1], query, headers)

    def _within_budget(
        self, source: str, name: str, query: dict[str, str], headers: dict[str, str]
    ) -> Reply:
        """Answer a request for a listing, or for posts, unless its sender may not have it."""
        if (refusal := self._refused_access(source, headers)) is not None:
            return refusal
        now = self.clock.time()
        budget = self.budgets.get(source)
        if budget is None:
            return self._name(source, name, query)
        if not budget.spend(now):
            return budget.refusal(now)
        status, more, body = self._name(source, name, query)
        return status, {**more, **budget.as_headers(now)}, body

    def _refused_access(self, source: str, headers: dict[str, str]) -> Reply | None:
        """Refuse a request without a valid token, or from a blocked client."""
        if source == "oauth":
            scheme, _, token = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or self._tokens.get(token, 0) <= self.clock.time():
                return self._unauthorized('Bearer realm="reddit", error="invalid_token"')
        if source == "json" and self.anonymous_json_blocked:
            return self.closed_json or block_page()
        return block_page() if source == "feed" and self.feed_blocked else None

    def _has_feed_token(self, query: dict[str, str]) -> bool:
        """Tell whether a personal feed token is there and its user's."""
        user = self.feed_tokens.get(query.get("feed", ""))
        return user is not None and user.lower() == query.get("user", "").lower()

    def _unauthorized(self, challenge: str) -> Reply:
        status, headers, body = error_reply(401, "Unauthorized")
        return status, {**headers, "www-authenticate": challenge}, body

    def _token(self, method: str, headers: dict[str, str], body: bytes) -> Reply:
        """Give a token to an app, by either of the two grants."""
        if method != "POST":
            return error_reply(404, "Not Found")
        app, secret = _basic(headers.get("authorization", ""))
        if self.clients.get(app) != secret:
            return self._unauthorized('Basic realm="reddit"')
        form = dict(parse_qsl(body.decode()))
        if error := _grant_error(form, secret):
            return json_reply(200, {"error": error})
        token = f"invented-token-{next(self._sequence)}"
        self._tokens[token] = self.clock.time() + self.token_lifetime
        answer: dict[str, Any] = {"access_token": token, "token_type": "bearer"}
        if "device_id" in form:
            answer["device_id"] = form["device_id"]
        return json_reply(200, {**answer, "expires_in": int(self.token_lifetime), "scope": "*"})

    def _name(self, source: str, name: str, query: dict[str, str]) -> Reply:
        """Answer for a name that is there and open to all; without a name, for posts."""
        if not name:
            return self._info(query)
        if self.recorded or self._page:
            return reply(200, self._recorded_page(query))
        if name.lower() not in self._windows:
            return self._no_subreddit(source, name)
        if why := self._refused.get(name.lower()):
            return self._refusal(why)
        return self._page_of(source, name, query)

    def _info(self, query: dict[str, str]) -> Reply:
        """Answer with posts by their fullnames; what is unknown is left out."""
        names = query.get("id", "").split(",")
        if len(names) > 100:
            return error_reply(400, "Bad Request", reason="TOO_MANY_THING_IDS")
        known = [self.posts[name[3:]] for name in dict.fromkeys(names) if self._known(name)]
        return _listing_reply(query, map(thing, known))

    def _refusal(self, why: str) -> Reply:
        """Refuse a subreddit the way its state asks for."""
        status, message = REFUSALS[why]
        if self.refusals_in_html:
            return reply(status, f"<!doctype html><html><h1>{message}</h1></html>", HTML)
        return error_reply(status, message, **({"reason": why} if self.reasons else {}))

    def _no_subreddit(self, source: str, name: str) -> Reply:
        """Send a request for a subreddit that does not exist to the search."""
        extension = {"json": ".json", "oauth": ""}.get(source, ".rss")
        place = f"{self.url if self._port else ''}/subreddits/search{extension}?q={quote(name)}"
        body = (
            f"<html>\n <head>\n  <title>302 Found</title>\n </head>\n <body>{place}</body>\n</html>"
        )
        return reply(302, body, {**HTML, "location": place})

    def _page_of(self, source: str, name: str, query: dict[str, str]) -> Reply:
        """Answer with one page."""
        page, after = self._slice(name.lower(), query)
        if "feed" in source:
            feed = atom_around([item.as_atom() for item in page], name, self.clock.time())
            return reply(200, self.feed_filter(feed) if self.feed_filter else feed, ATOM)
        return _listing_reply(query, (item.as_json() for item in page), after)

    def _slice(self, name: str, query: dict[str, str]) -> tuple[list[Item], str | None]:
        """Cut the page out of a listing; give the anchor of the next one with it.

        An anchor that was removed gives an empty page, one that never was is ignored.
        """
        items, limit, start = self._listed_items(name), _limit(query.get("limit", "")), 0
        if self._known(anchor := query.get("after", "")):
            item = self._items.get(anchor[3:])
            start = items.index(item) + 1 if item in items else len(items)
        page = items[start : start + limit]
        more = bool(page) and start + len(page) < len(items)
        return page, f"t3_{page[-1].post['id']}" if more else None

    def _known(self, anchor: str) -> bool:
        """Tell whether an anchor is the fullname of a post that there ever was."""
        return anchor[:3] == "t3_" and anchor[3:] in self.posts

    def _recorded_page(self, query: dict[str, str]) -> bytes:
        """Take the next recorded listing for a newest page; below it is only the rest of it."""
        if query.get("after"):
            children = json.loads(self._page)["data"]["children"]
            names = [str(child["data"].get("name")) for child in children]
            behind = names.index(query["after"]) + 1 if query["after"] in names else len(names)
            return listing([json.dumps(child) for child in children[behind:]])
        if self.recorded:
            self._page = self.recorded.popleft()
        return self._page


def _arrivals(
    rate: float,
    names: list[str],
    jitter: float | Callable[[random.Random], float],
    dice: random.Random,
) -> Iterator[tuple[float, float, Post]]:
    """Make up posts: the seconds since the one before, those until it is listed, the post."""
    for n in itertools.count(1):
        extra = {"author": "[deleted]"} if dice.random() < 0.012 else {}
        post = make_post(n, 0, dice.choice(names), **extra)
        late = jitter(dice) if callable(jitter) else dice.expovariate(1 / jitter) if jitter else 0.0
        yield dice.expovariate(rate), late, post


def _basic(header: str) -> tuple[str, str]:
    """Read the name and the password of HTTP Basic; empty ones from anything else."""
    scheme, _, value = header.partition(" ")
    if scheme.lower() != "basic":
        return "", ""
    name, _, password = base64.b64decode(value).decode(errors="replace").partition(":")
    return name, password


def _grant_error(form: dict[str, str], secret: str) -> str:
    """Give the error that Reddit has for a request for a token, or nothing."""
    grant = form.get("grant_type", "")
    if grant == INSTALLED:
        return "" if 20 <= len(form.get("device_id", "")) <= 50 else "invalid_request"
    if grant != "client_credentials":
        return "unsupported_grant_type"
    return "" if secret else "unauthorized_client"


def _limit(text: str) -> int:
    """Read a page's length as Reddit does: 25 unless told, at least 1, at most 100."""
    return max(1, min(100, int(text))) if re.fullmatch(r"-?[0-9]+", text) else 25


def _listing_reply(
    query: dict[str, str], children: Iterable[str], after: str | None = None
) -> Reply:
    """Answer with a listing; without `raw_json=1` Reddit escapes three characters."""
    body = listing(children, after)
    if query.get("raw_json") != "1":
        body = body.replace(b"&", b"&amp;").replace(b"<", b"&lt;").replace(b">", b"&gt;")
    return reply(200, body)


# ------------------------------------------------------------- the server


class _Server(socketserver.ThreadingTCPServer):
    """Serve a FakeReddit over HTTP/1.1 until told to stop."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, reddit: FakeReddit, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.reddit = reddit
        self.released = threading.Event()
        self.connections: set[socket.socket] = set()
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def release(self) -> None:
        """End what hangs now; what comes later hangs again."""
        self.released.set()
        self.released = threading.Event()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Remember a connection so that `stop` can cut it."""
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget a connection."""
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that went away."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def stop(self) -> None:
        """Cut all connections, and refuse new ones."""
        self.shutdown()
        self.released.set()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()
        self.thread.join()


class _Handler(BaseHTTPRequestHandler):
    """Read one request after the other from a connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # one packet for headers and body, where they fit
    server: _Server

    def do_GET(self) -> None:
        """Answer a request of any method."""
        target = urlsplit(self.path)
        query = dict(parse_qsl(target.query, keep_blank_values=True))
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))
        released = self.server.released
        answer = self.server.reddit.handle(self.command, unquote(target.path), query, headers, body)
        if isinstance(answer, Fault):
            self.close_connection = True
            getattr(self, f"_{answer.kind}")(answer, released)
        else:
            self._send(*answer)

    do_POST = do_HEAD = do_PUT = do_DELETE = do_GET

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        headers = dict(headers)
        accepted = self.headers.get("accept-encoding", "")
        if "gzip" in accepted and len(body) > 1000 and "content-encoding" not in headers:
            body = gzip.compress(body, 1)
            headers["content-encoding"] = "gzip"
        self._send_head(status, {**headers, "content-length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)
            self.wfile.flush()

    def _send_head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _refuse(self, fault: Fault, released: threading.Event) -> None:
        """Close without a word."""

    def _reset(self, fault: Fault, released: threading.Event) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # Closed below the socket object: the server's own shutdown would send a FIN first.
        self.server.connections.discard(self.connection)
        os.close(self.connection.detach())

    def _hang(self, fault: Fault, released: threading.Event) -> None:
        released.wait(fault.seconds)

    def _truncate(self, fault: Fault, released: threading.Event) -> None:
        status, headers, body = fault.reply
        self._send_head(status, {**headers, "content-length": str(len(body))})
        self.wfile.write(body[: len(body) // 2])

    def _drip(self, fault: Fault, released: threading.Event) -> None:
        status, headers, body = fault.reply
        self._send_head(status, {**headers, "content-length": str(len(body))})
        for position in range(min(len(body), int(fault.seconds))):
            self.wfile.write(body[position : position + 1])
            self.wfile.flush()
            if released.wait(1):
                return

    def _giant(self, fault: Fault, released: threading.Event) -> None:
        self._send_head(200, {**JSON, "content-length": "1000000000"})
        ends = time.monotonic() + fault.seconds
        chunk = b" " * 100_000
        for _ in range(10_000):
            if released.is_set() or time.monotonic() > ends:
                return
            self.wfile.write(chunk)

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet: the log is FakeReddit's."""


def main() -> None:
    """Serve a Reddit that grows, until stopped."""
    parser = argparse.ArgumentParser(description="Serve an invented Reddit that grows.")
    parser.add_argument("--port", type=int, default=0, help="default: any free one")
    parser.add_argument("--rate", type=float, default=1.0, help="posts a second, default 1")
    parser.add_argument("--jitter", type=float, default=0.0, help="mean delay, seconds, default 0")
    parser.add_argument("--subreddits", default="python,rust", help="default python,rust")
    parser.add_argument(
        "--past", type=float, default=300.0, help="seconds it began ago, default 300"
    )
    parser.add_argument("--block-json", action="store_true", help="as Reddit does since May 2026")
    asked = parser.parse_args()
    reddit = FakeReddit()
    reddit.anonymous_json_blocked = asked.block_json
    reddit.grow(
        asked.rate, asked.subreddits.split(","), asked.jitter, start=time.time() - asked.past
    )
    with contextlib.suppress(KeyboardInterrupt), reddit.start(asked.port):
        print(reddit.url, flush=True)
        print("app id and secret:", *next(iter(reddit.clients.items())), flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
