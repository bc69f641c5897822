"""Texts of registries that tests of several packages read."""

FIVE_MISTAKES = """\
version: 1
default_model: bge-m4
models:
  - name: bge-m3
    source: BAAI/bge-m3
    poling: cls
    keep_alive: soon
  - name: bge-m3
    source: https://huggingface.co/BAAI/bge-m3
"""
