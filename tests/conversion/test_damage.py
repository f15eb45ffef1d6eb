"""Damaged input of every kind is refused with the file or tensor named, and leaves nothing that loads."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from emu3_megatron.conversion import ConversionError, ExportedModel, distributed, export_hugging_face
from emu3_megatron.conversion.checkpoints import export_checkpoint, import_checkpoint, save_weights
from emu3_megatron.conversion.publish import publish_folder
from emu3_megatron.errors import UserError
from emu3_megatron.training import checkpoint_metadata
from emu3_megatron.training.checkpoint import load_model_for_inference
from emu3_megatron.training.checkpoint_files import CheckpointError
from emu3_megatron.training.checkpoint_metadata import read_metadata
from tests.inference import worlds

QUERY = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with worlds.one_process():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the released layout, in two shards."""
    folder = tmp_path_factory.mktemp("whole") / "hf"
    model = worlds.tiny_model()
    about = ExportedModel(config=model.model_config, vocabulary=worlds.VOCABULARY)
    export_hugging_face(folder, model.state_dict(), about, layout="emu3")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:10], "b.safetensors": names[10:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    write_index(folder, {name: file for file, part in parts.items() for name in part})
    return folder


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def edit_index(folder: Path, name: str, file: str) -> None:
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    write_index(folder, {**weight_map, name: file})


def edit_shard(folder: Path, name: str, change: Callable[[Tensors], None]) -> None:
    """Change the shard that holds tensor `name`, and the index with it."""
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    file = weight_map[name]
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)
    others = {key: shard for key, shard in weight_map.items() if shard != file}
    write_index(folder, {**others, **dict.fromkeys(tensors, file)})


def edit_config(folder: Path, file: str = "config.json", **values: object) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def truncate(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


def header_length(path: Path, change: int) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    path.write_bytes(struct.pack("<Q", length + change) + data[8:])


def header_type(path: Path) -> None:
    """Call the first tensor's elements twice as wide as they are."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].replace(b'"F32"', b'"F64"', 1)
    path.write_bytes(data[:8] + header + data[8 + length :])


def spoil(value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[QUERY][3, 5] = value

    return change


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing shard": (lambda f: (f / "b.safetensors").unlink(), r"b\.safetensors.*missing"),
    "truncated shard": (lambda f: truncate(f / "b.safetensors", 100), r"b\.safetensors is damaged"),
    "empty shard": (lambda f: (f / "b.safetensors").write_bytes(b""), r"b\.safetensors is damaged"),
    "trailing bytes": (
        lambda f: (f / "a.safetensors").write_bytes((f / "a.safetensors").read_bytes() + b"xx"),
        r"a\.safetensors is damaged",
    ),
    "longer header": (lambda f: header_length(f / "a.safetensors", 8), r"a\.safetensors is damaged"),
    "shorter header": (lambda f: header_length(f / "a.safetensors", -8), r"a\.safetensors is damaged"),
    "endless header": (lambda f: header_length(f / "a.safetensors", 1 << 40), r"a\.safetensors is damaged"),
    "header of another type": (lambda f: header_type(f / "a.safetensors"), r"a\.safetensors is damaged"),
    "whole numbers": (
        lambda f: edit_shard(f, QUERY, lambda t: t.update({QUERY: t[QUERY].int()})),
        rf"{QUERY} is int32",
    ),
    "mixed types": (
        lambda f: edit_shard(f, QUERY, lambda t: t.update({QUERY: t[QUERY].half()})),
        rf"{QUERY} is float16.*--dtype",
    ),
    "extra tensor": (
        lambda f: edit_shard(f, QUERY, lambda t: t.update(surplus=torch.zeros(2))),
        "unexpected surplus",
    ),
    "missing tensor": (lambda f: edit_shard(f, NORM, lambda t: t.pop(NORM)), f"missing {NORM}"),
    "mis-shaped tensor": (
        lambda f: edit_shard(f, QUERY, lambda t: t.update({QUERY: t[QUERY][:, :7].contiguous()})),
        rf"{QUERY} has shape \[32, 7\], expected \[32, 32\]",
    ),
    "NaN": (lambda f: edit_shard(f, QUERY, spoil(float("nan"))), r"linear_qkv\.weight has 1 NaN of 2048"),
    "infinity": (lambda f: edit_shard(f, QUERY, spoil(-float("inf"))), "linear_qkv.weight has 1 infinite"),
    "index into a file that is not there": (
        lambda f: edit_index(f, "x", "c.safetensors"),
        r"c\.safetens.*missing",
    ),
    "index out of the folder": (lambda f: edit_index(f, "x", "../b.safetensors"), "not a plain file name"),
    "index to an absolute path": (lambda f: edit_index(f, "x", "/etc/passwd"), "not a plain file name"),
    "index into another shard": (
        lambda f: edit_index(f, NORM, "a.safetensors" if NORM > QUERY else "b.safetensors"),
        "does not match its files",
    ),
    "index that is no JSON": (
        lambda f: (f / "model.safetensors.index.json").write_text("{"),
        r"index\.json is not an index",
    ),
    "no weights": (
        lambda f: [path.unlink() for path in f.glob("*.safetensors*")],  # type: ignore[return-value, arg-type]
        "holds neither",
    ),
    "config that is no JSON": (lambda f: (f / "config.json").write_text("]"), r"config\.json is not JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
    "config without sizes": (
        lambda f: (f / "config.json").write_text("{}"),
        r"config\.json lacks 'num_attention_heads'",
    ),
    "config of more layers": (
        lambda f: edit_config(f, num_hidden_layers=3),
        "num_layers is 3 in config.json",
    ),
    "config of another width": (
        lambda f: ((f / "emu3_megatron.json").unlink(), edit_config(f, intermediate_size=64)),  # type: ignore[return-value]
        r"gate_proj\.weight has shape \[48, 32\], expected \[64, 32\]",
    ),
    "config of nonsense": (
        lambda f: edit_config(f, hidden_size="wide"),
        r"config\.json does not describe a model",
    ),
    "config of another vocabulary": (
        lambda f: ((f / "emu3_megatron.json").unlink(), edit_config(f, vocab_size=500)),  # type: ignore[return-value]
        r"embed_tokens\.weight has shape",
    ),
    "biases": (lambda f: edit_config(f, mlp_bias=True), "mlp_bias=True is not supported"),
    "our file without a model": (
        lambda f: edit_config(f, "emu3_megatron.json", model={"surplus": 1}),
        r"emu3_megatron\.json does not describe a model",
    ),
}
"""What is done to a whole folder, and what the refusal says."""


class Touch:
    """Unpickled without care, makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_folders_are_refused(whole: Path, tmp_path: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    shutil.copytree(whole, tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises((ConversionError, UserError), match=message):
        import_checkpoint(tmp_path / "hf", tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_whole_folder_is_not(whole: Path, tmp_path: Path) -> None:
    assert import_checkpoint(whole, tmp_path / "run").is_dir()


def test_pickled_weights_need_leave_and_hold_tensors_only(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "hf")
    tensors: Tensors = {}
    for path in (tmp_path / "hf").glob("*.safetensors"):
        tensors.update(load_file(path))
        path.unlink()
    (tmp_path / "hf" / "model.safetensors.index.json").unlink()
    torch.save(tensors, tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(ConversionError, match="--allow-pickle"):
        import_checkpoint(tmp_path / "hf", tmp_path / "run")
    import_checkpoint(tmp_path / "hf", tmp_path / "run", allow_pickle=True)
    export_checkpoint(tmp_path / "run", tmp_path / "back", layout="emu3")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    torch.save({**tensors, "x": Touch(tmp_path / "touched")}, tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin is damaged, or holds more than tensors"):
        import_checkpoint(tmp_path / "hf", tmp_path / "again", allow_pickle=True)
    assert not (tmp_path / "touched").exists()


def test_the_metadata_of_a_checkpoint_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged or not to be trusted"):
        read_metadata(tmp_path)
    assert not (tmp_path / "touched").exists()


def save_run(folder: Path) -> Path:
    """A run with one checkpoint of the small model."""
    model = worlds.tiny_model()
    config = {"model": asdict(model.model_config), "seed": 0, "trainer": {"precision": "fp32"}}
    checkpoint = folder / "checkpoints" / "step-00000001"
    save_weights(model, checkpoint, worlds.VOCABULARY.to_dict(), config)
    return checkpoint


def test_the_states_of_a_checkpoint_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core would unpickle them as training or generation loads the checkpoint."""
    touched = tmp_path / "touched"
    monkeypatch.setattr(distributed, "EMPTY", [Touch(touched)])
    save_run(tmp_path / "code")
    monkeypatch.setattr(distributed, "EMPTY", [torch.ones(8, dtype=torch.uint8)])
    save_run(tmp_path / "bytes")
    with pytest.raises(CheckpointError, match=r"_extra_state/shard_0_2 is damaged or not to be trusted"):
        load_model_for_inference(tmp_path / "code")
    with pytest.raises(CheckpointError, match=r"a state that Transformer Engine would unpickle"):
        load_model_for_inference(tmp_path / "bytes")
    assert not touched.exists()
    monkeypatch.setattr(checkpoint_metadata, "refuse_code", lambda folder: None)
    load_model_for_inference(tmp_path / "code")
    assert touched.exists(), "megatron-core no longer unpickles states: the check is not needed any more"


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "run")
    (path,) = (p for p in folder.glob("*.distcp") if p.stat().st_size > 100_000)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{path.name}: CRC-32C"):
        export_checkpoint(tmp_path / "run", tmp_path / "hf", layout="emu3")
    with pytest.raises(CheckpointError, match=rf"{path.name}: CRC-32C"):
        load_model_for_inference(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{path.name}: missing"):
        export_checkpoint(tmp_path / "run", tmp_path / "hf", layout="emu3")
    assert [item.name for item in tmp_path.iterdir()] == ["run"]


def test_a_failed_swap_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    target = tmp_path / "target"
    target.mkdir()
    (target / "old").touch()
    rename = os.rename

    def fail(source: object, destination: object) -> None:
        if str(source).endswith(".tmp"):
            raise OSError("no")
        rename(source, destination)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="no"), publish_folder(target, overwrite=True) as unfinished:
        (unfinished / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert [path.name for path in target.iterdir()] == ["old"]


def test_what_a_killed_conversion_left_goes_with_the_next(tmp_path: Path) -> None:
    (tmp_path / ".target.0123456789ab.tmp").mkdir()
    with publish_folder(tmp_path / "target") as unfinished, publish_folder(tmp_path / "other"):
        (unfinished / "file").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "target"]
