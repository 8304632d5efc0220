"""tinyllama: pretrain and fine-tune LLaMA models on tinygrad, on any machine.

from tinyllama import Llama, LlamaConfig
model = Llama(LlamaConfig.toy_124m())
logits = model(tokens)  # tokens (B, T) int32 Tensor -> (B, T, vocab) float32
"""

from typing import TYPE_CHECKING, Any

from tinyllama.version import __version__

if TYPE_CHECKING:
    from tinyllama.config import LlamaConfig
    from tinyllama.model.llama import Llama

__all__ = ["Llama", "LlamaConfig", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LlamaConfig":
        from tinyllama.config import LlamaConfig

        return LlamaConfig
    # The device is chosen when the model is first used, so that GPU=1, CPU=1, ... are
    # understood in scripts as they are on the command line, and importing us stays instant.
    if name == "Llama":
        from tinyllama.system import device

        device.select()
        from tinyllama.model.llama import Llama

        return Llama
    raise AttributeError(f"module 'tinyllama' has no attribute {name!r}")
