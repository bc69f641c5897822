"""Every model type of the installed transformers has a verdict, and a sample of them gets it again."""

import importlib.metadata
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from benchmarks.accuracy.families import PAGES, read_results, render
from benchmarks.lib.engine_kit import Kit
from benchmarks.lib.families import TriedType, try_family

FOUND, VERSION = read_results()
SERVED = [each for each in FOUND if each.verdict == "served"]
REFUSED = [each for each in FOUND if each.verdict == "refused"]
SAMPLE = SERVED[::12] + REFUSED[::8]
"""Some of each verdict: all of them take minutes (`python -m benchmarks.accuracy.families`)."""


@pytest.mark.parametrize("language", PAGES)
def test_the_page_is_the_one_that_the_results_make(language: str) -> None:
    assert PAGES[language].read_text(encoding="utf-8") == render(FOUND, VERSION, language)


def test_every_type_of_the_installed_transformers_has_a_verdict() -> None:
    if importlib.metadata.version("transformers") != VERSION:
        pytest.skip("another version of transformers is installed")
    assert [each.model_type for each in FOUND] == sorted(CONFIG_MAPPING.keys())


def test_no_type_gets_wrong_vectors() -> None:
    assert [each for each in FOUND if each.verdict == "wrong"] == []
    assert len(SERVED) > 100


@pytest.mark.slow
@pytest.mark.parametrize("known", SAMPLE, ids=lambda known: known.model_type)
def test_a_type_gets_its_verdict_again(kit: Kit, tmp_path: Path, known: TriedType) -> None:
    assert try_family(known.model_type, kit, tmp_path / "folder") == known
