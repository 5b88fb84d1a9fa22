"""The Atom feed: whatever is wrong in one entry, the others are read, and what was meant is kept.

Feeds come from a real server; a test changes them on their way.
"""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import query
from fake_reddit import FakeReddit, atom_entry, atom_feed, login_page, make_post, moved
from pipeline import Access, Failed, Gone, Reddit, RedpipeError, Refused, http_fetch
from virtual import VirtualClock, fetch_from

NOW = 1_790_000_000
POSTS = [make_post(n, NOW - n, title=f"Title {n}") for n in range(5)]
IDS = [post["id"] for post in POSTS]
FEED = atom_feed(POSTS, "python", NOW)
THIRD = b"Title 2"


@pytest.fixture
def world():
    """Serve five posts in r/python and one in r/rust by the feed alone."""
    with FakeReddit(VirtualClock(NOW)) as reddit:
        reddit.anonymous_json_blocked = True
        for post in POSTS:
            reddit.add(post)
        reddit.add(make_post(9, NOW - 9, "rust"))
        yield reddit


def reader(world, **access):
    """Give a Reddit that has found out that only the feed answers."""
    reddit = Reddit(Access(world.url, **access), http_fetch(), world.clock)
    with pytest.raises(Failed, match="taking the feed"):
        reddit.page("python")
    return reddit


def titles(world, feed):
    """Read a feed through the server; give its titles."""
    world.feed_filter = lambda _: feed
    return [post.get("title") for post in reader(world).page("python").posts]


# what is put in the place of the third title, and what becomes of it
MENDED = {
    "U+001B": (b"a \x1b[31m b", "a \ufffd[31m b"),
    "U+0008": (b"a\x08b", "a\ufffdb"),
    "U+0000": (b"a\0b", "a\ufffdb"),
    "U+FFFE": ("a\ufffeb".encode(), "a\ufffdb"),
    "U+FFFF": ("a\uffffb".encode(), "a\ufffdb"),
    "a reference to U+001B": (b"a&#x1b;b", "a\ufffdb"),
    "a reference to U+001B in capitals": (b"a&#X1B;b", "a\ufffdb"),
    "a decimal reference to U+0008": (b"a&#8;b", "a\ufffdb"),
    "a reference to U+0000": (b"a&#0;b", "a\ufffdb"),
    "a reference to U+FFFE": (b"a&#xfffe;b", "a\ufffdb"),
    "a reference to a surrogate": (b"a&#xD800;b", "a\ufffdb"),
    "a reference beyond Unicode": (b"a&#x110000;b", "a\ufffdb"),
    "a reference that is none": (b"a&#xyz;b&#;c&#12c;", "a&#xyz;b&#;c&#12c;"),
    "a reference without end": (b"a&#" + b"9" * 5000 + b";b", "a&#" + "9" * 5000 + ";b"),
    "good references": (b"&#65;&#x42;&#13;&#x1F600;", "AB\r\U0001f600"),
    "bad UTF-8": (b"Caf\xe9 \xff\xfe au lait", "Caf\ufffd \ufffd\ufffd au lait"),
    "a surrogate": (b"a\xed\xa0\x80b", "a\ufffd\ufffd\ufffdb"),
    "a character cut short": (b"a\xf0\x9f\x98", "a\ufffd"),
    "a bare ampersand": (b"AT&T & more &", "AT&T & more &"),
    "an ampersand before a word": (b"a&b; c&copy d", "a&b; c&copy d"),
    "entities of HTML": (b"a&nbsp;b &eacute;&hellip; &LT;", "a\xa0b \xe9\u2026 <"),
    "an unknown entity": (b"a&nosuch;b", "a&nosuch;b"),
    "the five of XML": (b"&lt;&gt;&amp;&quot;&apos;", "<>&\"'"),
    "what was escaped twice": (b"&amp;nbsp; &amp;#x1b; &amp;amp;", "&nbsp; &#x1b; &amp;"),
    "a CDATA": (b"<![CDATA[a <b> & c &amp; d]]>", "a <b> & c &amp; d"),
    "a document type in a CDATA": (b"<![CDATA[<!DOCTYPE html>]]>", "<!DOCTYPE html>"),
    "a document type as text": (b"&lt;!DOCTYPE html&gt;", "<!DOCTYPE html>"),
    "an entry in a CDATA": (b"<![CDATA[</entry><entry>]]>", "</entry><entry>"),
    "an end of the feed in a CDATA": (b"<![CDATA[</feed>]]>", "</feed>"),
    "an escape in a CDATA": (b"<![CDATA[a\x1bb]]>", "a\ufffdb"),
    "two CDATAs": (b"<![CDATA[a]]>]]&gt;<![CDATA[b]]>", "a]]>b"),
}
UNREADABLE = {
    "an element without end": b"a<b>c",
    "a tag that is cut": b"a<",
    "an end without a beginning": b"a</b>",
    "a CDATA without end": b"<![CDATA[a",
    "a comment without end": b"<!-- a",
    "a document type": b'<!DOCTYPE a [<!ENTITY b "c">]>&b;',
    "an unknown prefix": b"<x:y/>",
}


@pytest.mark.parametrize(("bad", "meant"), MENDED.values(), ids=MENDED)
def test_a_bad_character_in_one_entry_is_mended(bad, meant, world):
    feed = FEED.replace(THIRD, bad)
    assert titles(world, feed) == ["Title 0", "Title 1", meant, "Title 3", "Title 4"]


@pytest.mark.parametrize("bad", UNREADABLE.values(), ids=UNREADABLE)
def test_an_entry_that_cannot_be_read_is_left_out_and_counted(bad, world):
    world.feed_filter = lambda feed: feed.replace(THIRD, bad)
    page = reader(world).page("python")
    assert [post["title"] for post in page.posts] == ["Title 0", "Title 1", "Title 3", "Title 4"]
    assert page.things == 5


@pytest.mark.parametrize("bad", [*UNREADABLE.values(), *(bad for bad, _ in MENDED.values())])
def test_what_is_wrong_in_a_text_that_is_not_kept_is_no_matter(bad, world):
    feed = FEED.replace(b"Nobody wrote text 2.", bad)
    assert titles(world, feed) == [f"Title {n}" for n in range(5)]


DECLARED = b'<?xml version="1.0" encoding="UTF-8"?>'
CAFE = atom_feed([make_post(1, NOW, title="Caf\xe9 \u2026")], "python", NOW)
WHOLE = {
    "blanks before the declaration": b" \r\n\t" + CAFE,
    "a byte-order mark": b"\xef\xbb\xbf" + CAFE,
    "both": b"\xef\xbb\xbf \n" + CAFE,
    "no declaration": CAFE.replace(DECLARED, b""),
    "a comment and an instruction before the root": DECLARED
    + b'\n<!-- a --><?xml-stylesheet href="a.xsl"?>\n'
    + CAFE.removeprefix(DECLARED),
    "another encoding declared than there is": CAFE.replace(b"UTF-8", b"ISO-8859-1"),
    "an encoding declared that does not exist": CAFE.replace(b"UTF-8", b"klingon"),
    "a newline behind it": CAFE + b"\n<!-- cached -->\n",
    "a content without end tag": re.sub(rb"(?s)<content.*</content>", b"<content/>", CAFE),
    "a version that is not yet": CAFE.replace(b'"1.0"', b'"1.1"'),
}


@pytest.mark.parametrize("feed", WHOLE.values(), ids=WHOLE)
def test_a_feed_in_another_form_is_read(feed, world):
    assert titles(world, feed) == ["Caf\xe9 \u2026"]


def bomb(size):
    """Give a document type whose last entity unpacks to 10 to the power of `size` bytes."""
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, size))
    return f'<!DOCTYPE feed [<!ENTITY e0 "aaaaaaaaaa">{entities}]>'.encode()


NO_FEED = {
    "a document type before the root": FEED.replace(b"?><feed", b"?><!DOCTYPE feed><feed"),
    "an entity bomb": FEED.replace(b"?><feed", b"?>" + bomb(12) + b"<feed").replace(
        THIRD, b"&e11;"
    ),
    "an entity bomb behind a comment": b"<!-- -->" + bomb(9) + FEED.removeprefix(DECLARED),
    "an entity from a file": b'<!DOCTYPE feed [<!ENTITY a SYSTEM "file:///etc/passwd">]>' + FEED,
    "half of it": FEED[: len(FEED) // 2],
    "all but its end": FEED.removesuffix(b"</feed>"),
    "another root": FEED.replace(b"<feed ", b"<rss ").replace(b"</feed>", b"</rss>"),
    "another namespace": FEED.replace(b"http://www.w3.org/2005/Atom", b"http://example.invalid/"),
    "instructions without end": b"<?a?>" * 50_000,
    "comments without end": b"<!--" * 50_000,
    "entries without end": b"<entry>" * 50_000,
    "sections without end": FEED[:400] + b"<![CDATA[" * 50_000,
}


@pytest.mark.parametrize("feed", NO_FEED.values(), ids=NO_FEED)
@pytest.mark.timeout(20)
def test_what_is_no_feed_is_a_failed_request(feed, world):
    with pytest.raises(Failed, match=r"^HTTP 200 \(application/atom.xml\) instead of a listing$"):
        titles(world, feed)


# Any damage


PIECES = [b"<entry>", b"<entry", b"</entry>", b"<feed>", b"</feed>", b"<content>", b"</content>"]
PIECES += [b"<id>", b"<title>", b"<![CDATA[", b"]]>", b"<!--", b"-->", b"<!DOCTYPE a>", b"<?xml?>"]
PIECES += [b"?>", b"<", b">", b"&", b"&#x1b;", b'"', b"\0", b"\x1b", b"\xff", b"\xed\xa0\x80", b""]
bad_bytes = st.sampled_from(PIECES) | st.binary(max_size=8)
cuts_of_an_entry = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 40), bad_bytes), min_size=1, max_size=6
)
"""Places, lengths, and what comes there."""


def damaged(number, cuts):
    """Give the feed with one entry damaged."""
    entry = bad = atom_entry(POSTS[number]).encode()
    assert FEED.count(entry) == 1
    for place, length, piece in cuts:
        start = int(place * len(bad))
        bad = bad[:start] + piece + bad[start + length :]
    return FEED.replace(entry, bad)


@given(st.integers(0, len(POSTS) - 1), cuts_of_an_entry)
def test_whatever_is_damaged_in_one_entry_the_others_are_read(number, cuts):
    clock = VirtualClock(NOW)
    fake = FakeReddit(clock)
    fake.create("python")
    fake.anonymous_json_blocked = True
    fake.feed_filter = lambda _: damaged(number, cuts)
    reddit = Reddit(Access(), fetch_from(fake, clock), clock)
    with pytest.raises(Failed, match="taking the feed"):
        reddit.page("python")
    read = [(post["id"], post.get("title")) for post in reddit.page("python").posts]
    others = [(post["id"], post["title"]) for post in POSTS if post is not POSTS[number]]
    assert [one for one in read if one[0] in IDS and one[0] != IDS[number]] == others


# Entries that are no posts


def of_others(*_):
    """Give a feed of comments, and of entries whose ids are addresses."""
    feed = atom_feed([make_post(n, NOW - n) for n in range(3)], "python", NOW)
    return feed.replace(b"<id>t3_", b"<id>t1_", 1).replace(
        b"<id>t3_", b"<id>https://reddit.invalid/"
    )


def test_a_page_without_a_post_is_a_failed_request_as_the_newest_and_else_empty(world):
    reddit = reader(world)
    assert len(reddit.page("python").posts) == 5
    world.feed_filter = of_others
    page = reddit.page("python", f"t3_{IDS[-1]}")
    assert (page.posts, page.things, page.after) == ([], 0, None)
    with pytest.raises(Failed, match=r"^a listing without posts$"):
        reddit.page("python")
    world.feed_filter = lambda _: atom_feed([], "python", NOW)
    page = reddit.page("python")
    assert (page.posts, page.things, page.after) == ([], 0, None)


def test_the_anchor_is_the_last_post_that_can_be_read(world):
    world.feed_filter = lambda feed: feed.replace(b"Title 4", b"a<b>c")
    assert reader(world).page("python").after == f"t3_{IDS[3]}"


# Refusals


@pytest.mark.parametrize("why", ["private", "quarantined"])
def test_403_with_html_for_one_name_is_that_names_trouble_while_others_are_answered(why, world):
    world.refuse("closed", why)
    world.refusals_in_html = True
    with pytest.raises(Refused, match=r"^Reddit blocks this address, or the subreddit is private"):
        reader(world).page("closed")  # nothing is known of others
    reddit = reader(world)
    assert len(reddit.page("python").posts) == 5
    with pytest.raises(Gone, match=r"^cannot be read: private or quarantined, it seems \(403\)$"):
        reddit.page("closed")
    assert len(reddit.page("rust").posts) == 1


@pytest.mark.parametrize("names", [["python"], ["rust", "python", "rust", "python"]])
def test_403_with_html_for_everything_is_a_block_however_many_names_there_are(names, world):
    reddit = reader(world)
    assert len(reddit.page("python").posts) == 5
    world.feed_blocked = True
    for number, name in enumerate(names):
        with pytest.raises(RedpipeError if name == "rust" and not number else Refused):
            reddit.page(name)


@pytest.mark.parametrize("login", [None, moved("https://www.reddit.com/login/?dest=x")])
def test_a_login_for_a_feed_token_points_at_the_credentials(login, world):
    world.feed_login = True
    reddit = reader(world, feed_token="a wrong one", username="somebody")
    world.script(login)
    with pytest.raises(Refused) as refused:
        reddit.page("python")
    sentence = "Reddit answers the feed token with a login page; see README, Credentials"
    assert str(refused.value) == sentence
    assert len(reader(world).page("python").posts) == 5


CLOSED = {
    "private": "r/closed cannot be read: private or quarantined, it seems (403)",
    "banned": "r/closed does not exist, or is banned (404)",
}
BAD = {0: b"a \x1b[31m b", 1: b"Caf\xe9", 2: b"AT&T", 3: b"a&nbsp;b"}


@pytest.mark.parametrize("why", CLOSED)
def test_the_built_file_stores_every_post_though_one_name_is_closed_and_titles_are_bad(
    why, redpipe, fake_reddit, database
):
    def spoil(feed):
        for number, title in BAD.items():
            feed = feed.replace(b"<title>Title %d<" % number, b"<title>%s<" % title)
        return b" " + feed

    fake_reddit.anonymous_json_blocked, fake_reddit.closed_json = True, login_page()
    fake_reddit.refusals_in_html = True
    fake_reddit.feed_filter = spoil
    fake_reddit.refuse("closed", why)
    for post in POSTS:
        fake_reddit.add(post)
    done = redpipe("--once", database, "python", "closed")
    assert done == (69, "", f"redpipe: {CLOSED[why]}\n")
    titles = [title for (title,) in query(database, "SELECT title FROM posts ORDER BY id")]
    assert titles == ["a \ufffd[31m b", "Caf\ufffd", "AT&T", "a\xa0b", "Title 4"]
