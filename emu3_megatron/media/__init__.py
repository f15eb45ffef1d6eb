"""Decoding, preprocessing and encoding of images and video."""

from emu3_megatron.media.errors import MediaError
from emu3_megatron.media.files import Media, read_media
from emu3_megatron.media.folders import MediaFolder, list_media
from emu3_megatron.media.geometry import BoundedResizeRule, Geometry, ResizeRule, fixed_geometry
from emu3_megatron.media.images import decode_image, decode_images, image_dimensions
from emu3_megatron.media.load import load_clip, load_stills
from emu3_megatron.media.preprocess import Preprocessor, to_uint8
from emu3_megatron.media.probe import VideoInfo
from emu3_megatron.media.selection import Clip, ClipRule, Interval, frame_range
from emu3_megatron.media.sources import FrameSource, frame_source
from emu3_megatron.media.video import OpenVideo, probe_video
from emu3_megatron.media.write import write_mp4, write_png

__all__ = [
    "BoundedResizeRule",
    "Clip",
    "ClipRule",
    "FrameSource",
    "Geometry",
    "Interval",
    "Media",
    "MediaError",
    "MediaFolder",
    "OpenVideo",
    "Preprocessor",
    "ResizeRule",
    "VideoInfo",
    "decode_image",
    "decode_images",
    "fixed_geometry",
    "frame_range",
    "frame_source",
    "image_dimensions",
    "list_media",
    "load_clip",
    "load_stills",
    "probe_video",
    "read_media",
    "to_uint8",
    "write_mp4",
    "write_png",
]
