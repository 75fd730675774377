"""The folders at the top of the repository and the names they are installed under.

Everything else about the package is in pyproject.toml, which cannot search a renamed folder for packages.
"""

from setuptools import find_packages, setup

FOLDERS = {
    "hooked_vlm": "hooked_vlm",
    "hooked_vlm.converters": "converters",
    "hooked_vlm.experiments": "experiments",
}

# In the checkout hooked_vlm/converters and hooked_vlm/experiments are links to the two folders beside it.
LINKS = ["converters", "converters.*", "experiments", "experiments.*"]


def packages() -> list[str]:
    found = []
    for name, folder in FOLDERS.items():
        below = find_packages(folder, exclude=LINKS if folder == "hooked_vlm" else ())
        found += [name, *(f"{name}.{package}" for package in below)]
    return found


setup(packages=packages(), package_dir=FOLDERS)
