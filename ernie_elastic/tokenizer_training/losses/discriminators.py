"""The two networks that tell real from reconstructed media: patches of pictures, and spectrograms of sounds.

Contract: logits are high for real. No layer mixes the items of a batch (no batch norm), so any batch size and any
number of ranks give the same logits. Weights draw from the global generator: fork and seed it around the constructor.
paper: section 2.2 (an adversarial loss from discriminators, StyleGAN cited, without details). background: patch
discriminator of pix2pix and VQGAN; complex STFT discriminator of EnCodec.

Shape letters: N items, H/W pixels, h/w patches, L samples, T time frames, K frequency bins, k bins left, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from ernie_elastic.errors import ConfigError, DataError

SLOPE = 0.2  # of the leaky rectifiers, background
WIDEST = 8  # channels grow up to this multiple of the width


class PatchDiscriminator(nn.Module):
    """Logits for overlapping patches of pictures; frames of clips are merged into the batch.

    background: spectral norm (Miyato et al. 2018) on all layers. ours: but the last, so that logits can reach the
    margins of the hinge loss.
    """

    def __init__(self, channels: int = 3, width: int = 32, layers: int = 3) -> None:
        """channels of the pictures; width: channels after the first layer; layers that halve the sides.

        Raises ConfigError unless all are at least 1.
        """
        super().__init__()
        if min(channels, width, layers) < 1:
            raise ConfigError(
                f"patch discriminator: channels {channels}, width {width} and layers {layers} must be at least 1"
            )
        self.channels, self.smallest = channels, 2**layers
        widths = [channels, *(width * min(2**layer, WIDEST) for layer in range(layers + 1))]
        blocks: list[nn.Module] = []
        for layer in range(layers + 1):
            # Halving layers come first; then one that only widens what a logit sees.
            kernel, stride = (4, 2) if layer < layers else (3, 1)
            conv = nn.Conv2d(widths[layer], widths[layer + 1], kernel, stride, padding=1)
            blocks += [spectral_norm(conv), nn.LeakyReLU(SLOPE)]
        self.body = nn.Sequential(*blocks)
        self.head = nn.Conv2d(widths[-1], 1, kernel_size=3, padding=1)

    def forward(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """Logits [N, 1, h, w] of pixels float [N, C, H, W] in -1..1; h = H // 2^layers, and w likewise.

        Raises DataError for another shape, or a side below 2^layers.
        """
        if pixels_NCHW.ndim != 4 or pixels_NCHW.shape[1] != self.channels:
            raise DataError(
                f"patch discriminator: pixels of shape {tuple(pixels_NCHW.shape)}; expected [N, {self.channels}, H, W]"
            )
        if min(pixels_NCHW.shape[2:]) < self.smallest:
            raise DataError(
                f"patch discriminator: pictures of {pixels_NCHW.shape[2]}x{pixels_NCHW.shape[3]} pixels are smaller "
                f"than {self.smallest}; use larger pictures or fewer layers"
            )
        return self.head(self.body(pixels_NCHW))


class StftDiscriminator(nn.Module):
    """One network for each window of a complex spectrogram; sounds of any length.

    background: EnCodec's MS-STFT discriminator: real and imaginary part are two channels; layers halve the frequencies
    and see ever more time; weight norm. ours: width and windows small enough for a CPU.
    """

    def __init__(self, windows: Sequence[int] = (1024, 512, 256), width: int = 16) -> None:
        """windows: samples of each spectrogram's window (a step is a quarter). width: channels of all layers.

        Raises ConfigError for no windows, one below 16 samples, or a width below 1.
        """
        super().__init__()
        if not windows or min(windows) < 16 or width < 1:
            raise ConfigError(
                f"STFT discriminator: windows {tuple(windows)} must name at least one of 16 samples or more, and width "
                f"{width} be at least 1"
            )
        self.networks = nn.ModuleList(_SpectrumNetwork(window, width) for window in windows)

    def forward(self, wave_NL: torch.Tensor) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
        """For each window (logits [N, 1, T, k], features [N, C, T, k] of every layer before) of waves float [N, L].

        Raises DataError for another shape, or no samples.
        """
        if wave_NL.ndim != 2 or wave_NL.shape[1] < 1:
            raise DataError(f"STFT discriminator: waves of shape {tuple(wave_NL.shape)}; expected [N, L] with L >= 1")
        return [network(wave_NL) for network in self.networks]


class _SpectrumNetwork(nn.Module):
    window_W: torch.Tensor

    def __init__(self, window: int, width: int) -> None:
        super().__init__()
        self.register_buffer("window_W", torch.hann_window(window), persistent=False)
        layers = [weight_norm(nn.Conv2d(2, width, (3, 9), padding=(1, 4)))]
        for dilation in (1, 2, 4):
            # Nine bins at half the step; the dilation spreads the three frames over time.
            conv = nn.Conv2d(width, width, (3, 9), stride=(1, 2), dilation=(dilation, 1), padding=(dilation, 4))
            layers.append(weight_norm(conv))
        layers.append(weight_norm(nn.Conv2d(width, width, (3, 3), padding=(1, 1))))
        self.layers = nn.ModuleList(layers)
        self.head = weight_norm(nn.Conv2d(width, 1, (3, 3), padding=(1, 1)))

    def forward(self, wave_NL: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        size = len(self.window_W)
        # Zeros around: reflection needs more samples than half a window.
        spectrum_NKT = torch.stft(
            wave_NL, size, size // 4, window=self.window_W.to(wave_NL), center=True, pad_mode="constant",
            normalized=True, return_complex=True,
        )  # fmt: skip
        state = torch.view_as_real(spectrum_NKT).permute(0, 3, 2, 1)
        features = []
        for layer in self.layers:
            state = F.leaky_relu(layer(state), SLOPE)
            features.append(state)
        return self.head(state), features
