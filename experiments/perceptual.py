"""LPIPS, the learned perceptual distance: with real weights or not at all.

Source: Zhang et al., 2018, arXiv:1801.03924 (v0.1, AlexNet).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from experiments.matching import Images

LPIPS_VARIABLE = "FEDPEEK_LPIPS_DIR"
"""Environment variable that names the folder with AlexNet's ImageNet weights."""

ALEXNET_FINGERPRINT = (0.11864, 0.09407, 0.09544)
"""First three weights of ImageNet-trained AlexNet (torchvision's ``features.0.weight``): random weights do not have them."""

LPIPS_MIN_PIXELS = 64
"""Smaller images are enlarged to this side before LPIPS: AlexNet's pooling leaves nothing of them otherwise."""

Lpips = Callable[[Images, Images], Float[Tensor, " batch"]]
"""The LPIPS distance of images in [0, 1], pair by pair."""


def load_lpips(folder: str | Path | None = None) -> tuple[Lpips | None, str]:
    """Return LPIPS with the AlexNet weights in ``folder``, or None and the reason why not.

    The heads ship with torchmetrics; the backbone must be ``alexnet.safetensors`` or ``alexnet.pth`` with torchvision's
    names. Weights whose first values are not those of the ImageNet network are refused: a random backbone gives numbers
    that look like distances and are none. The network is kept, so that asking again costs nothing.

    Args:
        folder: defaults to the environment variable :data:`LPIPS_VARIABLE`.
    """
    folder = folder or os.environ.get(LPIPS_VARIABLE)
    if not folder:
        return None, f"LPIPS needs AlexNet's ImageNet weights. Set {LPIPS_VARIABLE} to a folder with alexnet.safetensors or alexnet.pth."
    found = [path for name in ("alexnet.safetensors", "alexnet.pth") if (path := Path(folder, name)).is_file()]
    if not found:
        return None, f"LPIPS needs alexnet.safetensors or alexnet.pth, found neither in {folder}. Save torchvision's AlexNet weights there."
    return _open(found[0], found[0].stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _open(path: Path, _modified_ns: int) -> tuple[Lpips | None, str]:  # the time tells a replaced file from the one that is kept
    weights = _read(path)
    if "features.0.weight" not in weights:
        got = ", ".join(sorted(weights)[:3])
        return None, f"{path} must have torchvision's names (features.0.weight, …), got {got}. Save its state_dict."
    first = weights["features.0.weight"].flatten()[:3]
    if not torch.allclose(first.float(), torch.tensor(ALEXNET_FINGERPRINT), atol=1e-4):
        return None, f"{path} must be the ImageNet AlexNet, got first weights {first.tolist()}. No LPIPS with other weights."
    return _lpips(weights), ""


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return dict(torch.load(path, map_location="cpu", weights_only=True))


def _lpips(weights: dict[str, Tensor]) -> Lpips:
    from torchmetrics.functional.image.lpips import _LPIPS  # the public function downloads its backbone

    network = _LPIPS(pretrained=True, net="alex", pnet_rand=True)  # real heads; the random backbone is overwritten whole
    for name, parameter in network.net.named_parameters():  # slice2.3.weight is torchvision's features.3.weight
        parameter.data.copy_(weights["features." + name.partition(".")[2]])

    @torch.no_grad()
    def distance(guess: Images, truth: Images) -> Float[Tensor, " batch"]:
        pair = [_rgb(guess.float().clamp(0, 1)), _rgb(truth.float())]
        return torch.as_tensor(network(*pair, normalize=True)).flatten()

    return distance


def _rgb(images: Images) -> Images:
    images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    side = min(images.shape[-2:])
    if side >= LPIPS_MIN_PIXELS:
        return images
    return functional.interpolate(images, scale_factor=LPIPS_MIN_PIXELS / side, mode="bilinear", align_corners=False)
