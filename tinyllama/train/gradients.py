"""Loss and gradients of the model, stage by stage: embedding, layers, head, and back.

Every layer is the same piece of work, so it is scheduled and compiled once (ops/stage.py). What
the forward pass of a layer writes to memory is kept for its backward pass; with activation
checkpointing only the layer's input is, and the rest is computed again (Chen et al. 2016).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tinygrad import Tensor

from tinyllama.model.layers import named_tensors, structure
from tinyllama.model.llama import Llama
from tinyllama.ops.cross_entropy import loss_and_gradients, token_losses
from tinyllama.ops.sums import into_products
from tinyllama.runtime.kernel import in_memory
from tinyllama.runtime.stage import Stage, replaced, saved_for_backward
from tinyllama.runtime.storage import memory_key

Function = Callable[..., Tensor]


class _Stages:
    """The kinds of pieces that a pass forward and back is made of."""

    def __init__(self) -> None:
        self.forward, self.backward = Stage(), Stage()
        self.head, self.sum = Stage(), Stage()


class StagedLoss:
    """The summed loss of a model, and its gradient with respect to some of its weights."""

    def __init__(self, model: Llama, wanted: Mapping[str, Tensor] | None = None) -> None:
        """`wanted` are the weights, by name, that gradients are asked for."""
        self.model = model
        self.names = {_key(tensor): name for name, tensor in (wanted or {}).items()}
        self.stages = _Stages()

    def loss(self, tokens: Tensor, targets: Tensor, starts: Tensor) -> Tensor:
        """Loss summed over targets >= 0, in nats, shape (1,): tokens, targets, starts (B, T)."""
        x = self._hidden(tokens, starts)[-1][-1]
        weight = self.model.head_weight()

        def build() -> list[Tensor]:
            losses = token_losses(x.reshape(-1, x.shape[-1]), weight, targets.reshape(-1))
            return [losses.sum().reshape(1)]

        return self.stages.head([x, weight, targets], build, "loss")[0]

    def gradients(
        self, tokens: Tensor, targets: Tensor, starts: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss (1,) and the gradient of each wanted weight, by name, float32."""
        grads: dict[str, Tensor] = {}
        tape = self._hidden(tokens, starts, keep=True)
        loss, dx = self._head_gradients(tape[-1][-1], targets, grads)
        # Nothing is pulled back below the lowest part that is trained (adapters on a frozen base).
        lowest = next((i for i, part in enumerate(tape) if self._trained(part[1])), len(tape))
        for i, (function, module, inputs, saved, _) in reversed([*enumerate(tape)][lowest:]):
            dx = self._pull_back(function, module, inputs, saved, dx, grads, i > lowest)
        return loss, grads

    def _trained(self, module: Any) -> list[Tensor]:
        """The weights of a module that gradients are asked for."""
        return [t for _, t in named_tensors(module) if _key(t) in self.names]

    def _hidden(self, tokens: Tensor, starts: Tensor, keep: bool = False) -> list[tuple[Any, ...]]:
        """Run embedding, layers and norm; the tape of (function, module, inputs, saved, out)."""
        model = self.model
        cos, sin = model.rotations(tokens.shape[1])
        tape: list[tuple[Any, ...]] = []

        def run(function: Function, module: Any, *inputs: Tensor) -> Tensor:
            recompute = model.checkpoint_activations or not keep
            out, *saved = self._run(function, module, inputs, recompute)
            tape.append((function, module, inputs, saved, out))
            return out

        x = run(model.embed, model.model.embed_tokens, tokens)
        for layer in model.model.layers:
            x = run(type(layer).__call__, layer, x, cos, sin, starts)
        run(type(model.model.norm).__call__, model.model.norm, x)
        return tape

    def _run(
        self, function: Function, module: Any, inputs: Sequence[Tensor], recompute: bool
    ) -> list[Tensor]:
        """Output of function(module, *inputs), then what it wrote on the way unless `recompute`."""
        weights = [t for _, t in named_tensors(module)]

        def build() -> list[Tensor]:
            out = in_memory(function(module, *inputs))
            return [out] if recompute else [out, *saved_for_backward(out, inputs, weights)]

        key = (function.__qualname__, structure(module), recompute)
        return self.stages.forward([*inputs, *weights], build, key)

    def _pull_back(
        self,
        function: Function,
        module: Any,
        inputs: Sequence[Tensor],
        saved: Sequence[Tensor],
        dout: Tensor,
        grads: dict[str, Tensor],
        further: bool,
    ) -> Tensor:
        """Gradient with respect to inputs[0], if it goes `further`, from that of the output.

        Adds the weights' gradients to `grads`.
        """
        weights = [t for _, t in named_tensors(module)]
        trained = self._trained(module)
        through = [inputs[0]] if further else []
        known = [*inputs, *weights]

        def build() -> list[Tensor]:
            out = in_memory(function(module, *inputs))
            found = out.gradient(*through, *trained, gradient=dout)
            old = saved_for_backward(out, inputs, weights) if saved else []
            return [in_memory(g) for g in into_products(replaced(found, old, saved))]

        positions = tuple(i for i, t in enumerate(weights) if _key(t) in self.names)
        key = (function.__qualname__, structure(module), positions, further)
        found = self.stages.backward([*known, *saved, dout], build, key)
        for tensor, grad in zip(trained, found[len(through) :], strict=True):
            self._add(grads, tensor, grad)
        return found[0] if through else dout

    def _head_gradients(
        self, x: Tensor, targets: Tensor, grads: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Summed loss (1,) and the gradient of x (B, T, hidden); adds the head's to `grads`."""
        weight = self.model.head_weight()
        trained = _key(weight) in self.names

        def build() -> list[Tensor]:
            rows = x.reshape(-1, x.shape[-1])
            loss, dx, *dw = loss_and_gradients(rows, weight, targets.reshape(-1), trained)
            return [loss.reshape(1).contiguous(), in_memory(dx.reshape(x.shape)), *dw]

        loss, dx, *dw = self.stages.head([x, weight, targets], build, trained)
        for grad in dw:
            self._add(grads, weight, grad)
        return loss, dx

    def _add(self, grads: dict[str, Tensor], weight: Tensor, grad: Tensor) -> None:
        """A tied weight is used twice, so its two gradients are summed."""
        name = self.names[_key(weight)]
        if name in grads:
            first = grads[name]
            grad = self.stages.sum([first, grad], lambda: [(first + grad).contiguous()])[0]
        grads[name] = grad


def _key(tensor: Tensor) -> Any:
    """What makes a weight the same weight: its buffer."""
    return memory_key(tensor)
