"""The documentation site: `make docs`."""

import re
from importlib.metadata import version as _version
from urllib.request import urlopen

from sphinx.pycode import ModuleAnalyzer

project = "schedulefree_cpp"
release = version = _version("schedulefree-cpp")
copyright = "The schedulefree_cpp authors"

extensions = [
    "breathe",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_templates"]
templates_path = ["_templates"]

html_theme = "furo"
html_title = f"schedulefree_cpp {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]

# Headings have the anchors that GitHub gives them.
myst_heading_anchors = 4

# In docstrings a name in single backticks is a link: `AdamWScheduleFree`. help() shows it as it stands.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_type_aliases = {"ParamsT": "ParamsT"}
autodoc_typehints_format = "short"
maximum_signature_line_length = 100

breathe_projects = {"schedulefree_cpp": "../build/doxygen/xml"}
breathe_default_project = "schedulefree_cpp"


def _is_reachable(site):
    try:
        with urlopen(f"{site}objects.inv", timeout=5):
            return True
    except OSError:
        return False


# Names of Python and torch are links where there is a network, and plain where there is none.
_SITES = {"python": "https://docs.python.org/3/", "torch": "https://docs.pytorch.org/docs/stable/"}
intersphinx_mapping = {name: (site, None) for name, site in _SITES.items() if _is_reachable(site)}

# Every name in the references must be found, but for what is private, and for what others document.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(collections|os|torch|torchtitan|transformers|lightning)\..*"),
    ("py:.*", r"(ParamsT|Loss|schedulefree_cpp\._.*)"),
    ("cpp:identifier", r"(at|c10|std|torch)(::.*)?|LossClosure|Naming"),
    ("cpp:identifier", r"schedulefree|(schedulefree::)?detail(::.*)?|StepCoefficients|betas_t"),
]


def _link_to_the_front_page(app, name, source):
    # The README is the site's front page, which stands elsewhere than the file.
    source[0] = re.sub(r"\]\(((?:\.\./)*)\.\./README\.md", r"](\1index.md", source[0])


def _show_one_signature_of_create():
    # Type checkers read one for each name that create() may be given.
    analyzer = ModuleAnalyzer.for_module("schedulefree_cpp._create")
    analyzer.analyze()
    analyzer.overloads.clear()


def setup(app):
    """Has pages link to the README as GitHub does, and show a signature of create()."""
    _show_one_signature_of_create()
    app.connect("source-read", _link_to_the_front_page)
