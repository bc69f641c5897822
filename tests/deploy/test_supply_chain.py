"""Tests the list of shipped packages, and the summary of the registry's answers."""

import json
from typing import Any

import pytest

from tests.deploy.supply_chain import main, only_shipped, read_audit, shipped

FINE = {"name": "click", "version": "8.5.1", "vulns": []}
BUGS = [{"id": "PYSEC-1", "fix_versions": ["1.1"]}, {"id": "GHSA-2", "fix_versions": []}]
BAD = {"name": "numpy", "version": "1.0", "vulns": BUGS}
UNKNOWN = {"name": "torch", "skip_reason": "Dependency not found on PyPI and could not be audited: torch (2.13.0)"}


def audited(*packages: dict[str, Any]) -> str:
    return json.dumps({"dependencies": packages, "fixes": []})


def test_shipped_is_what_the_server_needs_and_not_what_tests_do() -> None:
    found = shipped()

    assert {"litestar", "torch", "transformers", "uvicorn", "redis", "opentelemetry-sdk"} <= found.keys()
    assert {"pytest", "mypy", "selenium", "embedyard"} & found.keys() == set()
    assert "redis" not in shipped(extras=("otel",))


@pytest.mark.parametrize(
    ("output", "words", "status"),
    [
        (audited(FINE), "1 of 1 packages were looked up, 0 vulnerabilities", 0),
        (audited(FINE, UNKNOWN), "1 of 2 packages were looked up, 0 vulnerabilities", 0),
        (audited(UNKNOWN, UNKNOWN), "has none of the 2 packages, so nothing was checked", 0),
        ("", "no registry answered, so nothing is known", 0),
        (
            audited(FINE, BAD),
            "2 vulnerabilities are known\n  numpy 1.0: PYSEC-1, mended in 1.1\n  numpy 1.0: GHSA-2",
            1,
        ),
    ],
    ids=["clean", "partly known", "nothing known", "no answer", "vulnerable"],
)
def test_an_audit_fails_only_for_vulnerabilities_that_it_found(output: str, words: str, status: int) -> None:
    verdict, code = read_audit(output)

    assert words in verdict
    assert code == status


def test_a_bill_of_materials_leaves_the_test_tools_out() -> None:
    bill = {
        "metadata": {"component": {"bom-ref": "root"}},
        "components": [{"name": "click", "bom-ref": "a"}, {"name": "pytest", "bom-ref": "b"}],
        "dependencies": [{"ref": "root", "dependsOn": ["a", "b"]}, {"ref": "a"}, {"ref": "b", "dependsOn": ["a"]}],
    }  # fmt: skip

    assert only_shipped(bill, {"click"}) == {
        "metadata": {"component": {"bom-ref": "root"}},
        "components": [{"name": "click", "bom-ref": "a"}],
        "dependencies": [{"ref": "root", "dependsOn": ["a"]}, {"ref": "a", "dependsOn": []}],
    }


def test_an_unknown_word_is_answered_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adit"]) == 2
    assert "audit" in capsys.readouterr().err
