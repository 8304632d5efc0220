"""Scaling of the rotary frequencies for contexts longer than those a model was first trained on.

The formulas are in ops/rope.py; the names of types and parameters are Hugging Face's.

    linear   divided by `factor`
    dynamic  of a larger base, once a sequence is longer than original_max_position_embeddings
    yarn     divided by `factor`, except those of short wavelengths; cos and sin are scaled too
    llama3   divided by `factor`, except those of short wavelengths
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, structs

Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Length = Annotated[int, Meta(ge=1, le=2**31 - 1)]

BETA_FAST, BETA_SLOW = 32.0, 1.0  # of yarn, where they are not set


class RopeScaling(Struct, frozen=True, forbid_unknown_fields=True):
    """One scaling. "default" changes nothing: for overriding the scaling of a base."""

    rope_type: Literal["default", "linear", "dynamic", "yarn", "llama3"]
    factor: Annotated[float, Meta(ge=1)] = 1.0
    # Tokens of the first training; when not set, model.max_seq_len.
    original_max_position_embeddings: Length | None = None
    low_freq_factor: Positive | None = None  # of llama3
    high_freq_factor: Positive | None = None
    attention_factor: Positive | None = None  # of yarn, and all below
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    mscale: NotNegative | None = None
    mscale_all_dim: NotNegative | None = None
    truncate: bool | None = None

    def trained_on(self, length: int) -> "RopeScaling":
        """The same, with `length` as that of the first training where it depends on one and states
        none."""
        needless = self.rope_type == "linear"
        trained = None if needless else self.original_max_position_embeddings or length
        return structs.replace(self, original_max_position_embeddings=trained)

    def stated(self) -> dict[str, Any]:
        """The parameters that are set, by name."""
        values = {name: getattr(self, name) for name in self.__struct_fields__}
        return {name: value for name, value in values.items() if value is not None}


_OF_LLAMA3 = ("low_freq_factor", "high_freq_factor")
_OF_YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")


def _states_none(scaling: RopeScaling, names: tuple[str, ...]) -> bool:
    return all(getattr(scaling, name) is None for name in names)


def _rises(scaling: RopeScaling) -> bool:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return low is not None and high is not None and low < high


# What must hold between the parameters, and the words for it.
RULES: tuple[tuple[Callable[[RopeScaling], bool], str], ...] = (
    (
        lambda s: s.rope_type != "llama3" or _rises(s),
        "one with low_freq_factor and a larger high_freq_factor",
    ),
    (
        lambda s: s.rope_type == "llama3" or _states_none(s, _OF_LLAMA3),
        'one without low_freq_factor and high_freq_factor, which belong to "llama3"',
    ),
    (
        lambda s: s.rope_type == "yarn" or _states_none(s, _OF_YARN),
        f'one without {", ".join(_OF_YARN)}, which belong to "yarn"',
    ),
    (
        lambda s: (s.beta_fast or BETA_FAST) > (s.beta_slow or BETA_SLOW),
        "one whose beta_fast is larger than beta_slow",
    ),
)
