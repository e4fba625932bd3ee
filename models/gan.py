"""A generative adversarial network (Goodfellow et al. 2014): two parts that are trained in turn, in one job.

dltrain launch recipe=gan train.optimizer.lr=0.0002 'train.optimizer.betas=[0.5, 0.999]'
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from ..core.contracts import Batch, Layout
from ..core.spec import Spec

_SHOWN = 64


class GanConfig(Spec):
    """Arguments of the GAN (``model:`` in a job file)."""

    kind: Literal["conv", "mlp"] = "conv"
    """'conv' for images, after DCGAN; 'mlp' for rows of numbers."""
    channels: int = Field(1, gt=0)
    """Channels of the images; used by 'conv'."""
    size: int = Field(8, gt=0)
    """Height and width of the images in pixels, a multiple of 4; used by 'conv'."""
    features: int = Field(1, gt=0)
    """Numbers in a row; used by 'mlp'."""
    latent: int = Field(32, gt=0)
    """Random numbers that the generator makes a sample of."""
    width: int = Field(64, gt=0)
    """Channels of the widest convolutions, or units of the hidden layers."""
    loss: Literal["non_saturating", "wasserstein"] = "non_saturating"
    """'non_saturating' (Goodfellow et al. 2014), or 'wasserstein' with gradient penalty (Gulrajani et al. 2017), whose
    discriminator wants several steps for one of the generator: train.parts.generator.every."""
    penalty: float = Field(10.0, ge=0)
    """Weight of the gradient penalty of 'wasserstein'."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kind == "conv" and self.size % 4:
            raise ValueError(f"size must be a multiple of 4, not {self.size}: there are two layers of stride 2")
        if self.kind == "conv" and self.width % 2:
            raise ValueError(f"width must be even, not {self.width}")
        return self


def _generator(config: GanConfig) -> nn.Module:
    width = config.width
    if config.kind == "mlp":
        hidden = [nn.Linear(config.latent, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        return nn.Sequential(*hidden, nn.Linear(width, config.features))
    side = config.size // 4
    return nn.Sequential(
        nn.Linear(config.latent, width * side * side),
        nn.Unflatten(1, (width, side, side)),
        nn.GroupNorm(1, width),
        nn.ReLU(),
        nn.ConvTranspose2d(width, width // 2, 4, stride=2, padding=1),
        nn.GroupNorm(1, width // 2),
        nn.ReLU(),
        nn.ConvTranspose2d(width // 2, config.channels, 4, stride=2, padding=1),
    )


def _discriminator(config: GanConfig) -> nn.Module:
    width = config.width
    if config.kind == "mlp":
        hidden = [nn.Linear(config.features, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2)]
        return nn.Sequential(*hidden, nn.Linear(width, 1))
    side = config.size // 4
    return nn.Sequential(
        nn.Conv2d(config.channels, width // 2, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width // 2, width, 4, stride=2, padding=1),
        nn.GroupNorm(1, width),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(width * side * side, 1),
    )


class GanRecipe:
    """Batches of ``x``: float images ``[samples, channels, size, size]`` or rows ``[samples, features]``.

    Every step trains the discriminator, then the generator against it. As in DCGAN (Radford et al. 2016), with
    GroupNorm in place of BatchNorm: no sample's score depends on another's, which the gradient penalty needs, and which
    makes the numbers independent of how samples are dealt to ranks. The generator has no final tanh, since inputs are
    normalised to zero mean and unit variance rather than to [-1, 1].
    """

    Config = GanConfig

    def __init__(self, **model: object) -> None:
        self.config = self.Config.model_validate(model)

    def parts(self) -> dict[str, nn.Module]:
        return {"discriminator": _discriminator(self.config), "generator": _generator(self.config)}

    def layout(self, part: str) -> Layout:
        return Layout(double_backward=part == "discriminator" and self.config.loss == "wasserstein")

    def loss(self, part: str, parts: Mapping[str, nn.Module], batch: Batch) -> Tensor:
        real = batch["x"]
        if part == "generator":
            scores = parts["discriminator"](self._fake(parts, len(real), real.device))
            return -scores.mean() if self.config.loss == "wasserstein" else functional.softplus(-scores).mean()
        with torch.no_grad():
            fake = self._fake(parts, len(real), real.device)
        if self.config.loss == "wasserstein":
            return self._critic_loss(parts[part], real, fake)
        of_real, of_fake = parts[part](torch.cat([real, fake])).chunk(2)
        return (functional.softplus(-of_real) + functional.softplus(of_fake)).mean()

    def _critic_loss(self, critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
        """The Wasserstein loss with the penalty on gradients at points between real and made samples, in one pass."""
        share = torch.rand(len(real), *(1 for _ in real.shape[1:]), device=real.device)
        between = torch.lerp(real, fake, share).requires_grad_()
        of_real, of_fake, of_between = critic(torch.cat([real, fake, between])).chunk(3)
        (slope,) = torch.autograd.grad(of_between.sum(), between, create_graph=True)
        steepness = slope.flatten(1).norm(dim=1)
        return (of_fake - of_real).mean() + self.config.penalty * (steepness - 1).square().mean()

    def _fake(self, parts: Mapping[str, nn.Module], count: int, device: torch.device) -> Tensor:
        return parts["generator"](torch.randn(count, self.config.latent, device=device))

    def metrics(self, parts: Mapping[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
        """``energy_distance``: between the real and the made samples, 0 where their distributions are the same.

        Székely & Rizzo 2013: twice the mean distance of a real sample to a made one, minus the mean distances of pairs
        within each kind. Over the pairs of the batch, without bias, so it may come out below 0.
        """
        real = batch["x"].flatten(1)
        fake = self._fake(parts, len(real), real.device).flatten(1)
        others = max(1, len(real) - 1)
        within = (torch.cdist(real, real).sum(dim=1) + torch.cdist(fake, fake).sum(dim=1)) / others
        return {"energy_distance": 2 * torch.cdist(real, fake).mean(dim=1) - within}

    def samples(self, parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """Images made of the same latent numbers every time; none of rows."""
        if self.config.kind == "mlp":
            return {}
        device = next(parts["generator"].parameters()).device
        return {"generator": self._fake(parts, _SHOWN, device)}
