"""The status page: its text, and in a real browser with a real server."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsm_serve.client import PolicyClient
from rsm_serve.config import ServerConfig
from rsm_serve.server import PolicyServer, background_server
from tests.bundles import make_spec, write_bundle
from tests.hang import HANG_S
from tests.rsm_serve.http.ask import ANY_PORT, get, http_of

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "rsm_serve" / "http" / "status.html").read_text(encoding="utf-8")
VOID = {"meta", "input", "link"}
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")
HOSTILE = "<img id='injected' src='x'>"


class Markup(HTMLParser):
    """What the tests ask for; tags must be balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.fields: list[str] = []
        self.labels: list[str] = []
        self.assets: list[str] = []
        self.pictures: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag not in VOID:
            self._open.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.fields += [values["id"]] if tag in ("input", "select", "textarea") else []
        self.labels += [values["for"]] if tag == "label" else []
        self.pictures += [values["role"]] if tag == "svg" else []
        self.assets += [value for name, value in attrs if name in ("src", "href", "srcset")]
        assert "style" not in values, "the content security policy forbids it"
        assert not any(name.startswith("on") for name in values)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag


def test_the_page_stands_alone_and_is_labelled():
    markup = Markup(PAGE)
    assert len(markup.ids) == len(set(markup.ids))
    assert sorted(markup.fields) == sorted(markup.labels)
    assert set(markup.pictures) == {"img"}
    assert all(asset == "data:," or asset.startswith("/") for asset in markup.assets)
    assert re.findall(r"https?://[^\"\s]+", PAGE) == ["http://www.w3.org/2000/svg"]
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "@import"):
        assert forbidden not in PAGE
    assert set(re.findall(r'(?:byId|setText)\("([\w-]+)"', PAGE)) <= set(markup.ids)
    assert "prefers-color-scheme: dark" in PAGE
    assert len(PAGE) < 60_000


def test_the_page_is_served_with_a_policy_that_lets_its_script_run():
    script = re.search(r"<script>(.*?)</script>", PAGE, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    with background_server(
        ServerConfig.from_options(repo=_any_repo(), addresses=(ANY_PORT,), http=ANY_PORT), []
    ) as server:
        status, body, headers = get(f"{http_of(server)}/")
    assert (status, body) == (200, PAGE)
    assert f"script-src 'sha256-{digest}'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]


def _any_repo() -> Path:
    return Path("unused")


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[PolicyServer]:
    """A server that has answered 30 requests of 3 rows, with a specification that tries to be markup."""
    repo = tmp_path_factory.mktemp("repository")
    write_bundle(repo, dataclasses.replace(make_spec("tiny", "7"), env_id=HOSTILE))
    with background_server(
        ServerConfig.from_options(repo=repo, addresses=(ANY_PORT,), http=ANY_PORT)
    ) as server:
        with PolicyClient(server.addresses[0], timeout_s=HANG_S) as client:
            for _ in range(30):
                client.act(np.zeros((3, 4)))
        yield server


def browse(server: PolicyServer, profile: Path, fragment: str, *flags: str) -> str:
    assert BROWSER is not None
    url = f"http://{http_of(server)}/{fragment}"
    command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", "--virtual-time-budget=4000", *flags, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=True)
    assert "Content Security Policy" not in done.stderr
    return done.stdout


def text_of(dom: str, element_id: str) -> str:
    found = re.search(rf'id="{element_id}"[^>]*>([^<]*)<', dom)
    assert found is not None, element_id
    return found[1]


@needs_browser
def test_the_page_shows_live_numbers_and_a_sample(server, tmp_path):
    dom = browse(server, tmp_path, "#sample=probe:1", "--dump-dom")
    assert text_of(dom, "state") == "serving"
    assert server.addresses[0] in text_of(dom, "summary")
    cells = re.search(r'<tbody id="policies"><tr><th scope="row">tiny:7</th>(.*?)</tr>', dom)
    assert cells is not None
    values = re.findall(r"<td[^>]*>([^<]*)</td>", cells[1])
    assert values[0] == "serving"
    assert re.fullmatch(r"[\d.]+ (µs|ms)", values[2]), "p50"
    assert re.fullmatch(r"[\d.]+ (µs|ms)", values[3]), "p99"
    assert values[4:6] == ["30", "0"]
    assert re.search(
        r"p50 [\d.]+ (µs|ms), p99 [\d.]+ (µs|ms), 30 since the start", text_of(dom, "request-note")
    )
    assert dom.count('class="bar"') >= 4
    # The sample: a dot per action, a legend, the statistics, and what was asked for.
    assert dom.count("<circle") == 256
    assert len(set(re.findall(r'fill="rgb\([^"]*"', dom))) == 1, (
        "q of the tiny graph is that of the observation"
    )
    assert "256 actions of tiny:7, seeds expand_seed(0, 256)" in text_of(dom, "drawn")
    assert re.search(r'<tbody id="statistics"><tr><th scope="row">a0</th>', dom)
    assert text_of(dom, "error") == ""
    assert re.search(r'aria-label="Scatter of a0 and a1: 256 actions[^"]*q from', dom)
    # The specification, as text.
    assert "&lt;img id='injected' src='x'&gt;" in dom
    assert "<img" not in dom


@needs_browser
def test_a_mistake_is_shown_in_a_sentence(server, tmp_path):
    dom = browse(server, tmp_path, "#sample=1,2", "--dump-dom")
    assert "wanted an observation of shape [4]" in text_of(dom, "error")
    assert "<circle" not in dom


@needs_browser
def test_it_fits_a_narrow_screen_and_is_drawn(server, tmp_path):
    picture = tmp_path / "narrow.png"
    browse(server, tmp_path / "profile", "#sample=zeros", f"--screenshot={picture}", "--window-size=360,2000")
    with Image.open(picture) as image:
        assert image.size == (360, 2000)
        pixels = np.asarray(image.convert("RGB"), dtype=np.int16)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
    blue_bars = (abs(pixels - np.array([0x1F, 0x5F, 0xD0])).max(axis=2) < 8).sum()
    assert blue_bars > 1000, "bars and the button"
    assert (pixels[:, -8:] == pixels[0, -1]).mean() > 0.99, "nothing sticks out at the right"


def test_the_picture_in_the_documentation():
    picture = ROOT / "docs" / "images" / "status.png"
    assert any("images/status.png" in page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    assert 10_000 < picture.stat().st_size < 200_000
    with Image.open(picture) as image:
        assert image.size[0] >= 900
