"""Proxies and certificates that the environment names: what can never work is said at once."""

from __future__ import annotations

import importlib.util
import os
import socketserver
import threading
from contextlib import contextmanager

import pytest
import trustme

from artefact import ROOT, run_bare
from fake_reddit import TRUNCATE, gzip_bomb, make_post
from pipeline import BadEnvironment

spec = importlib.util.spec_from_file_location("redpipe_process", ROOT / "__main__.py")
process = importlib.util.module_from_spec(spec)
spec.loader.exec_module(process)

FAR = {"REDPIPE_URL": "https://reddit.invalid"}
NO_PROXY_FORM = "not http(s)://host:port; SOCKS is not spoken"
NO_CERTIFICATE = "not a file or folder that holds a certificate"

PROXY_NAMES = ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"]
BAD_PROXIES = {
    "SOCKS": "socks5h://user:pa55word@127.0.0.1:1080",
    "an old SOCKS": "socks4://127.0.0.1:1080",
    "SOCKS in capitals": "SOCKS5://127.0.0.1:1080",
    "a port that is no number": "http://pa55word:notaport",
    "a port that is too high": "http://proxy.invalid:65536",
    "port 0": "http://proxy.invalid:0",
    "no host": "http://",
    "no host but a port": "http://:3128",
    "nothing but a scheme": "://",
    "another scheme": "ftp://proxy.invalid:21",
    "a blank": "http://proxy.invalid :3128",
    "half an IPv6 address": "http://[::1:3128",
    "a password with a number sign": "http://user:pa55#word@proxy.invalid:3128",
    "a password with a question mark": "http://user:pa55?word@proxy.invalid:3128",
    "a newline": "http://proxy.invalid:3128\n",
}
GOOD_PROXIES = [
    "http://proxy.invalid:3128",
    "HTTP://proxy.invalid",
    "https://user:pa55word@proxy.invalid:8443/",
    "proxy.invalid:3128",
    "127.0.0.1:3128",
    "http://[::1]:3128",
    "",
]


@contextmanager
def environment(variables):
    """Let this process have these variables and no others."""
    kept = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def access(**environ):
    with environment(environ):
        found = process.read_access(environ)
        process.check_proxy(found.url or "https://www.reddit.com")
    return found


@pytest.mark.parametrize("name", PROXY_NAMES)
def test_a_socks_proxy_ends_the_built_file_at_once(name, redpipe, tmp_path):
    socks = "socks5h://user:pa55word@127.0.0.1:1080"
    done = redpipe(tmp_path / "posts.db", "python", timeout=10, **{name: socks}, **FAR)
    assert done == (78, "", f"redpipe: {name}: {NO_PROXY_FORM}\n")
    assert not (tmp_path / "posts.db").exists()


@pytest.mark.parametrize("proxy", BAD_PROXIES.values(), ids=BAD_PROXIES)
@pytest.mark.parametrize("name", PROXY_NAMES)
def test_a_proxy_that_can_never_work_is_refused_by_its_variable(name, proxy):
    with pytest.raises(BadEnvironment) as refused:
        access(**{name: proxy})
    assert str(refused.value) == f"{name}: {NO_PROXY_FORM}"


@pytest.mark.parametrize("proxy", GOOD_PROXIES)
@pytest.mark.parametrize("name", PROXY_NAMES)
def test_a_proxy_that_may_work_is_taken(name, proxy):
    assert access(**{name: proxy}).url == ""


@pytest.mark.parametrize("all_proxy", ["ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize("https_proxy", ["HTTPS_PROXY", "https_proxy"])
def test_a_socks_proxy_for_all_is_no_matter_beside_one_that_is_used(all_proxy, https_proxy):
    environ = {all_proxy: "socks5://127.0.0.1:1080", https_proxy: "http://127.0.0.1:3128"}
    assert access(**environ).url == ""


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy"])
def test_a_proxy_for_plain_http_matters_to_plain_http_only(name):
    assert access(**{name: "socks5://127.0.0.1:1080"}).url == ""
    with pytest.raises(BadEnvironment, match=f"^{name}: "):
        access(REDPIPE_URL="http://reddit.invalid", **{name: "socks5://127.0.0.1:1080"})


@pytest.mark.parametrize("exempt", ["*", "reddit.com", ".reddit.com", "a.invalid, www.reddit.com"])
@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
def test_a_proxy_that_no_proxy_leaves_unused_is_no_matter(name, exempt):
    assert access(HTTPS_PROXY="socks5://127.0.0.1:1080", **{name: exempt}).url == ""


def test_no_proxy_for_another_host_changes_nothing():
    with pytest.raises(BadEnvironment, match=r"^https_proxy: "):
        access(https_proxy="socks5://127.0.0.1:1080", NO_PROXY="example.invalid")


@contextmanager
def proxy():
    """Run a proxy that refuses; give its address and the first lines that it was sent."""
    asked = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            asked.append(self.rfile.readline())
            self.wfile.write(b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()
        thread.join(10)


def test_no_proxy_is_respected_by_requests_too(redpipe, tmp_path):
    with proxy() as (address, asked):
        environment = {
            "HTTPS_PROXY": address,
            "NO_PROXY": "0.0.0.0",
            "REDPIPE_URL": "https://0.0.0.0:9",
        }
        process = redpipe.start("-v", tmp_path / "posts.db", "python", **environment)
        lines = [process.stderr.readline() for _ in range(3)]
        redpipe.stop(process)
    assert asked == []
    assert lines[1] == "redpipe: asking for /r/python/new/.json\n"


# Certificates

FILES = ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"]


@pytest.fixture(scope="module")
def authority():
    return trustme.CA().cert_pem.bytes()


def rubbish(path):
    path.write_text("rubbish with pa55word\n")


def an_empty_file(path):
    path.touch()


def an_empty_folder(path):
    path.mkdir()


def a_folder_of_rubbish(path):
    path.mkdir()
    (path / "12345678.0").write_text("rubbish")


def a_key(path):
    path.write_bytes(trustme.CA().private_key_pem.bytes())


def nothing(path):
    pass


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "make", [rubbish, an_empty_file, an_empty_folder, a_folder_of_rubbish, a_key, nothing]
)
def test_a_path_without_a_certificate_is_refused_by_its_variable(name, make, tmp_path):
    make(tmp_path / "authority")
    with pytest.raises(BadEnvironment) as refused:
        access(**{name: str(tmp_path / "authority")})
    assert str(refused.value) == f"{name}: {NO_CERTIFICATE}"


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_rubbish_ends_the_built_file_at_once(name, redpipe, tmp_path):
    rubbish(tmp_path / "authority")
    done = redpipe("posts.db", "python", timeout=10, **{name: str(tmp_path / "authority")})
    assert done == (78, "", f"redpipe: {name}: {NO_CERTIFICATE}\n")


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_a_certificate_is_taken(name, authority, tmp_path):
    (tmp_path / "authority.pem").write_bytes(b"# Invented\n" + authority)
    assert access(**{name: str(tmp_path / "authority.pem")}).url == ""


@pytest.mark.parametrize("name", FILES)
def test_a_folder_with_a_certificate_is_taken_whatever_else_is_in_it(name, authority, tmp_path):
    (tmp_path / "README").write_text("rubbish")
    (tmp_path / "00000000.0").write_text("rubbish")
    (tmp_path / "0a1b2c3d.0").write_bytes(authority)
    (tmp_path / "gone.0").symlink_to("nowhere")
    assert access(**{name: str(tmp_path)}).url == ""


# Warnings


@pytest.mark.parametrize("json", ["open", "closed"])
def test_a_run_in_development_mode_warns_of_nothing(json, pyz, bare_python, fake_reddit, tmp_path):
    fake_reddit.anonymous_json_blocked = json == "closed"
    fake_reddit.add(make_post(1))
    command = [
        bare_python,
        "-X",
        "dev",
        "-W",
        "error",
        pyz,
        "--once",
        tmp_path / "posts.db",
        "python",
    ]
    done = run_bare(*command, REDPIPE_URL=fake_reddit.url, TMPDIR=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_failures_in_development_mode_warn_of_nothing(pyz, bare_python, fake_reddit, tmp_path):
    fake_reddit.script(TRUNCATE, gzip_bomb())
    fake_reddit.add(make_post(1))
    command = [bare_python, "-X", "dev", "-W", "error", pyz, "-q", "--once", "posts.db", "python"]
    done = run_bare(*command, REDPIPE_URL=fake_reddit.url, TMPDIR=str(tmp_path), cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(fake_reddit.log) == 3
