"""Show where the time of a step goes: kernels, and the lines of the model that they come from.

tinyllama profile 124m --steps 5
tinyllama profile --generate checkpoints/124m/final --steps 20 --out profile

The profile of a configuration whose run is there already is kept beside it, for its report.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama.cli.arguments import count, path
from tinyllama.cli.shared import add_set, add_threads, load, select_device
from tinyllama.errors import ConfigError
from tinyllama.system.notices import to_stderr

if TYPE_CHECKING:
    from tinyllama.config import Config
    from tinyllama.reports.profile import Profile

_PROMPT = "Once upon a time"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command line."""
    parser.add_argument(
        "config",
        nargs="?",
        help="TOML file, or the name of a shipped configuration: its training is profiled",
    )
    parser.add_argument(
        "--generate",
        type=path,
        metavar="MODEL",
        help="profile generation with this model instead: one step per token",
    )
    parser.add_argument("--steps", type=count, default=5, help="steps to measure (default: 5)")
    add_set(parser)
    add_threads(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--out",
        type=path,
        metavar="DIR",
        help="write profile.json, trace.json (Perfetto), profile.speedscope.json, roofline.svg,"
        " roofline.png and roofline.json into this folder",
    )


def run(options: argparse.Namespace) -> None:
    """Print the profile. Raises TinyllamaError."""
    if (options.config is None) == (options.generate is None):
        raise ConfigError("name a configuration to train, or a model with --generate MODEL")
    config = _config(options)
    profile = _generation(options) if config is None else _training(options, config)
    if options.out is not None:
        _write(profile, options.out)
    print(json.dumps(profile.as_dict()) if options.json else profile.table())
    if config is not None:
        _keep(profile, config, options.out)


def _config(options: argparse.Namespace) -> "Config | None":
    from tinyllama.config import load_config

    return None if options.generate else load_config(options.config, options.set)


def _training(options: argparse.Namespace, config: "Config") -> "Profile":
    to_stderr(select_device(options.threads).line())
    from tinyllama.reports.profile import profile_training

    return profile_training(config, options.steps, to_stderr)


def _generation(options: argparse.Namespace) -> "Profile":
    to_stderr(select_device(options.threads).line())
    from tinyllama.reports.profile import profile_generation

    tokenizer, model = load(options.generate, None)
    prompt = [*tokenizer.begin, *tokenizer.encode(_PROMPT, special=False)]
    return profile_generation(model, prompt, options.steps)


def _write_table(profile: "Profile", folder: Path) -> None:
    from tinyllama.reports.runs import PROFILE
    from tinyllama.system.files import atomic_write

    atomic_write(folder / PROFILE, (json.dumps(profile.as_dict()) + "\n").encode())


def _keep(profile: "Profile", config: "Config", out: Path | None) -> None:
    """Put the profile beside the run of the same model, if there is one, where its report looks for
    it."""
    from tinyllama.config import load_config
    from tinyllama.system.files import atomic_write

    run = Path(config.checkpointing.checkpoint_dir)
    made_with = run / "config.toml"
    if not made_with.is_file():
        return
    of_run = load_config(str(made_with), [])
    if any(getattr(of_run, part) != getattr(config, part) for part in ("model", "lora", "qlora")):
        return
    _write_table(profile, run)
    if out is not None and out.resolve() != run.resolve():
        for picture in out.glob("roofline.svg"):
            atomic_write(run / picture.name, picture.read_bytes())
    to_stderr(f"wrote {run}/profile.json: `tinyllama report {run}` shows it")


def _write(profile: "Profile", folder: Path) -> None:
    """Write the files beside the table; their names go to stderr."""
    from tinyllama.observe.ceiling import keep_ceilings
    from tinyllama.reports.profile_files import write_speedscope, write_trace
    from tinyllama.reports.roofline import draw_roofline, measure_ceilings
    from tinyllama.system.files import make_folder

    make_folder(folder)
    _write_table(profile, folder)
    write_trace(profile, folder / "trace.json")
    write_speedscope(profile, folder / "profile.speedscope.json")
    ceilings = measure_ceilings()
    (folder / "roofline.json").write_text(json.dumps(ceilings.as_dict()) + "\n")
    keep_ceilings(ceilings.as_dict())
    to_stderr(
        f"ceilings: float32 {ceilings.float32:,.0f} GFLOPS, bfloat16 {ceilings.bfloat16:,.0f}"
        f" GFLOPS, memory {ceilings.gb_per_second:,.1f} GB/s"
    )
    try:
        draw_roofline(profile, ceilings, folder / "roofline.svg", folder / "roofline.png")
    except ImportError:
        to_stderr("no roofline.svg: matplotlib is not installed: pip install matplotlib")
    to_stderr(f"wrote {folder}")
