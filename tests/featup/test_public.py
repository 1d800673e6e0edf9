"""The public names of the method, and what importing them loads."""

from importlib import import_module
from pathlib import Path

import pytest

import featup
from tests.featup.support import run_python

HEAVY = ("torch", "numpy", "numba", "timm", "torchvision", "safetensors", "PIL")


@pytest.mark.parametrize("module", ["featup", "featup.errors"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    assert run_python(f"import sys, {module}\nprint([name for name in {HEAVY} if name in sys.modules])") == "[]\n"


def test_errors_load_nothing_heavy() -> None:
    assert run_python("import sys, featup\nfeatup.FeatupError\nprint('torch' in sys.modules)") == "False\n"


def test_upsamplers_and_checkpoints_load_neither_timm_nor_numba() -> None:
    code = "import sys, featup\nfeatup.create_upsampler('bilinear', channels=3), featup.load_pca, featup.load_probe\n"
    assert run_python(code + "print([name for name in ('timm', 'numba') if name in sys.modules])") == "[]\n"


def test_every_public_name_resolves() -> None:
    code = "import featup\nprint(*(type(getattr(featup, name)).__name__ for name in featup.__all__))"
    assert len(run_python(code).split()) == len(featup.__all__)
    assert set(featup.__all__) <= set(dir(featup))
    assert featup.create_backbone is import_module("featup.backbones").create_backbone
    assert featup.FeatupError is import_module("featup.errors").FeatupError


def test_the_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert featup.__version__ == version("featup-datasets")


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'featup' has no attribute 'create_backbones'"):
        featup.create_backbones  # type: ignore[attr-defined]  # noqa: B018


def test_the_package_is_marked_as_typed() -> None:
    assert (Path(featup.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize(
    "package", ["featup.evaluation", "featup.kernels", "featup.multiview", "featup.training", "featup.upsamplers"]
)
def test_packages_export_their_names_without_timm_or_numba(package: str) -> None:
    code = f"import sys, {package}\nprint([name for name in ('timm', 'numba') if name in sys.modules])"
    assert run_python(code) == "[]\n"
    module = import_module(package)
    assert module.__doc__
    assert all(hasattr(module, name) for name in module.__all__)
