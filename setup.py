"""Map the folders at the root to packages below `graftvit`; each folder with an `__init__.py` is one."""

from setuptools import find_packages, setup

FOLDERS = ("models", "checkpoints", "transfer", "launch", "cfgs")
inner = [
    folder for folder in find_packages() if folder.split(".")[0] in FOLDERS and folder != "launch.graftvit"
]
setup(
    packages=["graftvit", *(f"graftvit.{folder}" for folder in inner)],
    package_dir={"graftvit": "launch/graftvit", **{f"graftvit.{folder}": folder for folder in FOLDERS}},
)
