"""PEP 517 backend: setuptools, with build requirements that depend on what the machine already has.

torch is never one of them: a build requirement would download a second torch of several gigabytes into a
throw-away environment, with headers of another version than the one that runs. The installed torch is found
from outside instead.
"""

import os
import sys

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change)

sys.path.insert(0, os.path.dirname(__file__))

import native
import torch_dir


def get_requires_for_build_wheel(config_settings=None):
    try:
        torch_dir.find()
    except torch_dir.TorchNotFound as problem:
        sys.exit(str(problem))  # without a traceback: the message is all that helps
    requires = _setuptools.get_requires_for_build_wheel(config_settings)
    if not native.find_cmake():
        requires.append("cmake>={}.{}".format(*native.CMAKE_MINIMUM))
    if not native.find_ninja():
        requires.append("ninja")
    return requires


get_requires_for_build_editable = get_requires_for_build_wheel


def get_requires_for_build_sdist(config_settings=None):
    return []
