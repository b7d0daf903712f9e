"""The site is built strictly, and every link, anchor and image in it leads somewhere, offline."""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("material")
pytest.importorskip("mkdocstrings")

ROOT = Path(__file__).parents[2]
FETCHED = {("img", "src"), ("script", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}
"""Attributes whose files a browser fetches by itself."""


class Links(HTMLParser):
    """What a page links to, what it fetches, and what can be linked to in it."""

    def __init__(self, text):
        super().__init__()
        self.links, self.fetched, self.anchors, self.without_text = set(), set(), set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        for name, value in attrs:
            if name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value)
            if (tag, name) in FETCHED and value:
                self.fetched.add(value)
            if tag == "a" and name == "href" and value:
                self.links.add(value)
        if tag == "img" and not attributes.get("alt") and "headerlink" not in attributes.get("class", ""):
            self.without_text.append(attributes.get("src"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, by pages. With --quiet, --strict would not see the warnings that it is to fail by."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return {page: Links(page.read_text(encoding="utf-8")) for page in folder.rglob("*.html")}


def inside(page, link):
    """The file of the site that a link leads to, and the anchor in it; None for the web."""
    parts = urlsplit(link)
    if parts.scheme in ("http", "https", "mailto", "data"):
        return None
    assert not parts.scheme, f"{page}: {link}"
    path = unquote(parts.path)
    return (page.parent / path).resolve() if path else page, unquote(parts.fragment)


def test_every_link_leads_somewhere(site):
    assert len(site) > 60
    broken = []
    for page, found in site.items():
        if page.name == "404.html":  # its links begin at the root of a server
            continue
        for link in found.links | found.fetched:
            there = inside(page, link)
            if there is None:
                continue
            file, anchor = there
            file = file / "index.html" if file.is_dir() else file
            if not file.is_file() or (anchor and file in site and anchor not in site[file].anchors):
                broken.append(f"{page.name}: {link}")
    assert not broken


def test_nothing_is_fetched_from_elsewhere(site):
    assert not {link for found in site.values() for link in found.fetched if urlsplit(link).scheme in ("http", "https")}


def test_images_of_the_pages_have_a_text(site):
    assert not {page.name: found.without_text for page, found in site.items() if found.without_text}
