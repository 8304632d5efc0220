"""What a processor says of itself, and which products our kernels take for it."""

from collections.abc import Callable

import pytest

from tinyllama.system import device, processor

AVX_512 = "avx512f avx512bw avx512vl avx512dq"
AMX = f"{AVX_512} avx512_bf16 amx_tile amx_bf16"
Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    def be(flags: str, permitted: bool = True, vendor: str = "GenuineIntel") -> None:
        words = {"flags": flags, "vendor_id": vendor, "model name": "a processor"}
        monkeypatch.setattr(processor, "described", lambda: words)
        monkeypatch.setattr(processor, "amx_permitted", lambda: permitted)
        monkeypatch.setattr(processor.platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(processor.sys, "platform", "linux")
        for name in ("instruction_set", "processor_name"):
            uncached = getattr(processor, name).__wrapped__
            monkeypatch.setattr(processor, name, uncached)

    return be


@pytest.mark.parametrize(
    ("flags", "permitted", "name"),
    [
        (AMX, True, "AMX"),
        (AMX, False, "AVX-512-BF16"),
        (f"{AVX_512} avx512_bf16", True, "AVX-512-BF16"),
        (f"{AVX_512} amx_tile amx_int8", True, "AVX-512"),
        ("avx2 fma f16c", True, "AVX2"),
        ("sse2", True, "generic"),
    ],
)
def test_instruction_set_follows_flags_and_permission(
    flags: str, permitted: bool, name: str, machine: Machine
) -> None:
    machine(flags, permitted)
    assert processor.instruction_set() == name


@pytest.mark.parametrize(
    ("instructions", "vendor", "multiplies"),
    [
        ("AMX", "GenuineIntel", True),
        ("AVX-512-BF16", "GenuineIntel", False),
        ("AVX-512-BF16", "AuthenticAMD", True),
        ("AVX-512", "AuthenticAMD", False),
        ("NEON", "", False),
    ],
)
def test_bfloat16_is_multiplied_where_that_is_faster(
    instructions: str, vendor: str, multiplies: bool, machine: Machine
) -> None:
    machine(AMX, vendor=vendor)
    assert processor.multiplies_bf16(instructions) == multiplies


def test_asking_for_permission_twice_gives_the_same_answer() -> None:
    assert processor.amx_permitted.__wrapped__() == processor.amx_permitted.__wrapped__()


def test_a_denied_permission_is_reported_and_vector_instructions_are_used(
    machine: Machine,
) -> None:
    machine(AMX, permitted=False)
    description = device._describe("CPU", None)
    assert description.endswith(" threads, AVX-512-BF16, AMX is not permitted by the system")


def test_a_switch_leaves_amx_out(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(AMX)
    assert device._describe("CPU", None).endswith(
        " threads, AMX (float32 products exact or bfloat16x3)"
    )
    monkeypatch.setenv("TINYLLAMA_AMX", "0")
    assert device._describe("CPU", None).endswith("AVX-512-BF16, AMX is switched off")
