"""Map the folders at the root to packages below `graftvit`, and make the page of a package index from README.md."""

import re
from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = ("models", "checkpoints", "transfer", "launch", "cfgs")
inner = [
    folder for folder in find_packages() if folder.split(".")[0] in FOLDERS and folder != "launch.graftvit"
]
readme = Path("README.md").read_text(encoding="utf-8")
page = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n*", "", readme)  # an index has none of our pictures and pages
page = re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", page)
setup(
    packages=["graftvit", *(f"graftvit.{folder}" for folder in inner)],
    package_dir={"graftvit": "launch/graftvit", **{f"graftvit.{folder}": folder for folder in FOLDERS}},
    long_description=page,
    long_description_content_type="text/markdown",
)
