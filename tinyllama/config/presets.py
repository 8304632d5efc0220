"""The configurations that are shipped, found by name: 124m is configs/124m.toml.

In a source tree they lie in configs/, in an installed package in tinyllama/configs/.
"""

from pathlib import Path

from tinyllama.config.options import listed
from tinyllama.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped() -> dict[str, Path]:
    """Every shipped configuration by name."""
    folder = _PACKAGE / "configs"
    if not folder.is_dir():
        folder = _PACKAGE.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def find_config(name: str | Path) -> Path:
    """The file that `name` means: an existing path, else the shipped configuration of that name.

    Raises ConfigError, with the names that are shipped.
    """
    path, presets = Path(name), shipped()
    if path.is_dir():
        raise ConfigError(f"{name}: is a folder, must be a TOML file")
    if path.exists():
        return path
    if str(name) not in presets:
        raise ConfigError(f"{name}: no such file; configurations by name: {listed(presets)}")
    return presets[str(name)]
