"""What the site takes from outside docs/: the benchmarks' pictures, and no script from the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

PICTURES = ("benchmarks/results/directions.png", "benchmarks/results/guides.png")
FETCHED = "https://unpkg.com/iframe-worker/shim"
"""What the theme would have every page fetch, for a search without a server."""

KEPT = "assets/iframe-worker/shim.js"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the benchmarks' pictures under assets/."""
    for picture in PICTURES:
        path = Path(config.docs_dir).parent / picture
        files.append(File.generated(config, f"assets/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Have pages, whose links are those of the repository, show the copies."""
    for picture in PICTURES:
        markdown = markdown.replace(f"(../{picture})", f"(assets/{Path(picture).name})")
    return markdown


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Have a page take the script from the site itself."""
    return output.replace(FETCHED, get_relative_url(KEPT, page.url))


def on_post_template(output_content: str, **_: Any) -> str:
    """Have pages that stand for no file do so too."""
    return output_content.replace(FETCHED, KEPT)
