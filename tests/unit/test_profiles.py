import platform

import pytest
import torch

from kdcompress.errors import InputError
from kdcompress.profiles import (
    ALIASES,
    PROFILES,
    default_profile,
    get_profile,
    instruction_sets,
    parse_cpuinfo,
    tensorrt_profile,
)


def test_an_unknown_profile_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'ort-x86'"):
        get_profile("ort-x68")


def test_an_alias_is_the_newest_of_its_kind() -> None:
    assert set(ALIASES) & set(PROFILES) == set()
    newest = max((p for p in PROFILES.values() if p.name.startswith("trt")), key=lambda p: numbers(p.version))
    assert get_profile("trt") is newest


@pytest.mark.parametrize(
    ("version", "name"),
    [
        *(("8.4.1", "trt8.5"), ("8.5.3", "trt8.5"), ("8.6.1", "trt8.6"), ("9.2", "trt8.6"), ("10.0.1", "trt10.3")),
        *(("10.3.0", "trt10.3"), ("10.12", "trt10.3"), ("10.16.1", "trt10.13"), ("11.4", "trt11"), ("12.1", "trt11")),
    ],
)
def test_the_profile_for_a_version_of_tensorrt(version: str, name: str) -> None:
    assert tensorrt_profile(numbers(version)).name == name


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def test_what_a_profile_says_hangs_together() -> None:
    for profile in PROFILES.values():
        assert profile.opset <= profile.newest_opset
        assert not (profile.symmetric and profile.activation_type == "uint8"), (
            "a zero point of 0 cuts off what is below"
        )
        assert {"fp32", "fp16", "int8"} <= set(profile.precisions)
        if profile.runtime == "tensorrt":
            assert profile.symmetric
            assert profile.float_bias
            assert profile.activation_type == profile.weight_type == "int8"
            assert profile.typed == (numbers(profile.version) >= (10,))
    assert "fp8" not in get_profile("jetson-orin").precisions
    assert get_profile("jetson-orin").version == get_profile("trt10.3").version
    assert get_profile("jetson-thor").version == get_profile("trt10.13").version


@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "groups", "first", "expected"),
    [
        (16, 16, (3, 3), 1, False, True),
        (3, 16, (3, 3), 1, True, True),
        (3, 12, (3, 3), 1, True, False),
        (3, 16, (3, 5), 1, True, False),
        (8, 8, (3, 3), 1, False, False),
        (8, 64, (1, 1), 1, False, True),
        (4, 20, (1, 1), 1, False, False),
        (1, 64, (3, 3), 64, False, True),
        (1, 60, (3, 3), 60, False, False),
        (1, 64, (1, 3), 64, False, False),
        (64, 10, (), 1, False, False),
        (8, 64, (), 1, False, False),
        (64, 100, (), 1, False, True),
    ],
)
def test_what_is_too_small_stays_float_for_tensorrt(
    inputs: int, outputs: int, kernel: tuple[int, ...], groups: int, first: bool, expected: bool
) -> None:
    asked = get_profile("trt8.6").quantizes(inputs, outputs, kernel=kernel, groups=groups, first=first)
    assert asked is expected
    assert get_profile("ort-x86").quantizes(inputs, outputs, kernel=kernel, groups=groups, first=first)


def test_every_profile_is_found_by_its_name() -> None:
    for name, profile in PROFILES.items():
        assert get_profile(name) is profile
        assert profile.name == name


def test_x86_gets_unsigned_activations_and_arm_signed() -> None:
    assert get_profile("ort-x86").activation_type == "uint8"
    assert get_profile("ort-arm").activation_type == "int8"


@pytest.mark.parametrize(
    ("instructions", "reduced"),
    [
        ({"avx2"}, True),
        ({"avx2", "avx_vnni"}, False),
        ({"avx512f"}, True),
        ({"avx512f", "avx512_vnni"}, False),
        (set(), True),
    ],
)
def test_weights_get_seven_bits_only_without_vnni(instructions: set[str], reduced: bool) -> None:
    assert get_profile("ort-x86").reduces_range(frozenset(instructions)) is reduced
    assert not get_profile("ort-arm").reduces_range(frozenset(instructions))


def test_the_machine_that_runs_this_has_a_profile() -> None:
    arm = platform.machine().lower() in ("aarch64", "arm64")
    assert default_profile().name == ("ort-arm" if arm else "ort-x86")


def test_cpuinfo_of_x86_and_arm_is_read() -> None:
    x86 = ["processor\t: 0", "flags\t\t: fpu sse4_2 avx2 avx512_vnni avx512vl", "bugs\t\t: spectre_v1"]
    arm = ["processor\t: 0", "Features\t: fp asimd evtstrm asimddp i8mm"]
    assert parse_cpuinfo(x86) == {"sse4_2", "avx2", "avx512_vnni"}
    assert parse_cpuinfo(arm) == {"asimd", "asimddp", "i8mm"}
    assert parse_cpuinfo(["model name : none"]) == frozenset()


@pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64", reason="compares names of x86 Linux"
)
def test_the_probe_agrees_with_torchs_own() -> None:
    if not hasattr(torch.cpu, "get_capabilities"):
        pytest.skip("this torch does not tell")
    capabilities = torch.cpu.get_capabilities()
    for mine, theirs in {"avx2": "avx2", "avx512f": "avx512_f", "avx512_vnni": "avx512_vnni"}.items():
        assert (mine in instruction_sets()) == bool(capabilities.get(theirs, False)), mine
