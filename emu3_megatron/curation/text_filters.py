"""Filters of plain text: length, language, repetition, exact and near duplicates; English or Chinese."""

from __future__ import annotations

import base64
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import numpy as np
from datasketch import MinHash, MinHashLSH

from emu3_megatron.curation.config import TextConfig
from emu3_megatron.curation.units import KEEP, Comparer, ComparingStage, Decision, Score, Stage, Unit, drop

SPACELESS = (
    "\u2e80-\u2fdf\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
)
"""Han, kana, Thai, Lao, Myanmar, Khmer: scripts that write no spaces between words."""

TOKEN = re.compile(rf"[{SPACELESS}\U00020000-\U0003ffff]|[^\W{SPACELESS}_]+")
"""A word, or one character of a script without spaces."""

DETECTED_CHARACTERS = 10_000
"""Beginning of a document that its language is told from."""

REPEATED_SHINGLE, TOP_SHINGLE = (10, 20), (2, 4)
"""Lengths in words and in characters of the shingles that repetition is measured with."""

MINHASH_SEED = 1
MINHASH_SCHEME = "affine32"
"""Of datasketch's permutations."""


def normalise(text: str) -> str:
    """Compatibility forms, lower case, single spaces: what duplicates are compared by."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def tokens_of(text: str) -> list[str]:
    """Words, and single characters of scripts without spaces; punctuation is left out."""
    return TOKEN.findall(normalise(text))


def is_spaceless(tokens: Sequence[str]) -> bool:
    """Whether most letters are of a script without spaces."""
    single = sum(
        1 for token in tokens if len(token) == 1 and re.match(f"[{SPACELESS}\U00020000-\U0003ffff]", token)
    )
    return 2 * single > sum(map(len, tokens))


def shingles(tokens: Sequence[str], length: int) -> list[tuple[str, ...]]:
    """All runs of `length` tokens; the whole, where there are fewer."""
    if len(tokens) <= length:
        return [tuple(tokens)]
    return [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]


class LengthStage(Stage):
    """Drops texts that are too short or too long."""

    name = "length"

    def __init__(self, config: TextConfig) -> None:
        """`config` has the range."""
        self._config = config

    def score(self, unit: Unit) -> Score:
        """Characters, spaces at the ends not counted."""
        return {"characters": len(unit.text.strip())}

    def decide(self, unit: Unit, score: Score) -> Decision:
        """Compare with the range."""
        config, characters = self._config, score["characters"]
        if characters < config.min_characters:
            return drop("too short", f"{characters} characters, less than {config.min_characters}")
        if characters > config.max_characters:
            return drop("too long", f"{characters} characters, more than {config.max_characters}")
        return KEEP


@lru_cache(maxsize=1)
def _language_model() -> Any:
    """py3langid's identifier; its model is in the package."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


class LanguageStage(Stage):
    """Keeps some languages."""

    name = "language"

    def __init__(self, config: TextConfig) -> None:
        """`config` has the languages and the certainty asked for."""
        self._config = config

    def settings(self) -> Mapping[str, Any]:
        """The detector."""
        return {"detector": f"py3langid {version('py3langid')}", "characters": DETECTED_CHARACTERS}

    def score(self, unit: Unit) -> Score:
        """Language (ISO 639-1) and its probability; written Cantonese counts as Chinese."""
        language, probability = _language_model().classify(unit.text[:DETECTED_CHARACTERS])
        return {
            "language": "zh" if language == "yue" else str(language),
            "probability": round(float(probability), 4),
        }

    def decide(self, unit: Unit, score: Score) -> Decision:
        """Look the language up."""
        config = self._config
        if config.languages and score["language"] not in config.languages:
            return drop("other language", score["language"])
        if config.languages and score["probability"] < config.min_language_probability:
            return drop("language not certain", f"{score['language']}, {score['probability']:.2f}")
        return KEEP


class RepetitionStage(Stage):
    """Drops texts that repeat themselves (after Gopher, arXiv 2112.11446, table A1)."""

    name = "repetition"

    def __init__(self, config: TextConfig) -> None:
        """`config` has the limits."""
        self._config = config

    def settings(self) -> Mapping[str, Any]:
        """Lengths of the shingles."""
        return {"repeated": REPEATED_SHINGLE, "top": TOP_SHINGLE}

    def score(self, unit: Unit) -> Score:
        """Shares of the characters: in repeated lines, in repeated shingles, in the commonest shingle."""
        tokens = tokens_of(unit.text)
        spaceless = is_spaceless(tokens)
        return {
            "lines": round(repeated_lines(unit.text), 4),
            "ngrams": round(repeated_share(tokens, REPEATED_SHINGLE[spaceless]), 4),
            "top": round(top_share(tokens, TOP_SHINGLE[spaceless]), 4),
        }

    def decide(self, unit: Unit, score: Score) -> Decision:
        """Compare with the limits."""
        config = self._config
        limits = (
            ("lines", config.max_duplicate_lines, "repeats its lines"),
            ("ngrams", config.max_duplicate_ngrams, "repeats itself"),
            ("top", config.max_top_ngram, "repeats a phrase"),
        )
        for key, limit, reason in limits:
            if score[key] > limit:
                return drop(reason, f"{score[key]:.1%} of the characters, more than {limit:.1%}")
        return KEEP


def repeated_lines(text: str) -> float:
    """Share of the characters in lines that stood before."""
    lines = [line for raw in text.splitlines() if (line := normalise(raw))]
    seen: set[str] = set()
    repeated = 0
    for line in lines:
        repeated += len(line) if line in seen else 0
        seen.add(line)
    return repeated / max(1, sum(map(len, lines)))


def repeated_share(tokens: Sequence[str], length: int) -> float:
    """Share of the characters inside a shingle that stood before, each character counted once."""
    if len(tokens) <= length:
        return 0.0
    seen: set[tuple[str, ...]] = set()
    inside = np.zeros(len(tokens), bool)
    for place, shingle in enumerate(shingles(tokens, length)):
        if shingle in seen:
            inside[place : place + length] = True
        seen.add(shingle)
    sizes = np.array([len(token) for token in tokens])
    return float(sizes[inside].sum() / sizes.sum())


def top_share(tokens: Sequence[str], length: int) -> float:
    """Share of the characters taken by the commonest shingle; 0 where none occurs twice."""
    if len(tokens) <= length:
        return 0.0
    shingle, count = Counter(shingles(tokens, length)).most_common(1)[0]
    size = sum(map(len, shingle))
    return min(1.0, count * size / sum(map(len, tokens))) if count > 1 else 0.0


class ExactDuplicatesStage(ComparingStage):
    """Drops texts that are equal to one before, but for case, spaces and compatibility forms."""

    name = "exact_duplicates"

    def score(self, unit: Unit) -> Score:
        """A digest of the normalised text."""
        text = normalise(unit.text).encode("utf-8", "surrogatepass")
        return {"digest": hashlib.blake2b(text, digest_size=16).hexdigest()}

    def comparer(self) -> Comparer:
        """An empty table."""
        return _ExactComparer()


class _ExactComparer(Comparer):
    """Digests and the first unit of each."""

    def __init__(self) -> None:
        self._seen: dict[bytes, str] = {}

    def decide(self, unit: Unit, score: Score) -> Decision:
        """Keep the first of each group."""
        first = self._seen.setdefault(bytes.fromhex(score["digest"]), unit.id)
        return KEEP if first == unit.id else drop("exact duplicate", f"of {first}")


class NearDuplicatesStage(ComparingStage):
    """Drops texts that share most shingles with one before: MinHash signatures and banding (datasketch)."""

    name = "near_duplicates"

    def __init__(self, config: TextConfig) -> None:
        """`config` has the shingles, the length of a signature and the similarity."""
        self._config = config

    def settings(self) -> Mapping[str, Any]:
        """The shingles and the permutations."""
        config = self._config
        return {
            "words": config.shingle_words,
            "characters": config.shingle_characters,
            "permutations": config.permutations,
            "minhash": [MINHASH_SEED, MINHASH_SCHEME],
        }

    def score(self, unit: Unit) -> Score:
        """The signature: little-endian uint32, base64."""
        config, tokens = self._config, tokens_of(unit.text)
        length = config.shingle_characters if is_spaceless(tokens) else config.shingle_words
        minhash = MinHash(config.permutations, seed=MINHASH_SEED, scheme=MINHASH_SCHEME)
        distinct = {
            "\x1f".join(shingle).encode("utf-8", "surrogatepass") for shingle in shingles(tokens, length)
        }
        minhash.update_batch(sorted(distinct))
        return {"signature": base64.b64encode(minhash.hashvalues.astype("<u4").tobytes()).decode()}

    def summary(self, score: Score) -> Score:
        """Nothing: a signature tells a reader nothing."""
        return {}

    def comparer(self) -> Comparer:
        """An empty index."""
        return _NearComparer(self._config)


class _NearComparer(Comparer):
    """Bands find candidates; the whole signatures decide."""

    def __init__(self, config: TextConfig) -> None:
        self._threshold, self._permutations = config.min_similarity, config.permutations
        # A missed duplicate cannot be won back; a false candidate only costs the comparison.
        self._index = MinHashLSH(threshold=self._threshold, num_perm=self._permutations, weights=(0.1, 0.9))
        self._kept: dict[str, Any] = {}

    def decide(self, unit: Unit, score: Score) -> Decision:
        """Keep the first of each group."""
        values = np.frombuffer(base64.b64decode(score["signature"]), "<u4")
        minhash = MinHash(self._permutations, seed=MINHASH_SEED, scheme=MINHASH_SCHEME, hashvalues=values)
        candidates = {name: float((self._kept[name] == values).mean()) for name in self._index.query(minhash)}
        best = max(sorted(candidates), key=candidates.__getitem__, default=None)
        if best is not None and candidates[best] >= self._threshold:
            return drop("near-duplicate", f"of {best}, {candidates[best]:.0%} alike")
        self._index.insert(unit.id, minhash)
        self._kept[unit.id] = values
        return KEEP
