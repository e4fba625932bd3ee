"""A Transformer: the decoder-only language model, and the encoder that classifies.

dltrain launch recipe=transformer data.source=stdlib_text model.preset=tiny
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..core.contracts import Batch, Layout, SequenceRule, TensorRule
from ..core.spec import Spec
from .attention import Attention, Block, SwiGLU
from .inputs import as_sequence, refuse_idle_keys
from .losses import cross_entropy
from .text import token_metrics

#: Sizes by name; the parameters counted are those of the language model with its own vocabulary. 125m and 350m have
#: the widths and depths of GPT-2's (Radford et al. 2019), 1b, 7b and 70b are those of Llama 3.2, Llama 2 and Llama 3.
PRESETS: Mapping[str, Mapping[str, int | bool]] = {
    "tiny": {"dim": 64, "layers": 2, "heads": 4, "kv_heads": 2, "feedforward": 192},
    "mini": {"dim": 192, "layers": 4, "heads": 6, "kv_heads": 2, "feedforward": 512},
    "small": {"dim": 384, "layers": 8, "heads": 6, "kv_heads": 2, "feedforward": 1024},
    "125m": {"dim": 768, "layers": 12, "heads": 12, "kv_heads": 12, "feedforward": 2048, "vocabulary": 50304},
    "350m": {"dim": 1024, "layers": 24, "heads": 16, "kv_heads": 16, "feedforward": 2816, "vocabulary": 50304},
    "1b": {"dim": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "feedforward": 8192, "vocabulary": 128256},
    "7b": {
        "dim": 4096,
        "layers": 32,
        "heads": 32,
        "kv_heads": 32,
        "feedforward": 11008,
        "vocabulary": 32000,
        "tie_weights": False,
    },
    "70b": {
        "dim": 8192,
        "layers": 80,
        "heads": 64,
        "kv_heads": 8,
        "feedforward": 28672,
        "vocabulary": 128256,
        "tie_weights": False,
    },
}
_KEYS = {"tie_weights": ("next_token",), **dict.fromkeys(("classes", "inputs"), ("classify",))}
_TOKEN_KEYS = ("vocabulary", "tie_weights")  # of a preset these are the language model's alone
_STD = 0.02
_RESIDUAL = ("attention.output.weight", "feedforward.down.weight")


class TransformerConfig(Spec):
    """Arguments of the Transformer (``model:`` in a job file)."""

    task: Literal["next_token", "classify"] = "next_token"
    """'next_token': a decoder-only language model. 'classify': an encoder, which reads in both directions, and the
    class from the mean over all places."""
    preset: Literal["tiny", "mini", "small", "125m", "350m", "1b", "7b", "70b"] = "tiny"
    """A size by name: sets dim, layers, heads, kv_heads, feedforward, and of a language model from 125m on the
    vocabulary. Keys that are given beside it override it."""
    vocabulary: int = Field(256, gt=1)
    """Number of different tokens."""
    inputs: int | None = Field(None, gt=0)
    """Features per step where 'classify' reads vectors, or an image row by row (channels × width), and not tokens."""
    classes: int = Field(10, gt=1)
    """Number of classes; used by 'classify' alone."""
    dim: int = Field(64, gt=0)
    """Width of the residual stream."""
    layers: int = Field(2, gt=0)
    """Number of blocks."""
    heads: int = Field(4, gt=0)
    """Query heads; dim is shared evenly among them."""
    kv_heads: int = Field(2, gt=0)
    """Key and value heads, each shared by heads / kv_heads query heads."""
    feedforward: int = Field(192, gt=0)
    """Inner width of the feed-forward layers."""
    tie_weights: bool = True
    """Use one matrix as the embedding and as the output layer; used by 'next_token' alone."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the embedding's and of each layer's outputs dropped in training."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Probability that the targets spread evenly over all classes or tokens."""
    rope_base: float = Field(10000.0, gt=1)
    """Base of the rotary positions' wavelengths; raise it for long sequences."""
    norm_eps: float = Field(1e-5, gt=0)
    """Added to the mean square in RMS norms."""

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, given: Any) -> Any:
        preset = given.get("preset") if isinstance(given, dict) else None
        if not isinstance(preset, str):
            return given
        given = cast("dict[str, Any]", given)
        skipped = _TOKEN_KEYS if given.get("task") == "classify" else ()
        return {key: value for key, value in PRESETS.get(preset, {}).items() if key not in skipped} | given

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.dim % self.heads or self.dim // self.heads % 2:
            raise ValueError(f"dim {self.dim} does not give each of {self.heads} heads an even width")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot be shared evenly by {self.kv_heads} kv_heads")
        if self.task == "classify" and self.inputs is not None and "vocabulary" in self.model_fields_set:
            raise ValueError("'inputs' is for vectors and 'vocabulary' for tokens: give one of them")
        refuse_idle_keys(self, self.task, _KEYS)
        return self


class Transformer(nn.Module):
    """int64 tokens ``[samples, steps]`` to logits ``[samples, steps, vocabulary]`` or ``[samples, classes]``.

    With ``inputs`` it reads floats ``[samples, steps, inputs]``, or what :func:`as_sequence` makes into them.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.tied = config.task == "next_token" and config.tie_weights
        self.pooled = config.task == "classify"
        self.depth = config.layers
        self.reader = AsSequence() if self.pooled and config.inputs is not None else None
        if self.pooled and config.inputs is not None:
            self.embedding = nn.Linear(config.inputs, config.dim)
        else:
            self.embedding = nn.Embedding(config.vocabulary, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(_block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.pool = Mean() if self.pooled else None
        self.head = nn.Linear(config.dim, config.classes if self.pooled else config.vocabulary, bias=self.pooled)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew, in the order of the modules; also after ``to_empty()`` of a model built on 'meta'.

        Normal with deviation 0.02; of the two layers of a block that write to the residual stream 0.02 / sqrt(2 ·
        blocks), so that its variance does not grow with depth (GPT-2: Radford et al. 2019). Biases 0, norms 1.
        """
        if self.tied:
            self.head.weight = cast(nn.Embedding, self.embedding).weight
        residual = _STD / (2 * self.depth) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                nn.init.normal_(parameter, std=residual if name.endswith(_RESIDUAL) else _STD)

    def forward(self, x: Tensor) -> Tensor:
        """As :meth:`TransformerRecipe.layout` says it to pipelines."""
        if self.reader is not None:
            x = self.reader(x)
        x = self.dropout(self.embedding(x))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.pool is not None:
            x = self.pool(x)
        return self.head(x)


class AsSequence(nn.Module):
    """:func:`as_sequence`."""

    def forward(self, x: Tensor) -> Tensor:
        return as_sequence(x)


class Mean(nn.Module):
    """``[samples, steps, dim]`` to the mean over the steps, ``[samples, dim]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


def _block(config: TransformerConfig) -> Block:
    attention = Attention(
        config.dim,
        heads=config.heads,
        kv_heads=config.kv_heads,
        causal=config.task == "next_token",
        rope_base=config.rope_base,
    )
    feedforward = SwiGLU(config.dim, config.feedforward)
    return Block(attention, feedforward, dim=config.dim, eps=config.norm_eps, dropout=config.dropout)


class TransformerRecipe:
    """Batches of ``x``: tokens (int64), vectors, or images; and ``y``: the tokens that follow, or a class index."""

    Config = TransformerConfig

    def __init__(self, **model: object) -> None:
        self.config = self.Config.model_validate(model)

    def parts(self) -> dict[str, nn.Module]:
        return {"transformer": Transformer(self.config)}

    def layout(self, part: str) -> Layout:
        """The blocks, and both ends unless they share a matrix, which then stays with the whole model.

        A tensor group shares the heads, the feed-forward layers' inner width, and the vocabulary (Shoeybi et al. 2019,
        "Megatron-LM"; the sequence as in Korthikanti et al. 2022, "Reducing activation recomputation").
        """
        config = self.config
        blocks = tuple(f"blocks.{i}" for i in range(config.layers))
        of_tokens = config.task == "next_token" or config.inputs is None
        columns = ("attention.q", "attention.k", "attention.v", "feedforward.gate", "feedforward.up")
        rules: dict[str, TensorRule] = {f"blocks.*.{name}": "column" for name in columns}
        rules |= {"blocks.*.attention.output": "row", "blocks.*.feedforward.down": "row"}
        if of_tokens:
            rules["embedding"] = "embedding"
        if config.task == "next_token":
            rules["head"] = "whole_column"
        along: dict[str, SequenceRule] = {
            "blocks.*.attention_norm": "norm",
            "blocks.*.feedforward_norm": "norm",
            "norm": "norm",
            "blocks.*.dropout": "dropout",
            "dropout": "dropout",
        }
        return Layout(
            units=blocks if config.task == "next_token" and config.tie_weights else ("embedding", *blocks, "head"),
            tensor=rules,
            sequence=along if of_tokens else {},  # vectors come in whole
            tensor_sizes={"heads": config.heads, "kv_heads": config.kv_heads},
            pipeline=(
                *(() if of_tokens else ("reader",)),
                *("embedding", "dropout", *blocks, "norm"),
                *(() if config.task == "next_token" else ("pool",)),
                "head",
            ),
        )

    def loss(self, part: str, parts: Mapping[str, nn.Module], batch: Batch) -> Tensor:
        return cross_entropy(parts[part](batch["x"]), batch["y"], smoothing=self.config.label_smoothing)

    def metrics(self, parts: Mapping[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
        """The loss and the accuracy (over places, for 'next_token'), and there the bits per byte."""
        logits, y = parts["transformer"](batch["x"]), batch["y"]
        values = {"loss": cross_entropy(logits, y, smoothing=self.config.label_smoothing, per_sample=True)}
        if self.config.task == "next_token":
            return {**values, **token_metrics(logits, batch)}
        return {**values, "accuracy": (logits.argmax(dim=1) == y).to(torch.float32)}
