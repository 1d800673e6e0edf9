import argparse
import hashlib
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from featup.errors import WeightsError
from featup.weights import file_digest, load_state_dict, load_strict, state_digest

STATE = {"body.weight": torch.arange(6.0).reshape(2, 3), "body.bias": torch.tensor([1.0, 2.0])}


class Net(nn.Module):
    """A module with a body, a classifier, an integer buffer and one buffer it does not save."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 2)
        self.header = nn.Linear(2, 2)
        self.head = nn.Linear(2, 5)
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("index", torch.arange(4), persistent=False)


def numbered(module: nn.Module) -> dict[str, Tensor]:
    """A state dict for ``module`` in which every value is 0.5 + the place of its tensor."""
    state = module.state_dict()
    return {key: torch.full_like(value, 0.5 + place) for place, (key, value) in enumerate(state.items())}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


def test_safetensors_come_back_as_they_were_saved(tmp_path: Path) -> None:
    state = {key: value.half() for key, value in STATE.items()}
    save_file(state, tmp_path / "w.safetensors")
    same(load_state_dict(tmp_path / "w.safetensors"), state)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".pth.tar"])
def test_pickles_of_every_suffix(tmp_path: Path, suffix: str) -> None:
    torch.save(OrderedDict(STATE), tmp_path / f"w{suffix}")
    same(load_state_dict(str(tmp_path / f"w{suffix}")), STATE)


WRAPPED = {f"module._orig_mod.{key}": value for key, value in STATE.items()}
ZEROS = {key: torch.zeros_like(value) for key, value in STATE.items()}


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": STATE, "epoch": 3},
        {"model": {"state_dict": WRAPPED}},
        {"state_dict": ZEROS, "state_dict_ema": STATE},
        {"model": ZEROS, "model_ema": WRAPPED, "args": argparse.Namespace(lr=0.1)},
        {"student": ZEROS, "teacher": WRAPPED, "epoch": 3},
        {"module": STATE, "lr": 0.1},
        {"encoder": WRAPPED, "target_encoder": ZEROS},
        WRAPPED,
    ],
    ids=["state_dict", "nested twice", "averaged first", "model_ema", "teacher", "module", "encoder", "prefixes"],
)
def test_nesting_and_prefixes_are_taken_off(tmp_path: Path, content: dict[str, Any]) -> None:
    torch.save(content, tmp_path / "w.pth")
    same(load_state_dict(tmp_path / "w.pth"), STATE)


def test_a_prefix_that_only_some_keys_have_is_part_of_their_names(tmp_path: Path) -> None:
    state = {"module.a": torch.ones(1), "b": torch.ones(1)}
    torch.save(state, tmp_path / "w.pth")
    same(load_state_dict(tmp_path / "w.pth"), state)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_damaged_files_say_so(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(STATE, path)
    else:
        save_file(STATE, path)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "text": b"<html>404</html>", "empty": b""}[damage])
    with pytest.raises(WeightsError, match=r"w\.\w+: cannot be read by .* bytes.*Fetch the file again") as caught:
        load_state_dict(path)
    assert caught.value.__cause__ is not None


class Payload:
    """Unpickled carelessly, this would make a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (Path.mkdir, (self.path,))  # type: ignore[return-value]


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"a": Payload(tmp_path / "run")}, protocol=2))
    torch.save({"a": Payload(tmp_path / "run")}, tmp_path / "zip.pth")
    for name in ("w.pth", "zip.pth"):
        with pytest.raises(WeightsError, match=r"pickled objects of .*getattr.*weights_only=False"):
            load_state_dict(tmp_path / name)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_program_with_weights_is_refused_with_the_command_that_saves_its_weights(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "ViT-B-16.pt")
    with pytest.raises(WeightsError, match=r"TorchScript archive.*torch\.jit\.load\('ViT-B-16\.pt'"):
        load_state_dict(tmp_path / "ViT-B-16.pt")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([torch.ones(1)], "holds a list, not named tensors"),
        ({}, "holds an empty dict, not named tensors"),
        ({"net": STATE, "epoch": 3}, r"not only named tensors.*'net' \(dict\), 'epoch' \(int\)"),
    ],
    ids=["list", "empty", "other nesting"],
)
def test_other_content_is_named(tmp_path: Path, content: Any, text: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=text):
        load_state_dict(tmp_path / "w.pth")


def test_missing_files_and_other_suffixes(tmp_path: Path) -> None:
    for name in ("w.safetensors", "w.pth"):
        with pytest.raises(FileNotFoundError, match=name):
            load_state_dict(tmp_path / name)
    with pytest.raises(WeightsError, match=r"ends in '\.onnx' is not read as weights.*\.safetensors"):
        load_state_dict(tmp_path / "w.onnx")


def test_values_are_cast_to_the_modules_dtypes() -> None:
    net = Net()
    state = numbered(net)
    halves = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    load_strict(net, halves, "halves")
    same(net.state_dict(), state)


def test_every_difference_is_listed_and_nothing_is_loaded() -> None:
    net = Net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = numbered(net)
    del state["body.bias"]
    state["extra"] = torch.ones(1)
    state["body.weight"] = torch.ones(3, 3).half()
    state["header.weight"] = torch.ones(2, 2, dtype=torch.int8)
    with pytest.raises(WeightsError) as caught:
        load_strict(net, state, "some/file.pth")
    text = str(caught.value)
    assert text.startswith("some/file.pth does not fit Net; ")
    assert "missing from it (1): body.bias;" in text
    assert "unexpected in it (1): extra;" in text
    assert "body.weight float16[3, 3] for float32[2, 3]" in text
    assert "header.weight int8[2, 2] for float32[2, 2]" in text
    assert "Likely cause: another variant of the architecture" in text
    same(net.state_dict(), before)


def test_long_lists_are_cut_and_the_cause_fits_the_difference() -> None:
    net = nn.Sequential(*(nn.Linear(1, 1) for _ in range(6)))
    other = {f"layer{i}": torch.ones(1) for i in range(9)}
    with pytest.raises(WeightsError, match=r"\(12\): 0\.weight, .*, 3\.bias and 4 more; unexpected") as caught:
        load_strict(net, other, "other")
    assert "layer7 and 1 more" in str(caught.value)
    assert "weights of another architecture" in str(caught.value)
    wider = nn.Sequential(*(nn.Linear(2, 1) for _ in range(6))).state_dict()
    with pytest.raises(WeightsError, match="same architecture with another width"):
        load_strict(net, wider, "wider")


@pytest.mark.parametrize("classes", [None, 7, 5])
def test_only_the_classifier_may_differ(classes: int | None) -> None:
    net = Net()
    state = numbered(net)
    before = net.head.weight.clone()
    expected = torch.full_like(before, state["head.weight"][0, 0].item()) if classes == 5 else before
    for key in ("head.weight", "head.bias"):
        value = state.pop(key)
        if classes:
            state[key] = value[:1].expand(classes, *value.shape[1:]).clone()
    load_strict(net, state, "file", ignore=("head",))
    assert torch.equal(net.head.weight, expected)
    assert torch.equal(net.header.weight, state["header.weight"])
    if classes != 5:
        with pytest.raises(WeightsError, match=r"head\.weight"):
            load_strict(net, state, "file")
    del state["header.weight"]
    with pytest.raises(WeightsError, match=r"missing from it \(1\): header\.weight"):
        load_strict(net, state, "file", ignore=("head",))


def test_a_buffer_the_module_computes_itself_may_be_in_the_file_and_is_not_taken() -> None:
    net = Net()
    load_strict(net, numbered(net) | {"index": torch.zeros(9)}, "file")
    assert torch.equal(net.get_buffer("index"), torch.arange(4))


def test_file_digest_is_sha256(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "f").write_bytes(data)
    assert file_digest(tmp_path / "f") == hashlib.sha256(data).hexdigest()


def test_state_digest_tells_states_apart_and_nothing_else() -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(2.0), "c": torch.zeros(0).bfloat16()}
    digest = state_digest(state)
    strided = {"a": state["a"].t().contiguous().t()}
    assert state_digest(dict(reversed(state.items()))) == digest
    assert state_digest(state | strided) == digest
    assert state_digest(state | {"head.x": torch.ones(1)}, ignore=("head",)) == digest
    others = [
        state | {"a": state["a"].reshape(3, 2)},
        state | {"a": state["a"].double()},
        state | {"a": state["a"] + 1e-6},
        state | {"b": torch.tensor([2.0])},
        {"x": state["a"], "b": state["b"], "c": state["c"]},
        state | {"d": torch.zeros(0)},
    ]
    assert len({digest, *map(state_digest, others)}) == 1 + len(others)
