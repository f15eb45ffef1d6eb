"""What one client may ask of the server."""

from __future__ import annotations

from dataclasses import dataclass, fields

from emu3_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of the server. Raises `UserError` for a value that is not positive."""

    jobs: int = 8
    """Requests that run or wait; the next one is refused (429)."""
    connections: int = 64
    """Requests whose bodies are being read or answered; the next one is refused unread (429)."""
    seconds: float = 900.0
    """Longest time of a request, waiting included (504)."""
    body_seconds: float = 60.0
    """Longest time in which a body must arrive (408)."""
    send_seconds: float = 60.0
    """Longest time in which a client must take what waits for it; then its connection is cut off."""
    body_bytes: int = 32 << 20
    """Largest body; an upload is a third longer than its file (413)."""
    upload_pixels: int = 1 << 25
    """Most pixels of an uploaded image, or of one frame of an uploaded clip."""
    clip_pixels: int = 1 << 27
    """Most pixels of all frames that are taken from an uploaded clip (64 frames of 1920 x 1080)."""
    uploads: int = 8
    """Most files of one request."""
    understanding_area: int = 512 * 512
    """Pixels that an uploaded picture is brought to."""
    pixels: int = 1 << 19
    """Most pixels of a picture to generate (released: 720 x 720); fewer where `length` holds fewer."""
    frames: int = 64
    """Most frames of a clip, given and generated."""
    samples: int = 4
    """Most pictures of one request."""
    rows: int = 16
    """Sequences at a time; a guided picture counts twice."""
    length: int = 9216
    """Most positions of a sequence, prompt included (released: 9,216)."""

    def __post_init__(self) -> None:
        """Check the values."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise UserError(f"limit {field.name}={value} must be positive")
        if self.rows < 2:
            raise UserError(f"limit rows={self.rows} must be at least 2: a guided picture needs two")
