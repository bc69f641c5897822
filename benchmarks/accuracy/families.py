"""Tries every model type of the installed transformers, and writes docs/families.md and its Chinese twin.

    python -m benchmarks.accuracy.families            tries all (minutes), keeps what it found, and writes both pages
    python -m benchmarks.accuracy.families bert gte   tries these, and writes what has become of them
    python -m benchmarks.accuracy.families --pages    writes both pages from what was found last

`benchmarks/lib/families.py` says how a type is tried. Exits with 1 when a type gets wrong vectors.
"""

import argparse
import json
import logging
import sys
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import structlog
import transformers

from benchmarks.lib.engine_kit import Kit
from benchmarks.lib.families import TriedType, Verdict, model_types, try_all

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "families.json"
PAGES = {"en": ROOT / "docs" / "families.md", "zh": ROOT / "docs" / "zh" / "families.md"}

_INTRODUCTION = {
    "en": """# Families

What becomes of each of the {total} model types that transformers {version} knows, when a small model of it with random
weights is served and compared with sentence-transformers on the same folder (mean pooling, float32, CPU; cosine of at
least 0.999999, and 1e-5 in every component). Made by `python -m benchmarks.accuracy.families`. A type whose config
cannot be made small without knowledge of the family is *untried*, which says nothing about whether it can be served:
every load compares the fast path with the plain one ([accuracy](accuracy.md)).
""",
    "zh": """# 模型结构

[English](../families.md)。transformers {version} 认识的 {total} 种模型类型，各建一个随机权重的小模型，提供服务并与
同一目录的 sentence-transformers 比较（平均池化、float32、CPU；余弦不低于 0.999999，各分量误差不超过 1e-5）。
由 `python -m benchmarks.accuracy.families` 产生。不了解其结构就无法缩小配置的类型列为“未试”，这并不说明它能否提供
服务：每次加载都会把快速路径与朴素路径相比较（[精度](accuracy.md)）。
""",
}
_TITLES: dict[str, dict[Verdict, str]] = {
    "en": {
        "served": "Served with the same vectors",
        "refused": "Refused, with the message",
        "out": "No text embedders",
        "untried": "Untried",
        "wrong": "Wrong",
    },
    "zh": {
        "served": "向量相同",
        "refused": "拒绝加载，信息如下",
        "out": "不是文本向量模型",
        "untried": "未试",
        "wrong": "向量有误",
    },
}
_HEADS = {"en": "| | number | types |\n|---|---|---|", "zh": "| | 数量 | 类型 |\n|---|---|---|"}
_REASONS_ZH = {
    "encoder-decoder": "编码器-解码器",
    "no model without a head": "没有不带打分头的模型",
    "packed": "无填充",
    "padded": "有填充",
    "unpadded": "等长分批",
}


def render(found: Sequence[TriedType], version: str, language: str) -> str:
    """Return a page: for each verdict a table of the reasons, the most frequent first."""
    lines = [_INTRODUCTION[language].format(total=len(found), version=version)]
    for verdict, title in _TITLES[language].items():
        by_reason: dict[str, list[str]] = defaultdict(list)
        for each in found:
            if each.verdict == verdict:
                by_reason[each.why].append(each.model_type)
        if by_reason:
            number = sum(map(len, by_reason.values()))
            lines += [f"## {title}: {number}" if language == "en" else f"## {title}：{number}", "", _HEADS[language]]
            lines += [_row(reason, types, language) for reason, types in sorted(by_reason.items(), key=_rank)]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _rank(item: tuple[str, list[str]]) -> tuple[int, str]:
    return -len(item[1]), item[0]


def _row(reason: str, types: Sequence[str], language: str) -> str:
    shown = _REASONS_ZH.get(reason, reason) if language == "zh" else reason
    if language == "zh" and reason.startswith("reads "):
        shown = f"读取 `{reason.removeprefix('reads ')}`"
    return f"| {shown.replace('|', '/')} | {len(types)} | {', '.join(types)} |"


def read_results() -> tuple[list[TriedType], str]:
    """Return what was found last, and the version of transformers that it was found with."""
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))
    return [TriedType(name, *entry) for name, entry in kept["types"].items()], kept["transformers"]


def write_pages() -> None:
    """Write both pages from what was found last."""
    found, version = read_results()
    for language, page in PAGES.items():
        page.write_text(render(found, version, language), encoding="utf-8")


def keep(found: Mapping[str, TriedType]) -> None:
    """Keep what was found."""
    types = {name: [found[name].verdict, found[name].why] for name in sorted(found)}
    content = {"transformers": transformers.__version__, "types": types}
    RESULTS.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Try the types and print what becomes of each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.families", description=__doc__)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types; default: all")
    parser.add_argument("--pages", action="store_true", help="write the pages only")
    options = parser.parse_args()
    if options.pages:
        write_pages()
        return
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    warnings.simplefilter("ignore")
    found: dict[str, TriedType] = {}
    with TemporaryDirectory() as folder:
        kit = Kit(Path(folder))
        for each in try_all(tuple(options.types) or model_types(), kit):
            found[each.model_type] = each
            print(f"{each.model_type}: {each.verdict}{f' ({each.why})' if each.why else ''}", flush=True)
        kit.close()
    keep(({each.model_type: each for each in read_results()[0]} if options.types else {}) | found)
    write_pages()
    if any(each.verdict == "wrong" for each in found.values()):
        sys.exit("a type gets wrong vectors")


if __name__ == "__main__":
    main()
