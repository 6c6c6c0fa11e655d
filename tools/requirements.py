# SPDX-License-Identifier: Apache-2.0
"""Prints everything that pyproject.toml asks for but torch, which the Makefile has chosen: for the development venv."""

import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
groups = [project["dependencies"], *project["optional-dependencies"].values()]
print("\n".join(sorted({name for group in groups for name in group if not name.startswith("torch")})))
