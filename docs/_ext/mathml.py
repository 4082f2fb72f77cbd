"""Formulas as MathML, which browsers lay out themselves: made when the site is built, and no script runs on a page."""

import re

import docutils.nodes
from math_core import LatexToMathML
from sphinx.errors import ExtensionError

_convert = LatexToMathML()
_PRIME = re.compile(r"<msup>(<mi>[^<]*</mi>)<mo>′</mo></msup>")


def _mathml(node, display):
    try:
        found = _convert.convert_with_local_state(node.astext(), displaystyle=display)
        return _PRIME.sub(r"\1<mo>′</mo>", found)  # the glyph is raised already
    except Exception as error:
        raise ExtensionError(f"{node.source}:{node.line}: {node.astext()}: {error}") from error


def _inline(translator, node):
    translator.body.append(_mathml(node, False))
    raise docutils.nodes.SkipNode


def _block(translator, node):
    translator.body.append(f'<div class="math">{_mathml(node, True)}</div>')
    raise docutils.nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
