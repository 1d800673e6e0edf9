"""The import of timm beside any build of torchvision."""

from tests.featup.support import run_python


def test_timm_is_imported_after_an_attempt_without_the_operators_and_again() -> None:
    run_python(
        "import contextlib\n"
        "with contextlib.suppress(RuntimeError):\n"
        "    import torchvision\n"
        "from featup._timm import timm\n"
        "import importlib, featup._timm, torchvision, timm as plain\n"
        "importlib.reload(featup._timm)\n"
        "assert plain is timm is featup._timm.timm\n"
        "timm.create_model('test_vit')"
    )


def test_operators_that_exist_are_left_alone() -> None:
    out = run_python(
        "import torch\n"
        "own = torch.library.Library('torchvision', 'FRAGMENT')\n"
        "for name in ('nms', 'qnms'):\n"
        "    own.define(name + '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
        "    own.impl(name, lambda dets, scores, iou_threshold: scores + 1, 'CPU')\n"
        "import featup._timm\n"
        "print(torch.ops.torchvision.nms(torch.zeros(1, 4), torch.tensor([41.0]), 0.5).item())"
    )
    assert float(out) == 42
