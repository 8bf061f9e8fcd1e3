"""Settings of the site: `make docs` builds it into build/docs.

Sphinx with myst-nb and furo, as optax and flax have it: their readers are ours, docstrings become the reference with a
check that can fail, and notebooks are Markdown that is run at every build. mkdocs would be lighter, but its reference
cannot say which names it lacks, and its notebooks are not run.
"""

import os
import sys
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent / "_ext"), str(Path(__file__).parent.parent)]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [sys.path[1], os.environ.get("PYTHONPATH")]))  # of notebooks
# Libraries of others warn while they are imported; nothing that a notebook prints is hidden by it.
warnings.filterwarnings("ignore", category=DeprecationWarning)

import compressx  # noqa: E402

project = "compressx"
author = "The compressx authors"
copyright = "The compressx authors"
release = version = compressx.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "reference", "results"]
exclude_patterns = ["results/**", "_ext/**", "_static/**"]

# Markdown: headings may be linked to as on a forge.
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]

# Notebooks: run at every build; an error ends it.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # for a loaded machine; each notebook takes under a minute on an idle one
nb_merge_streams = True

# The reference.
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
default_role = "py:obj"
maximum_signature_line_length = 72
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
add_module_names = True

html_theme = "furo"
html_title = f"compressx {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_copyright = False
