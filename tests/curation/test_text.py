"""Filters of plain text, on English and Chinese."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu3_megatron.curation.categories import category_of
from emu3_megatron.curation.config import ContaminationConfig, TextConfig
from emu3_megatron.curation.contamination import ContaminationStage
from emu3_megatron.curation.text_filters import (
    ExactDuplicatesStage,
    LanguageStage,
    LengthStage,
    NearDuplicatesStage,
    RepetitionStage,
    is_spaceless,
    repeated_share,
    shingles,
    tokens_of,
)
from emu3_megatron.curation.units import ComparingStage, Decision, Stage, Unit

ENGLISH = (
    "The harbour was quiet in the early morning, and the fishing boats lay close together along the old "
    "stone wall. A woman with a red scarf walked slowly past the nets, counting the crates that had come in "
    "overnight, while two gulls argued over something bright on the wet ground near the lamp."
)
CHINESE = (
    "清晨的港口非常安静，渔船沿着古老的石墙紧紧地停靠在一起。一位戴着红色围巾的女士慢慢走过渔网，"
    "清点着昨夜运来的木箱，而两只海鸥正在灯柱旁边潮湿的地面上为了一件闪亮的东西争吵不休。"
)


def text(value: str, name: str = "a") -> Unit:
    return Unit(id=name, kind="text", record={"text": value}, path=None)


def decide(stage: Stage, value: str) -> Decision:
    unit = text(value)
    return stage.decide(unit, stage.score(unit))


def kept(stage: ComparingStage, values: Sequence[str]) -> list[int]:
    """Which of a list of texts stay."""
    comparer = stage.comparer()
    units = [text(value, str(i)) for i, value in enumerate(values)]
    return [i for i, unit in enumerate(units) if comparer.decide(unit, stage.score(unit)).keep]


def changed(value: str, share: float, seed: int = 0) -> str:
    """The text with a share of its tokens replaced, one run of them."""
    tokens = tokens_of(value)
    count = round(share * len(tokens))
    first = random.Random(seed).randrange(len(tokens) - count + 1)
    new = ["海" if is_spaceless(tokens) else "zzz"] * count
    joined = tokens[:first] + new + tokens[first + count :]
    return ("" if is_spaceless(tokens) else " ").join(joined)


@pytest.mark.parametrize("value", [ENGLISH, CHINESE])
def test_good_text_passes_every_filter(value: str) -> None:
    config = TextConfig()
    for stage in (LengthStage(config), LanguageStage(config), RepetitionStage(config)):
        assert decide(stage, value) == Decision(), stage.name


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("Guten Tag, heute ist ein schöner Tag und wir gehen alle zusammen in den Park.", "other language"),
        ("今日はとても天気が良いので、みんなで公園へ散歩に行きました。", "other language"),
        ("8f3a 99x -- 0x7f -- 77", "other language"),
    ],
)
def test_other_languages_are_dropped(value: str, reason: str) -> None:
    decision = decide(LanguageStage(TextConfig()), value)
    assert not decision.keep
    assert decision.reason in (reason, "language not certain")


@pytest.mark.parametrize(
    "value",
    ["buy it now " * 40, "很好很好" * 60, ENGLISH + ENGLISH, CHINESE * 2, "\n".join([ENGLISH[:80]] * 4)],
)
def test_repetition_is_dropped(value: str) -> None:
    assert not decide(RepetitionStage(TextConfig()), value).keep


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=0, max_size=40), st.integers(1, 6))
def test_repeated_share_is_that_of_a_plain_count(values: list[int], length: int) -> None:
    tokens = ["abcd"[v] * (v + 1) for v in values]
    runs = [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]
    inside = {i + k for i, run in enumerate(runs) if run in runs[:i] for k in range(length)}
    expected = sum(len(tokens[i]) for i in inside) / max(1, sum(map(len, tokens)))
    assert repeated_share(tokens, length) == pytest.approx(expected if len(tokens) > length else 0.0)


@settings(deadline=None)
@given(st.text(max_size=60))
def test_tokens_lose_nothing_but_punctuation_and_case(value: str) -> None:
    tokens = tokens_of(value)
    assert all(token and not token.isspace() for token in tokens)
    assert tokens_of(" ".join(tokens)) == tokens
    assert len(shingles(tokens, 3)) == max(1, len(tokens) - 2)


@pytest.mark.parametrize("value", [ENGLISH, CHINESE])
def test_exact_duplicates_ignore_case_and_spaces(value: str) -> None:
    values = [value, value + "x", f"  {value.upper()}\n", value.replace("，", "， "), value]
    assert kept(ExactDuplicatesStage(), values)[:2] == [0, 1]
    assert 2 not in kept(ExactDuplicatesStage(), values)
    assert 4 not in kept(ExactDuplicatesStage(), values)


@pytest.mark.parametrize("value", [ENGLISH, CHINESE])
@pytest.mark.parametrize("seed", range(3))
def test_near_duplicates_are_found_and_others_kept(value: str, seed: int) -> None:
    stage = NearDuplicatesStage(TextConfig(min_similarity=0.7))
    values = [value, changed(value, 0.02, seed), changed(value, 0.6, seed), ENGLISH[::-1]]
    assert kept(stage, values) == [0, 2, 3]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_the_first_of_each_group_stays(seed: int) -> None:
    """Whatever the order, every dropped text has its kept twin before it."""
    base = [ENGLISH * 2, CHINESE * 2, " ".join(reversed(ENGLISH.split())) * 2]
    order = random.Random(seed).choices(range(3), k=8)
    places = kept(NearDuplicatesStage(TextConfig()), [base[i] for i in order])
    assert places == [order.index(i) for i in dict.fromkeys(order)]


def found(config: ContaminationConfig, value: str) -> Decision:
    stage = ContaminationStage(config)
    unit = text(value)
    return stage.comparer().decide(unit, stage.score(unit))


def test_contamination_by_shared_runs(tmp_path: Any) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "a red cube balanced on top of a blue sphere in the desert\n"
        "a photo of a cat\n一只戴着红色围巾的小猫坐在古老的石墙上看海\n",
        encoding="utf-8",
    )
    config = ContaminationConfig(prompts=(prompts,))
    contaminated = [
        "We saw A RED CUBE, balanced on top of a blue sphere!",
        "this is a photo of a cat on a mat",
        "昨天我看见一只戴着红色围巾的小猫坐在古老的石墙上。",
    ]
    clean = ["a red cube on a blue cube", "a photo of a dog", "一只戴着蓝色帽子的小狗坐在古老的石墙上", ""]
    assert all(found(config, value).reason for value in contaminated)
    assert not any(found(config, value).reason for value in clean)
    assert all(found(config, value).keep for value in contaminated)
    several = {"caption": clean[0], "captions": [clean[1], "A photo of a cat."]}
    captioned = Unit(id="a", kind="image", record={"image": "a.png", **several}, path=tmp_path / "a.png")
    stage = ContaminationStage(config)
    assert stage.comparer().decide(captioned, {}).reason
    dropping = ContaminationConfig(prompts=(prompts,), drop=True)
    assert not any(found(dropping, value).keep for value in contaminated)


@pytest.mark.parametrize(
    ("record", "category"),
    [
        ({"category": "Animals"}, "animals"),
        ({"category": "drone", "caption": "a dog"}, "drone"),
        ({"caption": "Two dogs and a cat by the sea"}, "animals"),
        ({"caption": "高山和大海的风景"}, "landscape"),
        ({"captions": ["a thing", "two dogs by the sea and a cat"]}, "animals"),
        ({"tags": ["minecraft", "gameplay"], "caption": "a man by a tree"}, "games"),
        ({"caption": "abstract shapes"}, "unknown"),
        ({"caption": None, "tags": 3}, "unknown"),
    ],
)
def test_category(record: dict[str, Any], category: str) -> None:
    assert category_of(record) == category
