"""Conversions killed at any moment leave what was there, or the whole result; the next starts cleanly."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from emu3_megatron.conversion import ExportedModel, export_hugging_face, open_hugging_face
from emu3_megatron.conversion.checkpoints import export_checkpoint, import_checkpoint
from emu3_megatron.conversion.compare import compare
from emu3_megatron.conversion.publish import publish_folder
from emu3_megatron.conversion.rules import ConversionError
from emu3_megatron.errors import UserError
from emu3_megatron.training.checkpoint_files import CheckpointError, resolve
from tests.inference import worlds

KILLS = 12


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with worlds.one_process():
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Hugging Face folder to import, and the run of its import to export."""
    folder = tmp_path_factory.mktemp("sources")
    model = worlds.tiny_model()
    about = ExportedModel(config=model.model_config, vocabulary=worlds.VOCABULARY)
    export_hugging_face(folder / "hf", model.state_dict(), about, layout="emu3")
    import_checkpoint(folder / "hf", folder / "run")
    return {"import": folder / "hf", "export": folder / "run"}


def convert(way: str, source: Path, target: Path) -> None:
    if way == "import":
        import_checkpoint(source, target, overwrite=True)
    else:
        export_checkpoint(source, target, layout="emu3", overwrite=True)


def killed(work: Callable[[], None], after: float | None = None) -> int:
    """Do it in a process of its own; its exit code, negative for a signal. Killed `after` seconds if told."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    if after is not None:
        time.sleep(after)
        process.kill()
    process.join()
    return int(process.exitcode or 0)


@pytest.mark.parametrize("way", ["import", "export"])
def test_killed_at_any_moment(sources: dict[str, Path], tmp_path: Path, way: str) -> None:
    source, target = sources[way], tmp_path / "target"
    start = time.monotonic()
    assert killed(lambda: convert(way, source, target)) == 0
    seconds = time.monotonic() - start
    shutil.rmtree(target)
    moments = random.Random(0)
    unfinished = 0
    for _ in range(KILLS):
        killed(lambda: convert(way, source, target), after=moments.uniform(0, 1.1 * seconds))
        if target.exists():  # it had finished
            assert compare(source, target).tensors
            shutil.rmtree(target)
        for left in tmp_path.iterdir():
            unfinished += 1
            assert left.name.startswith(".target.")
            assert left.name.endswith(".tmp")
    convert(way, source, target)
    assert compare(source, target).tensors
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    print(f"{way}: {unfinished} of {KILLS} kills left an unfinished folder")


@pytest.mark.parametrize(("way", "files"), [("import", 1), ("import", 4), ("export", 1), ("export", 3)])
def test_unfinished_folders_do_not_load(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, files: int
) -> None:
    """Killed as one of the first files is made, and the remains given to a loader by their name."""
    target = tmp_path / "target"

    def work() -> None:
        import builtins

        opened, made = builtins.open, 0

        def count(path: object, mode: str = "r", *rest: object, **named: object) -> object:
            nonlocal made
            made += "w" in mode and str(path).startswith(str(tmp_path))
            if made > files:
                os.kill(os.getpid(), signal.SIGKILL)
            return opened(path, mode, *rest, **named)  # type: ignore[call-overload]

        monkeypatch.setattr(builtins, "open", count)
        convert(way, sources[way], target)

    assert killed(work) == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    with pytest.raises((CheckpointError, ConversionError)):
        resolve(left) if way == "import" else open_hugging_face(left)


def test_killed_between_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there is back with the next conversion."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").touch()
    rename = os.rename

    def work() -> None:
        def die(source: Path, destination: Path) -> None:
            if destination == target:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, destination)

        monkeypatch.setattr(os, "rename", die)
        with publish_folder(target, overwrite=True):
            pass

    assert killed(work) == -signal.SIGKILL
    assert not target.exists()
    with pytest.raises(UserError, match="--overwrite"), publish_folder(target):
        pass
    assert (target / "old").exists()
    with publish_folder(target, overwrite=True) as unfinished:
        (unfinished / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert [path.name for path in target.iterdir()] == ["new"]
