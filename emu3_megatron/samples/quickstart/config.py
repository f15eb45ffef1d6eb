"""What the quickstart, and its longer sibling the sample-world proof, are told."""

from __future__ import annotations

from dataclasses import dataclass, field

from emu3_megatron.errors import UserError


@dataclass(kw_only=True)
class CorpusSection:
    """The corpus to draw."""

    world: str = "quickstart"
    """Preset of the sample world: `quickstart` (larger shapes, fewer backgrounds) or `full`."""
    train_images: int = 6000
    """Pictures of the train split."""
    train_videos: int = 1500
    """Clips of the train split."""
    train_texts: int = 500
    """Pure text documents."""
    held_out_images: int = 256
    """Pictures of combinations that training never shows."""
    held_out_videos: int = 64
    """Clips of combinations that training never shows."""
    chinese: float = 0.25
    """Share of Chinese captions, 0..1."""
    wordings: int = 1
    """Wordings of a caption in each language."""
    seed: int = 0
    """Scenes and captions follow from it."""


@dataclass(kw_only=True)
class EvaluationSection:
    """What is generated and checked."""

    prompts: int = 256
    """Captions of held-out pictures that become prompts."""
    captions: int = 256
    """Held-out pictures that are captioned."""
    continuations: int = 64
    """Held-out clips whose second half is predicted."""
    clips: int = 16
    """Held-out clips' captions that become clips; shown and not counted."""
    temperature: float = 0.7
    """Sampling temperature of vision tokens."""
    top_k: int = 20
    """Vision tokens that sampling chooses among."""
    guidance: float = 1.0
    """Scale of classifier-free guidance for pictures and clips; 1 is off."""
    seed: int = 0
    """Of all samples."""


@dataclass(kw_only=True)
class QuickstartConfig:
    """One run of the whole path."""

    run: str = "runs/quickstart"
    """Folder of everything the run makes."""
    title: str = "emu3-megatron quickstart"
    """Heading of the report."""
    processes: int = 2
    """Processes that draw, tokenize and train, each with one thread."""
    corpus: CorpusSection = field(default_factory=CorpusSection)
    """The corpus."""
    vision: str = "examples/configs/quickstart/vision.yaml"
    """Configuration of the vision tokenizer's training."""
    text_pieces: int = 512
    """Upper bound of the SentencePiece model's ids."""
    shards: int = 4
    """Shards of each dataset."""
    training: str = "examples/configs/quickstart/training.yaml"
    """Configuration of the model's training; the run sets its sources `images`, `videos` and `texts`."""
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    """Samples and their check."""

    def __post_init__(self) -> None:
        """Check counts."""
        if self.processes < 1:
            raise UserError(f"processes={self.processes} must be at least 1")
        for asked, name in (
            ("prompts", "held_out_images"),
            ("captions", "held_out_images"),
            ("continuations", "held_out_videos"),
            ("clips", "held_out_videos"),
        ):
            wanted, available = getattr(self.evaluation, asked), getattr(self.corpus, name)
            if not 1 <= wanted <= available:
                raise UserError(f"evaluation.{asked}={wanted} must be 1 to corpus.{name}={available}")
