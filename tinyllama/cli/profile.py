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
    from tinyllama.reports.roofline import Ceilings

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
    of_run = None if config is None else _run_of(config)
    profile = _generation(options) if config is None else _training(options, config)
    print(json.dumps(profile.as_dict()) if options.json else profile.table(), flush=True)
    if options.out is None and of_run is None:
        return
    ceilings = _ceilings()
    if options.out is not None:
        _write(profile, ceilings, options.out)
    if of_run is not None:
        _write_tables(profile, ceilings, of_run)
        to_stderr(f"wrote {of_run}/profile.json: `tinyllama report {of_run}` shows it")


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


def _run_of(config: "Config") -> Path | None:
    """The folder of the run of the same model, if there is one: its report shows the profile. A
    notice where the run's configuration cannot be read."""
    from tinyllama.config import load_config
    from tinyllama.reports.runs import CONFIG

    run = Path(config.checkpointing.checkpoint_dir)
    if not (run / CONFIG).is_file():
        return None
    try:
        of_run = load_config(str(run / CONFIG), [])
    except ConfigError as error:
        to_stderr(f"{error}; the profile is not kept in {run}")
        return None
    parts = ("model", "lora", "qlora")
    return run if all(getattr(of_run, p) == getattr(config, p) for p in parts) else None


def _ceilings() -> "Ceilings":
    """Measure what the machine can do, keep it for the runs to come, and say it."""
    from tinyllama.observe.ceiling import keep_ceilings
    from tinyllama.reports.roofline import measure_ceilings

    ceilings = measure_ceilings()
    keep_ceilings(ceilings.as_dict())
    to_stderr(
        f"ceilings: float32 {ceilings.float32:,.0f} GFLOPS, bfloat16 {ceilings.bfloat16:,.0f}"
        f" GFLOPS, memory {ceilings.gb_per_second:,.1f} GB/s"
    )
    return ceilings


def _write_tables(profile: "Profile", ceilings: "Ceilings", folder: Path) -> None:
    """Write the table and the ceilings, as a report reads them."""
    from tinyllama.reports.runs import CEILINGS, PROFILE
    from tinyllama.system.files import atomic_write

    for name, content in ((PROFILE, profile), (CEILINGS, ceilings)):
        atomic_write(folder / name, (json.dumps(content.as_dict()) + "\n").encode(), links=False)


def _write(profile: "Profile", ceilings: "Ceilings", folder: Path) -> None:
    """Write these and the files for other programs; their folder goes to stderr."""
    from tinyllama.reports.profile_files import write_speedscope, write_trace
    from tinyllama.reports.roofline import draw_roofline
    from tinyllama.system.files import make_folder

    make_folder(folder)
    _write_tables(profile, ceilings, folder)
    write_trace(profile, folder / "trace.json")
    write_speedscope(profile, folder / "profile.speedscope.json")
    try:
        draw_roofline(profile, ceilings, folder / "roofline.svg", folder / "roofline.png")
    except ImportError:
        to_stderr("no roofline.svg: matplotlib is not installed: pip install matplotlib")
    to_stderr(f"wrote {folder}")
