"""The post-training proof: what fine-tuning and preferences do for a finished quickstart model.

``make prove NAME=post-training`` starts from ``runs/quickstart`` (``ARGS="--base RUN"``: another run), which
it makes where it is missing. Its parts, chosen by ``--parts``:

quality        Loss on vision codes alone, on pictures that a score chose, with Chinese captions, which are a
               tenth of pre-training: pictures of held-out Chinese captions come out better, and those of
               English captions do not suffer.
understanding  Stage 2 on conversation files: at least 80% right of every kind of held-out question.
unified        One mixture of both, so that one checkpoint draws and answers; preferences start from it.
preferences    DPO on pairs of its own pictures, which the checker made: on held-out captions the checker
               prefers the new pictures, and questions are answered as before.

What is finished is kept, so a run that was cut short goes on. Exit code 0 only if every bar holds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from emu3_megatron.files import write_json_atomic
from emu3_megatron.samples import Checker, caption
from emu3_megatron.samples.preferences import score_quickstart
from emu3_megatron.samples.questions import KINDS, write_conversations
from emu3_megatron.samples.quickstart.statistics import mean_interval, wilson_interval
from emu3_megatron.samples.world import Scene, World, WorldConfig

ROOT = Path(__file__).resolve().parents[2]
TRAINING = ROOT / "examples/configs/quickstart/training.yaml"
WORLD = World(WorldConfig.preset("quickstart"))
SIDE = WORLD.config.size

ANSWERED = 0.8
"""Share of right answers of every kind; answers are balanced."""
LOSS_OF_OLD = 0.10
"""Share of English captions' right shapes that fine-tuning on Chinese ones may cost."""
LOSS_OF_ANSWERS = 0.05
"""Share of right answers that preferences may cost."""

CONVERSATIONS, HELD_OUT_QUESTIONS = 16_000, 800
POOL = 4000
"""Pictures that are scored for quality fine-tuning; about half show what their captions say."""
HELD_OUT_PICTURES = 288
"""Different captions of combinations that training never shows: all in this world."""
PROMPTS, CANDIDATES, HELD_OUT_CANDIDATES = 1536, 4, 4

NOT_VISION = {"text_weight": 0.0, "meta_weight": 0.0, "break_weight": 0.0, "control_weight": 0.0}
CODES = {**NOT_VISION, "vision_weight": 1.0}
ANSWERS = {**NOT_VISION, "vision_weight": 0.0, "text_weight": 1.0, "end_weight": 1.0}
DRAWING = {"temperature": 0.7, "top_k": 20, "guidance": 2.0}
"""As the quickstart's evaluation."""


@dataclass(frozen=True)
class Proof:
    """Where everything is, and the commands that make it."""

    base: Path
    """A finished quickstart."""
    folder: Path
    """Of this proof."""
    processes: int
    """Of a training."""
    seed: int
    """Of data, order and samples."""

    @property
    def tokenizers(self) -> list[str]:
        """Options of the programs that need them."""
        return [
            *["--text-tokenizer", str(self.base / "text.model")],
            *["--vision-tokenizer", str(self.base / "vision-tokenizer")],
        ]

    def run(self, *commands: Sequence[str | Path]) -> None:
        """Programs of this checkout, side by side; a failure ends the proof."""
        running = [subprocess.Popen([sys.executable, *map(str, each)], cwd=ROOT) for each in commands]
        codes = [process.wait() for process in running]
        if any(codes):
            sys.exit(f"a program of the proof failed (exit codes {codes}); see its message above")

    def shared(self, *command: str | Path) -> None:
        """A program whose work several processes share."""
        count = self.processes
        self.run(*([*command, "--worker", str(i), "--num-workers", str(count)] for i in range(count)))

    def train(self, name: str, *, module: str = "emu3_megatron.training", **changes: dict[str, Any]) -> Path:
        """A run of the quickstart's training with changed sections; one that exists is resumed."""
        steps = changes["trainer"]["steps"]
        if (self.folder / name / f"checkpoints/step-{steps:08d}/COMMIT").exists():
            return self.folder / name
        values = yaml.safe_load(TRAINING.read_text())
        values |= {"run": str(self.folder / name), "seed": self.seed}
        values["data"]["template"] = {}
        values["checkpoint"] = {"interval": 200, "load": str(self.base / "training")}
        for section, fields in changes.items():
            values[section] = {**values.get(section, {}), **fields}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes)]
        self.run([*(launcher if self.processes > 1 else []), "-m", module, "--config", path])
        return self.folder / name

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """A result, computed where its file is missing."""
        path = self.folder / "results" / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(path, compute())
        return json.loads(path.read_text())


def with_model(proof: Proof, model: Path, use: Callable[[Any], Any]) -> Any:
    """The result of `use` of a model's `Generator`, on one process."""
    from emu3_megatron.parallel import platform
    from emu3_megatron.parallel.config import ParallelConfig
    from emu3_megatron.parallel.groups import destroy_parallel, initialize_parallel

    initialize_parallel(ParallelConfig(), platform.install("auto"), seed=0)
    from emu3_megatron.inference import Generator, open_bundle

    files = {"text_tokenizer": proof.base / "text.model", "vision_tokenizer": proof.base / "vision-tokenizer"}
    result = use(Generator(open_bundle(model, **files)))
    destroy_parallel()
    return result


# ---- quality


def held_out_scenes() -> list[Scene]:
    """Different held-out scenes."""
    scenes = {
        tuple(scene.to_dict().items()): scene
        for rng in [np.random.default_rng(0)]
        for scene in (WORLD.sample(rng, "image", "held-out") for _ in range(5000))
    }
    ordered = [scenes[key] for key in sorted(scenes)]
    return [ordered[i] for i in np.random.default_rng(1).permutation(len(ordered))[:HELD_OUT_PICTURES]]


def chosen_pictures(proof: Proof) -> Path:
    """A dataset of pictures with Chinese captions that the checker's score chose of a larger pool."""
    from emu3_megatron.media import write_png

    folder, data = proof.folder / "pool", proof.folder / "data" / "chosen"
    if (data / "manifest.json").exists():
        return data
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rng, lines = np.random.default_rng([proof.seed, 1]), []
    for number in range(POOL):
        scene = WORLD.sample(rng, "image", "train")
        shown = scene if rng.random() < 0.5 else WORLD.sample(rng, "image", "train")
        words, pixels = caption(scene, language="zh"), WORLD.render(shown)
        name = f"pictures/{number:06d}.png"
        write_png(folder / name, pixels)
        scores = dict(score_quickstart(words, pixels))
        lines.append({"id": f"{number:06d}", "image": name, "caption": words, "scores": scores})
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "scored.jsonl").write_text(text, encoding="utf-8")
    manifest = folder / "chosen.jsonl"
    scored = json.dumps([str(folder / "scored.jsonl")])
    rule = ["--scores", '["alignment"]', "--scale", "none", "--least", "1.0"]
    proof.run(["tools/select_by_preference.py", "--manifest", scored, "--output", manifest, *rule])
    sizes = ["--image-area", str(SIDE * SIDE), "--num-shards", str(proof.processes)]
    proof.shared(
        *["tools/tokenize_media.py", "--manifest", manifest, "--output", data, *proof.tokenizers, *sizes]
    )
    return data


def drawn(proof: Proof, model: Path, name: str) -> dict[str, Any]:
    """What the checker reads from one picture of each held-out caption in both languages, by language."""
    scenes = held_out_scenes()

    def read(generator: Any) -> dict[str, Any]:
        from emu3_megatron.inference import Sampling
        from emu3_megatron.media import write_png

        checker, marks = Checker(WORLD.config), {}
        for language in ("zh", "en"):
            images = generator.text_to_image(
                [caption(scene, language=language) for scene in scenes],
                height=SIDE,
                width=SIDE,
                sampling=Sampling(**DRAWING),
                seeds=list(range(len(scenes))),
            )
            seen = [checker.read_image(image.pixels) for image in images]
            marks[language] = {
                key: [getattr(a, key) == getattr(b, key) for a, b in zip(seen, scenes, strict=True)]
                for key in ("shape", "colour", "position")
            }
            for number, image in enumerate(images):
                write_png(proof.folder / f"drawn/{name}/{language}-{number:03d}.png", image.pixels)
        return marks

    (proof.folder / f"drawn/{name}").mkdir(parents=True, exist_ok=True)
    return with_model(proof, model, read)


def quality(proof: Proof) -> list[str]:
    """Fine-tune on the chosen pictures, and compare pictures of held-out captions."""
    sources = {
        "chosen": {"path": str(chosen_pictures(proof)), "weight": 0.7},
        "images": {"path": str(proof.base / "data/images"), "weight": 0.3},
    }
    before = proof.once("drawn-base", lambda: drawn(proof, proof.base / "training", "base"))
    model = proof.train(
        "quality",
        loss=CODES,
        data={"sources": sources, "template": {"caption_dropout": 0.05}},
        optimizer={
            "learning_rate": 2e-3,
            "min_learning_rate": 0.0,
            "schedule": "wsd",
            "warmup_steps": 20,
            "decay_steps": 300,
        },
        trainer={"steps": 600},
    )
    after = proof.once("drawn-quality", lambda: drawn(proof, model, "quality"))
    bars = {("zh", "shape"): 0.0, ("en", "shape"): -LOSS_OF_OLD}
    lines = []
    for language, words in (("zh", "Chinese"), ("en", "English")):
        for key in ("shape", "colour", "position"):
            old, new = before[language][key], after[language][key]
            gain, low, high = mean_interval(np.array(new, float) - np.array(old, float))
            begin = mark(low > bars[language, key]) if (language, key) in bars else "    "
            lines.append(
                f"{begin} quality, {words} captions, {key}: {share(old)} before, {share(new)} after, "
                f"gain {gain:+.1%} [{low:+.1%}, {high:+.1%}]"
            )
    return lines


# ---- understanding


def talks(proof: Proof, split: str) -> Path:
    """The dataset of a split's conversations, made where it is missing; held-out ones are a question each."""
    data = proof.folder / "data" / f"talks-{split}"
    if not (data / "manifest.json").exists():
        pictures = proof.folder / "pictures" / split
        further = split == "train"
        count = CONVERSATIONS if further else HELD_OUT_QUESTIONS
        file = write_conversations(
            pictures, WORLD, split=split, count=count, seed=proof.seed, further=further
        )
        text, vision = proof.tokenizers[1], proof.tokenizers[3]
        command = ["tools/tokenize_conversations.py", "--manifest", json.dumps([str(file)])]
        command += ["--output", str(data), "--text_tokenizer", text, "--vision_tokenizer", vision]
        command += [
            "--quarantine_budget",
            "0",
            "--min_area",
            str(SIDE * SIDE),
            "--max_area",
            str(SIDE * SIDE),
        ]
        proof.run(command)
    return data


def answered(proof: Proof, model: Path) -> dict[str, list[bool]]:
    """Of every held-out question whether it is answered rightly, by kind."""
    from emu3_megatron.data import MultimodalDataset
    from emu3_megatron.samples.questions import judge_answers, read_prompts

    prompts = read_prompts(MultimodalDataset.open(talks(proof, "held-out")))
    return with_model(proof, model, lambda generator: judge_answers(generator.engine, prompts))


def verdict_on_answers(name: str, answers: dict[str, list[bool]]) -> list[str]:
    """A line for each kind of question."""
    return [
        f"{mark(np.mean(answers[kind]) >= ANSWERED)} {name}, {kind}: {share(answers[kind])}" for kind in KINDS
    ]


def understanding_model(proof: Proof) -> Path:
    """Stage 2."""
    sources = {"talks": {"path": str(talks(proof, "train"))}}
    return proof.train(
        "understanding",
        loss=ANSWERS,
        data={"sources": sources},
        optimizer={"learning_rate": 3e-3},
        trainer={"steps": 2500},
    )


def understanding(proof: Proof) -> list[str]:
    """Stage 2, and the answers to held-out questions."""
    answers = proof.once("answers", lambda: answered(proof, understanding_model(proof)))
    return verdict_on_answers("understanding", answers)


def unified_model(proof: Proof) -> Path:
    """One model that draws and answers: what answers learns to draw again, for that takes less."""
    sources = {
        "talks": {
            "path": str(talks(proof, "train")),
            "weight": 0.5,
            "loss": ANSWERS,
        },
        "images": {
            "path": str(proof.base / "data/images"),
            "weight": 0.5,
            "template": {"caption_dropout": 0.05},
            # a picture has 64 codes where an answer has two tokens
            "loss": {**CODES, "vision_weight": 0.2},
        },
    }
    return proof.train(
        "unified",
        data={"sources": sources},
        optimizer={"learning_rate": 3e-3},
        trainer={"steps": 1500},
        checkpoint={"load": str(understanding_model(proof))},
    )


def unified(proof: Proof) -> list[str]:
    """The mixture, and the answers to held-out questions."""
    answers = proof.once("answers-unified", lambda: answered(proof, unified_model(proof)))
    return verdict_on_answers("unified", answers)


# ---- preferences


def captions(split: str, count: int, seed: int) -> list[str]:
    """Different English captions of a split in a random order."""
    if split == "held-out":
        return [caption(scene) for scene in held_out_scenes()]
    rng = np.random.default_rng([seed, 2])
    found: dict[str, None] = {}
    while len(found) < count:
        found[caption(WORLD.sample(rng, "image", split))] = None
    return list(found)


def candidates(proof: Proof, model: Path, name: str, split: str, each: int) -> Path:
    """A folder of a model's pictures, judged by the checker."""
    folder, prompts = proof.folder / "candidates" / name, proof.folder / f"prompts-{split}.txt"
    prompts.write_text("\n".join(captions(split, PROMPTS, proof.seed)) + "\n")
    drawing = [text for key, value in DRAWING.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    command = ["tools/make_preferences.py", "sample", "--checkpoint", model, *proof.tokenizers, *drawing]
    command += ["--prompts", prompts, "--output", folder, "--candidates", each, "--group", 64 // each]
    command += ["--height", SIDE, "--width", SIDE, "--seed", 1000]
    proof.shared(*map(str, command))
    scorer = "emu3_megatron.samples.preferences:score_quickstart"
    proof.run(["tools/make_preferences.py", "score", "--candidates", folder, "--scorer", scorer])
    return folder


def pairs(proof: Proof, folder: Path) -> Path:
    """The best and the worst of every prompt, as a dataset."""
    data = proof.folder / "data" / f"pairs-{folder.name}"
    if not (data / "manifest.json").exists():
        proof.run(["tools/make_preferences.py", "pairs", "--candidates", folder, "--output", data])
    return data


def scores(folder: Path) -> np.ndarray[Any, Any]:
    """The checker's scores ``[prompts, candidates]``."""
    lines = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    shape = [1 + max(line[key] for line in lines) for key in ("prompt", "candidate")]
    table = np.full(shape, np.nan)
    for line in lines:
        table[line["prompt"], line["candidate"]] = line["alignment"]
    return table


def preferences(proof: Proof) -> list[str]:
    """DPO from the unified model; its pictures and answers against those before."""
    base = unified_model(proof)
    own = candidates(proof, base, "train", "train", CANDIDATES)
    old = candidates(proof, base, "before", "held-out", HELD_OUT_CANDIDATES)
    model = proof.train(
        "preferences",
        module="emu3_megatron.posttraining.preferences",
        loss=CODES,
        data={
            "sources": {"pairs": {"path": str(pairs(proof, own))}},
            "validation": {"held-out": {"path": str(pairs(proof, old))}},
        },
        # gently, and each pair about twice: with more of either, pictures come out worse than they were
        dpo={"beta": 0.1, "cross_entropy_weight": 0.1},
        optimizer={"learning_rate": 1e-4, "warmup_steps": 10, "weight_decay": 0.0},
        trainer={"steps": 120},
        validation={"interval": 20, "windows": 32},
        checkpoint={"load": str(base)},
    )
    new = candidates(proof, model, "after", "held-out", HELD_OUT_CANDIDATES)
    before, after = scores(old), scores(new)
    better = (np.sign(np.round(after.mean(1) - before.mean(1), 9)) + 1) / 2  # equal scores are ties
    rate, low, high = mean_interval(better)
    right_before, right_after = (before == 1).mean(1), (after == 1).mean(1)
    gain, least, most = mean_interval(right_after - right_before)
    return [
        f"{mark(low > 0.5)} preferences, held-out captions: the new pictures are preferred {rate:.1%} "
        f"[{low:.1%}, {high:.1%}] of {len(better)}; without ties {share(better[better != 0.5] == 1)}",
        f"{mark(least > 0)} preferences, pictures right in everything: {right_before.mean():.1%} before, "
        f"{right_after.mean():.1%} after, n {before.size}, gain {gain:+.1%} [{least:+.1%}, {most:+.1%}]",
        *answers_kept(proof, base, model),
    ]


def answers_kept(proof: Proof, base: Path, model: Path) -> list[str]:
    """Whether questions are answered as before."""
    before = proof.once("answers-unified", lambda: answered(proof, base))
    after = proof.once("answers-preferences", lambda: answered(proof, model))
    old, new = (np.array([x for kind in KINDS for x in answers[kind]], float) for answers in (before, after))
    gain, low, high = mean_interval(new - old)
    line = (
        f"{mark(low > -LOSS_OF_ANSWERS)} preferences, answers of all kinds: {share(old)} before, "
        f"{share(new)} after, change {gain:+.1%} [{low:+.1%}, {high:+.1%}]"
    )
    return [line, *verdict_on_answers("after preferences", after)]


# ---- report


def mark(holds: Any) -> str:
    """As a line begins."""
    return "pass" if holds else "FAIL"


def share(marks: Sequence[Any] | np.ndarray[Any, Any]) -> str:
    """A share with its interval and number."""
    right, total = int(np.sum(marks)), len(marks)
    low, high = wilson_interval(right, total)
    return f"{right / max(1, total):.1%} [{low:.1%}, {high:.1%}] of {total}"


def write_sheets(folder: Path) -> None:
    """Before above after, where both are: ``quality.png`` (Chinese captions) and ``preferences.png``."""
    from emu3_megatron.inference.results import SHEET_FRAMES, contact_sheet
    from emu3_megatron.media import write_png

    sheets = {
        "quality": [folder / f"drawn/{name}/zh-{{:03d}}.png" for name in ("base", "quality")],
        "preferences": [folder / f"candidates/{name}/images/{{:06d}}-0.png" for name in ("before", "after")],
    }
    for name, versions in sheets.items():
        starts = range(0, 3 * SHEET_FRAMES, SHEET_FRAMES)
        numbers = [range(start, start + SHEET_FRAMES) for start in starts]
        rows = [[Path(str(each).format(n)) for n in row] for row in numbers for each in versions]
        if all(path.exists() for row in rows for path in row):
            pictures = [np.stack([np.asarray(Image.open(path)) for path in row]) for row in rows]
            write_png(folder / f"{name}.png", contact_sheet(pictures))


PARTS: dict[str, Callable[[Proof], list[str]]] = {
    "quality": quality,
    "understanding": understanding,
    "unified": unified,
    "preferences": preferences,
}


def main() -> int:
    """Run, print the verdict, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--base", type=Path, default=ROOT / "runs/quickstart", help="a quickstart's run")
    parser.add_argument("--run", type=Path, default=ROOT / "runs/post-training", help="folder of this proof")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--processes", type=int, default=2, help="of a training (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of data, order and dropout")
    asked = parser.parse_args()
    proof = Proof(asked.base.resolve(), asked.run.resolve(), asked.processes, asked.seed)
    proof.folder.mkdir(parents=True, exist_ok=True)
    if not (proof.base / "summary.json").exists():
        config = ROOT / "examples/configs/quickstart.yaml"
        proof.run(["tools/quickstart.py", "--config", config, "--run", proof.base])
    verdict = [line for part in asked.parts for line in PARTS[part](proof)]
    write_sheets(proof.folder)
    print("\n".join(verdict))
    return int(any(line.startswith("FAIL") for line in verdict))


if __name__ == "__main__":
    sys.exit(main())
