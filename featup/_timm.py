"""The only module that imports timm; the import works beside any build of torchvision.

timm needs only the Python part of torchvision. Where torchvision's compiled part does not fit the installed
torch (the registry's torchvision beside a CPU build of torch), that Python part cannot be imported either: it
attaches shape functions to two compiled operators that then do not exist. This module declares the missing
operators without an implementation. Calling such an operator still fails.

Use ``from featup._timm import timm``, before anything else imports timm or torchvision.
"""

import contextlib
from importlib.machinery import PathFinder
from importlib.util import find_spec

import torch

__all__ = ["timm"]

# The operators that torchvision refers to at import without checking whether its compiled part was loaded.
_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def _declare_missing_operators() -> None:
    package = find_spec("torchvision")
    compiled = package and PathFinder.find_spec("_C", package.submodule_search_locations)
    if compiled and compiled.origin:
        # A working compiled part is loaded first, because it would clash with an earlier declaration. Loading it twice
        # is harmless, and torchvision itself ignores these two errors.
        with contextlib.suppress(ImportError, OSError):
            torch.ops.load_library(compiled.origin)  # type: ignore[no-untyped-call]
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", schema)


_declare_missing_operators()

import timm  # noqa: E402  (the operators must be declared first)
