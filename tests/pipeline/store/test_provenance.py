import hashlib
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from featup.checkpoints import pca_bytes
from featup.errors import WeightsError
from featup.projection import PCA
from pipeline.compute.models import Setup, take_pca
from pipeline.config.base import Size, describe
from pipeline.config.precompute import PrecomputeConfig
from pipeline.errors import IncompleteStoreError, StoreError
from pipeline.store.create import create_store, declare_complete, withdraw_complete
from pipeline.store.layout import Layout, open_group
from pipeline.store.provenance import stored_file, stored_pca

LAYOUT = Layout(4, 4, 6, 10, 2, (6, 10), (), "uint8", False, 1)


def pca_of(seed: int) -> bytes:
    components = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)))[0][:2]
    return pca_bytes(
        PCA(components.contiguous(), torch.zeros(3), torch.ones(2), explained_variance_ratio=0.9, count=100)
    )


def setup_of(digests: dict[str, str]) -> Setup:
    mean = (0.5, 0.5, 0.5)
    return Setup(3, (3, 5), (2, 2), 11, mean, mean, {"backbone": "weights", **digests}, "cpu")


@pytest.fixture
def store(tmp_path: Path) -> str:
    """A complete store with a PCA, of random weights."""
    out, data = str(tmp_path / "store"), pca_of(0)
    digest = hashlib.sha256(data).hexdigest()
    config = PrecomputeConfig(shards=("a.tar",), out=out, size=Size(6, 10), pca=2)
    attributes = {"identity": {"pca digest": digest}, "config": describe(config)}
    create_store(out, LAYOUT, {**attributes, "setup": asdict(setup_of({"pca": digest}))})
    Path(out, "plan").mkdir()
    Path(out, "plan/pca.safetensors").write_bytes(data)
    declare_complete(out)
    return out


def run_of(store: str) -> PrecomputeConfig:
    return PrecomputeConfig(shards=("b.tar",), out=f"{store}2", size=Size(6, 10), pca_from=store)


def test_the_pca_of_a_store_is_the_one_it_was_made_with(store: str) -> None:
    pca, data = stored_pca(store)
    assert data == pca_of(0)
    assert (len(pca.components), pca.count) == (2, 100)
    assert take_pca(store, run_of(store), setup_of({}))[1] == data


def test_a_pca_that_was_replaced_is_refused(store: str) -> None:
    # Given as --pca-from, such a store gave features of cosine -1, with exit status 0.
    other = pca_of(1)
    Path(store, "plan/pca.safetensors").write_bytes(other)
    digests = [hashlib.sha256(data).hexdigest() for data in (other, pca_of(0))]
    text = rf"pca\.safetensors has sha256 {digests[0]}, and .* was made with {digests[1]}: the file was replaced"
    for read in (stored_pca, lambda url: take_pca(url, run_of(url), setup_of({}))):
        with pytest.raises(StoreError, match=text):
            read(store)


def test_a_pca_that_is_gone_or_never_was_says_so(store: str) -> None:
    Path(store, "plan/pca.safetensors").unlink()
    with pytest.raises(StoreError, match=r"pca\.safetensors is gone, and .* was made with it"):
        stored_pca(store)
    open_group(store, mode="r+").attrs["identity"] = {}
    with pytest.raises(StoreError, match="holds all channels and no PCA"):
        stored_pca(store)
    with pytest.raises(StoreError, match=r"has no digest of .*backbone\.safetensors"):
        stored_file(store, "backbone.safetensors")


def test_a_file_that_is_no_pca_is_refused(store: str) -> None:
    Path(store, "plan/pca.safetensors").write_bytes(b"no PCA")
    open_group(store, mode="r+").attrs["identity"] = {"pca digest": hashlib.sha256(b"no PCA").hexdigest()}
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        stored_pca(store)


def test_the_pca_of_a_store_that_is_not_complete_is_its_own_only(store: str) -> None:
    withdraw_complete(store)
    assert stored_pca(store)[1] == pca_of(0), "its own job reads it while it runs"
    with pytest.raises(IncompleteStoreError, match="is not complete"):
        take_pca(store, run_of(store), setup_of({}))
