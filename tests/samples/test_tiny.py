from __future__ import annotations

from pathlib import Path

import pytest

from emu3_megatron.data import Manifest, MultimodalDataset
from emu3_megatron.errors import UserError
from emu3_megatron.samples.tiny import PARTS, prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    for name in PARTS:
        prepare(folder / name)
    return folder


def test_every_part_is_a_dataset_of_one_vocabulary(folder: Path) -> None:
    manifests = {name: Manifest.load(folder / name) for name in PARTS}
    assert len({manifest.vocabulary.fingerprint for manifest in manifests.values()}) == 1
    assert {name: manifest.num_documents for name, manifest in manifests.items()} == {
        name: part.count for name, part in PARTS.items()
    }


def test_codes_follow_the_pictures(folder: Path) -> None:
    dataset = MultimodalDataset.open(folder / "stills")
    spans = {dataset.document(number)[1][0].tobytes() for number in range(len(dataset))}
    assert len(spans) > 0.95 * len(dataset), "different pictures have the same codes"


def test_the_same_bytes_every_time(folder: Path, tmp_path: Path) -> None:
    prepare(tmp_path / "clips")
    for path in (folder / "clips").iterdir():
        assert (tmp_path / "clips" / path.name).read_bytes() == path.read_bytes(), path.name


def test_another_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stills, clips, texts, held-out"):
        prepare(tmp_path / "photos")
