"""The hardware facts that `embedyard doctor` tells, from files as Linux writes them."""

from pathlib import Path

import pytest

from router.cli.hardware import bfloat16_effect, count_nvidia_gpus, read_processor

XEON = """\
processor\t: 0
model name\t: Intel Xeon
flags\t\t: fpu avx2 avx512f avx512_vnni avx512_bf16 amx_bf16 amx_int8

"""
GRAVITON = "processor\t: 0\nFeatures\t: fp asimd sve bf16\n\nprocessor\t: 1\n"


def test_the_first_processor_and_its_vector_instructions_are_read(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(XEON + XEON)
    found = read_processor(file)

    assert found is not None
    assert found.name == "Intel Xeon"
    assert found.instructions == ("AVX2", "AVX-512", "VNNI", "AVX512-BF16", "AMX-BF16", "AMX-INT8")


def test_an_arm_processor_has_features_and_no_name(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(GRAVITON)
    found = read_processor(file)

    assert found is not None
    assert found.instructions == ("NEON", "SVE", "BF16")


def test_other_systems_tell_nothing(tmp_path: Path) -> None:
    assert read_processor(tmp_path / "cpuinfo") is None
    assert count_nvidia_gpus(tmp_path / "pci") == 0


@pytest.mark.parametrize(
    ("instructions", "words"),
    [
        (("AVX-512", "AVX512-BF16", "AMX-BF16"), "runs on AMX"),
        (("AVX-512", "AVX512-BF16"), "run in hardware; no AMX"),
        (("AVX2",), "is slow: neither AMX nor AVX512-BF16"),
    ],
)
def test_what_bfloat16_brings_depends_on_the_instructions(instructions: tuple[str, ...], words: str) -> None:
    assert words in bfloat16_effect(instructions)


def test_nvidia_gpus_are_counted_by_vendor_and_class(tmp_path: Path) -> None:
    for slot, vendor, kind in (("0", "0x10de", "0x030200"), ("1", "0x10de", "0x040300"), ("2", "0x8086", "0x030000")):
        (tmp_path / slot).mkdir()
        (tmp_path / slot / "vendor").write_text(f"{vendor}\n")
        (tmp_path / slot / "class").write_text(f"{kind}\n")

    assert count_nvidia_gpus(tmp_path) == 1, "neither an audio function nor another vendor"
