from pathlib import Path

import pytest

from emu3_megatron.errors import UserError
from emu3_megatron.samples.quickstart.runner import StageRunner


def stages(folder: Path, log: list[str], first: str = "a", fail: bool = False) -> StageRunner:
    def second() -> None:
        if fail:
            raise UserError("no")
        log.append("second")

    runner = StageRunner(folder, {})
    runner.run("first", first, lambda: log.append("first"))
    runner.run("second", "b", second)
    return runner


def test_finished_stages_are_skipped_and_keep_their_seconds(tmp_path: Path) -> None:
    log: list[str] = []
    before = stages(tmp_path, log).seconds
    after = stages(tmp_path, log).seconds
    assert log == ["first", "second"]
    assert before == after


def test_a_changed_stage_runs_again_with_all_after_it(tmp_path: Path) -> None:
    log: list[str] = []
    stages(tmp_path, log)
    stages(tmp_path, log, first="other")
    assert log == ["first", "second", "first", "second"]


def test_a_failed_stage_runs_again(tmp_path: Path) -> None:
    log: list[str] = []
    with pytest.raises(UserError):
        stages(tmp_path, log, fail=True)
    stages(tmp_path, log)
    assert log == ["first", "second"]


def test_a_failing_command_is_named(tmp_path: Path) -> None:
    runner = StageRunner(tmp_path, {})
    with pytest.raises(UserError, match=r"'both' failed with exit code 3"):
        runner.run_commands("both", [["python", "-c", "pass"], ["python", "-c", "raise SystemExit(3)"]])


def test_commands_and_configs_describe_a_stage(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    out = tmp_path / "out"
    command = ["python", "-c", f"open({str(out)!r}, 'a').write('x')"]
    for text in ("one", "one", "two"):
        config.write_text(text)
        StageRunner(tmp_path, {}).run_commands("write", [command], [config])
    assert out.read_text() == "xx"


@pytest.mark.parametrize(("second", "left"), [("one", "xx"), ("two", "x")])
def test_an_interrupted_stage_goes_on_and_a_changed_one_starts_from_nothing(
    tmp_path: Path, second: str, left: str
) -> None:
    output = tmp_path / "output"
    output.mkdir()

    def write(fail: bool) -> None:
        output.mkdir(exist_ok=True)
        with (output / "log").open("a") as stream:
            stream.write("x")
        if fail:
            raise UserError("interrupted")

    with pytest.raises(UserError):
        StageRunner(tmp_path, {}).run("stage", "one", lambda: write(True), [output])
    StageRunner(tmp_path, {}).run("stage", second, lambda: write(False), [output])
    assert (output / "log").read_text() == left
