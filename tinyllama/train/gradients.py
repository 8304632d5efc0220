"""Loss and gradients of the model, part by part: embedding, layers, norm, head, and back.

    forward    each part writes a record on the tape: its inputs, its output, what it saved
    loss       of the last output (losses.py), with the gradient that the way back starts from
    backward   the tape in reverse: gradient of a part's output -> of its input and its weights

All layers are the same piece of work, so it is scheduled and compiled once (runtime/stage.py).
What the forward pass of a part writes to memory is saved for its backward pass; with activation
checkpointing only its inputs are, and the rest is computed again (Chen et al. 2016).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tinygrad import Tensor

from tinyllama.model.int4 import widen_head
from tinyllama.model.layers import named_tensors, structure
from tinyllama.model.llama import Block, Function, Llama
from tinyllama.model.lora import lora_layers, without_adapters
from tinyllama.ops.copies import reading_copies, without_copies
from tinyllama.ops.matmul import float32_products
from tinyllama.ops.narrow import narrow_together
from tinyllama.ops.products import together
from tinyllama.ops.sums import into_products, read_by_gradients
from tinyllama.runtime.kernel import in_memory
from tinyllama.runtime.stage import Stage, replaced, saved_for_backward
from tinyllama.runtime.storage import memory_key
from tinyllama.train.losses import CrossEntropy, Loss
from tinyllama.train.preferences import log_probabilities


@dataclass(frozen=True)
class Record:
    """One part of the forward pass, function(module, *inputs), as its backward pass needs it."""

    function: Function
    module: Any
    inputs: tuple[Tensor, ...]
    saved: tuple[Tensor, ...]  # what it wrote on the way; empty where that is computed again
    output: Tensor

    @property
    def weights(self) -> list[Tensor]:
        """The tensors of the module."""
        return [tensor for _, tensor in named_tensors(self.module)]


class _Stages:
    """The kinds of pieces that a pass forward and back is made of."""

    def __init__(self, products: str) -> None:
        """`products` is how float32 matrices are multiplied."""
        around = partial(float32_products, products)
        self.forward, self.backward, self.head = Stage(around), Stage(around), Stage(around)
        self.sum, self.starts = Stage(), Stage()


class StagedLoss:
    """The summed loss of a model, and its gradient with respect to some of its weights."""

    def __init__(
        self,
        model: Llama,
        trained: Mapping[str, Tensor] | None = None,
        loss: Loss | None = None,
        copies: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`trained` are the weights, by name, that get gradients; the loss is cross entropy.
        Products read the `copies` of those that have one (ops/copies.py)."""
        widen_head(model)
        self.model, self.criterion = model, loss or CrossEntropy()
        # Adapters leave their base as it was, so a model that has some is its own reference.
        self.refers = self.criterion.needs_reference and bool(lora_layers(model))
        trained, copies = trained or {}, copies or {}
        self.names = {_key(tensor): name for name, tensor in trained.items()}
        self.stages = _Stages(model.float32_products)
        self._copies = {_key(t): copies[n] for n, t in trained.items() if n in copies}

    def loss(self, tokens: Tensor, targets: Tensor, starts: Tensor, *more: Tensor) -> Tensor:
        """Summed loss and measures, shape (1 + measures,): tokens, targets, starts (B, T), and what
        the batches of this loss hold more."""
        more = (*more, *self._reference(tokens, targets, starts))
        hidden = self.forward(tokens, starts)[-1].output
        weight = self.model.head_weight()

        def build() -> list[Tensor]:
            return [self.criterion.summed(hidden, weight, targets, *more).contiguous()]

        return self.stages.head([hidden, weight, targets, *more], build, "loss")[0]

    def log_probabilities(self, tokens: Tensor, targets: Tensor, starts: Tensor) -> Tensor:
        """Of the targets of each row, summed: (B,) float32, in nats."""
        hidden = self.forward(tokens, starts)[-1].output
        weight = self.model.head_weight()

        def build() -> list[Tensor]:
            return [log_probabilities(hidden, weight, targets).contiguous()]

        return self.stages.head([hidden, weight, targets], build, "log-probabilities")[0]

    def _reference(self, tokens: Tensor, targets: Tensor, starts: Tensor) -> list[Tensor]:
        """The log-probabilities of the rows under the frozen base, if the loss wants those and
        the model can tell."""
        if not self.refers:
            return []
        with without_adapters(self.model):
            return [self.log_probabilities(tokens, targets, starts)]

    def gradients(
        self, tokens: Tensor, targets: Tensor, starts: Tensor, *more: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss and measures (1 + measures,), and the gradient of the loss of each trained
        weight, by name, float32."""
        grads: dict[str, Tensor] = {}
        more = (*more, *self._reference(tokens, targets, starts))
        tape = self.forward(tokens, starts, save=True)
        loss, gradient = self._head_gradients([tape[-1].output, targets, *more], grads)
        # Nothing is pulled back below the lowest part that is trained (adapters on a frozen base).
        lowest = next((i for i, part in enumerate(tape) if self._trained(part)), len(tape))
        for i in reversed(range(lowest, len(tape))):
            gradient = self._pull_back(tape[i], gradient, grads, further=i > lowest)
        return loss, grads

    def forward(self, tokens: Tensor, starts: Tensor, *, save: bool = False) -> list[Record]:
        """Run embedding, layers and norm on tokens and starts (B, T); the tape, in their order."""
        tape: list[Record] = []
        recompute = self.model.checkpoint_activations or not save
        cos, sin = self.model.rotations(tokens.shape[1])
        starts = self._first_visible(starts)

        def run(function: Function, module: Any, *inputs: Tensor) -> Tensor:
            tape.append(self._run(function, module, inputs, recompute))
            return tape[-1].output

        self.model.walk(
            tokens, lambda block, x: run(Block.__call__, block, x, cos, sin, starts), run
        )
        return tape

    def _first_visible(self, starts: Tensor) -> Tensor:
        """The first position that each one attends to (B, T), by document and sliding window."""

        def build() -> list[Tensor]:
            return [self.model.first_visible(starts)]

        window = self.model.config.sliding_window
        if window is None or window >= starts.shape[1]:
            return starts
        return self.stages.starts([starts], build, "window")[0]

    def _copied(self, weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Those of the weights that have a copy, with it."""
        return [(w, self._copies[_key(w)]) for w in weights if _key(w) in self._copies]

    def _trained(self, part: Record) -> list[Tensor]:
        """The weights of a part that get gradients."""
        return [tensor for tensor in part.weights if _key(tensor) in self.names]

    def _run(
        self, function: Function, module: Any, inputs: tuple[Tensor, ...], recompute: bool
    ) -> Record:
        """Compute function(module, *inputs), saving what it writes on the way or not."""
        weights = [tensor for _, tensor in named_tensors(module)]
        pairs = self._copied(weights)

        def build() -> list[Tensor]:
            out = in_memory(function(module, *inputs))
            saved = [] if recompute else _saved(out, inputs, weights, pairs)
            made = reading_copies(together(into_products([out, *saved])), pairs)
            return narrow_together(made, weights)

        key = (function.__qualname__, structure(module), recompute)
        known = [*inputs, *weights, *(copy for _, copy in pairs)]
        out, *saved = self.stages.forward(known, build, key)
        return Record(function, module, inputs, tuple(saved), out)

    def _pull_back(
        self, part: Record, d_output: Tensor, grads: dict[str, Tensor], *, further: bool
    ) -> Tensor:
        """Gradient with respect to a part's first input, if it goes `further`, from that of its
        output. Adds the gradients of its weights to `grads`."""
        inputs, weights, trained = part.inputs, part.weights, self._trained(part)
        through = [inputs[0]] if further else []
        pairs = self._copied(weights)

        def build() -> list[Tensor]:
            out = in_memory(part.function(part.module, *inputs))
            gradients = out.gradient(*through, *trained, gradient=d_output)
            old = _saved(out, inputs, weights, pairs) if part.saved else []
            gradients = together(into_products(replaced(gradients, old, part.saved)))
            gradients = narrow_together(reading_copies(gradients, pairs), weights)
            return [in_memory(g) for g in gradients]

        positions = tuple(i for i, t in enumerate(weights) if _key(t) in self.names)
        key = (part.function.__qualname__, structure(part.module), positions, further)
        known = [*inputs, *weights, *(copy for _, copy in pairs), *part.saved, d_output]
        gradients = self.stages.backward(known, build, key)
        self._add(grads, trained, gradients[len(through) :])
        return gradients[0] if through else d_output

    def _head_gradients(
        self, inputs: Sequence[Tensor], grads: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Summed loss and measures, and the gradient of the hidden states (B, T, hidden), which are
        the first of `inputs`, before targets and what a batch holds more; adds the head's to
        `grads`."""
        weight = self.model.head_weight()
        hidden, targets, *more = inputs
        trained = _key(weight) in self.names
        pairs = self._copied([weight])

        def build() -> list[Tensor]:
            given = (hidden, weight, targets, *more)
            head = self.model.through_head(
                lambda: self.criterion.gradients(*given, trains_weight=trained)
            )
            d_weight = [] if head.weight is None else [head.weight]
            made = [head.loss.contiguous(), in_memory(head.hidden), *d_weight]
            return reading_copies(made, pairs)

        known = [weight, *(copy for _, copy in pairs), *inputs]
        loss, d_hidden, *d_weight = self.stages.head(known, build, trained)
        self._add(grads, [weight] * len(d_weight), d_weight)
        return loss, d_hidden

    def _add(
        self, grads: dict[str, Tensor], weights: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> None:
        """Note gradients of weights; a tied weight is used twice, so its two are summed."""
        for weight, gradient in zip(weights, gradients, strict=True):
            name = self.names[_key(weight)]
            grads[name] = self._sum(grads[name], gradient) if name in grads else gradient

    def _sum(self, first: Tensor, second: Tensor) -> Tensor:
        return self.stages.sum([first, second], lambda: [(first + second).contiguous()])[0]


def _saved(
    out: Tensor,
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    copies: Sequence[tuple[Tensor, Tensor]],
) -> list[Tensor]:
    """What computing `out` from `inputs` writes to memory and its gradients read."""
    return without_copies(read_by_gradients(out, saved_for_backward(out, inputs, weights)), copies)


def _key(tensor: Tensor) -> Any:
    """What makes a weight the same weight: its buffer."""
    return memory_key(tensor)
