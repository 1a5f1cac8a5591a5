"""The packages of the project; all else is in pyproject.toml.

`conf` lies at the top of the repository and is installed within the package, which no setting of
pyproject.toml can find by itself.
"""

from setuptools import find_namespace_packages, find_packages, setup

CONF = ["metarun.conf", *(f"metarun.conf.{name}" for name in find_namespace_packages("conf"))]

setup(packages=["hydra_plugins.metarun", *find_packages(include=["metarun", "metarun.*"]), *CONF])
