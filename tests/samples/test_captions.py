import numpy as np
import pytest

from emu3_megatron.samples import (
    LANGUAGES,
    WORDINGS,
    Scene,
    World,
    WorldConfig,
    caption,
    parse_caption,
    text_document,
)
from emu3_megatron.samples.captions import WORDS


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("medium", ["image", "video"])
def test_every_wording_names_every_attribute(language, medium):
    world, rng = World(WorldConfig()), np.random.default_rng(0)
    for wording in range(len(WORDINGS[language])):
        for _ in range(150):
            scene = world.sample(rng, medium, "train")
            assert parse_caption(caption(scene, language=language, wording=wording)) == scene.to_dict()


def test_several_wordings_in_both_languages():
    assert set(WORDINGS) == {"en", "zh"}
    assert all(len(set(texts)) >= 3 for texts in WORDINGS.values())


def test_captions_differ_where_scenes_differ():
    world = World(WorldConfig())
    for language in LANGUAGES:
        texts = set()
        for shape, colour, position in world.combinations("image", "train"):
            scene = Scene(shape=shape, colour=colour, size="small", background="white", position=position)
            texts.add(caption(scene, language=language))
        assert len(texts) == len(world.combinations("image", "train"))


@pytest.mark.parametrize("attribute", list(WORDS["zh"]))
def test_words_are_distinct(attribute):
    for language in LANGUAGES:
        phrases = WORDS[language][attribute].values()
        assert len(set(phrases)) == len(phrases)


def test_contradictions_and_gaps_are_not_guessed():
    assert parse_caption("large red blue circle, top left") == {
        "size": "large",
        "shape": "circle",
        "position": "top left",
    }
    assert parse_caption("大号、红色、蓝色、圆形") == {"size": "large", "shape": "circle"}
    assert parse_caption("") == {}
    assert parse_caption("the redder circles") == {}


def test_a_motion_is_not_a_position():
    assert parse_caption("red circle, moving left") == {
        "colour": "red",
        "shape": "circle",
        "direction": "left",
    }
    assert parse_caption("red circle, left") == {"colour": "red", "shape": "circle", "position": "left"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_text_documents_state_no_combination(language):
    rng = np.random.default_rng(0)
    documents = {text_document(rng, language=language, sentences=1) for _ in range(300)}
    assert len(documents) > 50
    for document in documents:
        known = parse_caption(document)
        assert not ({"shape", "colour"} <= set(known) and {"position", "direction"} & set(known))


def test_unknown_wordings_are_refused():
    scene = Scene(shape="ring", colour="red", size="small", background="white", position="top")
    with pytest.raises(ValueError, match="known wordings"):
        caption(scene, language="fr")
    with pytest.raises(ValueError, match="known wordings"):
        caption(scene, wording=99)
