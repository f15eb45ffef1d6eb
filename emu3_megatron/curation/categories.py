"""Which of the paper's five kinds of video a clip is, from its metadata or its caption."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

CATEGORIES = ("landscape", "animals", "plants", "games", "actions")
"""Categories of the paper's videos (arXiv 2409.18869, section 2.1)."""

UNKNOWN = "unknown"

SOURCES = ("tags", "keywords", "title", "description", "caption", "captions")
"""Keys of an entry that are searched, where ``category`` says nothing."""

WORDS: Mapping[str, str] = {
    "landscape": (
        "landscape landscapes scenery mountain mountains sea ocean beach river lake waterfall sky sunset "
        "sunrise desert valley coast island skyline city cityscape clouds snow canyon nature aerial "
        "风景 风光 高山 雪山 大海 海洋 海滩 湖泊 河流 瀑布 天空 日落 日出 沙漠 城市 白云"
    ),
    "animals": (
        "animal animals wildlife pet pets dog dogs puppy cat cats kitten bird birds fish horse horses cow "
        "sheep elephant lion tiger bear rabbit bunny squirrel monkey insect butterfly bee whale dolphin "
        "动物 小狗 狗狗 猫咪 小猫 小鸟 鱼群 骏马 奶牛 绵羊 大象 狮子 老虎 熊猫 兔子 松鼠 猴子 昆虫 蝴蝶"
    ),
    "plants": (
        "plant plants flower flowers tree trees forest leaf leaves grass garden blossom rose tulip bloom "
        "moss "
        "植物 花朵 鲜花 树木 大树 森林 树叶 草地 花园 盛开"
    ),
    "games": (
        "game games gaming gameplay gamer esports minecraft fortnite playthrough speedrun console videogame "
        "游戏 电竞 我的世界"
    ),
    "actions": (
        "action actions sport sports running runner dancing dance dancer jumping swimming cycling "
        "bike bikes bicycle riding skating skiing surfing football soccer basketball tennis "
        "fight workout cooking walking man woman person people "
        "动作 运动 跑步 奔跑 跳跃 跳舞 舞蹈 游泳 骑车 滑雪 冲浪 足球 篮球 网球 健身 烹饪 行走 男人 女人 人们"
    ),
}
"""Words that speak for a category; Chinese ones count wherever they stand."""

SYNONYMS: Mapping[str, str] = {
    "landscapes": "landscape", "scenery": "landscape", "风景": "landscape",
    "animal": "animals", "动物": "animals", "plant": "plants", "植物": "plants",
    "game": "games", "gaming": "games", "游戏": "games",
    "action": "actions", "sports": "actions", "human": "actions", "动作": "actions",
}  # fmt: skip
"""Other names of the categories."""

_LATIN = {word: category for category, words in WORDS.items() for word in words.split() if word.isascii()}
_CHINESE = {
    word: category for category, words in WORDS.items() for word in words.split() if not word.isascii()
}


def category_of(record: Mapping[str, Any]) -> str:
    """The category of a manifest's entry.

    Its key ``category`` decides (in lower case; names other than the five stay as they are); else the words
    of its tags, title, description and caption: the category with most words, the first of the five on a
    tie; ``unknown`` without any.
    """
    stated = record.get("category")
    if isinstance(stated, str) and stated.strip():
        name = stated.strip().lower()
        return SYNONYMS.get(name, name)
    text = " ".join(_strings(record.get(key)) for key in SOURCES).lower()
    counts = dict.fromkeys(CATEGORIES, 0)
    for word in re.findall(r"[a-z]+", text):
        if category := _LATIN.get(word):
            counts[category] += 1
    for word, category in _CHINESE.items():
        counts[category] += text.count(word)
    best = max(CATEGORIES, key=counts.__getitem__)
    return best if counts[best] else UNKNOWN


def _strings(value: Any) -> str:
    """Text of a value: a string, or a list of them."""
    if isinstance(value, str):
        return value
    return " ".join(part for part in value if isinstance(part, str)) if isinstance(value, list) else ""
