"""`python -m tinyllama.lm_eval`: lm-evaluation-harness with the model `tinyllama`.

python -m tinyllama.lm_eval run --model tinyllama --model_args pretrained=MODEL --tasks arc_easy

All else is lm_eval's own command line. MODEL is what `tinyllama chat` takes. Other model_args:
base (of an adapter), template (chatml, ...), max_length (tokens), threads.
"""

import sys
from typing import Any

from tinyllama.cli.arguments import path
from tinyllama.cli.shared import load, select_device
from tinyllama.cli.talking import context_length
from tinyllama.errors import ConfigError, TinyllamaError, missing
from tinyllama.system.notices import to_stderr


def register() -> None:
    """Make `tinyllama` a model of lm_eval. Raises ConfigError where that is not installed."""
    try:
        from lm_eval.api.registry import register_model

        from tinyllama.generate.harness import HarnessModel
    except ImportError as error:
        raise ConfigError(
            f"{missing(error)} is not installed: pip install 'tinyllama-trainer[lm-eval]'"
        ) from None

    class Registered(HarnessModel):
        """What lm_eval makes of model_args."""

        def __init__(
            self,
            pretrained: str,
            base: str | None = None,
            template: str | None = None,
            max_length: int | None = None,
            threads: int | None = None,
            batch_size: Any = None,  # lm_eval always gives these three: texts are computed one
            max_batch_size: Any = None,  # at a time, on the device that DEV chooses
            device: Any = None,
            **others: Any,
        ) -> None:
            if others:
                raise ConfigError(
                    f"model_args: got {min(others)}, must be one of pretrained, base, template, "
                    "max_length, threads"
                )
            to_stderr(select_device(threads).line())
            folder = path(str(pretrained))
            tokenizer, model = load(folder, None if base is None else path(base))
            length = context_length(max_length, model.config.max_seq_len, "max_length")
            super().__init__(tokenizer, model, str(pretrained), length, template)

    register_model("tinyllama")(Registered)


def main() -> int:
    """lm_eval's command line; 2 after a mistake that we name in one line."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except TinyllamaError as error:
        to_stderr(str(error))
        return 2
    return 0


if __name__ == "__main__":
    # Not as a command of ours, which handles signals: lm_eval forks processes and ends them by one.
    sys.exit(main())
