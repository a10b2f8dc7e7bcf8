"""Loss of VAE post-training: wavelet + perceptual + L2, no adversary (UltraFlux, table 3).

Images are (B, 3, H, W) in [-1, 1]; everything is computed in float32.

The wavelet term is an L1 norm. A squared norm of an orthonormal transform is the squared norm of
the image (Parseval), so it would only repeat the L2 term; L1 suits the sparse, heavy-tailed detail
coefficients that the term is there for. The paper does not state its norm.

The kind of the perceptual term is part of its name (`perceptual_gmsd`): nothing but LPIPS with
verified weights is ever called LPIPS.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.files.weight_folders import WeightsMissing
from components.objectives.haar import haar
from components.settings.training import ReconstructionSettings

# Rec. 601 luma.
LUMA = (0.299, 0.587, 0.114)
# GMSD's stabiliser (Xue et al. 2014), 170 on the 0..255 scale.
GMSD_CONSTANT = 170.0 / 255.0**2
# Exponents of the five scales of MS-SSIM (Wang et al. 2003).
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
# VGG16's first three stages at a quarter of its width.
RANDOM_VGG_STAGES = ((16, 16), (32, 32), (64, 64, 64))
RANDOM_VGG_SEED = 16
# Keeps the gradient of a square root finite at zero.
ROOT_EPSILON = 1e-8
LPIPS_COMMAND = (
    "curl -LO https://download.pytorch.org/models/vgg16-397923af.pth, then set lpips_backbone "
    "and lpips_sha256"
)


def luma(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] to (B, 1, H, W) in [0, 1]."""
    weights = images.new_tensor(LUMA).reshape(1, 3, 1, 1)
    # GMSD's and SSIM's constants below are defined on this range.
    return ((images + 1.0) / 2.0 * weights).sum(1, keepdim=True)


def wavelet_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of one-level Haar coefficients; scalar."""
    # The transform is linear: one of the difference instead of two.
    bands = haar(prediction.float() - target.float())
    return torch.stack([band.abs().mean() for band in bands]).mean()


def gmsd(prediction: Tensor, target: Tensor) -> Tensor:
    """Gradient magnitude similarity deviation (Xue et al. 2014), per image (B,); 0 is equal.

    Luma averaged over 2x2 pixels, Prewitt gradients, standard deviation of their similarity.
    """
    # Prewitt's kernel and its transpose in one convolution of two output channels.
    kernel = prediction.new_tensor([[1.0, 0.0, -1.0]] * 3).float() / 3.0
    kernels = torch.stack((kernel, kernel.T))[:, None]

    def magnitude(images: Tensor) -> Tensor:
        gradients = F.conv2d(F.avg_pool2d(luma(images.float()), 2), kernels, padding=1)
        # Flat patches have zero gradients, where a bare square root has an infinite derivative.
        return torch.sqrt(gradients.square().sum(1) + ROOT_EPSILON)

    a, b = magnitude(prediction), magnitude(target)
    similarity = (2 * a * b + GMSD_CONSTANT) / (a.square() + b.square() + GMSD_CONSTANT)
    # Population variance, as the deviation over all pixels is defined; equal images give 1e-4, not
    # 0.
    return torch.sqrt(similarity.flatten(1).var(1, correction=0) + ROOT_EPSILON)


def _gaussian_window(like: Tensor) -> Tensor:
    offsets = torch.arange(SSIM_WINDOW, device=like.device, dtype=torch.float32) - SSIM_WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    return window / window.sum()


def _ssim_terms(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Mean SSIM and mean contrast-structure of (B, 1, H, W) in [0, 1], each (B,)."""
    window = _gaussian_window(a)

    def smooth(x: Tensor) -> Tensor:
        # A Gaussian is separable: 2 x 11 products a pixel instead of 121.
        return F.conv2d(F.conv2d(x, window.reshape(1, 1, -1, 1)), window.reshape(1, 1, 1, -1))

    # Valid convolution: only windows that lie wholly inside the image count, as in scikit-image.
    mean_a, mean_b = smooth(a), smooth(b)
    # E[x^2] - E[x]^2 in float32: luma lies in [0, 1], so the rounding is far below 0.03^2.
    var_a = smooth(a * a) - mean_a.square()
    var_b = smooth(b * b) - mean_b.square()
    covariance = smooth(a * b) - mean_a * mean_b
    contrast = (2 * covariance + 0.03**2) / (var_a + var_b + 0.03**2)
    brightness = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    return (contrast * brightness).flatten(1).mean(1), contrast.flatten(1).mean(1)


def ms_ssim(prediction: Tensor, target: Tensor) -> Tensor:
    """Multi-scale SSIM of luma (Wang et al. 2003), per image (B,); 1 is equal.

    Deviation: small crops use as many of the five scales as hold the 11 px window, with the
    exponents scaled to the same sum (`test_reconstruction.py`).

    Raises:
        ValueError: images smaller than the window.
    """
    a, b = luma(prediction.float()), luma(target.float())
    if min(a.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"images: MS-SSIM needs at least {SSIM_WINDOW} px, got {a.shape[-2:]}")
    # A scale halves the edge: the next one is used only where the window still fits into it.
    scales = 1
    while scales < len(MS_SSIM_WEIGHTS) and min(a.shape[-2:]) >> scales >= SSIM_WINDOW:
        scales += 1
    used = MS_SSIM_WEIGHTS[:scales]
    result = torch.ones(a.shape[0], device=a.device)
    for scale, weight in enumerate(used):
        ssim, contrast = _ssim_terms(a, b)
        # Brightness counts at the coarsest scale only (Wang et al. 2003).
        term = ssim if scale == scales - 1 else contrast
        # Anti-correlated structure is negative; its fractional power would be NaN.
        result = result * term.clamp(min=1e-4) ** (weight / sum(used) * sum(MS_SSIM_WEIGHTS))
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return result


class RandomVggDistance(nn.Module):
    """Feature distance in a random, seeded, frozen VGG-shaped network, per image (B,).

    Random convolutional features already penalise blur and misplaced edges; they are not LPIPS.
    """

    def __init__(self, seed: int = RANDOM_VGG_SEED) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        channels = 3
        # Seeded and forked: the same network in every run, and training's own draws untouched.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for index, widths in enumerate(RANDOM_VGG_STAGES):
                layers: list[nn.Module] = [nn.MaxPool2d(2)] if index else []
                for width in widths:
                    convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
                    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
                    layers += [convolution, nn.ReLU()]
                    channels = width
                stages.append(nn.Sequential(*layers))
        self.stages = nn.ModuleList(stages)
        self.requires_grad_(False)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Sum over stages of the mean squared distance of channel-normalised features."""
        a, b = prediction.float(), target.float()
        total = torch.zeros(a.shape[0], device=a.device)
        for stage in self.stages:
            a, b = stage(a), stage(b)
            # Unit length at each pixel, as LPIPS does: else the layer with the largest activations
            # decides alone. eps is large because a dead pixel's gradient grows with 1 / eps.
            difference = F.normalize(a, dim=1, eps=1e-4) - F.normalize(b, dim=1, eps=1e-4)
            total = total + difference.square().sum(1).flatten(1).mean(1)
        return total


def _verified_backbone(path: str | None, sha256: str | None) -> dict[str, Tensor]:
    """State dict of a local torchvision VGG16 file with the stated hash; fails closed."""
    name = "LPIPS VGG16 backbone"
    if not path:
        raise WeightsMissing(name, "(lpips_backbone not set)", LPIPS_COMMAND)
    file = Path(path).expanduser()
    if not file.is_file():
        raise WeightsMissing(name, file, LPIPS_COMMAND)
    # An unverified backbone would print numbers named LPIPS that are not: no hash is no permission.
    if not sha256:
        raise WeightsMissing(name, file, LPIPS_COMMAND, "lpips_sha256 not set, cannot verify it")
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256.lower():
        raise WeightsMissing(name, file, LPIPS_COMMAND, f"its sha256 is {found}, not {sha256}")
    # weights_only: the format is pickle, and unpickling runs code.
    state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return state


def build_lpips(path: str | None, sha256: str | None) -> nn.Module:
    """LPIPS v0.1 (VGG16) from the `lpips` package's linear layers and a verified backbone.

    Args:
        path: torchvision VGG16 state dict (`vgg16-397923af.pth`).
        sha256: its hash.

    Returns:
        Frozen module (prediction, target) in [-1, 1] -> (B, 1, 1, 1).

    Raises:
        WeightsMissing: no file, no hash, or another hash.
    """
    state = _verified_backbone(path, sha256)
    import lpips

    with torch.random.fork_rng(devices=[]):
        # pnet_rand keeps it from fetching the backbone; the linear layers ship with the package.
        module = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    # The package cuts VGG into slices but keeps torchvision's layer numbers behind their names.
    slices = {key: state[f"features.{key.split('.', 1)[1]}"] for key in module.net.state_dict()}
    module.net.load_state_dict(slices)
    module.requires_grad_(False)
    frozen: nn.Module = module.eval()
    return frozen


class ReconstructionLoss(nn.Module):
    """Weighted sum of L2, wavelet L1 and one perceptual term.

    Args:
        settings: weights and the perceptual kind.

    Raises:
        WeightsMissing: kind `lpips` without its verified backbone.
    """

    def __init__(self, settings: ReconstructionSettings) -> None:
        super().__init__()
        self.settings = settings
        self.perceptual: nn.Module | None = None
        if settings.perceptual_kind == "random_vgg":
            self.perceptual = RandomVggDistance()
        elif settings.perceptual_kind == "lpips":
            self.perceptual = build_lpips(settings.lpips_backbone, settings.lpips_sha256)

    @property
    def perceptual_name(self) -> str:
        """Name of the perceptual term, with its kind."""
        return f"perceptual_{self.settings.perceptual_kind}"

    def _perceptual_distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        kind = self.settings.perceptual_kind
        if kind == "gmsd":
            return gmsd(prediction, target).mean()
        if kind == "ms_ssim":
            return 1.0 - ms_ssim(prediction, target).mean()
        assert self.perceptual is not None
        distance: Tensor = self.perceptual(prediction.float(), target.float())
        return distance.mean()

    def forward(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Unweighted terms and their weighted total.

        Args:
            prediction: (B, 3, H, W), not clamped, H and W even.
            target: (B, 3, H, W) in [-1, 1].

        Returns:
            Scalars `l2`, `wavelet_l1`, `perceptual_<kind>` (not for kind `none`) and `total`.
        """
        if prediction.shape != target.shape:
            raise ValueError(
                f"prediction: shape {tuple(prediction.shape)} differs from the target's "
                f"{tuple(target.shape)}"
            )
        terms = {
            "l2": (prediction.float() - target.float()).square().mean(),
            "wavelet_l1": wavelet_l1(prediction, target),
        }
        total = self.settings.l2 * terms["l2"] + self.settings.wavelet * terms["wavelet_l1"]
        if self.settings.perceptual_kind != "none":
            terms[self.perceptual_name] = self._perceptual_distance(prediction, target)
            total = total + self.settings.perceptual * terms[self.perceptual_name]
        # The terms stay unweighted, so that curves of runs with other weights can be compared.
        terms["total"] = total
        return terms
