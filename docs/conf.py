"""The site, by Sphinx: ``make docs``. Markdown pages by MyST, the reference from docstrings, formulas as MathML.

Nothing on a page comes from elsewhere: no script or font of another host, and no script at all for the formulas.
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import mlkernels  # noqa: E402

project = "mlkernels"
author = copyright = "mlkernels contributors"
release = version = mlkernels.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "mathml", "curves"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"mlkernels {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

# The signatures of the family have some fifteen arguments each; what each may be stands below them.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
add_module_names = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_param = False
napoleon_use_rtype = False

# Every reference leads somewhere, but to other projects: their inventories would have to be downloaded.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(torch|nn|numpy|np|collections|typing)\..*")]

ELSEWHERE = re.compile(r"\[([^\]]+)\]\((\.\./[^)#]+)\)")


def _adapt(app, docname, source):
    """Files outside docs/ are handed over as they are, and folders, which a page cannot show, named."""

    def shown(match):
        name, path = match[1].strip("`"), (Path(app.srcdir) / docname).parent / match[2]
        return match[0] if path.is_file() else f"`{name}`"

    source[0] = ELSEWHERE.sub(shown, source[0])


def setup(app):
    app.connect("source-read", _adapt)
