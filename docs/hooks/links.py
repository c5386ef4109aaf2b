"""Check a built site: internal links are valid, and pages load nothing from other sites.

    python docs/hooks/links.py site

mkdocs checks what pages say to each other; this is about what is in the HTML, of the theme and the API pages too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """Links of a page, URLs that a browser loads for it, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Record an element."""
        attributes = {name: value or "" for name, value in attrs}
        self.places.update(attributes[name] for name in ("id", "name") if name in attributes)
        if "src" in attributes:
            self.fetched.append(attributes["src"])
        if tag == "link" and attributes.get("rel") not in ("canonical", "prev", "next"):
            self.fetched.append(attributes["href"])
        elif "href" in attributes:
            self.links.append(attributes["href"])


def problems(site: Path) -> Iterator[str]:
    """Problems of a site, one line each."""
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}
    for path, page in pages.items():
        where = path.relative_to(site.resolve())
        yield from (f"{where} fetches {url}" for url in page.fetched if urlsplit(url).scheme not in ("", "data"))
        for link in page.links + page.fetched:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                yield f"{where} links to {link}, which is not there"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].places:
                yield f"{where} links to {link}, a page without that heading"


def main(arguments: list[str]) -> int:
    """Print the problems of the site in a folder; return 1 if there are any."""
    broken = list(problems(Path(arguments[0])))
    print("\n".join(broken) or f"{arguments[0]}: every link leads somewhere, and nothing is fetched from elsewhere.")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
