"""The ids that Emu3 and Emu3.5 were released with."""

import pytest

from emu3_megatron.vocabulary import Vocabulary

RELEASED = {
    "pad": 151643,
    "eol": 151846,
    "eof": 151847,
    "bos": 151849,
    "eos": 151850,
    "img": 151851,
    "boi": 151852,
    "eoi": 151853,
}


@pytest.mark.parametrize("name", ["emu3", "emu3.5"])
def test_control_ids_are_the_released_ones(name):
    vocabulary = Vocabulary.preset(name)
    assert vocabulary.control_ids == RELEASED
    assert vocabulary.text_size == 151643
    assert vocabulary.vision_offset == 151854


@pytest.mark.parametrize(
    ("name", "size", "padded"), [("emu3", 184622, 185344), ("emu3.5", 282926, 283648), ("tiny", 979, 1024)]
)
def test_sizes(name, size, padded):
    vocabulary = Vocabulary.preset(name)
    assert vocabulary.size == size
    assert vocabulary.padded_size == padded
    assert padded % 1024 == 0


def test_last_vision_ids():
    assert Vocabulary.preset("emu3").size - 1 == 184621
    assert Vocabulary.preset("emu3.5").size - 1 == 282925


def test_fields_rebuild_the_vocabulary_and_decide_the_fingerprint():
    vocabulary = Vocabulary.preset("emu3")
    assert Vocabulary(**vocabulary.to_dict()) == vocabulary
    fingerprints = {Vocabulary.preset(name).fingerprint for name in ("emu3", "emu3.5", "tiny")}
    assert len(fingerprints) == 3
    assert Vocabulary(**vocabulary.to_dict()).fingerprint == vocabulary.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eol": 151847}, "distinct"),
        ({"boi": 7}, "boi=7"),
        ({"eoi": 160000}, "eoi=160000"),
        ({"codebook_size": 0}, "codebook_size=0"),
    ],
)
def test_impossible_layouts_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary(**{**Vocabulary.preset("emu3").to_dict(), **change})


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'emu4'.*emu3, emu3\.5, tiny"):
        Vocabulary.preset("emu4")
