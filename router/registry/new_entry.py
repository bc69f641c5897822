"""Formats a new entry of `registry.yaml` as text."""

import json
import re

import yaml
from msgspec import Struct

from engines.spec import Matryoshka

_PLAIN = re.compile(r"[A-Za-z0-9./~][A-Za-z0-9./~_+-]*(;? [A-Za-z0-9.,/()_+-]+)*", re.ASCII)
_PLAIN_IN_LIST = re.compile(r"[A-Za-z0-9./~][A-Za-z0-9./~_+-]*", re.ASCII)
_POOLING_NOTE = " # no modules.json states it: this is sentence-transformers' default; compare with the model card"


_KEYS = ("revision", "adapter", "adapter_revision", "task")


class NewEntry(Struct, frozen=True, kw_only=True):
    """An entry to add; what is empty is left out.

    `assumed_pooling`: written with a comment that nothing states it.
    """

    name: str
    source: str
    aliases: tuple[str, ...] = ()
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    task: str | None = None
    prompts: dict[str, str] = {}
    default_prompt: str | None = None
    instruction_template: str | None = None
    matryoshka: Matryoshka | None = None
    assumed_pooling: str | None = None
    description: str = ""
    license: str = ""


def entry_lines(entry: NewEntry) -> list[str]:
    """Format an entry as lines of the list `models`, without indentation."""
    lines = [f"- name: {scalar(entry.name)}"]
    if entry.aliases:
        lines.append(f"  aliases: [{', '.join(scalar(alias, _PLAIN_IN_LIST) for alias in entry.aliases)}]")
    lines.append(f"  source: {scalar(entry.source)}")
    lines += [f"  {key}: {scalar(text)}" for key in _KEYS if (text := getattr(entry, key))]
    if entry.prompts:
        lines.append("  prompts:")
        lines += [f"    {scalar(name)}: {_quoted(text)}" for name, text in entry.prompts.items()]
    if entry.default_prompt:
        lines.append(f"  default_prompt: {scalar(entry.default_prompt)}")
    if entry.instruction_template:
        lines.append(f"  instruction_template: {_quoted(entry.instruction_template)}")
    if entry.matryoshka:
        lines.append(f"  matryoshka: {_widths(entry.matryoshka)}")
    if entry.assumed_pooling:
        lines.append(f"  pooling: {entry.assumed_pooling}{_POOLING_NOTE}")
    lines += [f"  {key}: {scalar(text)}" for key in ("description", "license") if (text := getattr(entry, key))]
    return lines


def _widths(rule: Matryoshka) -> str:
    """Format a rule as a list, or as a mapping if it is more than widths."""
    widths = f"[{', '.join(map(str, rule.widths))}]"
    if rule.minimum is None and not rule.layer_norm:
        return widths
    bound = f"min: {rule.minimum}" if rule.minimum is not None else f"widths: {widths}"
    return f"{{ {bound}{', layer_norm: true' if rule.layer_norm else ''} }}"


def scalar(text: str, plain: re.Pattern[str] = _PLAIN) -> str:
    """Return a text as a YAML scalar, in quotes where YAML would read something else, as for `123`, `no` and `a: b`."""
    return text if plain.fullmatch(text) and isinstance(yaml.safe_load(text), str) else _quoted(text)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
