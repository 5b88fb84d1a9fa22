"""Secrets: told to nobody but Reddit, whatever goes wrong.

The client secret, the token it is exchanged for, and the feed token.
"""

from __future__ import annotations

import base64
import json
import logging
import math
import re
import select
import socket
import socketserver
import ssl
import threading
import urllib.parse
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

import pytest
import trustme

import pipeline
from artefact import serve_listing
from conftest import Done
from fake_reddit import (
    REFUSE,
    RESET,
    TRUNCATE,
    FakeReddit,
    block_page,
    error_reply,
    json_reply,
    listing,
    make_post,
    reply,
    thing,
    wrong_gzip,
)
from virtual import VirtualClock, stream

pytestmark = pytest.mark.timeout(60)

SECRET = "s3cret+of/the&app%"
FEED_TOKEN = "feed+t0ken/of&one%"
BEARER = "b3arer-of-one-hour"
PROXY_PASSWORD = "pr0xy-password"
APP = {"REDDIT_CLIENT_ID": "app-id", "REDDIT_CLIENT_SECRET": SECRET}
FEED = {"REDDIT_FEED_TOKEN": FEED_TOKEN, "REDDIT_USERNAME": "some_body"}
ALL = {**APP, **FEED}
FAR = "https://reddit.invalid"
GRANT = json_reply(200, {"access_token": BEARER, "token_type": "bearer", "expires_in": 86_400})


def basic(user, password):
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def disguises(secret):
    """Give the forms in which a secret travels."""
    forms = {
        secret,
        urllib.parse.quote(secret),
        urllib.parse.quote(secret, safe=""),
        urllib.parse.quote_plus(secret),
        json.dumps(secret)[1:-1],
        secret.encode().hex(),
        base64.b64encode(secret.encode()).decode().rstrip("="),
        basic("app-id", secret).rstrip("="),
    }
    return {form.encode() for form in forms}


DISGUISES = set().union(*map(disguises, (SECRET, FEED_TOKEN, BEARER, PROXY_PASSWORD)))


def secrets_in(text):
    content = text.encode() if isinstance(text, str) else text
    return sorted(form for form in DISGUISES if form in content)


def leaks(done, directory):
    """Search what a run said, and every file it left, for secrets."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    found = [*secrets_in(done.out), *secrets_in(done.err)]
    return found + [path for path in files if secrets_in(path.read_bytes())]


@pytest.fixture
def fake_reddit(fake_reddit):
    """Know the app and the feed token."""
    fake_reddit.clients = {"app-id": SECRET}
    fake_reddit.feed_tokens = {FEED_TOKEN: "some_body"}
    fake_reddit.budgets = {}
    fake_reddit.add(make_post(1))
    return fake_reddit


@pytest.fixture
def follow(redpipe, tmp_path):
    """Follow until a word is said; give all that was said, in which no secret may be."""

    def until(word, **environment):
        process = redpipe.start("-v", "--interval=1", "posts.db", "python", **environment)
        said = ""
        for line in process.stderr:
            said += line
            if word in line:
                break
        done = redpipe.stop(process)
        done = done._replace(err=said + done.err)
        assert leaks(done, tmp_path) == []
        return done.err

    return until


def test_the_search_itself_finds_what_it_should(tmp_path):
    (tmp_path / "file").write_bytes(b"\0" + FEED_TOKEN.encode() + b"\0")
    done = Done(0, urllib.parse.urlencode({"feed": FEED_TOKEN}), basic("app-id", SECRET))
    assert len(leaks(done, tmp_path)) >= 3


def test_an_apps_secrets_reach_reddit_and_nothing_else(redpipe, fake_reddit, tmp_path):
    fake_reddit.script(GRANT, on="access_token")
    fake_reddit._tokens[BEARER] = math.inf
    done = redpipe("-v", "--once", "posts.db", "python", **ALL)
    assert done.status == 0
    assert leaks(done, tmp_path) == []
    token, page = fake_reddit.log[:2]
    assert token.headers["authorization"] == f"Basic {basic('app-id', SECRET)}"
    assert page.headers["authorization"] == f"bearer {BEARER}"
    assert not any("feed" in str(seen) for seen in fake_reddit.log)


def test_the_feed_token_goes_into_the_query_of_the_feed_alone(redpipe, fake_reddit, tmp_path):
    fake_reddit.anonymous_json_blocked = True
    done = redpipe("-v", "--once", "posts.db", "python", **FEED)
    assert done.status == 0
    assert leaks(done, tmp_path) == []
    assert [seen.query for seen in fake_reddit.log[:2]] == [
        {"limit": "100", "raw_json": "1"},
        {"limit": "100", "feed": FEED_TOKEN, "user": "some_body"},
    ]
    assert not any(secrets_in(str(seen.headers) + str(seen.body)) for seen in fake_reddit.log)


# Every failure, over real HTTP, on a clock that does not wait


@pytest.fixture
def poll(fake_reddit, database, caplog):
    """Poll four times with the feed token, and as an app or not; give all that was said."""
    fake_reddit.anonymous_json_blocked = True
    caplog.set_level(logging.DEBUG, "redpipe")

    def some_polls(*, app):
        clock, error = VirtualClock(), ""
        id_and_secret = ("app-id", SECRET) if app else ("", "")
        access = pipeline.Access(fake_reddit.url, *id_and_secret, "some_body", FEED_TOKEN)
        reddit = pipeline.Reddit(access, pipeline.http_fetch(), clock)
        with pipeline.Database(str(database), clock=clock) as memory:
            batches = stream(reddit, ["python"], memory)
            try:
                for batch, _ in zip(batches, range(4), strict=False):
                    pipeline.load(memory, map(pipeline.transform, batch.posts), batch.cursors)
            except pipeline.RedpipeError as exc:
                error = f"{exc!r} {exc}"
        said = "\n".join([*caplog.messages, error])
        assert secrets_in(said) == []
        assert secrets_in(database.read_bytes()) == []
        return said

    return some_polls


FAILURES = {
    "refused": REFUSE,
    "reset": RESET,
    "truncated": TRUNCATE,
    "wrong gzip": wrong_gzip(),
    "nothing": reply(200),
    "302 elsewhere": reply(302, "", {"location": f"{FAR}/login?dest=x"}),
    "302 nowhere": reply(302, "", {"location": "http://["}),
    "302 to the search": reply(302, "", {"location": "/subreddits/search?q=python"}),
    "401": error_reply(401, "Unauthorized"),
    "403 blocked": block_page(),
    "403 private": error_reply(403, "Forbidden", reason="private"),
    "404": error_reply(404, "Not Found"),
    "429 in an hour": reply(429, "", {"retry-after": "3600"}),
    "500": reply(500),
    "token refused": json_reply(200, {"error": "invalid_grant"}),
    "a token that cannot be sent": json_reply(200, {"access_token": "a\r\nb", "expires_in": 1}),
}


@pytest.mark.parametrize("good", [0, 1], ids=["at first", "later"])
@pytest.mark.parametrize("source", ["oauth", "feed"])
@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_no_failure_tells_a_secret(fake_reddit, poll, failure, source, good):
    fake_reddit.token_lifetime = 61  # so that tokens are asked for now and then
    fake_reddit.script(*[None] * good, failure, failure, on="access_token")
    fake_reddit.script(*[None] * good, failure, failure, on=".rss" if source == "feed" else "/new")
    poll(app=source == "oauth")
    assert any(seen.status != 200 for seen in fake_reddit.log) or failure[0] == 200


# What comes back to us: a proxy or a debugging server may show what it was sent


def echoes(echo):
    """Give answers that show what was sent."""
    last = echo.rpartition(" ")[2]
    return [
        json_reply(403, {"message": echo, "reason": echo}),
        json_reply(400, {"error": echo}),
        json_reply(200, {"error": echo}),
        reply(502, echo, {"content-type": echo}),
        reply(302, echo, {"location": f"{FAR}/?{echo}"}),
        reply(302, echo, {"location": f"{FAR}/{echo}"}),
        reply(302, echo, {"location": f"{FAR}/{last}"}),
        json_reply(400, {"error": "invalid_grant", "error_description": f"No app: {echo}"}),
        json_reply(400, {"error": "invalid_grant", "error_description": echo}),
        reply(200, echo, {"content-type": f"text/{last}"}),
    ]


WHAT_IS_SENT = {
    "access_token": [SECRET, f"Basic {basic('app-id', SECRET)}", f"{'x' * 60} {SECRET}"],
    "/new": [f"bearer {BEARER}", f"{'x' * 70} {BEARER}"],
    ".rss": [FEED_TOKEN, f"?feed={urllib.parse.quote_plus(FEED_TOKEN)}&user=some_body"],
}


@pytest.mark.parametrize("on", WHAT_IS_SENT)
@pytest.mark.parametrize("answer", range(10))
def test_secrets_that_are_sent_back_are_not_repeated(fake_reddit, poll, database, on, answer):
    for echo in WHAT_IS_SENT[on]:
        if on == "/new":
            fake_reddit.script(GRANT, on="access_token")
        fake_reddit.script(*[echoes(echo)[answer]] * 3, on=on)
        said = poll(app=on != ".rss")
        assert re.search(r"page 1: |^(Refused|Gone)\(", said, re.MULTILINE)
        database.unlink()


@pytest.mark.parametrize("app", [(), ("app-id", SECRET)], ids=["feed", "app"])
@pytest.mark.parametrize("trouble", ["nobody listens", "no such host", "no TLS", "414"])
def test_no_trouble_with_the_connection_tells_a_secret(fake_reddit, caplog, trouble, app):
    caplog.set_level(logging.DEBUG, "redpipe")
    urls = {
        "nobody listens": fake_reddit.url,
        "no such host": FAR,
        "no TLS": fake_reddit.url.replace("http:", "https:"),
        "414": f"{fake_reddit.url}/{'x' * 100_000}",  # longer than a server takes
    }
    if trouble == "nobody listens":
        fake_reddit.stop()
    access = pipeline.Access(urls[trouble], *(app or ("", "")), "some_body", FEED_TOKEN)
    reddit = pipeline.Reddit(access, pipeline.http_fetch())
    reddit.source = pipeline.OAUTH if app else pipeline.FEED
    with pytest.raises(pipeline.RedpipeError) as error:
        reddit.page("python")
    assert secrets_in("\n".join([*caplog.messages, str(error.value), repr(error.value)])) == []


@contextmanager
def serving(handle):
    """Run a server on the loopback whose handler is a function; give where it listens."""
    handler = type("Handler", (socketserver.StreamRequestHandler,), {"handle": handle})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join(10)


def test_headers_that_are_none_tell_no_secret(follow):
    """urllib3 has a warning for such an answer, which holds the whole address."""
    body = listing([thing(make_post(1))])

    def handle(self):
        status = b"403 Blocked" if b".json" in self.rfile.readline() else b"200 OK"
        while self.rfile.readline().strip():
            pass
        self.wfile.write(b"HTTP/1.0 " + status + b"\r\nno header\r\n: nor this\r\n\r\n" + body)

    with serving(handle) as address:
        follow("instead of a listing", REDPIPE_URL=f"http://{address}", **FEED)


# To nobody else


@pytest.mark.parametrize(
    ("on", "status"),
    [("access_token", 302), ("access_token", 307), ("/new", 301), ("/new", 308), (".rss", 302)],
)
def test_a_redirect_to_another_host_is_never_followed(fake_reddit, poll, on, status):
    with FakeReddit() as other:
        elsewhere = reply(status, "", {"location": f"{other.url}/r/python/new?feed=x"})
        fake_reddit.script(elsewhere, on=on)
        said = poll(app=on != ".rss")
        assert f"{status} (redirect to /r/python/new)" in said
        assert other.log == []


@pytest.mark.parametrize("where", ["HOME", "NETRC"])
def test_netrc_is_ignored(redpipe, fake_reddit, tmp_path, where):
    netrc = tmp_path / ".netrc"
    netrc.write_text("default login somebody password else\n")
    netrc.chmod(0o600)
    environment = {where: str(netrc if where == "NETRC" else tmp_path)}
    assert redpipe("--once", "posts.db", "python", **environment).status == 0
    assert redpipe("--once", "posts.db", "python", **environment, **APP).status == 0
    shown = {seen.headers.get("authorization", "none") for seen in fake_reddit.log}
    assert {one.split()[0] for one in shown} == {"none", "Basic", "bearer"}
    assert f"Basic {basic('somebody', 'else')}" not in shown


ONLY_HTTPS = "REDPIPE_URL: credentials go to other machines by https only"


@pytest.mark.parametrize(
    ("url", "credentials"),
    [
        ("http://192.0.2.1", APP),
        ("http://192.0.2.1", {"REDDIT_CLIENT_ID": "app-id"}),
        ("http://192.0.2.1", FEED),
        ("HTTP://192.0.2.1", APP),
        ("Http://192.0.2.1", FEED),
        ("http://reddit.invalid", APP),
        ("http://localhost.invalid", APP),
        ("http://127.0.0.1.invalid", APP),
        ("http://0.0.0.0", APP),
        ("http://[2001:db8::1]:8080", APP),
    ],
)
def test_credentials_never_go_over_plain_http_to_another_machine(program, url, credentials):
    with pytest.raises(pipeline.BadEnvironment, match=f"^{ONLY_HTTPS}$"):
        program.read_access({"REDPIPE_URL": url, **credentials})
    assert program.read_access({"REDPIPE_URL": url}).url == url
    https = re.sub("(?i)^http", "https", url)
    assert program.read_access({"REDPIPE_URL": https, **credentials}).url == https


def test_the_built_file_ends_before_credentials_go_over_plain_http(redpipe, tmp_path):
    done = redpipe("--once", "posts.db", "python", REDPIPE_URL="http://192.0.2.1", timeout=5, **ALL)
    assert done == (78, "", f"redpipe: {ONLY_HTTPS}\n")
    assert not (tmp_path / "posts.db").exists()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3"])
def test_credentials_may_go_over_plain_http_on_this_machine(program, host):
    assert program.read_access({"REDPIPE_URL": f"http://{host}:8080", **ALL}).client_secret


# Proxies and authorities


class Proxy(NamedTuple):
    """A proxy on the loopback that keeps what passes through it."""

    url: str
    asked: list[str]
    """First lines of requests."""
    headers: list[str]
    passed: list[bytes]


@pytest.fixture
def proxy():
    """Run a proxy which leads every tunnel to one port, or refuses all."""
    with ExitStack() as stack:
        yield lambda port=0: stack.enter_context(running_proxy(port))


@contextmanager
def running_proxy(port):
    kept = Proxy("", [], [], [])

    def handle(self):
        kept.asked.append(self.rfile.readline().decode().strip())
        while line := self.rfile.readline().strip():
            kept.headers.append(line.decode())
        if not port:
            self.wfile.write(b"HTTP/1.1 407 Go away\r\nContent-Length: 0\r\n\r\n")
            return
        self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        with socket.create_connection(("127.0.0.1", port)) as upstream, suppress(OSError):
            pump(self.connection, upstream, kept.passed)

    with serving(handle) as address:
        yield kept._replace(url=f"http://{address}")


def pump(one, other, passed):
    """Pass bytes on in both directions until one side closes."""
    while ready := select.select([one, other], [], [], 20)[0]:
        for side in ready:
            if not (chunk := side.recv(65536)):
                return
            passed.append(chunk)
            (other if side is one else one).sendall(chunk)


@pytest.fixture
def tls_server(tmp_path):
    """Serve a listing as https://reddit.invalid; gives also the file of its authority."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("reddit.invalid").configure_cert(context)
    bundle = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(bundle))
    with serve_listing(context) as server:
        yield server, str(bundle)


def with_password(proxy):
    return proxy.url.replace("//", f"//user:{PROXY_PASSWORD}@")


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_proxies_and_authorities_are_honoured(redpipe, tls_server, proxy, tmp_path, variable):
    server, bundle = tls_server
    tunnel = proxy(server.server_port)
    environment = {variable: with_password(tunnel), "REQUESTS_CA_BUNDLE": bundle}
    done = redpipe("-v", "--once", "posts.db", "python", REDPIPE_URL=FAR, **environment)
    assert done.status == 0
    assert {line.rpartition(" ")[0] for line in tunnel.asked} == {"CONNECT reddit.invalid:443"}
    shown = f"proxy-authorization: basic {basic('user', PROXY_PASSWORD)}".lower()
    assert shown in map(str.lower, tunnel.headers)
    assert leaks(done, tmp_path) == []


def test_a_proxy_does_not_see_a_secret(follow, tls_server, proxy):
    server, bundle = tls_server
    tunnel = proxy(server.server_port)
    environment = {"HTTPS_PROXY": tunnel.url, "REQUESTS_CA_BUNDLE": bundle, "REDPIPE_URL": FAR}
    follow("instead of a token", **environment, **ALL)  # this server gives none
    assert sum(map(len, tunnel.passed)) > 2000
    assert secrets_in(b"".join(tunnel.passed)) == []
    assert secrets_in("\n".join([*tunnel.asked, *tunnel.headers])) == []


def test_an_authority_that_is_not_known_is_refused(follow, tls_server, proxy):
    server, _ = tls_server
    tunnel = proxy(server.server_port)
    follow("certificate", HTTPS_PROXY=tunnel.url, REDPIPE_URL=FAR, **FEED)
    assert tunnel.asked
    assert not server.served.acquire(blocking=False)


def test_a_proxy_that_refuses_is_said_without_its_password(follow, proxy):
    follow("407", HTTPS_PROXY=with_password(proxy()), REDPIPE_URL=FAR, **ALL)


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_what_goes_to_this_machine_passes_no_proxy(redpipe, fake_reddit, proxy, variable):
    tunnel = proxy()
    done = redpipe("--once", "posts.db", "python", **{variable: tunnel.url}, **APP)
    assert done == (0, "", "")
    assert tunnel.asked == []
    assert len(fake_reddit.log) == 2


def test_what_no_proxy_exempts_passes_none(follow, proxy):
    tunnel = proxy()
    nobody = {"REDPIPE_URL": "https://0.0.0.0:9", "NO_PROXY": "0.0.0.0"}
    follow("refused", HTTPS_PROXY=tunnel.url, **nobody)
    assert tunnel.asked == []
