"""The generation program: arguments to files and JSON lines. ``tools/generate.py`` is its main."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from emu3_megatron.errors import UserError
from emu3_megatron.grammar import Image, Video
from emu3_megatron.inference.bundle import open_bundle
from emu3_megatron.inference.checks import check_arguments, check_single_process
from emu3_megatron.inference.dialogue import (
    UNDERSTANDING_AREA,
    MediaReader,
    Message,
    answer,
    chat_template,
    interleave,
)
from emu3_megatron.inference.planned import Planned, Records, plan_results
from emu3_megatron.inference.quantized import FORMATS
from emu3_megatron.inference.results import contact_sheet, extend_video, write_document
from emu3_megatron.inference.sampling import Sampling
from emu3_megatron.inference.tasks import (
    CAPTION_SAMPLING,
    IMAGE_SAMPLING,
    Caption,
    GeneratedImage,
    GeneratedVideo,
    Generator,
    image_size,
)
from emu3_megatron.media import MediaError

IMAGE_AREA = 518_400
"""Pixels of a released image (720 x 720)."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Generate images, videos and text.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="task", required=True)
    image = commands.add_parser("image", help="text to image (PNG)", allow_abbrev=False)
    video = commands.add_parser("video", help="text to video (MP4)", allow_abbrev=False)
    caption = commands.add_parser("caption", help="image to text", allow_abbrev=False)
    continued = commands.add_parser("continue", help="continue a real video (MP4)", allow_abbrev=False)
    chat = commands.add_parser("chat", help="answer questions about images and videos", allow_abbrev=False)
    story = commands.add_parser("interleave", help="text and images as one document", allow_abbrev=False)
    for command in (image, video, caption, continued, chat, story):
        add_model(command)
        add_sampling(command, spans=command in (image, video, continued))
        command.add_argument("--max-rows", type=int, default=128, help="sequences at a time (default: 128)")
    for command in (image, video, caption, continued):
        add_size(command)
    for command in (image, video, chat, story):
        command.add_argument("--prompt", action="append", default=[], help="may be given several times")
        command.add_argument("--prompts", type=Path, help="file with a prompt a line; - for standard input")
        command.add_argument("--samples", type=int, default=1, help="results per prompt (default: 1)")
    for command in (image, video, story):
        command.add_argument(
            "--resume", action="store_true", help="keep what an earlier start has finished; needs a folder"
        )
        command.add_argument("--worker", type=int, default=0, help="this process, of --num-workers")
        command.add_argument("--num-workers", type=int, default=1, help="processes that share the prompts")
    for command in (image, video, continued):
        command.add_argument("--negative-prompt", default="", help="what guidance leads away from")
        command.add_argument("--output", type=Path, required=True, help="file for one result, else a folder")
        command.add_argument("--sheet", type=Path, help="also all results in one PNG (of a clip four frames)")
    for command in (caption, chat):
        command.set_defaults(temperature=CAPTION_SAMPLING.temperature)
    _add_dialogue(chat, story)
    for command in (video, continued):
        command.add_argument("--frames", type=int, help="frames of the whole clip")
        command.add_argument("--seconds", type=float, help="its duration, instead of --frames")
        command.add_argument("--fps", type=float, default=8.0, help="frames per second (default: 8)")
    caption.add_argument("--image", type=Path, nargs="+", required=True, help="image files")
    caption.add_argument("--prefix", default="", help="beginning of the caption")
    caption.add_argument("--max-new-tokens", type=int, default=256, help="longest caption (default: 256)")
    continued.add_argument("--video", type=Path, nargs="+", required=True, help="video files")
    continued.add_argument("--given-frames", type=int, default=4, help="frames to continue from (default: 4)")
    continued.add_argument("--prompt", default="", help="what the clips show")
    continued.add_argument(
        "--rounds", type=int, default=1, help="continue the result, this many times in all (default: 1)"
    )
    return parser


def _add_dialogue(chat: argparse.ArgumentParser, story: argparse.ArgumentParser) -> None:
    chat.add_argument("--image", type=Path, action="append", default=[], help="may be given several times")
    chat.add_argument("--video", type=Path, action="append", default=[], help="may be given several times")
    chat.add_argument("--frames", type=int, default=8, help="first frames of a video (default: 8)")
    chat.add_argument("--fps", type=float, help="frames per second of a video; default: its own")
    chat.add_argument(
        "--area", type=int, default=UNDERSTANDING_AREA, help="pixels of a picture (default: %(default)s)"
    )
    chat.add_argument(
        "--template",
        default="emu3-chat",
        help="name, or text with {media} and {question} (default: emu3-chat)",
    )
    chat.add_argument("--max-new-tokens", type=int, default=1024, help="longest answer (default: 1024)")
    story.add_argument("--output", type=Path, required=True, help="folder")
    story.add_argument("--max-new-tokens", type=int, default=8192, help="longest document (default: 8192)")


def add_model(parser: argparse.ArgumentParser) -> None:
    """The arguments that `open_generator` reads."""
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="run, checkpoint or Hugging Face folder"
    )
    parser.add_argument("--text-tokenizer", type=Path, help="its file; a Hugging Face folder has its own")
    parser.add_argument("--vision-tokenizer", type=Path, help="its folder; a Hugging Face folder has its own")
    parser.add_argument("--dialect", help="default: what the folder or the run's datasets state, else emu3")
    parser.add_argument("--platform", choices=("auto", "cuda", "cpu"), default="auto", help="default: auto")
    parser.add_argument("--weights", choices=FORMATS, help="keep the weights in one byte each")
    parser.add_argument("--plain-weights", action="store_true", help="not a run's averaged weights")


def add_sampling(parser: argparse.ArgumentParser, *, spans: bool) -> None:
    """The arguments that `read_sampling` reads; guidance only where `spans` are drawn."""
    default = IMAGE_SAMPLING
    parser.add_argument("--temperature", type=float, default=default.temperature, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=default.top_k, help="0 keeps all (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=default.top_p)
    parser.add_argument("--min-p", type=float, default=default.min_p)
    if spans:
        parser.add_argument("--guidance", type=float, default=default.guidance, help="1 is off (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of the first result; the next ones count up")


def add_size(parser: argparse.ArgumentParser) -> None:
    """The arguments that `read_size` reads."""
    parser.add_argument("--height", type=int, help="pixels, with --width")
    parser.add_argument("--width", type=int, help="pixels, with --height")
    parser.add_argument("--ratio", default="1:1", help="WIDTH:HEIGHT, where no size is given (default: 1:1)")
    parser.add_argument(
        "--area", type=int, default=IMAGE_AREA, help="pixels, where no size is given (default: %(default)s)"
    )


def main() -> None:
    """Parse the command line, start a single process and generate."""
    arguments = build_parser().parse_args()
    check_single_process("generate.py")
    from emu3_megatron.parallel import platform
    from emu3_megatron.parallel.config import ParallelConfig
    from emu3_megatron.parallel.groups import initialize_parallel

    initialize_parallel(ParallelConfig(), platform.install(arguments.platform), seed=0)
    generate(arguments)


def generate(arguments: argparse.Namespace) -> None:
    """Run one command: write the files, and a JSON line per result to standard output.

    Process groups must exist. Raises `UserError` for arguments, files or folders that cannot be used.
    """
    check_arguments(arguments)
    if arguments.seed < 0 or getattr(arguments, "samples", 1) < 1:
        raise UserError(f"--seed={arguments.seed} must not be negative, and --samples at least 1")
    read_sampling(arguments)
    task = {
        "image": _images, "video": _videos, "caption": _captions, "continue": _continuations,
        "chat": _answers, "interleave": _stories,
    }  # fmt: skip
    planned = plan_results(arguments)
    records = Records(arguments) if getattr(arguments, "resume", False) else None
    if records is not None:
        planned, finished = records.split(planned)
        for line in finished:
            print(json.dumps(line, ensure_ascii=False), flush=True)
    if hasattr(arguments, "worker") and not planned.prompts:
        return
    generator = open_generator(arguments, max_rows=arguments.max_rows)
    began = time.perf_counter()
    for place, record in enumerate(task[arguments.task](generator, arguments, planned)):
        record |= {"settings": asdict(read_sampling(arguments)), "checkpoint": str(arguments.checkpoint)}
        record["seconds"] = round(time.perf_counter() - began, 3)
        record["arguments"] = vars(arguments)
        line = json.loads(json.dumps({"task": arguments.task, **record}, default=str))
        if records is not None:
            records.keep(planned.numbers[place], line)
        print(json.dumps(line, ensure_ascii=False), flush=True)


def open_generator(arguments: argparse.Namespace, *, max_rows: int) -> Generator:
    """The model that the arguments of `add_model` name, for `max_rows` sequences at a time."""
    bundle = open_bundle(
        arguments.checkpoint,
        text_tokenizer=arguments.text_tokenizer,
        vision_tokenizer=arguments.vision_tokenizer,
        dialect=arguments.dialect,
        averaged=False if arguments.plain_weights else None,
        weights=arguments.weights,
    )
    return Generator(bundle, max_rows=max_rows)


def _images(
    generator: Generator, arguments: argparse.Namespace, planned: Planned
) -> Iterator[dict[str, Any]]:
    from emu3_megatron.media import write_png

    height, width = read_size(generator, arguments)
    shown: list[npt.NDArray[np.uint8]] = []
    with _progress(len(planned.prompts), "image") as bar:
        for group in planned.groups(_at_a_time(arguments)):
            images = generator.text_to_image(
                group.prompts,
                height=height,
                width=width,
                sampling=read_sampling(arguments),
                seeds=group.seeds,
                negative_prompt=arguments.negative_prompt,
                progress=bar.update,
            )
            for image, path in zip(images, group.made(), strict=True):
                write_png(path, image.pixels)
                yield {**_about(image), "negative_prompt": arguments.negative_prompt, "output": str(path)}
            if arguments.sheet:
                shown += [image.pixels[None] for image in images]
    _write_sheet(arguments, shown)


def _videos(
    generator: Generator, arguments: argparse.Namespace, planned: Planned
) -> Iterator[dict[str, Any]]:
    height, width = read_size(generator, arguments)
    shown: list[npt.NDArray[np.uint8]] = []
    with _progress(len(planned.prompts), "video") as bar:
        for group in planned.groups(_at_a_time(arguments)):
            videos = generator.text_to_video(
                group.prompts,
                height=height,
                width=width,
                frames=_frames(generator, arguments),
                fps=arguments.fps,
                sampling=read_sampling(arguments),
                seeds=group.seeds,
                negative_prompt=arguments.negative_prompt,
                progress=bar.update,
            )
            yield from _write_videos(videos, arguments, group)
            if arguments.sheet:
                shown += [video.pixels for video in videos]
    _write_sheet(arguments, shown)


def _continuations(
    generator: Generator, arguments: argparse.Namespace, planned: Planned
) -> Iterator[dict[str, Any]]:
    from emu3_megatron.media import load_clip

    size = read_size(generator, arguments)
    clips = [load_clip(path, arguments.given_frames, size, fps=arguments.fps) for path in arguments.video]
    with _progress(len(clips) * arguments.rounds, "video") as bar:
        videos = extend_video(
            generator,
            torch.stack(clips),
            rounds=arguments.rounds,
            frames=_frames(generator, arguments),
            fps=arguments.fps,
            prompts=[arguments.prompt] * len(clips),
            sampling=read_sampling(arguments),
            seeds=[arguments.seed + place for place in range(len(clips))],
            negative_prompt=arguments.negative_prompt,
            progress=bar.update,
        )
    for path, record in zip(arguments.video, _write_videos(videos, arguments, planned), strict=True):
        yield {**record, "video": str(path)}
    _write_sheet(arguments, [video.pixels for video in videos] if arguments.sheet else [])


def _captions(
    generator: Generator, arguments: argparse.Namespace, planned: Planned
) -> Iterator[dict[str, Any]]:
    from emu3_megatron.media import load_stills

    images = load_stills(arguments.image, read_size(generator, arguments))
    with _progress(len(images), "caption") as bar:
        captions = generator.image_to_text(
            images,
            prefix=arguments.prefix,
            max_new_tokens=arguments.max_new_tokens,
            sampling=read_sampling(arguments),
            seeds=[arguments.seed + place for place in range(len(images))],
            progress=bar.update,
        )
    for path, caption in zip(arguments.image, captions, strict=True):
        yield {"image": str(path), **_about(caption)}


def _answers(
    generator: Generator, arguments: argparse.Namespace, planned: Planned
) -> Iterator[dict[str, Any]]:
    prompts, template = planned.prompts, chat_template(arguments.template)
    reader = MediaReader(generator, area=arguments.area)
    clip = partial(reader.video, frames=arguments.frames, fps=arguments.fps)
    media: list[Image | Video] = [_named(path, reader.image) for path in arguments.image]
    media += [_named(path, clip) for path in arguments.video]
    with _progress(len(prompts), "answer") as bar:
        answers = answer(
            generator,
            [[Message("user", prompt, tuple(media))] for prompt in prompts],
            template=template,
            sampling=read_sampling(arguments),
            seeds=planned.seeds,
            max_new_tokens=arguments.max_new_tokens,
            progress=bar.update,
        )
    about = {
        "template": arguments.template,
        "max_new_tokens": arguments.max_new_tokens,
        "area": arguments.area,
    }
    about |= {"images": list(map(str, arguments.image)), "videos": list(map(str, arguments.video))}
    for prompt, said in zip(prompts, answers, strict=True):
        record = {"answer": said.text, "seed": said.seed, "tokens": said.tokens, "whole": said.finished}
        yield {"prompt": prompt, **about, **record}


def _stories(
    generator: Generator, arguments: argparse.Namespace, planned: Planned
) -> Iterator[dict[str, Any]]:
    longest = arguments.max_new_tokens
    with _progress(len(planned.prompts), "document") as bar:
        for group in planned.groups(_at_a_time(arguments)):
            stories = interleave(
                generator,
                group.prompts,
                sampling=read_sampling(arguments),
                seeds=group.seeds,
                max_new_tokens=longest,
                progress=bar.update,
            )
            for prompt, story, folder in zip(group.prompts, stories, group.outputs, strict=True):
                segments = write_document(generator, story.document, folder)
                record: dict[str, Any] = {"seed": story.seed, "tokens": story.tokens, "whole": story.finished}
                record |= {"segments": segments, "output": str(folder)}
                yield {"prompt": prompt, "max_new_tokens": longest, **record}


def _named(path: Path, read: Callable[[Path], Image | Video]) -> Image | Video:
    """What `read` makes of a file; its errors name the file."""
    try:
        return read(path)
    except MediaError as error:
        raise MediaError(f"{path}: {error}") from error


def _write_videos(
    videos: list[GeneratedVideo], arguments: argparse.Namespace, planned: Planned
) -> Iterator[dict[str, Any]]:
    from emu3_megatron.media import write_mp4

    for video, path in zip(videos, planned.made(), strict=True):
        write_mp4(path, video.pixels, video.fps)
        yield {**_about(video), "negative_prompt": arguments.negative_prompt, "output": str(path)}


def _write_sheet(arguments: argparse.Namespace, clips: Sequence[npt.NDArray[np.uint8]]) -> None:
    """All results in one picture, where one is asked for."""
    from emu3_megatron.media import write_png

    if arguments.sheet:
        arguments.sheet.parent.mkdir(parents=True, exist_ok=True)
        write_png(arguments.sheet, contact_sheet(clips))


def _at_a_time(arguments: argparse.Namespace) -> int:
    """Results that are drawn together, and then written: as many as there are rows for."""
    return max(1, int(arguments.max_rows) // (1 if read_sampling(arguments).guidance == 1.0 else 2))


def _about(result: GeneratedImage | GeneratedVideo | Caption) -> dict[str, Any]:
    """What a JSON line says of a result."""
    if isinstance(result, Caption):
        return {
            "caption": result.text,
            "seed": result.seed,
            "tokens": result.tokens,
            "whole": result.finished,
        }
    height, width = result.pixels.shape[-3:-1]
    record = {"prompt": result.prompt, "seed": result.seed, "height": height, "width": width}
    if isinstance(result, GeneratedVideo):
        record |= {"frames": len(result.pixels), "fps": result.fps, "given_frames": result.given_frames}
    return {**record, "tokens": result.tokens}


def read_sampling(arguments: argparse.Namespace) -> Sampling:
    """What the arguments of `add_sampling` say."""
    return Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k or None,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        guidance=getattr(arguments, "guidance", 1.0),
    )


def read_size(generator: Generator, arguments: argparse.Namespace) -> tuple[int, int]:
    """Height and width in pixels, by the arguments of `add_size`."""
    if (arguments.height is None) != (arguments.width is None):
        raise UserError("give both --height and --width, or --ratio and --area")
    if arguments.height is not None:
        return arguments.height, arguments.width
    return image_size(arguments.ratio, arguments.area, generator.bundle.vision_tokenizer.spatial_factor)


def _frames(generator: Generator, arguments: argparse.Namespace) -> int:
    """Frames of the whole clip; a duration is rounded up to whole latent frames."""
    if (arguments.frames is None) == (arguments.seconds is None):
        raise UserError("give either --frames or --seconds")
    if arguments.frames is not None:
        return int(arguments.frames)
    factor = generator.bundle.vision_tokenizer.temporal_factor
    return math.ceil(arguments.seconds * arguments.fps / factor) * factor


def _progress(count: int, unit: str) -> Any:
    """A bar on standard error, where that is a terminal."""
    return tqdm(total=count, unit=unit, disable=None, file=sys.stderr)
