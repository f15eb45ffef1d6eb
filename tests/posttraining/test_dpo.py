"""The loss of pairs and its gradients against plain transformers and torch, and against TRL."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from emu3_megatron.conversion.checkpoints import export_checkpoint, save_weights
from emu3_megatron.conversion.configuration import architecture
from emu3_megatron.conversion.maps import LAYOUTS, WeightMap
from emu3_megatron.data import Mixture, Source
from emu3_megatron.data.loader import Batch
from emu3_megatron.grammar import Modality
from emu3_megatron.posttraining.preferences.config import DPOConfig
from emu3_megatron.posttraining.preferences.pairs import PairPlan, PairTemplate
from emu3_megatron.training.config import LossConfig, OptimizerConfig
from tests.inference import worlds
from tests.posttraining.pairs import Pair, draw_pairs, write_pairs

BOS, EOS = worlds.VOCABULARY.bos, worlds.VOCABULARY.eos
EVERY_CLASS = ["text", "vision", "meta", "break", "control"]


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with worlds.one_process():
        yield


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return draw_pairs(6)


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory, pairs: list[Pair]) -> list[Batch]:
    """Every pair once, several to a window, two windows to a micro-batch."""
    folder = write_pairs(tmp_path_factory.mktemp("pairs") / "pairs", pairs)
    mixture = Mixture([Source(path=str(folder), template=PairTemplate(alignment=4))])
    plan = PairPlan(mixture, seed=1, context_length=160, alignment=4, block_draws=len(pairs))
    windows = [plan.window(number) for number in range(plan.block(0).num_windows)]
    assert len(windows) > 2
    assert max(len(window.source) for window in windows) > 2  # more than one pair in a window
    return [Batch.collate(windows[first : first + 2]) for first in range(0, len(windows), 2)]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Policy and reference as transformers reads them."""
    import transformers

    folder = tmp_path_factory.mktemp("models")
    models = []
    for seed in (0, 1):
        from dataclasses import asdict

        model = worlds.tiny_model(seed=seed)
        config = {"model": asdict(model.model_config), "seed": 0, "trainer": {"precision": "fp32"}}
        run = folder / f"run-{seed}"
        vocabulary = worlds.VOCABULARY.to_dict()
        save_weights(model, run / "checkpoints" / "step-00000001", vocabulary, config)
        export_checkpoint(run, folder / f"hf-{seed}", layout="emu3", dialect="emu3")
        models.append(transformers.Emu3ForCausalLM.from_pretrained(folder / f"hf-{seed}"))
    return models


def their_log_probabilities(model: Any, caption: np.ndarray, answer: np.ndarray) -> torch.Tensor:
    """log p of every token of ``caption answer EOS`` after BOS."""
    ids = torch.tensor([[BOS, *caption, *answer, EOS]])
    logits = model(input_ids=ids).logits[0].to(next(model.parameters()).dtype)
    return F.log_softmax(logits[:-1], -1).gather(1, ids[0, 1:, None])[:, 0]


def token_classes(caption: np.ndarray, answer: np.ndarray) -> list[str]:
    """Names of the classes by the ids alone, as the grammar says."""
    v = worlds.VOCABULARY
    names = ["prompt"] * len(caption)
    for token in answer:
        if token >= v.vision_offset:
            names.append("vision")
        elif token in (v.eol, v.eof):
            names.append("break")
        elif token in (v.boi, v.img, v.eoi):
            names.append("control")
        else:
            names.append("meta")
    return [*names, "control"]


def expected_loss(models: list[Any], pairs: list[Pair], config: DPOConfig, loss: LossConfig) -> torch.Tensor:
    """The formula of arXiv 2305.18290 with its smoothed form, pair by pair, unpacked."""
    weight_of = {
        "prompt": loss.prompt_weight,
        "vision": loss.vision_weight,
        "break": loss.break_weight,
        "control": loss.control_weight,
        "meta": loss.meta_weight,
    }
    total, entropy, weights = torch.zeros(()), torch.zeros(()), 0.0
    for caption, *answers in pairs:
        ratios = []
        for place, answer in enumerate(answers):
            names = token_classes(caption, answer)
            counted = torch.tensor([float(name in config.counted) for name in names])
            policy = their_log_probabilities(models[0], caption, answer)
            with torch.no_grad():
                reference = their_log_probabilities(models[1], caption, answer)
            ratio = (counted * (policy - reference)).sum()
            ratios.append(ratio / counted.sum() if config.length_normalization else ratio)
            if place == 0:
                here = torch.tensor([weight_of[name] for name in names])
                entropy = entropy - (here * policy).sum()
                weights += float(here.sum())
        preferred = torch.sigmoid(config.beta * (ratios[0] - ratios[1]))
        smooth = config.label_smoothing
        total = total - (1 - smooth) * preferred.log() - smooth * (1 - preferred).log()
    return total / len(pairs) + config.cross_entropy_weight * entropy / weights


def our_step(batches: list[Batch], config: DPOConfig, loss: LossConfig):
    """Loss by name and gradients by their names, from a training step of ours with the reference online."""
    from emu3_megatron.posttraining.preferences.objective import DPO
    from emu3_megatron.posttraining.preferences.references import ReferenceModel
    from emu3_megatron.training.metrics import MetricsLayout
    from emu3_megatron.training.optimizer import wrap_for_data_parallelism
    from emu3_megatron.training.step import ForwardBackward, Groups

    model = worlds.tiny_model(seed=0).train()
    reference = ReferenceModel([worlds.tiny_model(seed=1)], ("pairs",), None, torch.device("cpu"))
    chunks = wrap_for_data_parallelism([model], OptimizerConfig(use_distributed_optimizer=False))
    objective = DPO(config, loss, reference, Groups.current())
    layout = MetricsLayout(("pairs",), objective.quantities)
    run = ForwardBackward(chunks, objective, layout, device=torch.device("cpu"))
    totals = layout.totals(layout.vector(*run(batches)))
    ours = {name: parameter.main_grad for name, parameter in model.named_parameters()}
    sizes = architecture(model.model_config, worlds.VOCABULARY)
    gradients = dict(WeightMap(sizes, LAYOUTS["emu3"]).to_hugging_face(ours))
    return objective.value(totals), objective.named(totals), gradients


CASES = {
    "defaults": DPOConfig(),
    "weak tie, no cross entropy": DPOConfig(beta=0.02, cross_entropy_weight=0.0),
    "smoothed": DPOConfig(beta=0.02, label_smoothing=0.2, cross_entropy_weight=0.3),
    "means over every class": DPOConfig(
        beta=2.0, length_normalization=True, counted=EVERY_CLASS, cross_entropy_weight=0.5
    ),
}
LOSSES = {
    "codes only": LossConfig(
        text_weight=0, vision_weight=1, meta_weight=0, break_weight=0, control_weight=0, chunk_size=7
    ),
    "every class and the prompt": LossConfig(prompt_weight=0.25),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_plain_transformers(
    pairs: list[Pair], batches: list[Batch], theirs: list[Any], case: str, loss: str
) -> None:
    models = [copy.deepcopy(model).double() for model in theirs]
    expected = expected_loss(models, pairs, CASES[case], LOSSES[loss])
    expected.backward()
    value, _, gradients = our_step(batches, CASES[case], LOSSES[loss])
    assert value == pytest.approx(expected.item(), rel=1e-5)
    want = {name: parameter.grad for name, parameter in models[0].named_parameters()}
    assert gradients.keys() == want.keys()
    for name, gradient in gradients.items():
        norm = want[name].norm().item()
        assert (gradient.double() - want[name]).norm().item() <= 1e-5 * norm, name


def test_what_is_reported(pairs: list[Pair], batches: list[Batch], theirs: list[Any]) -> None:
    config = DPOConfig(beta=0.5)
    _, named, _ = our_step(batches, config, LossConfig())
    rewards = torch.zeros(len(pairs), 2)
    log_p = torch.zeros(len(pairs), 2)
    for number, (caption, *answers) in enumerate(pairs):
        for place, answer in enumerate(answers):
            counted = torch.tensor([name == "vision" for name in token_classes(caption, answer)])
            with torch.no_grad():
                policy, reference = (
                    their_log_probabilities(m, caption, answer)[counted].sum() for m in theirs
                )
            log_p[number, place], rewards[number, place] = policy, 0.5 * (policy - reference)
    chosen, rejected = rewards.mean(0).tolist()
    assert named["pairs"] == len(pairs)
    assert named["reward_chosen"] == pytest.approx(chosen, rel=1e-4)
    assert named["reward_rejected"] == pytest.approx(rejected, rel=1e-4)
    assert named["margin"] == pytest.approx(chosen - rejected, rel=1e-4)
    assert named["preferred"] == pytest.approx((rewards[:, 0] > rewards[:, 1]).float().mean().item())
    assert named["log_probability_chosen"] == pytest.approx(log_p[:, 0].mean().item(), rel=1e-5)


def test_a_model_that_is_its_own_reference_scores_a_half(batches: list[Batch]) -> None:
    from emu3_megatron.posttraining.preferences.objective import Answers, pair_losses

    policy = torch.randn(8, dtype=torch.float64)
    losses, rewards = pair_losses(policy, policy.clone(), beta=0.3, label_smoothing=0.1)
    assert torch.equal(rewards, torch.zeros(4, 2, dtype=torch.float64))
    torch.testing.assert_close(losses, torch.full((4,), math.log(2), dtype=torch.float64))
    assert sum(Answers.of(batch).count for batch in batches) == 12


@pytest.mark.parametrize("kind", ["sigmoid", "sigmoid_norm"])
def test_the_loss_is_that_of_trl(
    pairs: list[Pair], batches: list[Batch], theirs: list[Any], kind: str, tmp_path: Path
) -> None:
    """Of `DPOTrainer` on the same pairs, as token ids: its loss, and the gradients it gives."""
    trl = pytest.importorskip("trl")  # not on Python 3.10
    import datasets
    import tokenizers
    import transformers

    class StoredTokens(trl.DPOTrainer):
        """Pairs are token ids already."""

        def _prepare_dataset(self, dataset, *rest):
            return dataset

    words = {f"<{number}>": number for number in range(worlds.VOCABULARY.size)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<0>")),
        pad_token=f"<{worlds.VOCABULARY.pad}>",
        eos_token=f"<{EOS}>",
    )
    rows = [
        {
            "prompt_ids": [BOS, *caption.tolist()],
            "chosen_ids": [*chosen.tolist(), EOS],
            "rejected_ids": [*rejected.tolist(), EOS],
        }
        for caption, chosen, rejected in pairs
    ]
    policy, reference = (copy.deepcopy(model) for model in theirs)
    trainer = StoredTokens(
        model=policy,
        ref_model=reference,
        args=trl.DPOConfig(
            output_dir=str(tmp_path),
            beta=0.05,
            loss_type=[kind],
            max_length=None,
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_dropout=True,
            gradient_checkpointing=False,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    expected = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    expected.backward()
    config = DPOConfig(
        beta=0.05,
        counted=EVERY_CLASS,
        cross_entropy_weight=0.0,
        length_normalization=kind == "sigmoid_norm",
    )
    value, _, gradients = our_step(batches, config, LossConfig())
    assert value == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in trainer.model.named_parameters():
        norm = parameter.grad.norm().item()
        assert (gradients[name] - parameter.grad).norm().item() <= 2e-5 * norm, name


def test_the_prompt_is_marked_and_pairs_stand_side_by_side(pairs: list[Pair], batches: list[Batch]) -> None:
    seen = []
    for batch in batches:
        borders = batch.cu_seqlens.tolist()
        real = [place for place, source in enumerate(batch.source.tolist()) if source >= 0]
        for chosen, rejected in zip(real[::2], real[1::2], strict=True):
            assert batch.document[chosen] == batch.document[rejected]
            assert borders[chosen + 1] == borders[rejected]
            number = int(batch.document[chosen])
            seen.append(number)
            for place, answer in zip((chosen, rejected), pairs[number][1:], strict=True):
                caption = pairs[number][0]
                begin, length = borders[place], 2 + len(caption) + len(answer)
                tokens = batch.tokens[0, begin : begin + length].tolist()
                assert tokens == [BOS, *caption, *answer, EOS]
                modality = batch.modality[0, begin : borders[place + 1]].tolist()
                names = [Modality(value).name.lower() for value in modality]
                padding = ["padding"] * (len(names) - length + 1)
                assert names == [*token_classes(caption, answer), *padding]
    assert sorted(seen) == list(range(len(pairs)))
