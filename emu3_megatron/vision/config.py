"""Shape of the vision tokenizer: one frozen dataclass, and its form in `config.json` files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

NORM_GROUPS = 32
"""Groups of every group norm (MoVQGAN, and fixed in `transformers`): channels must be multiples of it."""

MODEL_TYPE = "emu3_vqgan"
"""`model_type` that `transformers` gives `Emu3VQVAEConfig`."""


@dataclass(frozen=True, kw_only=True)
class VisionTokenizerConfig:
    """Sizes of a vision tokenizer. The defaults are those of the released Emu3-VisionTokenizer.

    Raises `ValueError` where the sizes cannot be built, or could be built but not loaded by `transformers`.
    """

    channels: int = 256
    """Channels at full resolution; a multiple of 32 (`ch`; `base_channels`)."""
    channel_multiplier: tuple[int, ...] = (1, 2, 2, 4)
    """Channels of each level over `channels`; each but the last halves height and width (`ch_mult`)."""
    num_res_blocks: int = 2
    """Residual blocks of an encoder level, and of a temporal stack; a decoder level has one more."""
    attention_resolutions: tuple[int, ...] = (3,)
    """Level indices with attention, besides the middle, which always has it (`attn_resolutions`)."""
    z_channels: int = 4
    """Channels of the temporal layers, between encoder and codebook (`latent_channels`)."""
    embed_dim: int = 4
    """Length of a codebook vector; equal to `z_channels`, since one temporal stack decodes both."""
    codebook_size: int = 32768
    """Number of codebook vectors."""
    temporal_downsample_factor: int = 4
    """Frames to one latent frame; a power of two."""
    in_channels: int = 3
    """Channels of a pixel that is encoded."""
    out_channels: int = 3
    """Channels of a pixel that is decoded."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_multiplier", tuple(self.channel_multiplier))
        object.__setattr__(self, "attention_resolutions", tuple(self.attention_resolutions))
        self._check_levels()
        if self.num_res_blocks < 0:
            raise ValueError(f"num_res_blocks is {self.num_res_blocks}: it must be 0 or more")
        for name in ("z_channels", "embed_dim", "codebook_size", "in_channels", "out_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.z_channels != self.embed_dim:
            raise ValueError(
                f"z_channels is {self.z_channels} and embed_dim {self.embed_dim}: they must be equal, "
                "because the decoder sends latents and codebook vectors through the same temporal layers"
            )
        factor = self.temporal_downsample_factor
        if factor < 1 or factor & (factor - 1):
            raise ValueError(f"temporal_downsample_factor is {factor}: it must be a power of two")

    def _check_levels(self) -> None:
        if not self.channel_multiplier:
            raise ValueError("channel_multiplier is empty: give a number per level, such as [1, 2, 2, 4]")
        for channels in self.level_channels:
            if channels < NORM_GROUPS or channels % NORM_GROUPS:
                raise ValueError(
                    f"channels {self.channels} times {list(self.channel_multiplier)} gives a level of "
                    f"{channels}: every level must be a multiple of {NORM_GROUPS}, the groups of its norms"
                )
        if self.num_res_blocks == 0 and set(self.channel_multiplier) != {1}:
            raise ValueError(
                f"channel_multiplier is {list(self.channel_multiplier)} with num_res_blocks 0: only residual "
                "blocks change the number of channels, so every multiplier must be 1"
            )
        for level in self.attention_resolutions:
            if not 0 <= level < len(self.channel_multiplier):
                raise ValueError(
                    f"attention_resolutions has {level}: levels are 0 to {len(self.channel_multiplier) - 1}"
                )
            if self.level_channels[level] != self.hidden_size:
                raise ValueError(
                    f"attention_resolutions has level {level} of {self.level_channels[level]} channels: "
                    f"transformers has one attention width, that of the last level ({self.hidden_size})"
                )

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of every level, full resolution first."""
        return tuple(self.channels * multiplier for multiplier in self.channel_multiplier)

    @property
    def hidden_size(self) -> int:
        """Channels of the last level, of the middle and of every attention."""
        return self.level_channels[-1]

    @property
    def spatial_factor(self) -> int:
        """Pixels to one code, in height and in width."""
        return int(2 ** (len(self.channel_multiplier) - 1))

    @property
    def temporal_steps(self) -> int:
        """Number of temporal halvings."""
        return int(math.log2(self.temporal_downsample_factor))

    def to_transformers(self) -> dict[str, Any]:
        """The `config.json` of `transformers.Emu3VQVAE`."""
        return {
            "architectures": ["Emu3VQVAE"],
            "model_type": MODEL_TYPE,
            **_renamed(asdict(self), _TO_TRANSFORMERS),
            "double_latent": False,
            "hidden_size": self.hidden_size,
            "num_attention_heads": 1,
            "attention_dropout": 0.0,
        }

    def to_emu3(self) -> dict[str, Any]:
        """The `config.json` of the released Emu3-VisionTokenizer."""
        return {
            "architectures": ["Emu3VisionVQModel"],
            "model_type": "Emu3VisionVQ",
            **_renamed(asdict(self), _TO_EMU3),
            "double_z": False,
            "dropout": 0.0,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VisionTokenizerConfig:
        """Read either `config.json`; keys that do not describe the architecture are passed over.

        Raises `ValueError` for what this model does not have: a variational latent, several attention heads.
        """
        if values.get("double_latent") or values.get("double_z"):
            raise ValueError("double_latent (double_z) is true: Emu3's tokenizer has no variational latent")
        if values.get("num_attention_heads", 1) != 1:
            raise ValueError(f"num_attention_heads is {values['num_attention_heads']}: only 1 is known")
        names = set(cls.__dataclass_fields__)
        found: dict[str, Any] = {}
        for table in (_TO_TRANSFORMERS, _TO_EMU3):
            found.update({ours: values[theirs] for ours, theirs in table.items() if theirs in values})
        found.update({name: values[name] for name in names if name in values})
        return cls(**found)


_TO_TRANSFORMERS = {
    "channels": "base_channels",
    "attention_resolutions": "attn_resolutions",
    "z_channels": "latent_channels",
}

_TO_EMU3 = {
    "channels": "ch",
    "channel_multiplier": "ch_mult",
    "attention_resolutions": "attn_resolutions",
}


def _renamed(values: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return {names.get(key, key): value for key, value in plain.items()}
