"""A run's loss curve as a picture: training loss smoothed, validation loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRAINING, VALIDATION, REFERENCE = "#2f6f9f", "#d1495b", "#555555"


@dataclass(frozen=True)
class Reference:
    """What the loss is compared with: another compressor's bits per byte of the held-out text,
    and how many bits per byte one nat per token is there, which is the second axis."""

    name: str
    bits_per_byte: float
    bits_per_byte_per_nat: float

    @property
    def loss(self) -> float:
        """The loss at which the model is as good, in nats per token."""
        return self.bits_per_byte / self.bits_per_byte_per_nat


def smoothed(values: Sequence[float], share: float) -> list[float]:
    """Exponential moving average that weights the newest value by `share`, without the pull
    towards zero that the average of a few values would have."""
    average, weight, out = 0.0, 0.0, []
    for value in values:
        average = (1 - share) * average + share * value
        weight = (1 - share) * weight + share
        out.append(average / weight)
    return out


def draw(
    rows: Sequence[dict[str, Any]], out: Path, title: str, reference: Reference | None
) -> None:
    """Write the curve of metrics rows as a PNG."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=144, layout="constrained")
    trained = [r for r in rows if "loss" in r]  # step 0 has a validation loss alone
    steps, losses = [r["step"] for r in trained], [r["loss"] for r in trained]
    share = max(0.02, min(1.0, 10 / len(losses)))
    axes.plot(steps, losses, color=TRAINING, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smoothed(losses, share), color=TRAINING, linewidth=1.8, label="training")
    validated = [r for r in rows if "val_loss" in r]
    axes.plot(
        [r["step"] for r in validated], [r["val_loss"] for r in validated], color=VALIDATION,
        marker="o", markersize=4, linewidth=1.2, label="held out",
    )  # fmt: skip
    if reference is not None:
        _draw_reference(axes, reference)
    axes.set_xlim(0, steps[-1] * 1.02)
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.25)
    axes.spines["top"].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(out)
    pyplot.close(figure)


def _draw_reference(axes: Any, reference: Reference) -> None:
    axes.axhline(
        reference.loss, color=REFERENCE, linestyle="--", linewidth=1.2,
        label=f"{reference.name} ({reference.bits_per_byte:.2f} bits per byte)",
    )  # fmt: skip
    factor = reference.bits_per_byte_per_nat
    right = axes.secondary_yaxis("right", functions=(lambda y: y * factor, lambda y: y / factor))
    right.set_ylabel("bits per byte of held-out text")
    right.spines["top"].set_visible(False)
