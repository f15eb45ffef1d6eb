"""Which checkpoints a run goes on from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from emu3_megatron.training import command_line, resume
from emu3_megatron.training.checkpoint import Progress, Record
from emu3_megatron.training.checkpoint_files import CheckpointError
from emu3_megatron.training.resume import check_resumable, check_start

FOLDER = Path("RUN/checkpoints/step-00000010")
MUON = ["--optimizer.kind", "muon", "--optimizer.use_distributed_optimizer", "false"]


def record(config_file: Path, *options: str) -> Record:
    config = asdict(command_line.parse(["--config", str(config_file), *options]).config)
    return Record(progress=Progress(), vocabulary={}, plan_fingerprint="", plan={}, config=config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (MUON, "optimizer.kind=adam, this run has muon"),
        (["--trainer.precision", "bf16"], "trainer.precision=fp32, this run has bf16"),
    ],
)
def test_another_state_is_refused_in_one_plain_line(
    config_file: Path, options: list[str], message: str
) -> None:
    old, new = record(config_file), record(config_file, *options)
    with pytest.raises(CheckpointError, match=message) as raised:
        check_resumable(FOLDER, old, new, accept_changed_data=False)
    assert str(raised.value).endswith(f"start a new `run` with checkpoint.load={FOLDER}")


def test_a_run_of_before_there_was_a_choice_of_optimizers_goes_on(config_file: Path) -> None:
    old, new = record(config_file), record(config_file)
    del old.config["optimizer"]["kind"]
    check_resumable(FOLDER, old, new, accept_changed_data=False)


def test_another_rotary_base_is_for_a_new_run(
    config_file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor depends on it; a larger one for longer windows is the usual step between two stages."""
    monkeypatch.setattr(resume, "is_rank_zero", lambda: True)
    old, new = record(config_file), record(config_file, "--model.rotary_base", "8000000")
    with pytest.raises(CheckpointError, match=r"model\.rotary_base: 1000000 -> 8000000"):
        check_resumable(FOLDER, old, new, accept_changed_data=False)
    check_start(FOLDER, old, old)
    assert not caplog.records
    check_start(FOLDER, old, new)
    assert "model.rotary_base: 1000000 -> 8000000" in caplog.text
    wider = record(config_file, "--model.ffn_hidden_size", "192", "--model.rotary_base", "8000000")
    with pytest.raises(CheckpointError, match=r"another model \(model\.ffn_hidden_size: 128 -> 192\)"):
        check_start(FOLDER, old, wider)


def test_a_record_of_before_the_guard_was_in_it_is_read(config_file: Path, tmp_path: Path) -> None:
    fields = asdict(record(config_file))
    fields["format"] = 1
    fields["progress"] = {"step": 10, "windows": 40, "updates": 9, "skipped": 1}
    (tmp_path / "emu3.json").write_text(json.dumps(fields))
    progress = Record.read(tmp_path).progress
    assert (progress.step, progress.windows, progress.updates, progress.skipped) == (10, 40, 9, 1)
    assert progress.judged == progress.skipped_in_a_row == 0
