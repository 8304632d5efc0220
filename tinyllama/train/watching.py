"""What a run does about anomalies: it names them, and leaves out, goes back or stops.

What is unusual is decided in observe/anomalies.py. Everything here that changes a run's numbers
follows from its numbers alone and is part of a checkpoint's state, so a run that is killed and
resumed meets the same anomalies and does the same about them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor

from tinyllama.config import Config
from tinyllama.data.batches import Batches, Rows
from tinyllama.data.corpus import Part
from tinyllama.data.places import Places
from tinyllama.errors import CheckpointError, DataError
from tinyllama.formats.dtypes import NumpyArray, RawArray, to_float32
from tinyllama.observe.anomalies import NUMBERS, Anomaly, Limits, MachineWatch, Watch
from tinyllama.observe.text import OddRow, TextWatch
from tinyllama.runtime.storage import read
from tinyllama.system.notices import to_stderr
from tinyllama.train.objective import rows_per_example
from tinyllama.train.optimizer import AdamW
from tinyllama.train.step import StepResult

MOST_ROLLBACKS = 3  # to one checkpoint: then it is not the data
_MOST_DOCUMENTS = 16  # named per anomaly
_PIECE = 1 << 20  # weights that are looked at together
_SAMPLED_LAYERS = 8  # whose weights are compared before and after each step
_NEVER = Limits(-math.inf, -math.inf)


class Watching:
    """The anomalies of one run: what they are, where they come from, what was done."""

    def __init__(
        self, config: Config, batches: Batches, pieces: Sequence[str], state: Mapping[str, Any]
    ) -> None:
        """`pieces` are what each token is called; `state` is what a checkpoint's state holds of it;
        nothing for a new run. Raises CheckpointError where that is damaged."""
        self.action = config.observe.on_anomaly
        size = config.observe.anomaly_window
        self.watch, self.machine = Watch(size), MachineWatch(size)
        self.left_out = 0  # updates
        self.rollbacks: dict[str, int] = {}  # how often the run went back to each step
        self.notice: Callable[[str], None] = to_stderr
        share = config.data.val_fraction
        part = None if share is None else Part(share, rest=True)
        self._batches, self._places = batches, Places(config.data.train_path, part)
        self.text = TextWatch(batches.layout, pieces)
        self._odd: list[OddRow] = []  # rows of the batch
        self._per_example = rows_per_example(config)
        self.restore(state)

    def state(self) -> dict[str, Any]:
        """Plain values for the checkpoint's JSON."""
        return {
            "watch": self.watch.state(),
            "left_out": self.left_out,
            "rollbacks": dict(self.rollbacks),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken, without forgetting how often the run went back."""
        try:
            if state:
                self.watch.restore(state["watch"])
                self.left_out = int(state["left_out"])
                for step, times in state["rollbacks"].items():
                    self.rollbacks[step] = max(int(times), self.rollbacks.get(step, 0))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"the checkpoint's state of anomalies is damaged: {error}"
            ) from None

    def batch(self, batch: Rows) -> None:
        """Look at the text of the next step."""
        self._odd = self.text.odd(batch.targets)

    def limits(self) -> Limits:
        """What the next step's loss and gradient norm must not exceed: a step on unusual text is
        left out whatever they are."""
        return _NEVER if self._odd else self.watch.limits()

    def numbers(self, step: int, result: StepResult) -> list[Anomaly]:
        """What is unusual about a step's text and numbers. An update that was left out is
        counted."""
        applied = None if self.action == "note" or self._odd else result.applied
        self.left_out += not result.applied
        worst = max(self._odd, key=lambda odd: odd.value, default=None)
        text = [] if worst is None else [Anomaly(step, "text", "text", worst.value, worst.usual)]
        return [*text, *self.watch.numbers(step, result.loss, result.grad_norm, applied)]

    def record(
        self, anomalies: Sequence[Anomaly], action: str, layer: str | None = None
    ) -> list[dict[str, Any]]:
        """The anomalies of a step for its line of metrics.jsonl; those that are new get a notice.

        `layer` is the one that stands out.
        """
        entries = []
        for anomaly in anomalies:
            entry: dict[str, Any] = {
                "kind": anomaly.kind,
                "series": anomaly.series,
                "value": _finite(anomaly.value),
                "usual": _finite(anomaly.usual),
                "action": _action(action, anomaly),
            }
            if anomaly.series in NUMBERS:
                rows = self._odd if anomaly.kind == "text" else None
                entry |= {"documents": self._documents(rows)} | ({"layer": layer} if layer else {})
            entries.append(entry)
            if self.watch.is_new(anomaly):
                self.notice(f"step {anomaly.step}: {sentence(anomaly, entry)}")
        return entries

    def _documents(self, rows: Sequence[OddRow] | None) -> list[str]:
        """The file and row of the documents of the last batch, or of some of its rows; of
        conversations and pairs their number among those that are kept, since rows are left out for
        what their tokens are."""
        some = None if rows is None else sorted({odd.row // self._per_example for odd in rows})
        held = self._batches.documents(some).tolist()
        shown = held[:_MOST_DOCUMENTS]
        more = [f"and {len(held) - len(shown)} more"] if len(held) > len(shown) else []
        if not self._batches.is_text:
            return [*(f"number {document + 1} of those kept" for document in shown), *more]
        try:
            places = [self._places.of(document) for document in shown]
        except DataError as error:
            return [str(error)]
        return [*(str(place) for place in places if place), *more]


def _action(wanted: str, anomaly: Anomaly) -> str:
    """What is done about an anomaly where observe.on_anomaly is `wanted`. Unusual text is left out
    before it changes anything; an update that was made cannot be."""
    was_made = anomaly.series == "update" or anomaly.kind == "divergence"
    if anomaly.series not in NUMBERS or (was_made and wanted == "skip"):
        return "note"
    return "skip" if anomaly.kind == "text" and wanted == "rollback" else wanted


def sentence(anomaly: Anomaly, entry: Mapping[str, Any]) -> str:
    """An anomaly in one line: what, where, and what is done about it."""
    done = {
        "note": "",
        "skip": "; its update is left out",
        "rollback": "; the run goes back",
        "stop": "; the run stops",
    }[entry["action"]]
    layer = f", most of all in {entry['layer']}" if "layer" in entry else ""
    documents = entry.get("documents", [])
    shown = ", ".join(documents[:3]) + (", ..." if len(documents) > 3 else "")
    text = f" (text: {shown})" if documents else ""
    return f"unusual: {anomaly.words()}{layer}{text}{done}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def layer_of(name: str) -> str:
    """What part of the model a weight is in, for people: `layer 3`, `embedding`, `head`."""
    parts = name.split(".")
    if "layers" in parts:
        return f"layer {parts[parts.index('layers') + 1]}"
    if "embed_tokens" in parts:
        return "embedding"
    return "head" if "lm_head" in parts else "norm"


# The last step before one that is refused may have made weights whose squares overflow.
_overflowing = np.errstate(over="ignore", invalid="ignore")


class Moves:
    """How far each step moves some of the weights: the smallest tensors of a few layers, compared
    with what they were before the step."""

    def __init__(self, parameters: Mapping[str, Tensor], begun: bool) -> None:
        """`begun`: the weights are those of a run that goes on. Those of a new one are first read
        after its first step, since until then they may still be drawn in the background."""
        smallest: dict[str, Tensor] = {}
        for name, tensor in parameters.items():
            layer = layer_of(name)
            if layer not in smallest or tensor.numel() < smallest[layer].numel():
                smallest[layer] = tensor
        some = np.linspace(0, len(smallest) - 1, min(len(smallest), _SAMPLED_LAYERS))
        self._tensors = [list(smallest.values())[int(at)] for at in some]
        self._before: list[npt.NDArray[np.float32]] | None = None
        if begun:
            self.look()

    def look(self) -> None:
        """Take the weights as they are for those before the next step."""
        self._before = [read(tensor).reshape(-1).copy() for tensor in self._tensors]

    @_overflowing
    def ratio(self) -> float | None:
        """||change|| / ||weights|| of the step that was made; None after a new run's first one."""
        before = self._before
        self.look()
        if before is None or self._before is None:
            return None
        pairs = list(zip(before, self._before, strict=True))
        change = sum(float(d @ d) for old, new in pairs for d in (new - old,))
        size = sum(float(old @ old) for old, _ in pairs)
        return math.sqrt(change / size) if size else 0.0


@_overflowing
def update_ratios(optimizer: AdamW, update: int, lr: float) -> dict[str, float]:
    """||change|| / ||weights|| of update number `update` (1, 2, ...) by layer.

    Computed again from the optimizer's moments after the step, on the host, without a copy of the
    weights: change = lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps); decay is left out.
    """
    c, changes, sizes = optimizer.config, dict[str, float](), dict[str, float]()
    correction1, correction2 = 1 - c.beta1**update, 1 - c.beta2**update
    for name, weights in optimizer.parameters.items():
        layer = layer_of(name)
        tensors = (weights, optimizer.exp_avg[name], optimizer.exp_avg_sq[name])
        p, m, v = (read(tensor).reshape(-1) for tensor in tensors)
        for at in range(0, len(p), _PIECE):
            part = slice(at, at + _PIECE)
            mean, square = _float32(m[part]), _float32(v[part])
            change = mean / (np.sqrt(square / correction2) + c.epsilon)
            changes[layer] = changes.get(layer, 0.0) + float(change @ change)
            sizes[layer] = sizes.get(layer, 0.0) + float(p[part] @ p[part])
    factor = lr / correction1
    return {
        layer: factor * math.sqrt(changes[layer] / sizes[layer]) if sizes[layer] else 0.0
        for layer in changes
    }


def _float32(moment: NumpyArray) -> npt.NDArray[np.float32]:
    """A moment as float32; one in bfloat16 comes as uint16."""
    if moment.dtype != np.uint16:
        return moment
    return to_float32("optimizer state", RawArray("BF16", moment.shape, moment))


def greatest(by_layer: Mapping[str, float]) -> str | None:
    """The layer with the greatest value; None where none is finite."""
    finite = {layer: value for layer, value in by_layer.items() if math.isfinite(value)}
    return max(finite, key=finite.__getitem__, default=None)
