"""Sphinx settings: `make docs` builds the site from docs/*.md and the docstrings, without network access."""

from __future__ import annotations

import importlib

import pudnet

project = "pudnet"
author = "the pudnet authors"
version = release = pudnet.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
html_theme = "furo"
html_title = f"pudnet {release}"
html_show_sphinx = False

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": True}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autoclass_content = "class"
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# Members of torch.nn.Module that are no part of what pudnet promises.
autodoc_inherit_docstrings = False

for name in pudnet.__all__:  # the public names are looked up when they are first used
    setattr(pudnet, name, getattr(pudnet, name))
importlib.invalidate_caches()
