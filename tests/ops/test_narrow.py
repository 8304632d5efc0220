"""Weights that a GPU's products read narrowed share a launch; the numbers are those of a cast."""

import gpu_kernels
import numpy as np
import nvrtc
import pytest
from fake_cuda import needs_nvrtc
from runs_helpers import printed_json

from tinyllama.ops.gpu.narrow import MOST_TENSORS, narrow
from tinyllama.runtime.blocks import LIMITS, Dialect


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("dialect", ["cuda", "metal"])
def test_each_tensor_is_rounded_into_its_own_place(dialect: Dialect, dtype: str) -> None:
    counts = (4, 5000, 8, 4096)
    random = np.random.default_rng(0)
    sources = [random.standard_normal(n).astype(np.float32) for n in counts]
    places = [gpu_kernels.unwritten((n,), dtype) for n in counts]
    launch = narrow(dialect, counts, dtype)  # type: ignore[arg-type]
    gpu_kernels.emulate(launch, [*places, *sources])
    for place, source in zip(places, sources, strict=True):
        assert (
            gpu_kernels.loaded(place) == gpu_kernels.loaded(gpu_kernels.stored(source, dtype))
        ).all()


def test_a_launch_takes_as_many_tensors_as_the_device_has_arguments() -> None:
    for dialect, most in MOST_TENSORS.items():
        launch = narrow(dialect, [8] * most, "bfloat16")
        assert len(launch.arguments) <= (LIMITS[dialect].buffers or 500)


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_many_tensors_compile_without_spills(arch: str) -> None:
    launch = narrow("cuda", [4096] * MOST_TENSORS["cuda"], "bfloat16")
    attributes = nvrtc.attributes(nvrtc.compile_cubin(launch.text, arch))
    assert attributes[nvrtc.FRAME_BYTES] == 0


STEP = """
import json, sys
from tinyllama.system import device
device.select()
from tinygrad import Tensor, dtypes
from tinyllama.config import config_from_toml
from tinyllama.config.presets import find_config
from tinyllama.train.memory_estimate import blank_step
text = find_config("demo").read_text()
overrides = ["training.dtype=bfloat16", "training.batch_size=2", "data.context_length=64"]
step = blank_step(config_from_toml(text, "demo", overrides), copies=sys.argv[1] == "copies")
batch = [Tensor.empty(2, 64, dtype=dtypes.int32) for _ in range(3)]
found = step.account(*batch, hyperparameters=Tensor.empty(step.hyperparameter_count))
print(json.dumps([[l.name, l.times, "#define ADDEND 1" in l.text] for l in found.launches]))
"""


def launches_of_a_step(weights: str) -> list[tuple[str, int, bool]]:
    """Name, number, and whether it adds something, of a step's launches on a card that is not
    there; with "copies" of weights or none."""
    launches: list[tuple[str, int, bool]] = printed_json("-c", STEP, weights, DEV="NULL:CUDA:sm_90")
    return launches


@needs_nvrtc
def test_weights_that_have_copies_are_not_narrowed() -> None:
    plain, copied = launches_of_a_step("none"), launches_of_a_step("copies")
    # The narrowing of three layers, and of the head, which tinygrad does.
    assert sum(n for _, n, _ in plain) - sum(n for _, n, _ in copied) == 4
    assert any(name.startswith("narrow") for name, *_ in plain)
    assert not any(name.startswith("narrow") for name, *_ in copied)


@needs_nvrtc
def test_a_layers_weights_are_narrowed_once_and_its_residuals_are_added_by_kernels() -> None:
    launches = launches_of_a_step("none")

    def times(name: str, adding: bool = False) -> int:
        return sum(n for found, n, adds in launches if found.startswith(name) and adds >= adding)

    layers = 3
    assert times("narrow") == layers  # the gradient reads what the forward pass has narrowed
    assert times("gemm_nt", adding=True) == 2 * layers  # of attention and of the feed-forward
    assert times("rms_norm_backward") == 2 * layers + 1
    assert times("rms_norm_backward", adding=True) == 2 * layers
    assert times("E_") <= layers + 6  # tinygrad's own passes: the head's, scalars, one sum of parts
