"""How Sphinx builds the site. Its sources are the Markdown pages of the repository, which are read without it, too.

CONTRIBUTING.md has the command.
"""

import sys
from pathlib import Path

from sphinx.application import Sphinx


DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

from hf_dpzo import __version__  # noqa: E402

from sections import fill  # noqa: E402


project = "hf_dpzo"
copyright = "the authors of hf_dpzo; Apache-2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]

# The root of the sources is that of the repository, so that links between pages are right in both.
root_doc = "docs/index"
include_patterns = [
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/*.md",
    "recipes/README.md",
    "benchmarks/README.md",
    "examples/README.md",
    "hf_dpzo/methods/README.md",
    "model_cards/**.md",
]
exclude_patterns = [".*", "build", "out"]  # Large, and without a page.

myst_heading_anchors = 4
smartquotes = False  # Two hyphens begin an option.

# In docstrings, what stands between backticks is code.
default_role = "code"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
# Types of other libraries, and of modules that are not public, have no page to lead to.
nitpick_ignore_regex = [("py:.*", r"(?!hf_dpzo\.(?:privacy\.|methods\.|losses\.|trl\.)?[A-Z]).*")]

copybutton_exclude = ".linenos, .gp, .go"  # Prompts and output are not copied.

html_theme = "furo"
html_title = f"hf_dpzo {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_extra_path = ["front"]
html_theme_options = {
    "source_repository": "https://github.com/hf-dpzo/hf_dpzo/",
    "source_branch": "main",
    "source_directory": "",
}


def fill_page(app: Sphinx, name: str, source: list[str]) -> None:
    """Put what is made from the code into the page `name`, whose text is the one item of `source`."""
    source[0] = fill(source[0])


def setup(app: Sphinx) -> None:
    """Connect the parts that are made from the code."""
    app.connect("source-read", fill_page)
