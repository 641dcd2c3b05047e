"""Faults of an installation that come out under other names. Imports nothing but Python's own before it looks."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from importlib.metadata import PackageNotFoundError, version

from cdvideo.errors import UserError


def torchvision_fault() -> UserError | None:
    """What is wrong with torchvision, where it is installed and can not be imported; it was built for another torch.

    Nothing here needs it, but transformers imports it where it is, and then fails under names of its own.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torch")
    except Exception:  # which is another fault, and torch's own
        return None
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # RuntimeError for operators that are missing, OSError for libraries, ...
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        torch, torchvision = _version("torch"), _version("torchvision")
        return UserError(
            f"torchvision {torchvision} does not fit torch {torch}, and can not be imported ({reason})",
            allowed="no torchvision, which cdvideo does not need, or the release that was made for this torch",
            do=f"pip install 'torchvision=={_fitting(torch)}', or pip uninstall torchvision",
        )
    return None


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(unknown)"


def _fitting(torch: str) -> str:
    """The release of torchvision for one of torch: 0.15 was made for 2.0, and both have counted alike since."""
    major, minor, *_ = (*numbers_of(torch), 0, 0)
    return f"0.{minor + 15}.*" if major == 2 else "*"


def numbers_of(text: str) -> tuple[int, ...]:
    """The first three numbers of a version; what is local to a build does not count."""
    return tuple(int(number) for number in re.findall(r"\d+", text.partition("+")[0])[:3])
