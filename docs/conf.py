"""How Sphinx makes the site: `make docs`. Pages are MyST Markdown; tutorials are notebooks, which the build runs."""

import inspect
import re
import sys
from importlib.metadata import version as version_of
from pathlib import Path

from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import from_code  # noqa: E402

project, author = "hosfl", "the hosfl authors"
copyright = "the hosfl authors"
version = release = version_of("hosfl")
html_title = f"hosfl {release}"
source = re.search(r'^Source = "(.*)"', (HERE.parent / "pyproject.toml").read_text(), re.M)[1]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_copybutton"]
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


# --- what the build does beside ---


def elsewhere(app, name, text):
    """Links to files of the repository that are no pages lead to this version of them."""
    text[0] = re.sub(r"(?<!!)(\[[^]]*\])\(\.\./([^)]+)\)", rf"\1({source}/blob/v{release}/\2)", text[0])


def docstring(app, what, name, of, options, lines):
    lines[:] = from_code.as_rst("\n".join(lines), of)


def defaults(app, what, name, of, options, signature, returns):
    """Defaults that Python writes as <...> are no Python, and a signature with one would be set in a single line."""
    plain = re.sub(r"<(?:function |class ')([\w.]+)'?>", r"\1", signature or "").replace("<factory>", "...")
    return plain or signature, returns


def no_default(app, what, name, member, skip, options):
    """A field whose default is a function or a class is no method of its own class, and no class within it."""
    elsewhere = inspect.isclass(member) or (inspect.isfunction(member) and "." not in member.__qualname__)
    return True if what == "class" and elsewhere else None


def public_name(app, env, node, contnode):
    """A signature names a class by the module where it lies: it is documented under its public name."""
    python = env.get_domain("py")
    for module in from_code.MODULES:
        name = f"{module}.{node['reftarget'].rpartition('.')[2]}"
        if name in python.objects:
            return python.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, contnode)
    inside = node.get("refdomain") == "py" and node["reftarget"].startswith("hosfl")
    return contnode if inside else None  # what is not public stays text


class CommandLine(SphinxDirective):
    """Every command and every option, from the parser itself."""

    def run(self):
        return self.parse_text_to_nodes(from_code.command_line(), allow_section_headings=True)


def no_faults(app):
    if found := from_code.faults():
        raise ExtensionError("; ".join(found))


def nothing_from_elsewhere(app, error):
    """A page must read the same without a network: links lead out, but nothing is loaded."""
    load = re.compile(
        r"""<(?:script|img|iframe|source|video|audio)[^>]*\ssrc=["']?https?:[^>]*|"""
        r"""<link[^>]*rel=["']?(?:stylesheet|preload|preconnect|icon)[^>]*https?:[^>]*|@import[^;]*https?:[^;]*|"""
        r"""url\(["']?https?:[^)]*"""
    )
    for path in Path(app.outdir).rglob("*.[hc][ts][ms]*"):
        if found := load.search(path.read_text()):
            raise ExtensionError(f"{path} loads {found[0]}")


def setup(app):
    app.connect("builder-inited", no_faults)
    app.connect("source-read", elsewhere)
    app.connect("autodoc-process-docstring", docstring)
    app.connect("autodoc-process-signature", defaults)
    app.connect("autodoc-skip-member", no_default)
    app.connect("missing-reference", public_name)
    app.connect("build-finished", nothing_from_elsewhere)
    app.add_directive("command-line", CommandLine)
