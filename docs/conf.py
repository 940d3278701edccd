"""How Sphinx makes the site: `make docs`. Pages are MyST Markdown; tutorials are notebooks that are run by the build."""

import re
import sys
from importlib.metadata import version as version_of
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # from_code.py

project, author = "hosfl", "the hosfl authors"
copyright = "the hosfl authors"
version = release = version_of("hosfl")
html_title = f"hosfl {release}"
source = re.search(r'^Source = "(.*)"', (HERE.parent / "pyproject.toml").read_text(), re.M)[1]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_copybutton", "from_code"]
exclude_patterns = ["jupyter_execute"]

# --- pages ---
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
nb_execution_mode = "force"
nb_execution_timeout = 180
nb_execution_raise_on_error = True
nb_merge_streams = True
smartquotes = False
copybutton_exclude = ".linenos, .gp"

# --- the API: docstrings are plain text, which from_code.py turns into reStructuredText ---
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}
maximum_signature_line_length = 90
toc_object_entries_show_parents = "hide"
# What the signatures name of other projects, whose inventories would have to be fetched.
nitpick_ignore_regex = [(r"py:.*", r"(?!hosfl).*")]

# --- looks: nothing is loaded from elsewhere ---
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"source_repository": source, "source_branch": "main", "source_directory": "docs/"}


def elsewhere(app, name, text):
    """Links to files of the repository that are no pages lead to this version of them."""
    text[0] = re.sub(r"(?<!!)(\[[^]]*\])\(\.\./([^)]+)\)", rf"\1({source}/blob/v{release}/\2)", text[0])


def setup(app):
    app.connect("source-read", elsewhere)
