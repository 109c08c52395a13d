"""The measurement in a browser: its server against strangers, its devices by a page in Python, and real Chromium."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from urllib.parse import urlsplit

import keras
import numpy as np
import pytest
from browser_fixtures import FACTS, READY, Command, Page, small_file, small_pair
from export_fixtures import images_for, scattered
from keras import layers

import se_keras_cli
from se_keras.catalogue import create
from se_keras.export import to_litert
from se_keras.export.benchmark.browser import certificate, chromium, facts, litertjs, server, session
from se_keras.export.benchmark.browser.server import Answer, File, PageServer
from se_keras.export.benchmark.measuring import pair_of_files
from se_keras.export.benchmark.overhead import pairs
from se_keras.export.benchmark.report import read
from se_keras.export.benchmark.targets import browser as target
from se_keras.export.benchmark.targets.browser import Browser

try:
    LAN = server.lan_address()
except OSError:
    LAN = None


@pytest.fixture(scope="module")
def litert_js():
    """The files of LiteRT.js; skips where they cannot be had."""
    try:
        return litertjs.load()
    except OSError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def browser(litert_js):
    """Skips where there is no Chromium."""
    try:
        return chromium.find()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def pair():
    return small_pair()


@pytest.fixture
def command(litert_js, monkeypatch):
    """`command(pairs, **options)`: the command that serves a page, in a thread."""
    running = []

    monkeypatch.setattr(target, "_LONGEST_END", 0.0)  # most pages here do not ask for the end
    monkeypatch.setattr(target, "load", lambda *_, **__: litert_js)  # read once

    def run(wanted, **options):
        running.append(Command(Browser(**options), wanted))
        return running[-1]

    yield run
    for each in running:
        each.server.close()


# The server.


@pytest.fixture
def served():
    """A server with a page, a file and an answer."""
    page = PageServer({"": File("text/html", b"page"), "a/b.js": File("text/javascript", b"1")}, ANSWERS)
    yield page
    page.close()


ANSWERS = {"count": Answer(session._Block, lambda value: {"number": value["number"]})}
BLOCK = {"device": 1, "task": 1, "number": 0, "times": {"a": [1.0]}}


def ask(page, path, method="GET", body=None, **headers):
    """Status and text of the answer to a request that may be anything."""
    connection = http.client.HTTPConnection(page.host, page.port, timeout=20)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    if body:
        connection.send(body)
    answer = connection.getresponse()
    found = answer.status, answer.read().decode()
    connection.close()
    return found


def test_page_and_files_come_with_the_headers_that_threads_and_a_fine_clock_need(served):
    for path, kind in {"": "text/html", "a/b.js": "text/javascript", "a/b.js?x=1": "text/javascript"}.items():
        with urllib.request.urlopen(served.address + path) as answer:
            assert answer.headers["Content-Type"] == kind
            assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
            assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
            assert answer.headers["Cache-Control"] == "no-store"


def test_errors_have_the_headers_too(served):
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(served.address + "nothing")
    with raised.value as answer:
        assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"


def test_address_is_of_this_computer_alone_and_has_a_token_that_nobody_guesses(served):
    others = set()
    for _ in range(3):
        page = PageServer({}, {})
        others.add(page.token)
        page.close()
    assert urlsplit(served.address).hostname == "127.0.0.1"
    assert len(others | {served.token}) == 4 and len(served.token) == 12


@pytest.mark.parametrize(
    "path", ["/", "/{wrong}/", "/a/b.js", "//a/b.js", "/favicon.ico", "/{token}x/", "/%2e%2e/{token}/", "/%ff/"]
)
def test_nothing_is_served_without_the_token(served, path):
    path = path.format(token=served.token, wrong="a" * 12)
    assert ask(served, path) == (404, "Open the whole address that se-keras printed\n")


@pytest.mark.parametrize(
    "path", ["../../etc/passwd", "..%2f..%2fetc/passwd", "/etc/passwd", "a/../a/b.js", "a//b.js", "a", "A/B.JS", "\\a"]
)
def test_only_addresses_of_the_table_are_files(served, path):
    assert ask(served, f"/{served.token}/{path}") == (404, "There is no such file\n")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.nip.io", "", "]", "localhost.evil"])
def test_page_of_a_stranger_whose_name_leads_here_gets_nothing(served, host):
    status, text = ask(served, f"/{served.token}/", Host=host)
    assert (status, text) == (403, "Open the address that se-keras printed, with its numbers\n")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:1", "[::1]:80", "10.1.2.3:80"])
def test_numbers_of_this_computer_are_its_names(served, host):
    assert ask(served, f"/{served.token}/", Host=host) == (200, "page")


HOSTILE = {
    "no length": ({}, b"", 411, "Content-Length is missing"),
    "chunks": ({"Transfer_Encoding": "chunked"}, b"0\r\n\r\n", 411, "Content-Length is missing"),
    "negative": ({"Content_Length": "-1"}, b"", 400, "Content-Length must be a number of bytes"),
    "words": ({"Content_Length": "1e3"}, b"", 400, "Content-Length must be a number of bytes"),
    "huge": ({"Content_Length": str(10**15)}, b"", 413, "At most 262,144 bytes are taken"),
    "longer than digits": ({"Content_Length": "9" * 30}, b"", 400, "Content-Length must be a number of bytes"),
    "no JSON": ({}, b"{", 400, "This is not what the page sends: it is not JSON"),
    "no text": ({}, b"\xff\xfe\xfd", 400, "This is not what the page sends: it is not text"),
    "deep": ({}, b"[" * 100_000, 400, "This is not what the page sends: more than 50 lists"),
    "a list": ({}, b"[]", 400, "it must be an object. Received: []"),
    "less": ({}, b"{}", 400, "it lacks device, number, task, times"),
    "other types": (
        {},
        json.dumps(BLOCK | {"number": True}).encode(),
        400,
        "number must be an integer. Received: t",
    ),
    "other times": ({}, json.dumps(BLOCK | {"times": {"a": ["1"]}}).encode(), 400, "times.a.0 must be a number"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_post_of_a_stranger_is_refused_in_a_line(served, what):
    headers, body, status, text = HOSTILE[what]
    if status == 400 and not headers:
        headers = {"Content_Length": str(len(body))}
    found, reason = ask(served, f"/{served.token}/count", "POST", body, **headers)
    assert found == status and text in reason and reason.count("\n") == 1


def test_post_needs_the_token_and_a_known_address(served):
    body = json.dumps(BLOCK).encode()
    length = {"Content_Length": str(len(body))}
    assert ask(served, "/count", "POST", body, **length)[0] == 404
    assert ask(served, f"/{served.token}/a/b.js", "POST", body, **length) == (404, "There is no such answer\n")
    assert ask(served, f"/{served.token}/count", "POST", body, **length) == (200, '{"number": 0}')
    assert ask(served, f"/{served.token}/count", "PUT", body, **length)[0] == 501


def test_stranger_who_says_nothing_stops_nobody(served):
    with socket.create_connection((served.host, served.port)), socket.create_connection((served.host, served.port)):
        assert ask(served, f"/{served.token}/")[0] == 200


@pytest.mark.parametrize("port, message", [(70_000, "port must be an int of 0 to 65535. Received: port=70000")])
def test_port_that_does_not_exist_is_refused(port, message):
    with pytest.raises(ValueError, match=message):
        PageServer({}, {}, port=port)


def test_port_in_use_is_told_in_a_line(served):
    with pytest.raises(OSError, match=rf"^Port {served.port} cannot be used \(Address already in use\): take another"):
        PageServer({}, {}, port=served.port)


@pytest.mark.skipif(LAN is None, reason="this machine is in no network")
@pytest.mark.parametrize("lan", [True, False])
def test_other_devices_reach_the_page_with_lan_alone(lan):
    page = PageServer({"": File("text/html", b"page")}, {}, lan=lan)
    try:
        assert page.host == (LAN if lan else "127.0.0.1")
        with socket.socket() as other:
            other.settimeout(5)
            assert (other.connect_ex((LAN, page.port)) == 0) is lan
    finally:
        page.close()


@pytest.mark.parametrize("tool", ["cryptography", "openssl"])
def test_certificate_is_made_on_the_spot_for_the_address(tool, monkeypatch):
    if tool == "cryptography":
        pytest.importorskip("cryptography")
        monkeypatch.setenv("PATH", "")
    elif shutil.which("openssl") is None:
        pytest.skip("there is no openssl")
    else:
        monkeypatch.setitem(sys.modules, "cryptography", None)
    page = PageServer({"": File("text/html", b"page")}, {}, make_context=certificate.context)
    try:
        pem = ssl.get_server_certificate((page.host, page.port))
        trusting = ssl.create_default_context(cadata=pem)  # also checks the address in the certificate
        with urllib.request.urlopen(page.address, context=trusting) as answer:
            assert (page.address[:8], answer.read()) == ("https://", b"page")
        with socket.create_connection((page.host, page.port)):  # no handshake, which stops nobody else
            urllib.request.urlopen(page.address, context=trusting).close()
    finally:
        page.close()


def test_https_without_a_tool_for_certificates_is_told_in_a_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="^--https needs the command openssl or the package cryptography: pip"):
        certificate.context("127.0.0.1")


# LiteRT.js.


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_without_npm_one_line_says_both_ways(no_cache, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match=r"^LiteRT.js needs npm, .+ `npm pack @litertjs/.+ --litertjs DIR$"):
        litertjs.load()


@pytest.mark.skipif(shutil.which("npm") is None, reason="there is no npm")
@pytest.mark.slow
def test_without_a_network_one_line_says_both_ways(no_cache, monkeypatch):
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    monkeypatch.setenv("npm_config_cache", str(no_cache / "npm"))
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    with pytest.raises(OSError, match=r"^npm cannot fetch LiteRT.js \(ECONNREFUSED\): .+ --litertjs DIR$"):
        litertjs.load()
    assert not (no_cache / "cache").exists()


def npm_that_makes(folder, content):
    """An npm on the PATH whose packages have this content."""
    script = f"#!{sys.executable}\nimport os, sys\n" + (
        "folder = sys.argv[sys.argv.index('--pack-destination') + 1]\n"
        f"[open(os.path.join(folder, name), 'wb').write({content!r}) for name in ('a.tgz', 'b.tgz')]\n"
    )
    folder.mkdir()
    (folder / "npm").write_text(script)
    (folder / "npm").chmod(0o755)
    return str(folder)


def test_package_with_another_checksum_is_not_kept(no_cache, monkeypatch):
    monkeypatch.setenv("PATH", npm_that_makes(no_cache / "bin", b"something else"))
    with pytest.raises(ValueError, match=r"@litertjs/core and @litertjs/wasm-utils .+ SHA-512: .+ no such file from"):
        litertjs.load()
    assert not (no_cache / "cache").exists()


def test_folder_with_the_packages_serves_without_npm(litert_js, tmp_path, no_cache, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    for path in litertjs.cache_folder().glob("*.tgz"):
        (tmp_path / f"renamed-{path.name}").write_bytes(path.read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(no_cache / "none"))
    monkeypatch.setenv("PATH", "")
    found = litertjs.load(tmp_path)
    assert len(found) == 10 and found["wasm/litert_wasm_internal.wasm"].startswith(b"\0asm")
    damaged = next(tmp_path.glob("renamed-core*"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"^LiteRT.js must be @litertjs/core 2\..+, with its SHA-512"):
        litertjs.load(tmp_path)
    with pytest.raises(
        FileNotFoundError, match="--litertjs must be a folder with two .tgz files. Received: '.+nowhere'"
    ):
        litertjs.load(tmp_path / "nowhere")


def test_damaged_cache_is_fetched_again(no_cache, monkeypatch):
    path = litertjs.cache_folder() / "core.tgz"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a file")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="LiteRT.js needs npm"):
        litertjs.load()


# What a browser says of its device.

ANDROID = "Mozilla/5.0 (Linux; Android 10; K) AppleWebKit/537.36 Chrome/140.0.0.0 Mobile Safari/537.36"
FIREFOX = "Mozilla/5.0 (Android 14; Mobile; rv:132.0) Gecko/132.0 Firefox/132.0"
IPAD = "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 Version/17.4 Safari/605.1.15"
LINUX = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36"
AGENTS = [
    ({}, "iPhone, Safari 18.1", "iOS 18.1"),
    ({"user_agent": LINUX}, "Linux, Chrome 140", "X11; Linux x86_64"),
    ({"user_agent": LINUX.replace("Chrome", "HeadlessChrome")}, "Linux, headless Chrome 140", "X11; Linux x86_64"),
    (
        {"user_agent": ANDROID, "gpu": "Adreno (TM) 740"},
        "Android device with Adreno (TM) 740, Chrome 140",
        "Android 10",
    ),
    (
        {
            "user_agent": LINUX.replace("X11; Linux x86_64", "Linux; Android 10; K"),
            "model": "Pixel 9",
            "platform": "Android 16",
        },
        "Pixel 9, Chrome 140",
        "Android 16",
    ),
    (
        {"user_agent": "Mozilla/5.0 (Linux; Android 14; SM-S918B) AppleWebKit/537.36 SamsungBrowser/27.0 Chrome/125.0"},
        "SM-S918B, Samsung Internet 27",
        "Android 14",
    ),
    (
        {"user_agent": FIREFOX, "gpu": None},
        "Android device, Firefox 132",
        "Android 14",
    ),
    (
        {
            "user_agent": "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) Version/17.4 Safari/605.1.15",
            "touch_points": 5,
        },
        "iPad, Safari 17.4",
        "Macintosh; Intel Mac OS X 10_15_7",
    ),
    ({"user_agent": "x", "gpu": None}, "a device, a browser", "unknown"),
]


@pytest.mark.parametrize("said, name, system", AGENTS)
def test_device_has_the_name_that_its_browser_tells(said, name, system):
    assert (facts.name_of(FACTS | said), facts.system_of(FACTS | said)) == (name, system)


# The devices, each a page in Python.


def test_page_in_python_is_measured_block_by_block(command, pair):
    run = command([pair], blocks=4, runs=2)
    Page(run.address, pair).measure(ratio=1.25)
    (found,) = run.end()
    assert found.comparison.ratio.median == pytest.approx(1.25) and found.comparison.control.median == pytest.approx(1)
    assert (found.comparison.blocks, found.comparison.runs, found.comparison.a.p50) == (4, 2, pytest.approx(10.015))
    assert [(x.init_ms, x.first_ms) for x in found.footprints] == [(5.0, 2.0), (6.0, 2.5)]
    assert (found.threads, found.undelegated, found.device.missing) == (1, (), None)
    about = found.environment
    assert (about["processor"], about["system"], about["target"]) == ("iPhone, Safari 18.1", "iOS 18.1", "browser")
    assert about["runtime"] == f"LiteRT.js {litertjs.VERSION} with XNNPACK (WebAssembly)"
    assert (about["secure_context"], about["timer_step_ms"], about["max_error"]) == (False, 1.0, [0, 0])
    assert json.loads(json.dumps(found.to_json()))["environment"]["user_agent"] == FACTS["user_agent"]


def test_page_shows_the_result_at_the_end(command, pair, monkeypatch):
    monkeypatch.setattr(target, "_LONGEST_END", 5.0)
    run = command([pair], blocks=3, runs=1)
    page = Page(run.address, pair)
    task = page.start()
    texts = [page.block(task, number, ratio=1.2 + 0.1 * number)["text"] for number in range(3)]
    assert texts[0] == "1 block of 3 measured."
    assert texts[1:] == [
        "So far, after 2 blocks: +24.9 % time [+20.0 % to +30.0 %].",
        "Result of 3 blocks: +30.0 % time [+20.0 % to +40.0 %].",
    ]
    text = page.wait("end")["text"]
    assert text.startswith("Done. On iPhone, Safari 18.1 with 1 thread, net16 at 8x8 in float32 takes 30.0 % more time")


def test_block_that_is_sent_twice_counts_once(command, pair):
    run = command([pair], blocks=3, runs=1)
    page = Page(run.address, pair)
    task = page.start()
    assert [page.block(task, number)["done"] for number in (0, 0, 1, 0, 1, 2)] == [1, 1, 2, 2, 2, 3]
    assert run.end()[0].comparison.blocks == 3


def test_page_that_is_closed_keeps_its_blocks(command, pair, monkeypatch):
    monkeypatch.setattr(session, "REJOINING", 0.3)
    run = command([pair, pair], blocks=5, runs=1)
    page = Page(run.address, pair)
    task = page.start()
    for number in range(2):
        page.block(task, number)
    page.post("leave")
    (found,) = run.end()
    assert found.comparison.blocks == 2
    assert found.device.missing == "2 of 5 blocks: iPhone, Safari 18.1: closed the page"


def test_page_that_fails_later_keeps_its_blocks(command, pair):
    run = command([pair], blocks=5, runs=1)
    page = Page(run.address, pair)
    task = page.start()
    page.block(task, 0)
    page.block(task, 1)
    page.post("failed", task=task["number"], text="the page has an error: out of memory")
    missing = "2 of 5 blocks: iPhone, Safari 18.1: the page has an error: out of memory"
    assert run.end()[0].device.missing == missing


def test_target_measures_again_with_a_new_page(command, pair):
    run = command([pair], blocks=2, runs=1)
    Page(run.address, pair).measure()
    run.end()
    again = Command(run.target, [pair])
    assert again.address != run.address
    Page(again.address, pair).measure()
    assert len(again.end()) == 1


def test_page_that_is_silent_for_long_keeps_its_blocks(command, pair, monkeypatch):
    monkeypatch.setattr(session, "LONGEST_SILENCE", 0.5)
    run = command([pair], blocks=5, runs=1)
    page = Page(run.address, pair)
    task = page.start()
    page.block(task, 0)
    page.block(task, 1)
    assert run.end()[0].device.missing == "2 of 5 blocks: iPhone, Safari 18.1: is silent"


def test_page_that_is_loaded_again_continues_with_its_blocks(command, pair):
    run = command([pair], blocks=4, runs=1)
    page = Page(run.address, pair)
    task = page.start()
    page.block(task, 0)
    page.post("leave")
    assert page.post("hello", **FACTS | {"device": page.number})["device"] == page.number
    task = page.wait("measure")["task"]
    assert page.post("ready", task=task["number"], **READY)["done"] == 1
    for number in range(1, 4):
        page.block(task, number)
    (found,) = run.end()
    assert (found.comparison.blocks, found.device.missing) == (4, None)


def test_page_that_is_closed_before_two_blocks_leaves_the_pair_to_the_next(command, pair, monkeypatch):
    monkeypatch.setattr(session, "REJOINING", 0.1)
    run = command([pair], blocks=2, runs=1)
    page = Page(run.address, pair)
    page.block(page.start(), 0)
    page.post("leave")
    Page(run.address, pair, user_agent=LINUX).measure()
    (found,) = run.end()
    assert (found.environment["processor"], found.comparison.blocks) == ("Linux, Chrome 140", 2)
    assert "iPhone, Safari 18.1 closed the page before two blocks" in run.messages


def test_page_that_dies_each_time_is_not_tried_for_ever(command, pair):
    run = command([pair], blocks=2, runs=1)
    page = Page(run.address, pair)
    for _ in range(3):
        page.wait("measure")
    page.next()
    with pytest.raises(ValueError, match="Nothing could be timed. iPhone.+ began 3 times and was lost each time"):
        run.end()


def test_second_device_waits_and_then_has_its_turn(command, pair):
    run = command([pair], blocks=3, runs=1)
    first, second = Page(run.address, pair), Page(run.address, pair)
    task = first.start()
    assert second.next() == {
        "what": "wait",
        "text": "Another device is measuring. This one comes after it: keep this page open.",
    }
    with pytest.raises(ValueError, match="400: This pair is not measured now"):
        second.block(task, 0)
    for number in range(3):
        first.block(task, number)
    second.measure(ratio=1.5)
    records = run.end()
    assert [record.comparison.ratio.median for record in records] == pytest.approx([1.25, 1.5])
    assert [record.environment["id"] for record in records] == [1, 2]  # two iPhones


def test_pairs_are_exported_once_for_several_devices(command, pair):
    exported = []

    def lazily():
        for number in range(2):
            exported.append(number)
            yield pair

    run = command(lazily(), blocks=2, runs=1, devices=2)
    for _ in range(2):
        page = Page(run.address, pair)
        page.measure()
        page.measure()
    assert len(run.end()) == 4 and exported == [0, 1]


def test_page_says_what_it_waits_for_while_networks_are_exported(command, pair):
    def slowly():
        while not texts:
            time.sleep(0.01)
        yield pair

    texts = []
    run = command(slowly(), blocks=2, runs=1)
    page = Page(run.address, pair)
    texts.append(page.next()["text"])
    page.measure()
    run.end()
    assert texts[0].startswith("Your computer exports the next pair of networks, for 0 s now.")


def test_file_that_computes_something_else_is_not_timed(command, pair):
    run = command([pair, pair], blocks=2, runs=1)
    page = Page(run.address, pair)
    task = page.wait("measure")["task"]
    answer = page.check("a", task, off=0.1)
    assert not answer["agrees"] and answer["text"].startswith(
        "net8 does not compute the same in this browser and is not"
    )
    with pytest.raises(ValueError, match="400: This pair is not measured now"):
        page.block(task, 0)
    message = "iPhone.+: net8 does not compute the same .+ of the range away .+ more than 0.0001"
    with pytest.warns(UserWarning, match=message):
        page.measure()
        run.join(60)
    assert len(run.end()) == 1


@pytest.mark.parametrize(
    "outputs, reason",
    [
        ({"scores": [None] * 4}, "its outputs are not finite"),
        ({"scores": [0.0] * 5}, "it has 5 outputs and not 4"),
        ({"a": [0.0], "b": [1.0]}, "its outputs are a, b and not scores"),
        ({}, "its outputs are  and not scores"),
    ],
)
def test_outputs_of_another_kind_are_a_disagreement(outputs, reason):
    expected = {"scores": np.arange(4, dtype="f4")[None]}
    assert session.difference(expected, outputs, 1)[0] == reason


WRONG = {
    "ready": [
        ({"init_ms": [1.0]}, "init_ms and first_ms must be two times each"),
        ({"init_ms": [1.0, float("inf")]}, "init_ms and first_ms must be two times each"),
        ({"task": 7}, "This pair is not measured now"),
        ({"device": 99}, "This page is of an earlier measurement: open the new address"),
    ],
    "block": [
        ({"times": {"a": [1.0], "b": [1.0]}}, "A block must be 1 times of a, b and control"),
        ({"times": {"a": [1.0], "b": [1.0], "control": [1.0, 1.0]}}, "A block must be 1 times of a, b and control"),
        ({"times": {"a": [1.0], "b": [1.0], "control": [0.0]}}, "Times must be above 0"),
        ({"times": {"a": [1.0], "b": [1.0], "control": [float("nan")]}}, "Times must be above 0"),
        ({"times": {"a": [1.0], "b": [1.0], "control": [1e300]}}, "Times must be above 0"),
        ({}, "A block must come after the check of the outputs"),
    ],
    "check": [({"side": "c"}, r"side must be one of \('a', 'b'\). Received: 'c'")],
}


def test_page_of_a_stranger_changes_no_result(command, pair):
    run = command([pair], blocks=2, runs=1)
    page = Page(run.address, pair)
    task = page.wait("measure")["task"]
    right = {
        "ready": READY | {"task": task["number"]},
        "block": {"task": task["number"], "number": 0, "times": {"a": [1.0], "b": [1.0], "control": [1.0]}},
        "check": {"task": task["number"], "side": "a", "outputs": {}},
    }
    for name, rows in WRONG.items():
        for change, reason in rows:
            with pytest.raises(ValueError, match=f"400: {reason}"):
                page.post(name, **right[name] | change)
    page.measure()
    assert run.end()[0].comparison.ratio.median == pytest.approx(1.25)


def test_texts_of_a_browser_are_short_and_without_control_characters(command, pair):
    run = command([pair], blocks=2, runs=1)
    page = Page(run.address, pair, user_agent="\x1b[31mred\n" + "x" * 9999)
    page.post("status", text="\x1b]0;title\x07")
    page.measure()
    (found,) = run.end()
    assert found.environment["user_agent"].startswith("[31mred x") and len(found.environment["user_agent"]) < 301
    assert not any("\x1b" in message for message in run.messages)


def test_operators_that_are_not_delegated_are_not_timed_unless_allowed(command, pair):
    for allowed in (False, True):
        run = command([pair], blocks=2, runs=1, allow_undelegated=allowed)
        page = Page(run.address, pair)
        task = page.wait("measure")["task"]
        page.check("a", task)
        page.check("b", task)
        answer = page.post("ready", task=1, **READY | {"is_delegated": False})
        if not allowed:
            assert "--allow-undelegated" in answer["refused"]
            with pytest.raises(ValueError, match="Nothing could be timed.+ not delegated .+ --allow-undelegated"):
                run.end()
            continue
        page.block(task, 0)
        page.block(task, 1)
        assert run.end()[0].undelegated == ("a part",)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"output_type": "int8"}, "float32 inputs and outputs, .+ without --input-type.+ Received: int8 output scores"),
        ({"input_type": "uint8"}, "float32 inputs and outputs, .+ without --input-type.+ Received: uint8 input"),
    ],
)
def test_files_of_integers_are_refused_by_name(command, options, message):
    images = keras.Input((8, 8, 3), name="images")
    scores = layers.Dense(4, name="scores")(layers.GlobalAveragePooling2D()(images))
    calibration = np.random.default_rng(0).uniform(0, 255, (8, 8, 8, 3)).astype("f4")
    file = to_litert(
        keras.Model(images, scores, name="net"),
        precision="int8",
        calibration=calibration,
        normalization=(0, 1),
        **options,
    )
    with pytest.raises(ValueError, match=message):
        command([pair_of_files(file, file)]).end()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"accelerator": "npu"}, r"accelerator must be one of \('wasm', 'webgpu'\)"),
        ({"open": True, "headless": True}, "Received: --open and --headless"),
        ({"devices": 0}, "devices must be 1 or more. Received: devices=0"),
        ({"blocks": 1}, "At least 2 blocks"),
        ({"seconds": -1}, "seconds must be a finite number"),
        (
            {"lan": True, "accelerator": "webgpu"},
            "WebGPU and threads with --https alone. Received: acc",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Browser(**options)


@pytest.mark.skipif(LAN is None, reason="this machine is in no network")
def test_threads_over_plain_http_are_refused(command):
    with pytest.raises(ValueError, match="WebGPU and threads with --https alone. Received: threads=2"):
        command([small_pair(threads=2)], lan=True).end()


def test_nobody_who_comes_is_not_waited_for_for_ever(command, pair, monkeypatch):
    monkeypatch.setattr(target, "_LONGEST_WAIT", 0.2)
    with pytest.raises(TimeoutError, match="No browser opened the page within 0 seconds"):
        command([pair]).end()


def test_nothing_to_measure_ends_at_once(command):
    assert command([]).end() == []


def test_headless_without_a_browser_is_told_in_a_line(litert_js, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="^--headless needs Chromium or Chrome on the PATH; .+ none of"):
        Browser(headless=True).connect(print)


def test_headless_browser_that_dies_is_told_in_a_line(command, pair, tmp_path, monkeypatch):
    (tmp_path / "chromium").write_text("#!/bin/sh\necho 'no display' >&2\nexit 3\n")
    (tmp_path / "chromium").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + ":/bin:/usr/bin")
    with pytest.raises(OSError, match="^The headless browser ended with status 3: no display"):
        command([pair], headless=True).end()


def test_qr_code_has_the_address_in_white_on_black_with_a_margin():
    segno = pytest.importorskip("segno")
    address = "https://192.168.178.123:65535/v5htgd4vfjcq/"
    lines = [re.fullmatch(r"\x1b\[97;40m(.*)\x1b\[0m", line)[1] for line in target._qr_code(address).splitlines()]
    shown = [[letter in half for letter in line] for line in lines for half in ("█▀", "█▄")]  # white, of both halves
    dark = [[not white for white in row[2:-2]] for row in shown[2:-2]]
    expected = [[bool(module) for module in row] for row in segno.make(address, error="l").matrix]
    assert dark[: len(expected)] == expected
    assert all(row[0] and row[1] and row[-1] and row[-2] for row in shown[:-1]) and all(shown[0] + shown[1])


# Real browsers.


def test_chromium_measures_and_computes_the_same(browser, command, pair):
    (found,) = command([pair], headless=True, blocks=2, runs=1).end()
    assert max(found.environment["max_error"]) < 1e-4
    assert (found.comparison.blocks, found.undelegated, found.environment["threads"]) == (2, (), 1)
    assert found.environment["secure_context"] and found.environment["cross_origin_isolated"]
    assert "headless Chrome" in found.environment["processor"] and found.environment["timer_step_ms"] < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_int8_in_chromium_is_equal_to_the_bit(browser, command, threads):
    options = {"precisions": ["float32", "int8"], "variants": ["lowered"], "threads": [threads]}
    run = command(pairs("se_resnet11_digits", **options), headless=True, blocks=3, runs=2)
    float32, int8 = run.end()
    assert max(float32.environment["max_error"]) < 1e-4
    assert int8.environment["max_error"] == [0, 0]
    assert {found.threads for found in (float32, int8)} == {threads}


@pytest.mark.slow
def test_command_measures_and_its_report_shows_the_browser(browser, tmp_path, capfd):
    result = tmp_path / "browser.json"
    command = (
        "benchmark --browser --headless --network se_resnet11_digits --form lowered --precision int8 --blocks 4 -o"
    )
    assert se_keras_cli.main([*command.split(), str(result)]) == 0
    printed = capfd.readouterr()
    assert "Open http://127.0.0.1:" in printed.err and "int8 lowered" in printed.out
    assert "headless Chrome" in printed.out
    assert printed.out.count("paper, ResNet-50") == 1  # one table for both precisions of a device
    assert read(result)["environment"]["target"] == "browser"
    assert se_keras_cli.main(["report", str(result), "--markdown"]) == 0
    assert "headless Chrome" in capfd.readouterr().out


@pytest.fixture
def chromium_tab(browser, tmp_path):
    """`chromium_tab(address)`: opens a Chromium; returns a function that sends "new", "activate" or "close" to it."""
    running = []

    def open_tab(address):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        flags = [*chromium._FLAGS, "--no-sandbox", f"--user-data-dir={tmp_path}/profile"]
        command = [browser, *flags, f"--remote-debugging-port={port}", address]
        running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

        def send(action):
            tabs = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
            (tab,) = (tab["id"] for tab in tabs if tab["url"] == address)
            path = "new?about:blank" if action == "new" else f"{action}/{tab}"
            request = urllib.request.Request(f"http://127.0.0.1:{port}/json/{path}", method="PUT")
            urllib.request.urlopen(request).close()

        return send

    yield open_tab
    for process in running:
        process.terminate()
        process.wait(10)


def wait_for(run, text):
    """Waits for a message of the command that comes from now on."""
    before = len(run.messages)
    while not any(text in message for message in run.messages[before:]):
        assert run.is_alive()
        time.sleep(0.05)


@pytest.mark.slow
def test_tab_that_is_not_in_front_waits_and_one_that_is_closed_keeps_its_blocks(
    command, pair, chromium_tab, monkeypatch
):
    monkeypatch.setattr(session, "REJOINING", 2.0)
    run = command([pair], blocks=100_000, runs=20, seconds=None)
    send = chromium_tab(run.address)
    wait_for(run, ": block ")
    send("new")
    wait_for(run, "the page is not in front")
    time.sleep(1)
    seen = len(run.messages)
    time.sleep(1)
    assert len(run.messages) == seen
    send("activate")
    wait_for(run, ": block ")
    wait_for(run, ": block ")
    send("close")
    (found,) = run.end()
    assert found.comparison.blocks >= 3
    assert found.device.missing.endswith("closed the page")


@pytest.mark.slow
def test_headless_browser_that_is_killed_leaves_its_blocks(browser, command, pair, monkeypatch):
    started, start = [], chromium.Chromium.__init__
    monkeypatch.setattr(chromium.Chromium, "__init__", lambda self, *x: (started.append(self), start(self, *x))[1])
    run = command([pair], headless=True, blocks=100_000, runs=20, seconds=None)
    wait_for(run, ": block 3 ")
    os.kill(started[0]._process.pid, signal.SIGKILL)
    (found,) = run.end()
    assert found.comparison.blocks >= 3
    assert "The headless browser ended with status -9" in found.device.missing


@pytest.mark.slow
def test_second_chromium_has_its_turn(browser, command, pair):
    run = command([pair], blocks=30, runs=20)
    opened = [chromium.Chromium(run.address) for _ in range(2)]
    try:
        assert [found.environment["id"] for found in run.end()] == [1, 2]
    finally:
        for each in opened:
            each.close()


@pytest.mark.slow
def test_chromium_does_not_time_a_file_that_computes_something_else(browser, command, pair):
    size = len(pair.network.content)
    run = command([pair], headless=True, blocks=2, runs=1)
    while "files/1b.tflite" not in run.target._open.files:
        time.sleep(0.001)
    run.target._open.files["files/1b.tflite"] = File("", small_file(16, seed=1).content.ljust(size, b"\0"))
    with pytest.raises(ValueError, match="Nothing could be timed.+ does not compute the same in this browser"):
        run.end()


@pytest.mark.slow
def test_webgpu_times_what_it_computes_right_and_refuses_strided_convolutions(browser, command):
    """WebGPU computes a strided 1x1 convolution in int8 wrongly."""
    keras.utils.set_random_seed(0)
    model = scattered(create("se_resnet11_digits", classes=10, classifier_activation=None))
    images = images_for(model, samples=20)
    right = to_litert(model, precision="int8", calibration=images, for_gpu=True)
    strided = to_litert(model, precision="int8", calibration=images)
    wanted = [pair_of_files(file, file) for file in (strided, right)]
    with pytest.warns(
        UserWarning, match="headless Chrome.+ does not compute the same in this browser and is not timed"
    ):
        run = command(wanted, headless=True, accelerator="webgpu", blocks=2, runs=1)
        run.join(120)
    if "no adapter for WebGPU" in str(run.error):
        pytest.skip(str(run.error))
    (found,) = run.end()
    assert max(found.environment["max_error"]) < 1e-5 and found.environment["accelerator"] == "webgpu"
    assert found.environment["adapter"] in found.environment["runtime"]


@pytest.mark.slow
@pytest.mark.skipif(LAN is None, reason="this machine is in no network")
@pytest.mark.parametrize("https", [True, False])
def test_https_gives_threads_and_a_fine_clock_over_the_network(browser, command, pair, https):
    (found,) = command([pair], headless=True, blocks=2, runs=1, lan=True, https=https).end()
    about = found.environment
    assert (about["secure_context"], about["cross_origin_isolated"]) == (https, https)
    assert (about["timer_step_ms"] < 0.05) is https


@pytest.mark.slow
def test_interrupted_command_ends_its_browser(browser, tmp_path):
    script = "import sys; from se_keras_cli import main; sys.exit(main())"
    command = "benchmark --browser --headless --network se_resnet11_digits --form lowered --blocks 100000 --seconds 600"
    process = subprocess.Popen(
        [sys.executable, "-c", script, *command.split()], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    address = None
    for line in process.stderr:
        address = address or (line.split()[1] if line.startswith("Open ") else None)
        if "block 3 of" in line:
            break
    process.terminate()
    with process.stderr as rest:
        assert "interrupted" in rest.read()
    assert process.wait(30) == 130
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert address and address not in running
