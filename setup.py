"""What pyproject.toml cannot say: configs/, which lies beside the package, is installed inside it.

tinyllama finds a shipped configuration by name, wherever it is installed (config/presets.py).
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["tinyllama*"]), "tinyllama.configs"],
    package_dir={"tinyllama.configs": "configs"},
)
