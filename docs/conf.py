"""The documentation site: `make docs`. Nothing is downloaded, and every warning is an error.

The source is the whole repository, so that a link leads to the same place here and in a clone.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from privfl import __version__ as release  # noqa: E402

project = "privfl"
project_copyright = "the privfl authors, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "docs/reference/*.md"]
include_patterns += ["examples/*/README.md", "findings/README.md"]
# Folders are named so that they are not walked through.
exclude_patterns = [".venv", "build", "runs", "privfl", "tests", "benchmarks", ".*_cache"]

# The anchors that GitHub makes.
myst_heading_anchors = 3
# Keys of experiment and site files, and shell scripts, are shown as they are.
highlight_language = "none"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
autodoc_type_aliases = {"ArrayLike": "numpy.typing.ArrayLike"}
napoleon_numpy_docstring = False
# "Attributes:" become a list; as entries of their own they would stand beside the members.
napoleon_use_ivar = True

html_theme = "alabaster"
html_title = f"privfl {release}"
html_theme_options = {
    "description": "Differentially private federated learning over MPI",
    "fixed_sidebar": True,
    "page_width": "1240px",
    "body_max_width": "960px",
    "sidebar_width": "250px",
    "show_powered_by": False,
}
html_sidebars = {"**": ["about.html", "searchfield.html", "navigation.html"]}
html_copy_source = False

# The README is the front page, and has no place for what only this site needs.
CONTENTS = """

```{toctree}
:hidden:
:maxdepth: 2
:caption: Guides

docs/installation
docs/first-experiment
docs/run-folder
docs/cluster
docs/own-loop
docs/secure-sum
docs/choosing-a-mode
docs/choosing-epsilon
docs/budget
docs/reading-a-budget-report
docs/audits
docs/sharp-edges
```

```{toctree}
:hidden:
:maxdepth: 2
:caption: Reference

docs/reference/experiment-keys
docs/reference/site-keys
docs/reference/api
```

```{toctree}
:hidden:
:maxdepth: 2
:caption: Why it holds

docs/accounting
docs/secure-aggregation
SECURITY
```

```{toctree}
:hidden:
:maxdepth: 2
:caption: Project

examples/heart_disease/README
CONTRIBUTING
CHANGELOG
findings/README
```
"""


def _with_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname == root_doc:
        source[0] += CONTENTS


def _guarantees(
    app: Sphinx, what: str, name: str, documented: object, options: object, lines: list[str]
) -> None:
    """Set the paragraph of a docstring that begins with "Guarantee:" apart from the others."""
    text, lines[:] = list(lines), []
    inside = False
    for line in text:
        if line.startswith("Guarantee: "):
            lines += [".. admonition:: Guarantee", "", f"   {line.removeprefix('Guarantee: ')}"]
            inside = True
        else:
            inside = inside and bool(line.strip())
            lines.append(f"   {line.strip()}" if inside else line)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _with_contents)
    # Before napoleon, whose priority is 500.
    app.connect("autodoc-process-docstring", _guarantees, priority=400)
