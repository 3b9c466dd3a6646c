"""Arrays to PNG: exact pixels for the page, enlarged pairs for the files beside it."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image


def eight_bit(picture: np.ndarray) -> np.ndarray:
    """Return a picture in [0, 1] as uint8 of shape (height, width) or (height, width, 3); a value that is no number becomes 0.

    Raises:
        ValueError: the array is no grey or RGB picture with the channels last.
    """
    grey = picture[..., 0] if picture.ndim == 3 and picture.shape[2] == 1 else picture
    if not (grey.ndim == 2 or (grey.ndim == 3 and grey.shape[2] == 3)) or grey.size == 0:
        raise ValueError(f"picture must have shape HW, HW1 or HW3, got {picture.shape}. Move the channels last.")
    finite = np.nan_to_num(np.asarray(grey, dtype=np.float64), nan=0.0, posinf=1.0, neginf=0.0)
    return np.asarray(np.rint(finite.clip(0.0, 1.0) * 255.0), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    """Return uint8 pixels as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def pair(private: np.ndarray, reconstructed: np.ndarray, *, side: int = 256) -> np.ndarray:
    """Return both pictures side by side as uint8, enlarged by a whole factor to about ``side`` pixels without smoothing."""
    left, right = (_rgb(eight_bit(picture)) for picture in (private, reconstructed))
    left, right = (_enlarge(pixels, max(1, side // max(pixels.shape[:2]))) for pixels in (left, right))
    height, gap = max(left.shape[0], right.shape[0]), 8
    canvas = np.full((height, left.shape[1] + gap + right.shape[1], 3), 255, dtype=np.uint8)
    canvas[: left.shape[0], : left.shape[1]] = left
    canvas[: right.shape[0], left.shape[1] + gap :] = right
    return canvas


def data_uri(content: bytes) -> str:
    """Return a PNG file as a ``data:`` address, so that the page needs no other file."""
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def _rgb(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels


def _enlarge(pixels: np.ndarray, factor: int) -> np.ndarray:
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)
