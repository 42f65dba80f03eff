"""Sphinx settings: `make docs` builds the site from docs/*.md and the docstrings, without network access."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pudnet

project = "pudnet"
author = "the pudnet authors"
version = release = pudnet.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
html_theme = "furo"
html_title = f"pudnet {release}"
html_show_sphinx = False
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": True}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_inherit_docstrings = False  # torch.nn.Module's members are no part of what pudnet promises
napoleon_numpy_docstring = False
napoleon_use_rtype = False


def without_links_out(app: Any, name: str, source: list[str]) -> None:
    """Links to files outside docs/ work in the repository; on the site they become plain text."""
    docs = Path(app.srcdir)

    def plain(found: re.Match[str]) -> str:
        target = ((docs / name).parent / found[2]).resolve()
        return found[0] if target.is_relative_to(docs) else f"{found[1]} (`{target.relative_to(docs.parent)}`)"

    source[0] = re.sub(r"(?<!!)\[([^\]]+)\]\((?!\w+:|#)([^)#]+)\)", plain, source[0])


def setup(app: Any) -> None:
    app.connect("source-read", without_links_out)
