"""The runner of the GPU measurement: each part by itself, within its time, and kept whatever happens to it."""

import json
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from benchmarks.gpu.results import Device, PartResult, ResultFile, fingerprint, read
from benchmarks.gpu.runner import Part, Runner, launcher

CPU = Device(kind="cpu", name="Test CPU (2 cores)", packages={"torch": "2.11"})
SETTINGS = {"size": "small"}


def part(name: str, entry: str = "finds", **changes: float) -> Part:
    limits = {"expected_s": 1.0, "limit_s": 30.0, "cpu_limit_s": 30.0, **changes}
    return Part(name=name, question="is it so?", entry=f"tests.testkit.gpu_parts:{entry}", **limits)


def a_file(folder: Path, device: Device = CPU) -> ResultFile:
    file = ResultFile(folder, device)
    file.resume([folder], SETTINGS)
    return file


def a_runner(file: ResultFile, told: list[str] | None = None, *, sources: str = "abc") -> Runner:
    lines: list[str] = [] if told is None else told
    return Runner(file, "cpu", launcher(), sources=sources, commit="1234567", tell=lines.append)


def states(file: ResultFile) -> dict[str, str]:
    """What the file says, as the next reader sees it."""
    return {name: found.state for name, found in read(file.path).parts.items()}


def run(folder: Path, parts: Sequence[Part], told: list[str] | None = None, **options: object) -> ResultFile:
    file = a_file(folder)
    a_runner(file, told).run(parts, 60.0, **options)  # type: ignore[arg-type]  # only `only`
    return file


def test_each_part_runs_and_its_findings_are_kept_with_machine_versions_and_date(tmp_path: Path) -> None:
    file = run(tmp_path, [part("first"), part("second")])

    assert file.path.name == "gpu-test-cpu-2-cores.json"
    kept = json.loads(file.path.read_text())
    assert kept["device"]["packages"] == {"torch": "2.11"}
    assert kept["parts"]["first"]["records"] == [{"device": "cpu", "size": "small"}, {"left": True}]
    assert kept["parts"]["second"]["state"] == "done"
    assert kept["parts"]["second"]["commit"] == "1234567"
    assert kept["parts"]["second"]["measured_at"].endswith(" UTC")


def test_a_part_that_fails_costs_no_other_and_keeps_what_it_had_found(tmp_path: Path) -> None:
    file = run(tmp_path, [part("bad", "raises"), part("dead", "dies"), part("good")])

    assert states(file) == {"bad": "failed", "dead": "failed", "good": "done"}
    bad, dead = (read(file.path).parts[name] for name in ("bad", "dead"))
    assert (bad.reason, bad.records) == ("ValueError: the kernel is wrong", [{"step": 1}])
    assert (dead.reason, dead.records) == ("its process ended with 9", [{"step": 1}])


def test_a_part_that_hangs_is_ended_with_its_children_when_its_time_is_over(tmp_path: Path) -> None:
    file = run(tmp_path, [part("hung", "hangs", cpu_limit_s=3.0), part("good")])

    hung = read(file.path).parts["hung"]
    assert states(file) == {"hung": "timed out", "good": "done"}
    assert hung.reason == "longer than 3 s"
    assert hung.seconds < 15
    assert not psutil.pid_exists(hung.records[0]["child"]) or _is_dead(hung.records[0]["child"])


def _is_dead(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_part_that_needs_cuda_is_skipped_on_a_cpu_with_its_reason(tmp_path: Path) -> None:
    file = run(tmp_path, [part("graphs", cpu_limit_s=0.0), part("vllm", "declines")])

    kept = read(file.path).parts
    assert (kept["graphs"].state, kept["graphs"].reason) == ("skipped", "needs CUDA")
    assert (kept["vllm"].state, kept["vllm"].reason) == ("skipped", "no vLLM here")


def test_the_next_run_goes_on_with_what_is_not_done(tmp_path: Path) -> None:
    run(tmp_path, [part("first"), part("second", "raises")])
    told: list[str] = []

    file = run(tmp_path, [part("first", "raises"), part("second"), part("third")], told)

    assert states(file) == {"first": "done", "second": "done", "third": "done"}
    assert told[0].startswith("part 1 of 3, first: done before (")
    assert "part 3 of 3, third: is it so? (about 1 s on an H200; " in "\n".join(told)


@pytest.mark.parametrize("changed", ["sources", "settings", "packages"])
def test_what_was_measured_on_other_code_sizes_or_packages_is_measured_again(tmp_path: Path, changed: str) -> None:
    run(tmp_path, [part("first")])
    device = Device(kind="cpu", name=CPU.name, packages={"torch": "2.13"}) if changed == "packages" else CPU
    file = ResultFile(tmp_path, device)
    file.resume([tmp_path], {"size": "large"} if changed == "settings" else SETTINGS)

    a_runner(file, sources="def" if changed == "sources" else "abc").run([part("first", "raises")], 60.0)

    assert states(file) == {"first": "failed"}


def test_some_parts_can_be_run_again_and_all_others_stay(tmp_path: Path) -> None:
    run(tmp_path, [part("first"), part("second")])

    file = run(tmp_path, [part("first", "raises"), part("second", "raises")], only=["second"])

    assert states(file) == {"first": "done", "second": "failed"}


def test_without_time_left_no_part_begins_and_an_older_measurement_stays(tmp_path: Path) -> None:
    file = a_file(tmp_path)
    assert a_runner(file).run([part("first")], 60.0)

    assert not a_runner(file, sources="def").run([part("first", "raises"), part("second")], 1.0)

    assert states(file) == {"first": "done", "second": "not yet"}
    assert read(file.path).parts["second"].reason == "no time left in this run"


def test_a_run_that_was_ended_from_outside_leaves_a_file_that_the_next_one_reads(tmp_path: Path) -> None:
    file = a_file(tmp_path)
    file.result.parts["first"] = PartResult(state="running", records=[{"step": 1}])
    file.save()

    resumed = a_file(tmp_path)

    assert resumed.result.parts["first"].state == "failed"
    assert resumed.result.parts["first"].records == [{"step": 1}]
    assert list(tmp_path.iterdir()) == [file.path]


def test_an_earlier_result_is_looked_for_where_results_lie_too(tmp_path: Path) -> None:
    earlier, new = tmp_path / "results", tmp_path / "out"
    run(earlier, [part("first")])
    file = ResultFile(new, CPU)
    file.resume([new, earlier], SETTINGS)

    a_runner(file).run([part("first", "raises")], 60.0)

    assert file.path.parent == new
    assert states(file) == {"first": "done"}


def test_the_fingerprint_changes_with_any_line_of_the_code(tmp_path: Path) -> None:
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "a.py").write_text("x = 1\n")
    before = fingerprint(tmp_path)
    (tmp_path / "engines" / "a.py").write_text("x = 2\n")

    assert fingerprint(tmp_path) != before
