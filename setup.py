"""What a package index shows is the README, but for its links into the repository, which lead nowhere there."""

import re
from pathlib import Path

from setuptools import setup

readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
readme = re.sub(r"!\[[^\]]*\]\((?!https:)[^)]*\)\n+", "", readme)
readme = re.sub(r"\[([^\]]*)\]\((?!https:)[^)]*\)", r"\1", readme)

setup(long_description=readme, long_description_content_type="text/markdown")
