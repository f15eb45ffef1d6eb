"""Judgements, and the pairs that follow from them."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from emu3_megatron.data import MultimodalDataset
from emu3_megatron.errors import UserError
from emu3_megatron.posttraining.preferences.candidates import SCORES, VOTES
from emu3_megatron.posttraining.preferences.pairs import PAIR_TASK, PairTemplate
from emu3_megatron.posttraining.preferences.scores import (
    HeldOut,
    Judgement,
    mean_scores,
    read_folder,
    read_judgements,
    write_pairs,
)
from emu3_megatron.posttraining.preferences.scoring import score_candidates
from tests.posttraining import folders

ROOT = Path(__file__).parents[2]


def judgement(prompt: int, candidate: int, voter: str = "ada", **criteria: float) -> Judgement:
    return Judgement(prompt, candidate, voter, criteria)


def test_scores_are_means_over_voters_of_weighted_means_over_criteria() -> None:
    given = [
        judgement(0, 0, "ada", appeal=1, alignment=1),
        judgement(0, 0, "ada", appeal=2, alignment=5),  # she thought again
        judgement(0, 0, "bo", appeal=4, alignment=4),
        judgement(0, 1, "bo", appeal=3),
    ]
    assert mean_scores(given) == {(0, 0): (3.5 + 4) / 2, (0, 1): 3.0}
    assert mean_scores(given, {"appeal": 3, "alignment": 1}) == {(0, 0): (2.75 + 4) / 2, (0, 1): 3.0}
    assert mean_scores(given, {"alignment": 1}) == {(0, 0): 4.5}


def test_a_line_that_is_no_judgement_is_named_and_the_rest_kept(tmp_path: Path) -> None:
    bad = [
        '{"prompt": 0, "candidate": 1, "voter": "ada"',
        '{"prompt": "0", "candidate": 1, "voter": "ada", "appeal": 1}',
        '{"prompt": 0, "candidate": true, "voter": "ada", "appeal": 1}',
        '{"prompt": 0, "candidate": 1, "voter": "ada"}',
        '{"prompt": 0, "candidate": 1, "voter": "ada", "appeal": "good"}',
        '{"prompt": 0, "candidate": 1, "voter": "ada", "appeal": NaN}',
        f'{{"prompt": 0, "candidate": 1, "voter": "ada", "appeal": {"9" * 400}}}',
        "[1, 2]",
    ]
    good = judgement(1, 2, "bo", appeal=3.5)
    path = tmp_path / "votes.jsonl"
    path.write_text("\n".join([*bad, "", good.to_line()]))
    judgements, problems = read_judgements(path)
    assert judgements == [good]
    assert [problem.split(":")[0].rpartition(" ")[2] for problem in problems] == [
        str(number) for number in range(1, len(bad) + 1)
    ]


def test_the_best_and_the_worst_of_each_prompt_become_a_pair(tmp_path: Path) -> None:
    folder = folders.filled_folder(tmp_path / "candidates")
    scores = {
        **{(0, place): score for place, score in enumerate((2.0, 5.0, 1.0))},
        **{(1, place): 3.0 for place in range(3)},  # undecided
        (2, 0): 1.0,
        (2, 2): 1.5,
        (3, 1): 4.0,  # only one judged
    }
    report = write_pairs(folder, tmp_path / "pairs", scores)
    assert (report.pairs, report.undecided, report.unjudged) == (2, 1, 1)
    dataset = MultimodalDataset.open(tmp_path / "pairs", vocabulary=folders.VOCABULARY)
    assert [dataset.name(n) for n in range(2)] == [
        {"id": "prompt-000000", "task": PAIR_TASK},
        {"id": "prompt-000002", "task": PAIR_TASK},
    ]
    assert dataset.manifest.identity["text tokenizer"] == "t"
    for place, (number, best, worst) in enumerate([(0, 1, 2), (2, 2, 0)]):
        drawn, _ = folders.candidates_of(number)
        prompt = [drawn.prompt_ids] if len(drawn.prompt_ids) else []
        stored = [ids for ids, _ in dataset.document(place)]
        expected = [*prompt, drawn.spans[best], *prompt, drawn.spans[worst]]
        assert all(np.array_equal(*pair) for pair in zip(stored, expected, strict=True))
        halves = PairTemplate().halves(dataset.document(place), dataset.vocabulary)
        assert [ids[1:-1].tolist() for ids, _ in halves] == [
            np.concatenate([*prompt, drawn.spans[which]]).tolist() for which in (best, worst)
        ]
    with pytest.raises(UserError, match="dataset already"):
        write_pairs(folder, tmp_path / "pairs", scores)
    again = write_pairs(folder, tmp_path / "again", scores, minimum_margin=1.0)
    assert (again.pairs, again.undecided) == (1, 2)
    with pytest.raises(UserError, match="no pair"):
        write_pairs(folder, tmp_path / "none", scores, minimum_margin=100)
    with pytest.raises(UserError, match="prompt 9, candidate 0"):
        write_pairs(folder, tmp_path / "other", {(9, 0): 1.0})


def test_pairs_are_held_out_by_their_prompts(tmp_path: Path) -> None:
    folder = folders.filled_folder(tmp_path / "candidates")
    scores = {(number, place): float(place) for number in range(4) for place in range(3)}
    report = write_pairs(folder, tmp_path / "pairs", scores, held_out=HeldOut(tmp_path / "held-out", 0.5))
    assert (report.pairs, report.held_out) == (2, 2)
    sides = [MultimodalDataset.open(tmp_path / name) for name in ("pairs", "held-out")]
    names = [{side.sample_id(number) for number in range(2)} for side in sides]
    assert names[0] | names[1] == {f"prompt-{number:06d}" for number in range(4)}
    fewer = write_pairs(folder, tmp_path / "fewer", scores, held_out=HeldOut(tmp_path / "one"))
    assert (fewer.pairs, fewer.held_out) == (3, 1)
    with pytest.raises(UserError, match="held-out is a dataset already"):
        write_pairs(folder, tmp_path / "more", scores, held_out=HeldOut(tmp_path / "held-out"))
    # Killed after what is held out was written, and started again.
    (tmp_path / "fewer/manifest.json").unlink()
    again = write_pairs(folder, tmp_path / "fewer", scores, held_out=HeldOut(tmp_path / "one"))
    assert (again.pairs, again.held_out) == (3, 1)
    single = {key: score for key, score in scores.items() if key[0] == 0}
    with pytest.raises(UserError, match="none is left to train on"):
        write_pairs(folder, tmp_path / "none", single, held_out=HeldOut(tmp_path / "all"))
    with pytest.raises(UserError, match="must lie between 0 and 1"):
        HeldOut(tmp_path, 1.0)


def test_a_scorer_that_is_killed_goes_on(tmp_path: Path) -> None:
    def brightness(prompt: str, pixels: np.ndarray) -> dict[str, float]:
        if prompt == poisoned:
            raise KeyboardInterrupt
        return {"brightness": float(pixels.mean())}

    poisoned = "none"
    whole = folders.filled_folder(tmp_path / "whole")
    assert score_candidates(whole, brightness, "mean") == len(folders.PROMPTS)
    expected = (whole.path / SCORES).read_bytes()

    poisoned = folders.PROMPTS[2]
    folder = folders.filled_folder(tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        score_candidates(folder, brightness, "mean")
    cut = (folder.path / SCORES).read_bytes()
    (folder.path / SCORES).write_bytes(cut + b'{"prompt": 2, "cand')
    poisoned = "none"
    assert score_candidates(folder, brightness, "mean") == 2
    assert (folder.path / SCORES).read_bytes() == expected
    assert score_candidates(folder, brightness, "mean") == 0
    assert score_candidates(folder, brightness, "another") == len(folders.PROMPTS)

    (folder.path / VOTES).write_text("nonsense\n" + judgement(0, 0, "ada", appeal=2).to_line())
    judgements, problems = read_folder(folder)
    assert len(judgements) == 2 * len(folders.PROMPTS) * folders.EACH + 1
    assert len(problems) == 1
    means = {place: folders.candidates_of(1)[1][place].mean() for place in range(folders.EACH)}
    assert mean_scores(judgements)[1, 2] == pytest.approx(means[2])


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    folder = folders.filled_folder(tmp_path / "candidates", prompts=2)
    assert folder.finished() == [0, 1]
    assert folders.open_folder(tmp_path / "candidates").finished() == [0, 1]
    with pytest.raises(UserError, match=r"other settings .*seed"):
        folders.open_folder(tmp_path / "candidates", seed=1)
    (folder.path / "candidates" / "000001.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="cannot be read"):
        folder.read(1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no folder of candidates"):
        type(folder)(tmp_path / "empty")
    with pytest.raises(UserError, match="no judgements yet"):
        read_folder(folder)


def test_a_document_that_is_no_pair_is_refused() -> None:
    drawn, _ = folders.candidates_of(0)
    caption, span = (drawn.prompt_ids, 0), (drawn.spans[0], 1)
    for segments in (
        [caption, span],
        [caption, span, span],
        [caption, span, (drawn.prompt_ids[:-1], 0), span],
    ):
        with pytest.raises(UserError, match="not a preference pair"):
            PairTemplate().halves(segments, folders.VOCABULARY)


def test_settings_are_readable_by_people(tmp_path: Path) -> None:
    folder = folders.filled_folder(tmp_path / "candidates")
    assert json.loads((folder.path / "settings.json").read_text())["prompts"] == folders.PROMPTS


def test_the_tool_scores_and_writes_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tool(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["make_preferences.py", *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / "tools" / "make_preferences.py"), run_name="__main__")
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    folder = folders.filled_folder(tmp_path / "candidates").path
    output = ("--output", tmp_path / "pairs")
    assert tool("pairs", "--candidates", folder, *output) == 2
    assert "no judgements yet" in capsys.readouterr().err
    assert tool("score", "--candidates", folder, "--scorer", f"{__name__}:mean_red", "--name", "red") == 0
    assert "judged 4 prompts" in capsys.readouterr().out
    with open(folder / SCORES, "a") as stream:
        stream.write("nonsense\n")
    assert tool("pairs", "--candidates", folder, *output, "--weight", "red=x") == 2
    assert "CRITERION=NUMBER" in capsys.readouterr().err
    assert tool("pairs", "--candidates", folder, *output) == 0
    shown = capsys.readouterr()
    assert "wrote 4 pairs" in shown.out
    assert f"left out: {folder / SCORES}, line 13" in shown.err
    assert len(MultimodalDataset.open(tmp_path / "pairs")) == 4
    assert tool("score", "--candidates", tmp_path / "none", "--scorer", f"{__name__}:mean_red") == 2
    assert "no folder of candidates" in capsys.readouterr().err


def mean_red(prompt: str, pixels: np.ndarray) -> dict[str, float]:
    return {"red": float(pixels[..., 0].mean())}
