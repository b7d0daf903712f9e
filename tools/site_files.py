"""A hook of MkDocs: pages link to files of the repository outside of docs/, and these come into the site with them.

A link such as `../benchmarks/results/speed.md` is right where the repository is read. In the site that file stands
below `repository/`: Markdown and source code as pages, images and data as they are, a folder as a list of its pages.
What these link to comes with them. A link to a file that does not exist is left to MkDocs, which fails.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from os.path import normpath
from pathlib import Path, PurePosixPath
from posixpath import relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
FOLDER = "repository"
ALWAYS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")
"""What comes into the site linked to or not, so that its own links are checked as well."""

SOURCE = {".py": "python", ".toml": "toml", ".txt": "text"}
"""Suffixes of files that become a page with their text, and the language that it is coloured in."""

LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
ASIDE = "---\nsearch: {exclude: true}\nhide: [toc]\n---\n\n"
"""In front of pages from elsewhere: searches pass over them, and their tables have more room."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file of the repository that a page, or a file added here, links to."""
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    waiting = [*ALWAYS, *(path for page in pages for path in linked(page, (ROOT / page).read_text(encoding="utf-8")))]
    seen: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        text = page_of(path)
        if text is None:
            files.append(File.generated(config, uri(path), abs_src_path=str(ROOT / path)))
        else:
            files.append(File.generated(config, uri(path), content=ASIDE + text))
            waiting += linked(path, text)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Have links point to where the site has what they point to in the repository."""
    here = page.file.src_uri
    path = origin(here)

    def moved(match: re.Match[str]) -> str:
        target = resolved(path, match[2])
        if target is None:
            return match[0]
        there = uri(target) if outside(target) else target.removeprefix("docs/")
        return f"{match[1]}{relpath(there, str(PurePosixPath(here).parent))}{match[3] or ''}"

    return LINK.sub(moved, markdown)


def linked(path: str, text: str) -> Iterator[str]:
    """Files of the repository outside of the pages that `text`, which stands at `path`, links to."""
    for match in LINK.finditer(text):
        target = resolved(path, match[2])
        if target is not None and outside(target):
            yield target


def resolved(path: str, link: str) -> str | None:
    """Where in the repository a link leads, or None: to the web, or to nothing."""
    folder = path if (ROOT / path).is_dir() else str(PurePosixPath(path).parent)
    target = PurePosixPath(normpath(f"{folder}/{link}")).as_posix()
    return target if "://" not in link and not target.startswith("..") and (ROOT / target).exists() else None


def outside(path: str) -> bool:
    """Whether a path is of no page and no image of docs/."""
    return not path.startswith("docs/") or path.endswith(".py")


def uri(path: str) -> str:
    """Where in the site a file or folder outside of the pages stands."""
    if (ROOT / path).is_dir():
        return f"{FOLDER}/{path}/index.md"
    return f"{FOLDER}/{path}.md" if Path(path).suffix in SOURCE else f"{FOLDER}/{path}"


def origin(src_uri: str) -> str:
    """The path in the repository of a page of the site: the inverse of `uri`."""
    if not src_uri.startswith(f"{FOLDER}/"):
        return f"docs/{src_uri}"
    path = src_uri.removeprefix(f"{FOLDER}/")
    stem = path.removesuffix(".md")
    if Path(path).name == "index.md":
        return str(PurePosixPath(path).parent)
    return stem if Path(stem).suffix in SOURCE else path


def page_of(path: str) -> str | None:
    """The Markdown of a file or folder, or None where it is no text to be read as a page."""
    whole = ROOT / path
    if whole.is_dir():
        return listing(whole)
    if whole.suffix == ".md":
        return whole.read_text(encoding="utf-8")
    if whole.suffix not in SOURCE:
        return None
    text = whole.read_text(encoding="utf-8").rstrip()
    return f"# {whole.name}\n\n`{path}`\n\n````{SOURCE[whole.suffix]}\n{text}\n````\n"


def listing(folder: Path) -> str:
    """A page that lists the pages of a folder."""
    names = sorted(file.name for file in folder.iterdir() if file.suffix in (".md", ".py"))
    return "\n".join([f"# {folder.name}", "", *(f"- [{name}]({name})" for name in names)]) + "\n"
