"""GenEval's rules on objects given by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from emu3_megatron.evaluation.objects import Found, check, objects_by_class, relations, summary


def found(name: str, left: float, top: float, score: float = 0.95, side: float = 10) -> Found:
    return Found(name, (left, top, left + side, top + side), score)


def red(own: Sequence[Found], _: str) -> list[str]:
    """Every object is red but those on the right."""
    return ["red" if each.box[0] < 50 else "blue" for each in own]


def verdict(include: list[dict], *objects: Found, exclude: Sequence[dict] = ()) -> bool:
    about = {"include": include, "exclude": list(exclude)}
    correct, reason = check(about, objects_by_class(objects, counting=False), red)
    assert correct == (reason == "")
    return correct


CAT, TWO_CATS = {"class": "cat", "count": 1}, {"class": "cat", "count": 2}


def test_enough_and_not_too_many() -> None:
    assert verdict([CAT], found("cat", 0, 0))
    assert not verdict([CAT], found("dog", 0, 0))
    assert not verdict([CAT], found("cat", 0, 0, score=0.2))
    assert verdict([TWO_CATS], found("cat", 0, 0), found("cat", 30, 0))
    assert not verdict([TWO_CATS], found("cat", 0, 0))
    three = [found("cat", 20 * index, 0) for index in range(3)]
    assert not verdict([TWO_CATS], *three, exclude=[{"class": "cat", "count": 3}])


def test_counting_wants_sure_objects_and_at_most_sixteen() -> None:
    many = [found("cat", index, 0, score=0.5 + index / 100) for index in range(40)]
    assert len(objects_by_class(many, counting=False)["cat"]) == 16
    assert objects_by_class(many, counting=False)["cat"][0].score == pytest.approx(0.89)
    assert objects_by_class(many, counting=True) == {}


def test_colours_of_the_surest() -> None:
    wanted = {**CAT, "color": "red"}
    assert verdict([wanted], found("cat", 0, 0, 0.9), found("cat", 80, 0, 0.8))
    assert not verdict([wanted], found("cat", 0, 0, 0.8), found("cat", 80, 0, 0.9))


@pytest.mark.parametrize(
    ("left", "top", "expected"),
    [
        (-40, 0, {"left of"}), (40, 0, {"right of"}), (0, -40, {"above"}), (0, 40, {"below"}),
        (40, 40, {"right of", "below"}), (1, 1, set()), (40, 12, {"right of"}),
    ],
)  # fmt: skip
def test_relations(left: float, top: float, expected: set[str]) -> None:
    assert relations(found("a", left, top), found("b", 0, 0)) == expected


def test_positions_refer_to_an_earlier_clause() -> None:
    dog_left = {"class": "dog", "count": 1, "position": ["left of", 0]}
    cat, left, right = found("cat", 100, 0), found("dog", 0, 0), found("dog", 200, 0)
    assert verdict([CAT, dog_left], cat, left)
    assert not verdict([CAT, dog_left], cat, right)
    assert not verdict([CAT, dog_left], left)


def test_the_overall_score_is_the_mean_over_tags() -> None:
    rows = [{"tag": "a", "correct": True}, {"tag": "a", "correct": False}, {"tag": "b", "correct": True}]
    assert summary(rows) == {"overall": 0.75, "a": 0.5, "b": 1.0}
    assert summary([]) == {}
