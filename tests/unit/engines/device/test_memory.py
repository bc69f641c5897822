"""The memory of devices, memory needs, and the estimates that earlier loads leave."""

import os
import threading
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import structlog
from msgspec import structs

from engines.device.memory import CgroupLimit, CpuMemory, CudaMemory, anonymous_bytes, cgroup_limit, device_memory
from engines.form_cache import HEADER_BYTES, FormCache
from engines.pool.estimates import Estimates, Measurement, Measurements, ReducedForms
from engines.precision import PrecisionStore
from engines.spec import ModelSpec, Precision
from engines.testing.fakes import FakeFiles
from engines.types import Budget, ModelFiles, format_bytes

SPEC = ModelSpec(model_id="a", source="x")
FILES = ModelFiles(path="/m", revision="r1", size_bytes=700)
TOOK = Measurement(weight_bytes=10, workspace_bytes=2, load_s=0.5)
_COMPARED = Precision(
    dtype="int8", worst_cosine=0.995, median_cosine=0.997, recall_at_10=0.95, speedup=1.8, size_ratio=0.25, num_texts=50
)


# ---- bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size_bytes", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (102_400, "100 KiB"),
        (1023 * 2**20, "1023 MiB"),
        (9_100_000_000, "8.5 GiB"),
        (2**50, "1024.0 TiB"),
    ],
)
def test_sizes_are_printed_with_three_digits(size_bytes: int, expected: str) -> None:
    assert format_bytes(size_bytes) == expected


def test_a_budget_is_a_part_or_a_size_and_never_more_than_there_is() -> None:
    assert Budget(fraction=0.8).of(1000) == 800
    assert Budget(size_bytes=300).of(1000) == 300
    assert Budget(size_bytes=2000).of(1000) == 1000


# ---- the CPU -------------------------------------------------------------------------------------------------------


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_version_2_limit_counts_page_cache_as_free(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/kube/pod"
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/kube/pod\n",
            f"{group}/memory.max": "1000\n",
            f"{group}/memory.current": "700\n",
            f"{group}/memory.stat": "anon 300\ninactive_file 250\nactive_file 50\n",
        },
    )

    assert cgroup_limit(root) == CgroupLimit(1000, 400)


def test_the_tightest_limit_above_counts(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/kube/pod\n",
            "sys/fs/cgroup/kube/pod/memory.max": "max\n",
            "sys/fs/cgroup/kube/memory.max": "500\n",
            "sys/fs/cgroup/kube/memory.current": "600\n",
        },
    )

    limit = cgroup_limit(root)

    assert limit == CgroupLimit(500, 600)
    assert limit.available_bytes == 0


def test_inside_a_container_the_mount_is_its_own_group(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/../../docker/abc\n",
            "sys/fs/cgroup/memory.max": "2000\n",
            "sys/fs/cgroup/memory.current": "100\n",
        },
    )

    assert cgroup_limit(root) == CgroupLimit(2000, 100)


def test_a_version_1_limit(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory/docker/abc"
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu:/docker/abc\n4:memory,hugetlb:/docker/abc\n",
            f"{group}/memory.limit_in_bytes": "1000\n",
            f"{group}/memory.usage_in_bytes": "300\n",
            f"{group}/memory.stat": "total_inactive_file 50\ntotal_active_file 10\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )

    assert cgroup_limit(root) == CgroupLimit(1000, 240)


def test_without_a_limit_there_is_none(tmp_path: Path) -> None:
    assert cgroup_limit(tmp_path) is None
    assert cgroup_limit(write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"})) is None


def test_the_cpu_is_the_machine_or_the_container(tmp_path: Path) -> None:
    free = CpuMemory(tmp_path).read()
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{2**20}",
            "sys/fs/cgroup/memory.current": f"{2**19}",
        },
    )

    boxed = CpuMemory(root).read()

    assert free.total_bytes == psutil.virtual_memory().total
    assert free.ceiling_bytes is not None and 0 < free.ceiling_bytes <= free.total_bytes * 1.1
    assert boxed.total_bytes == 2**20
    assert boxed.ceiling_bytes is not None and 2**19 <= boxed.ceiling_bytes < 2**19 + 2**24


def test_what_this_process_has_grown_by_counts_as_its_own(tmp_path: Path) -> None:
    memory = CpuMemory(tmp_path)
    before = anonymous_bytes()
    grown = bytearray(os.urandom(1024)) * (64 * 1024)

    assert anonymous_bytes() - before > 0.9 * len(grown)
    reading, available = memory.read(), psutil.virtual_memory().available
    assert reading.ceiling_bytes is not None
    assert reading.ceiling_bytes - available > 0.5 * len(grown)


def test_devices_by_name() -> None:
    assert isinstance(device_memory("cpu"), CpuMemory)
    assert isinstance(device_memory("cuda:1"), CudaMemory)


# ---- measurements ---------------------------------------------------------------------------------------------------


def estimates(
    measurements: Measurements, files: FakeFiles | None = None, device: str = "cpu", conditions: str = ""
) -> Estimates:
    return Estimates(files or FakeFiles(), measurements, device, 99, conditions)


def test_a_measurement_outlives_the_process(tmp_path: Path) -> None:
    path = tmp_path / "new" / "measurements.json"
    estimates(Measurements(path)).save(SPEC, FILES, TOOK)

    need = estimates(Measurements(path)).estimate(SPEC, FILES)

    assert need is not None
    assert (need.weight_bytes, need.workspace_bytes, need.load_s) == (10, 2, 0.5)
    assert [file.name for file in path.parent.iterdir()] == ["measurements.json"]


@pytest.mark.parametrize(
    ("spec", "files", "device"),
    [
        (SPEC, ModelFiles(path="/m", revision="r2", size_bytes=700), "cpu"),
        (ModelSpec(model_id="a", source="x", dtype="bfloat16", min_cosine=0), FILES, "cpu"),
        (ModelSpec(model_id="a", source="x", max_batch_tokens=64), FILES, "cpu"),
        (SPEC, FILES, "cuda:0"),
    ],
)
def test_another_revision_dtype_batch_or_kind_of_device_is_another_measurement(
    spec: ModelSpec, files: ModelFiles, device: str
) -> None:
    measurements = Measurements()
    estimates(measurements).save(SPEC, FILES, TOOK)

    need = estimates(measurements, device=device).estimate(spec, files)

    assert need is not None
    assert (need.weight_bytes, need.workspace_bytes, need.workspace_known) == (1000, 99, False)


@pytest.mark.parametrize(
    ("changes", "num_forms"),
    [
        ({"dtype": "int8"}, 2),
        ({"dtype": "bfloat16", "task": "embed"}, 2),
        ({"dtype": "int8", "min_cosine": 0.0}, 1),
        ({"dtype": "bfloat16", "task": "rerank"}, 1),
        ({"dtype": "float32"}, 1),
    ],
)
def test_a_first_load_that_is_compared_with_float32_is_charged_both_forms(
    changes: dict[str, Any], num_forms: int
) -> None:
    spec = structs.replace(SPEC, **changes)
    measurements = Measurements()

    first = estimates(measurements).estimate(spec, FILES)
    estimates(measurements).save(spec, FILES, TOOK)
    later = estimates(measurements).estimate(spec, FILES)

    assert first is not None and later is not None
    assert first.known().weight_bytes == 1000 * num_forms
    assert later.weight_bytes == TOOK.weight_bytes


@pytest.mark.parametrize("conditions", ["", "threads=2"])
def test_a_load_that_compares_again_is_charged_both_forms_until_the_comparison_is_known(conditions: str) -> None:
    spec, measurements, precisions = structs.replace(SPEC, dtype="int8"), Measurements(), PrecisionStore(None)
    estimates(measurements).save(spec, FILES, TOOK)
    known = Estimates(FakeFiles(), measurements, "cpu", 99, conditions, ReducedForms(precisions))

    before = known.estimate(spec, FILES)
    precisions.put(spec, FILES.revision, _COMPARED, "cpu")
    after = known.estimate(spec, FILES)

    assert before is not None and after is not None
    assert before.weight_bytes == after.weight_bytes + 1000
    assert before.known().weight_bytes == after.known().weight_bytes + 1000


class _FilesByDtype(FakeFiles):
    def weight_bytes(self, spec: ModelSpec, device: str) -> int:
        return 4000 if spec.dtype == "float32" else 1000


@pytest.mark.parametrize("was_measured", [False, True])
def test_a_load_that_rounds_float_weights_is_charged_them_until_their_form_is_kept_but_never_refused_for_them(
    tmp_path: Path, was_measured: bool
) -> None:
    spec, kept = structs.replace(SPEC, dtype="int8", min_cosine=0.0), FormCache(tmp_path)
    measurements = Measurements()
    rounding = Estimates(_FilesByDtype(), measurements, "cpu", 99, "", ReducedForms(kept=kept))
    if was_measured:
        rounding.save(spec, FILES, structs.replace(TOOK, weight_bytes=1000))

    before = rounding.estimate(spec, FILES)
    path = kept.path(spec)
    assert path is not None
    header = msgspec.json.encode({"__metadata__": {"identity": kept.identity(spec, FILES.revision)}})
    path.write_bytes((HEADER_BYTES - 8).to_bytes(8, "little") + header.ljust(HEADER_BYTES - 8))
    after = rounding.estimate(spec, FILES)

    assert before is not None and after is not None
    assert (before.weight_bytes, after.weight_bytes) == (4000, 1000)
    assert (before.known().weight_bytes, after.known().weight_bytes) == (1000, 1000)
    on_a_gpu = Estimates(_FilesByDtype(), measurements, "cuda:0", 99, "", ReducedForms(kept=FormCache(None)))
    assert (on_a_gpu.estimate(spec, None) or before).weight_bytes == 1000


def test_a_stored_size_can_never_refuse_a_model_but_its_headers_can() -> None:
    measurements = Measurements()
    large = Measurement(weight_bytes=5000, workspace_bytes=600, load_s=1.0)
    estimates(measurements).save(SPEC, FILES, large)

    need = estimates(measurements).estimate(SPEC, FILES)
    without_headers = estimates(measurements, FakeFiles(weight_bytes={"a": None})).estimate(SPEC, FILES)

    assert need is not None and without_headers is not None
    assert (need.total_bytes, need.known().total_bytes) == (5600, 1000)
    assert (without_headers.total_bytes, without_headers.known().total_bytes) == (5600, 0)
    assert need.capped(1200).total_bytes == 1200
    assert need.capped(300).weight_bytes == 1000


def test_what_was_measured_under_other_settings_is_a_better_guess_but_no_less_than_the_headers() -> None:
    measurements = Measurements()
    large = Measurement(weight_bytes=5000, workspace_bytes=2, load_s=0.5)
    small = Measurement(weight_bytes=10, workspace_bytes=2, load_s=0.5)
    needs = []
    for took in (large, small):
        estimates(measurements, conditions="threads=1").save(SPEC, FILES, took)
        needs.append(estimates(measurements, conditions="threads=2").estimate(SPEC, FILES))

    assert [need and (need.weight_bytes, need.workspace_bytes, need.load_s) for need in needs] == [
        (5000, 2, 0.5),
        (1000, 2, 0.5),
    ]
    assert [need and need.known().total_bytes for need in needs] == [1000, 1000]


def test_another_vector_cache_is_another_measurement() -> None:
    measurements = Measurements()
    cached = ModelSpec(model_id="a", source="x", cache_bytes=10**9)
    estimates(measurements).save(cached, FILES, TOOK)

    need = estimates(measurements).estimate(SPEC, FILES)

    assert need is not None and (need.weight_bytes, need.workspace_bytes) == (1000, 99)


def test_devices_of_a_kind_share_what_was_measured() -> None:
    measurements = Measurements()
    estimates(measurements, device="cuda:0").save(SPEC, FILES, TOOK)

    need = estimates(measurements, device="cuda:1").estimate(SPEC, FILES)

    assert need is not None and need.weight_bytes == 10


def test_without_headers_the_size_on_disk_is_a_guess_and_before_the_download_nothing_is_known() -> None:
    unknown = estimates(Measurements(), FakeFiles(weight_bytes={"a": None}))

    here, away = unknown.estimate(SPEC, FILES), unknown.estimate(SPEC, None)

    assert here is not None and (here.weight_bytes, here.weights_known) == (700, False)
    assert away is None


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": {"weight_bytes": "x"}}', "\x00\xff"])
def test_a_corrupt_file_is_ignored_with_a_warning(tmp_path: Path, text: str) -> None:
    path = tmp_path / "measurements.json"
    path.write_text(text, encoding="latin-1")

    with structlog.testing.capture_logs() as logs:
        measurements = Measurements(path)

    assert measurements.get("any") is None
    assert [entry["event"] for entry in logs] == ["measurements.ignored"]
    measurements.put("any", TOOK)
    assert Measurements(path).get("any") == TOOK


def test_two_processes_keep_each_others_measurements(tmp_path: Path) -> None:
    path = tmp_path / "measurements.json"
    one, two = Measurements(path), Measurements(path)

    one.put("a", TOOK)
    two.put("b", TOOK)

    assert Measurements(path).get("a") == Measurements(path).get("b") == TOOK


def test_a_disk_that_cannot_be_written_only_warns(tmp_path: Path) -> None:
    path = tmp_path / "file" / "measurements.json"
    path.parent.write_text("in the way")
    measurements = Measurements(path)

    with structlog.testing.capture_logs() as logs:
        measurements.put("a", TOOK)

    assert measurements.get("a") == TOOK
    assert [entry["event"] for entry in logs] == ["measurements.not_written"]


def test_threads_may_write_at_once(tmp_path: Path) -> None:
    measurements = Measurements(tmp_path / "measurements.json")
    threads = [threading.Thread(target=measurements.put, args=(str(index), TOOK)) for index in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    again = Measurements(tmp_path / "measurements.json")

    assert all(again.get(str(index)) == TOOK for index in range(20))
