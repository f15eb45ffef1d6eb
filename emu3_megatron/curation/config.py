"""What a curation job is told: which stages, and their thresholds.

A field marked *score* goes into the fingerprint of its stage's scores: changing it computes them anew. All
other fields are thresholds: changing one decides again from the scores that are there.

The paper (arXiv 2409.18869, section 2.1) gives 512 x 512 pixels, the aesthetic thresholds 5.5 (images) and 5
(video) and the 2 FPS and 256 pixels of the text detection; all other defaults are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from emu3_megatron.errors import UserError

VIDEO_STAGES = ("probe", "scenes", "text_coverage", "motion", "quality", "duplicates")
"""Stages for video, in the order that costs least."""

IMAGE_STAGES = ("probe", "type", "quality", "readmission", "duplicates")
"""Stages for images."""

TEXT_STAGES = ("length", "language", "repetition", "exact_duplicates", "near_duplicates")
"""Stages for plain text."""

SCENE_DETECTORS = ("pyscenedetect", "transnetv2")
"""What finds scenes: PySceneDetect's content and threshold detectors together, or the TransNetV2 network."""


def _in_range(name: str, low: float, high: float) -> None:
    """Refuse an empty range."""
    if not low <= high:
        raise UserError(f"{name}: the lower limit {low} is above the upper limit {high}")


@dataclass(frozen=True, kw_only=True)
class SizeConfig:
    """Limits on the picture."""

    min_width: int = 512
    """Pixels across, upright (images: paper)."""
    min_height: int = 512
    """Pixels down, upright."""
    max_aspect_ratio: float = 5.0
    """Longer side over shorter side; Emu3's image processor refuses more."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(SizeConfig):
    """Limits on a video file."""

    min_width: int = 256
    """Pixels across, upright."""
    min_height: int = 256
    """Pixels down, upright."""
    min_seconds: float = 1.0
    """Shorter videos are dropped."""
    min_fps: float = 8.0
    """Slower videos are dropped: slide shows, surveillance."""


@dataclass(frozen=True, kw_only=True)
class SceneConfig:
    """How a video is split into clips."""

    detector: str = "pyscenedetect"
    """``pyscenedetect`` or ``transnetv2`` (*score*)."""
    content_threshold: float = 27.0
    """ContentDetector: change between neighbouring frames in HSV, 0 to 255 (PySceneDetect's default)."""
    fade_threshold: int = 12
    """ThresholdDetector: average level, 0 to 255, under which a frame is black (PySceneDetect's default)."""
    transnet_threshold: float = 0.5
    """TransNetV2: probability of a transition."""
    min_scene_seconds: float = 0.6
    """Cuts closer than this count as one event (a flash); PySceneDetect's default."""
    min_clip_seconds: float = 2.0
    """Shorter clips are dropped."""
    max_clip_seconds: float = 20.0
    """Longer scenes are cut into equal clips no longer than this."""
    margin_seconds: float = 0.0
    """Cut away at both ends of a scene that touch a transition, for soft ones."""

    def __post_init__(self) -> None:
        """Check the values."""
        if self.detector not in SCENE_DETECTORS:
            raise UserError(f"scenes.detector={self.detector!r} is not one of {', '.join(SCENE_DETECTORS)}")
        if not self.max_clip_seconds > 0:
            raise UserError(f"scenes.max_clip_seconds={self.max_clip_seconds} must be positive")
        _in_range("scenes.min_clip_seconds, max_clip_seconds", self.min_clip_seconds, self.max_clip_seconds)


@dataclass(frozen=True, kw_only=True)
class TextCoverageConfig:
    """How much of the frames text may cover."""

    fps: float = 2.0
    """Frames looked at per second (*score*; paper)."""
    shorter_edge: int = 256
    """Pixels of a frame's shorter edge, as seen by the detector (*score*; paper)."""
    max_frames: int = 40
    """At most this many frames of a clip, evenly spread (*score*)."""
    max_coverage: float = 0.05
    """Share of the picture inside text boxes, mean over the frames."""

    def __post_init__(self) -> None:
        """Check the values."""
        if not (self.fps > 0 and self.shorter_edge >= 32 and self.max_frames >= 1):
            raise UserError("text_coverage: fps must be positive, shorter_edge >= 32, max_frames >= 1")


@dataclass(frozen=True, kw_only=True)
class MotionConfig:
    """How much the picture may move."""

    fps: float = 12.0
    """Rate at which frames are compared; a slower stream's own frames (*score*)."""
    width: int = 320
    """Pixels across of the frames compared (*score*)."""
    max_pairs: int = 12
    """Pairs of frames compared, evenly spread over the clip (*score*)."""
    model: Path | None = None
    """RAFT as ONNX or TorchScript: two float32 ``[1, 3, H, W]`` in 0..255 to flow ``[1, 2, H, W]``; OpenCV's
    DIS where None (*score*)."""
    min_motion: float = 0.002
    """Mean flow over the shorter edge, per compared pair; less is a still picture."""
    max_motion: float = 0.1
    """The same; more is shake, or flow that cannot be trusted."""

    def __post_init__(self) -> None:
        """Check the values."""
        if not (self.fps > 0 and self.width >= 64 and self.max_pairs >= 1):
            raise UserError("motion: fps must be positive, width >= 64, max_pairs >= 1")
        _in_range("motion.min_motion, max_motion", self.min_motion, self.max_motion)


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """The quality score and its threshold."""

    threshold: float | None = None
    """Least score. None: 5.5 (images) or 5.0 (video) for the aesthetic model (paper), 4.0 for the
    no-reference score, whose scale is another."""
    model: Path | None = None
    """Folder of a CLIP model (Hugging Face), or ONNX file; the no-reference score where None (*score*)."""
    head: Path | None = None
    """Weights of the aesthetic head on the model's normalised features; None where `model` is an ONNX file
    that gives the score itself (*score*)."""
    device: str = "cpu"
    """Where the model runs, as torch names it."""


@dataclass(frozen=True, kw_only=True)
class TypeConfig:
    """The kind of picture."""

    model: Path | None = None
    """Folder of an image classifier (Hugging Face) whose labels are the types; heuristics where None
    (*score*)."""
    drop: tuple[str, ...] = ("screenshot", "text_page")
    """Types to drop, of photograph, drawing, chart, text_page, screenshot."""
    device: str = "cpu"
    """Where the model runs, as torch names it."""


@dataclass(frozen=True, kw_only=True)
class ReadmissionConfig:
    """Which images below the quality threshold are kept all the same (paper: colourful, little text)."""

    max_coverage: float = 0.02
    """Share of the picture inside text boxes."""
    min_colourfulness: float = 15.0
    """Hasler and Suesstrunk's measure, 0 (grey) to about 110."""
    min_score: float = 2.0
    """Quality below which nothing is re-admitted."""
    shorter_edge: int = 256
    """Pixels of the picture's shorter edge, as seen by the text detector (*score*)."""


@dataclass(frozen=True, kw_only=True)
class DuplicatesConfig:
    """Near-duplicates by perceptual hash; the best in quality stays, of equals the first in the manifest."""

    max_distance: int = 4
    """Differing bits, of 64, up to which two pictures are the same; for clips, of each of 3 frames."""

    def __post_init__(self) -> None:
        """Check the values."""
        if not 0 <= self.max_distance <= 15:
            raise UserError(f"duplicates.max_distance={self.max_distance} must lie in 0..15")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Filters of plain text."""

    stages: tuple[str, ...] = TEXT_STAGES
    """Stages, in order."""
    min_characters: int = 50
    """Shorter documents are dropped."""
    max_characters: int = 1_000_000
    """Longer documents are dropped."""
    languages: tuple[str, ...] = ("en", "zh")
    """ISO 639-1 codes to keep; empty keeps all."""
    min_language_probability: float = 0.6
    """Certainty of the language."""
    max_duplicate_lines: float = 0.3
    """Share of the characters that are in lines seen before in the document (Gopher's rules)."""
    max_duplicate_ngrams: float = 0.25
    """Share of the characters inside repeated shingles of 10 words, or 20 characters of Chinese."""
    max_top_ngram: float = 0.2
    """Share of the characters taken by the commonest shingle of 2 words, or 4 characters of Chinese."""
    shingle_words: int = 5
    """Words in a shingle of a text with spaces (*score*)."""
    shingle_characters: int = 5
    """Characters in a shingle of Chinese, Japanese and other text without spaces (*score*)."""
    permutations: int = 128
    """Length of a MinHash signature (*score*)."""
    min_similarity: float = 0.8
    """Estimated Jaccard similarity from which two documents are the same."""

    def __post_init__(self) -> None:
        """Check the values."""
        _check_stages("text", self.stages, TEXT_STAGES)
        _in_range("text.min_characters, max_characters", self.min_characters, self.max_characters)
        if not 0 < self.min_similarity <= 1:
            raise UserError(f"text.min_similarity={self.min_similarity} must lie above 0, up to 1")


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """Filters of images."""

    stages: tuple[str, ...] = IMAGE_STAGES
    """Stages, in order."""
    probe: SizeConfig = field(default_factory=SizeConfig)
    """Size and shape."""
    type: TypeConfig = field(default_factory=TypeConfig)
    """Kind of picture."""
    quality: QualityConfig = field(default_factory=QualityConfig)
    """Quality score."""
    readmission: ReadmissionConfig = field(default_factory=ReadmissionConfig)
    """What is kept in spite of it."""
    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    """Near-duplicates."""

    def __post_init__(self) -> None:
        """Check the values."""
        _check_stages("image", self.stages, IMAGE_STAGES)


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """Filters of video."""

    stages: tuple[str, ...] = VIDEO_STAGES
    """Stages, in order."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """Size, shape, duration, rate."""
    scenes: SceneConfig = field(default_factory=SceneConfig)
    """Split into clips."""
    text_coverage: TextCoverageConfig = field(default_factory=TextCoverageConfig)
    """Text in the picture."""
    motion: MotionConfig = field(default_factory=MotionConfig)
    """Optical flow."""
    quality: QualityConfig = field(default_factory=QualityConfig)
    """Quality of 3 frames, the least counting."""
    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    """Near-duplicates."""
    write_clips: bool = True
    """Write every kept clip that is a part of its video into its own MP4 file; else the manifest only states
    ``start`` and ``end``, in seconds."""

    def __post_init__(self) -> None:
        """Check the values."""
        _check_stages("video", self.stages, VIDEO_STAGES)


@dataclass(frozen=True, kw_only=True)
class ContaminationConfig:
    """Evaluation data that training data should not contain."""

    prompts: tuple[Path, ...] = ()
    """Text files (a prompt a line) or JSON Lines (keys ``prompt``, ``text`` or ``caption``)."""
    images: tuple[Path, ...] = ()
    """Image files, or folders of them."""
    words: int = 8
    """Words of a shared run that count as contamination; a shorter prompt must be contained whole."""
    characters: int = 12
    """The same for Chinese and other text without spaces, in characters."""
    max_distance: int = 4
    """Differing bits, of 64, of perceptual hashes up to which two pictures are the same."""
    drop: bool = False
    """Drop what is found; else only report it."""


@dataclass(frozen=True, kw_only=True)
class CurationConfig:
    """Settings of a job. Raises `UserError` on construction where a value is out of range."""

    manifest: tuple[Path, ...]
    """JSON Lines manifests, in order."""
    output: Path
    """Folder of the results; made if missing."""
    image: ImageConfig = field(default_factory=ImageConfig)
    """Filters of images."""
    video: VideoConfig = field(default_factory=VideoConfig)
    """Filters of video."""
    text: TextConfig = field(default_factory=TextConfig)
    """Filters of plain text."""
    contamination: ContaminationConfig = field(default_factory=ContaminationConfig)
    """Evaluation data to look for."""
    held_out: float | None = None
    """Give entries without a ``split`` one: that of their kind (``images``, ``videos``, ``texts``), or, for
    this share of them, ``held-out-images`` and so on, by their names; None: leave them as they are."""
    processes: int = 1
    """Processes that compute scores; 0: this one, without protection from a decoder that crashes."""
    worker: int = 0
    """This job's number, from 0, where several share the folder (a SLURM array)."""
    num_workers: int = 1
    """Jobs that share the folder."""
    entry_timeout: float = 600.0
    """Seconds without progress (a decoded frame) after which an entry's stage is given up; the second time
    the entry is set aside."""
    max_unusable_fraction: float = 0.5
    """Share of the entries that may be set aside before the job fails. Raw media hold many bad files; where
    most are bad, something else is wrong."""
    retry_unusable: bool = False
    """Look again at entries that were set aside in an earlier run."""
    thumbnails: int = 48
    """Examples shown for each reason; 0: no sheets."""
    progress: bool = True
    """Show a progress bar on stderr."""

    def __post_init__(self) -> None:
        """Check the values."""
        if not self.manifest:
            raise UserError("manifest: give at least one .jsonl file")
        if self.processes < 0 or self.num_workers < 1 or self.thumbnails < 0:
            raise UserError("processes and thumbnails must not be negative, num_workers at least 1")
        if not 0 <= self.worker < self.num_workers:
            raise UserError(f"worker={self.worker} must lie in 0..{self.num_workers - 1} (num_workers - 1)")
        if not 0 <= self.max_unusable_fraction <= 1:
            raise UserError(f"max_unusable_fraction={self.max_unusable_fraction} must lie in 0..1")
        if not self.entry_timeout > 0:
            raise UserError(f"entry_timeout={self.entry_timeout} must be positive")
        if self.held_out is not None and not 0 <= self.held_out < 1:
            raise UserError(f"held_out={self.held_out} must be a share, from 0 to less than 1")


def _check_stages(kind: str, stages: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Refuse stages that are not known, repeated, or before what they build on."""
    unknown = [stage for stage in stages if stage not in known]
    if unknown or len(set(stages)) < len(stages):
        raise UserError(f"{kind}.stages={list(stages)}: each at most once, of {', '.join(known)}")
    places = [known.index(stage) for stage in stages]
    if places != sorted(places):
        raise UserError(f"{kind}.stages={list(stages)}: keep the order {', '.join(known)}")
    if "readmission" in stages and "quality" not in stages:
        raise UserError(f"{kind}.stages={list(stages)}: readmission has nothing to do without quality")


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """Settings of a captioning job. Raises `UserError` on construction where a value is out of range."""

    manifest: tuple[Path, ...]
    """JSON Lines manifests, in order; entries with a caption are kept as they are."""
    output: Path
    """Folder of the journal and the captioned manifest; made if missing."""
    url: str | None = None
    """Address of an OpenAI-compatible server with vision, up to ``/v1``."""
    model: str = ""
    """Its model; the only one that it serves where empty."""
    api_key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the key; it may be unset."""
    checkpoint: Path | None = None
    """Instead of a server, a model of ours: run, checkpoint or exported Hugging Face folder."""
    text_tokenizer: Path | None = None
    """With `checkpoint`: its file; an exported folder has its own."""
    vision_tokenizer: Path | None = None
    """With `checkpoint`: its folder; an exported folder has its own."""
    area: int = 512 * 512
    """With `checkpoint`: pixels of a picture, about, as the model saw them."""
    platform: Literal["auto", "cuda", "cpu"] = "auto"
    """With `checkpoint`: where it runs."""
    batch_size: int = 16
    """With `checkpoint`: pictures at a time."""
    image_prompt: Path | None = None
    """File with the instruction for images; a default where None."""
    video_prompt: Path | None = None
    """File with the instruction for clips."""
    frames: int = 12
    """Frames shown of a clip, evenly spread (paper: 8 for labels by GPT-4V, 12 for the captioner)."""
    max_seconds: float = 20.0
    """Longer clips are captioned in equal pieces of half to all of this (paper: 10 to 20 s)."""
    max_edge: int = 1024
    """Pixels of a picture's longer side, at most."""
    max_tokens: int = 512
    """Longest caption."""
    temperature: float = 0.0
    """Of sampling; 0 is greedy."""
    concurrency: int = 16
    """Requests in flight."""
    requests_per_minute: float | None = None
    """Rate limit; none where None."""
    retries: int = 6
    """Tries after the first, for errors that may pass."""
    first_wait: float = 1.0
    """Seconds before the second try, doubled from try to try up to a minute."""
    timeout: float = 180.0
    """Seconds that one request may take from its start to the end of its answer."""
    replace: bool = False
    """Ask for entries that have a caption, too."""
    progress: bool = True
    """Show a progress bar on stderr."""

    def __post_init__(self) -> None:
        """Check the values."""
        if not self.manifest:
            raise UserError("manifest: give at least one .jsonl file")
        if (self.url is None) == (self.checkpoint is None):
            raise UserError("give either `url`, a server's address, or `checkpoint`, a model of ours")
        for name in ("frames", "concurrency", "max_tokens", "max_edge", "area", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.retries < 0 or self.first_wait < 0 or self.temperature < 0:
            raise UserError("retries, first_wait and temperature must not be negative")
        if not (self.timeout > 0 and self.max_seconds > 0):
            raise UserError("timeout and max_seconds must be positive")
        if self.requests_per_minute is not None and not self.requests_per_minute > 0:
            raise UserError(f"requests_per_minute={self.requests_per_minute} must be positive")
