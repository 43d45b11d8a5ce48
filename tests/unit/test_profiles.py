import platform

import pytest
import torch

from kdcompress.errors import InputError
from kdcompress.profiles import PROFILES, default_profile, get_profile, instruction_sets, parse_cpuinfo


def test_an_unknown_profile_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'ort-x86'"):
        get_profile("ort-x68")


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
