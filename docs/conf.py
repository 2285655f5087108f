"""The documentation site: `make docs`."""

from importlib.metadata import version as _version

project = "schedulefree_cpp"
release = version = _version("schedulefree-cpp")
copyright = "The schedulefree_cpp authors"

extensions = [
    "breathe",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_templates"]
templates_path = ["_templates"]

html_theme = "furo"
html_title = f"schedulefree_cpp {release}"

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

# Every name in the references must be found, but for what is private, and for what others document:
# nothing is fetched.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(collections|os|torch|torchtitan|transformers|lightning)\..*"),
    ("py:.*", r"(ParamsT|Loss|schedulefree_cpp\._.*)"),
    ("cpp:identifier", r"(at|c10|std|torch)(::.*)?|LossClosure"),
    ("cpp:identifier", r"schedulefree|(schedulefree::)?detail(::.*)?|StepCoefficients|betas_t"),
]
