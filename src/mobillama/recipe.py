"""Recipes: every setting of a model, a data preparation and a pre-training run, typed and explained.

The text under each field is its ``--help``. Relative paths start at the working directory. Files are read and overrides
applied in :mod:`mobillama.config`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal, Optional

from mobillama.errors import UsageError


def require(holds: bool, key: str, value: object, wanted: str) -> None:
    """Refuse a setting.

    Raises:
        UsageError: ``holds`` is false; it names ``key``, ``value`` and what is ``wanted``.
    """
    if not holds:
        raise UsageError(f"{key}: {value} is not {wanted}")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the decoder. The defaults are the paper's MobiLlama 0.5B; names are those of Hugging Face configs."""

    vocab_size: int = 32000
    """Number of token ids; must equal the tokenizer's."""
    hidden_size: int = 2048
    """Width h of the residual stream."""
    intermediate_size: int = 5632
    """Inner width I of a feed-forward network."""
    num_hidden_layers: int = 22
    """Number L of layers that a token passes."""
    num_attention_heads: int = 32
    """Number of query heads."""
    num_key_value_heads: Optional[int] = None
    """Number of key/value heads (grouped-query attention); absent: one for each query head."""
    head_dim: Optional[int] = None
    """Width of a head; absent: hidden_size / num_attention_heads."""
    share: Literal["none", "ffn", "block"] = "ffn"
    """What layers share: nothing, the feed-forward network (MobiLlama), or the whole block with its norms (baseline3)."""
    ffn_groups: int = 1
    """With share=ffn: number of feed-forward networks, dealt to contiguous groups of layers; 1 is the paper's."""
    max_position_embeddings: int = 2048
    """Context length in tokens."""
    rms_norm_eps: float = 1e-5
    """Epsilon of RMSNorm (released code and weights 1e-5; the paper's text 1e-6)."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    scale_residual_init: bool = False
    """Divide the initial output projections of attention and feed-forward by sqrt(2 L) (not in the paper)."""
    qk_norm: bool = False
    """Normalise each head's queries and keys before they are rotated (RMSNorm; not in the paper)."""
    tie_word_embeddings: bool = False
    """Let the head be the embedding table, as many small models do (the paper's are untied)."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "a positive number")
        for name in ("num_key_value_heads", "head_dim"):
            given = getattr(self, name)
            require(given is None or given >= 1, f"model.{name}", given, "a positive number, or absent")
        require(
            self.max_position_embeddings >= 1,
            "model.max_position_embeddings",
            self.max_position_embeddings,
            "1 or more",
        )
        require(self.rms_norm_eps > 0, "model.rms_norm_eps", self.rms_norm_eps, "above 0")
        require(self.rope_theta > 0, "model.rope_theta", self.rope_theta, "above 0")
        require(self.initializer_range >= 0, "model.initializer_range", self.initializer_range, "0 or more")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise UsageError(
                f"model.head_dim: hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}; set head_dim, for example {-(-self.hidden_size // self.num_attention_heads)}"
            )
        if self.attention_head_dim % 2:
            raise UsageError(f"model.head_dim: {self.attention_head_dim} is odd; rotary embedding needs an even width")
        if self.num_attention_heads % self.key_value_heads:
            raise UsageError(
                f"model.num_key_value_heads: {self.key_value_heads} does not divide num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if not 1 <= self.ffn_groups <= self.num_hidden_layers:
            raise UsageError(
                f"model.ffn_groups: {self.ffn_groups} is not within 1…{self.num_hidden_layers} (the layers)"
            )
        if self.ffn_groups > 1 and self.share != "ffn":
            raise UsageError(f"model.ffn_groups: {self.ffn_groups} groups need share=ffn, not share={self.share}")

    @property
    def attention_head_dim(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def layer_weights(self) -> list[tuple[int, int]]:
        """For each layer, the index of its stored attention block and of its stored feed-forward network.

        This table is all that sharing is: none (i, i), ffn (i, i·g // L), block (0, 0).
        """
        layers = range(self.num_hidden_layers)
        if self.share == "none":
            return [(i, i) for i in layers]
        if self.share == "ffn":
            return [(i, i * self.ffn_groups // self.num_hidden_layers) for i in layers]
        return [(0, 0) for _ in layers]


@dataclass(frozen=True)
class CleanConfig:
    """What is done to the documents of a source before they are tokenised; by default nothing."""

    repair: bool = False
    """Mend the encoding: drop byte-order marks and control characters, CRLF to LF, Unicode NFC."""
    language: str = ""
    """Keep documents in this language (ISO 639-1, for example en); empty: all."""
    min_language_score: float = 0.65
    """Least certainty of the language, 0…1."""
    gopher_repetition: bool = False
    """Gopher's rules on repeated lines, paragraphs and n-grams (arXiv 2112.11446, table A1)."""
    gopher_quality: bool = False
    """Gopher's rules on length, symbols, stop words (arXiv 2112.11446, A1.1)."""
    c4_quality: bool = False
    """C4's rules: keeps only lines that end a sentence, drops pages with braces or fewer than 5 sentences."""
    exact_duplicates: bool = False
    """Drop documents whose cleaned text stood before, in this or another source that has this on."""
    near_duplicates: bool = False
    """Drop documents that MinHash finds nearly equal to one before, in this or another source that has this on."""

    def __post_init__(self) -> None:
        wanted = bool(re.fullmatch(r"([a-z]{2,3})?", self.language))
        require(wanted, "clean.language", repr(self.language), "a code of two or three letters such as en")
        require(0 <= self.min_language_score <= 1, "clean.min_language_score", self.min_language_score, "within 0…1")


@dataclass(frozen=True)
class SourceConfig:
    """One source of documents."""

    path: str
    """A file, a directory, or with format=huggingface a data set's name (owner/name) or local directory."""
    format: Literal["auto", "jsonl", "parquet", "text", "amber", "huggingface"] = "auto"
    """auto: by the files' names (.jsonl or .ndjson, also .gz .xz .zst; .parquet; .txt). text: each file is a document.
    amber: sequences of ids as LLM360 publishes them, without its holdout_*. huggingface: streamed from the hub, or a
    local directory."""
    files: str = ""
    """Glob of the files to take below a directory, for example **/*.py; empty: all that the format knows."""
    subset: str = ""
    """With huggingface: the configuration's name. With amber: the label whose sequences are taken; empty: all."""
    split: str = "train"
    """With huggingface: the split."""
    revision: str = ""
    """With huggingface: the commit to read; empty: the newest, which another day may be another."""
    licence: str = "unstated"
    """Licence of the texts, kept in the manifest."""
    url: str = ""
    """Where the texts come from, kept in the manifest."""
    text_field: str = "text"
    """Key of the text in a JSON line, a Parquet column or a data set's row."""
    weight: float = 1.0
    """How often its training sequences are dealt out: 0.5 takes half of them, 2 takes each twice."""
    clean: CleanConfig = field(default_factory=CleanConfig)
    """Cleaning of this source."""

    def check(self, key: str) -> None:
        """Refuse values that cannot be, and keys that would have no effect; ``key`` is the source's.

        Raises:
            UsageError: the message names the key.
        """
        require(bool(self.path), f"{key}.path", repr(self.path), "the name of a file, directory or data set")
        require(0 < self.weight < math.inf, f"{key}.weight", self.weight, "above 0 and finite")
        used = {
            "subset": self.format in ("amber", "huggingface"),
            "split": self.format == "huggingface",
            "revision": self.format == "huggingface",
            "text_field": self.format not in ("amber", "text"),
            "clean": self.format != "amber",
            "files": self.format != "huggingface",
        }
        defaults = SourceConfig(self.path)
        for name in (name for name, is_used in used.items() if not is_used):
            if getattr(self, name) != getattr(defaults, name):
                raise UsageError(f"{key}.{name}: has no effect with format: {self.format}; remove it")


@dataclass(frozen=True)
class PrepareRecipe:
    """Raw documents to training sequences (``mobillama data prepare``)."""

    sources: dict[str, SourceConfig]
    """The sources by name, each packed on its own: {name: {path: …}}."""
    tokenizer: str
    """A sentencepiece .model, a tokenizer.json, or a directory that holds one."""
    sequence_length: int = 2049
    """Ids in a sequence: context length + 1 (the paper's 2,049)."""
    holdout: float = 0.01
    """Sequences held out of each source: a share when below 1, a count otherwise (Amber: 102400)."""
    chunks: int = 360
    """Number of chunk files for the training sequences (the paper's 360)."""
    seed: int = 0
    """Seed of the hold-out and of the training order."""
    max_document_bytes: int = 16777216
    """Longest document in bytes of UTF-8; what is longer follows long_documents."""
    long_documents: Literal["skip", "split"] = "skip"
    """Documents beyond max_document_bytes: skip them (counted), or split them into documents of that size."""
    bad_documents: Literal["stop", "skip"] = "stop"
    """Lines that are no JSON, lack the text, or are not UTF-8: stop with an error, or skip them (counted)."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise UsageError("sources: none given; name at least one source of documents")
        for name, source in self.sources.items():
            plain = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name)
            require(bool(plain), "sources", repr(name), "a name of letters, digits, '-' and '_'")
            require(name != "duplicates", "sources", repr(name), "free: the table of duplicates has it")
            source.check(f"sources.{name}")
        require(len(self.sources) <= 255, "sources", len(self.sources), "at most 255 of them")
        require(self.sequence_length >= 2, "sequence_length", self.sequence_length, "2 or more")
        require(self.chunks >= 1, "chunks", self.chunks, "a positive number")
        whole = self.holdout < 1 or self.holdout == int(min(self.holdout, 1e15))
        require(0 <= self.holdout < math.inf and whole, "holdout", self.holdout, "a share below 1 or a whole number")
        require(0 <= self.seed < 1 << 63, "seed", self.seed, "within 0…2^63-1")
        require(self.max_document_bytes >= 1024, "max_document_bytes", self.max_document_bytes, "1024 or more")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, warm-up and decay (section 3.3 of the paper: AdamW, cosine)."""

    kind: Literal["adamw", "muon"] = "adamw"
    """adamw: for all. muon: Muon, its updates scaled to AdamW's, for the layers' matrices, AdamW for the rest (not in
    the paper)."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warm-up: cosine to min_learning_rate, or wsd: constant, then linear to it (not in the paper)."""
    decay_share: float = 0.2
    """With schedule=wsd: share of the steps in which the rate falls."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    min_learning_rate: float = 3e-5
    """Learning rate at the last step."""
    warmup_steps: int = 2000
    """Steps of linear warm-up; the first step already learns at peak/warmup_steps."""
    beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    beta2: float = 0.95
    """Decay of AdamW's mean of squared gradients."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices."""
    decay_all: bool = False
    """Decay norms and embeddings too, as the authors' trainer did."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""

    def __post_init__(self) -> None:
        rate, least = self.learning_rate, self.min_learning_rate
        require(0 < rate < math.inf, "optimizer.learning_rate", rate, "above 0")
        require(0 <= least <= rate, "optimizer.min_learning_rate", least, f"within 0…learning_rate ({rate})")
        require(0 < self.decay_share <= 1, "optimizer.decay_share", self.decay_share, "above 0 and at most 1")
        require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "0 or more")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "at least 0 and below 1")
        require(0 < self.eps < math.inf, "optimizer.eps", self.eps, "above 0")
        for name in ("weight_decay", "clip_norm"):
            require(0 <= getattr(self, name) < math.inf, f"optimizer.{name}", getattr(self, name), "0 or more")


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and cadence of a pre-training run."""

    steps: int = 732422
    """Optimizer steps (the paper's 1.2 T tokens in steps of 800 × 2,048)."""
    batch_size: int = 800
    """Sequences in a step, over all devices (the paper's 800)."""
    micro_batch_size: int = 5
    """Sequences that a device takes through the model at once; the rest of the batch is accumulated."""
    z_loss: float = 0.0
    """Weight of the squared log-normaliser in the loss, for example 1e-4; it keeps logits small (not in the paper)."""
    mask_documents: bool = False
    """Let no token see another document of its sequence, and count positions anew in each (not in the paper)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type: bfloat16 autocast over float32 weights, or float32. auto: bfloat16 where the hardware has it."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    parallelism: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """What torchrun's processes hold. ddp: each the whole model; fsdp: each a share; hsdp: shares within a machine,
    copies between machines."""
    shard_ranks: int = 0
    """With parallelism=hsdp: processes that share one copy; 0: those of a machine."""
    compile: bool = False
    """Compile the model's layers with torch.compile: slower to start, faster steps."""
    fused: bool = False
    """Compute layers with products that have SwiGLU and sums fused in, and flash-attn-4's attention: the fastest, with
    the least memory (Hopper GPUs, bfloat16; pip install 'mobillama[hopper]')."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Keep less for the backward pass and compute it again. selective: all but products and attention, little slower
    when compiled; full: whole layers, a quarter slower, for the least memory."""
    float8: bool = False
    """Multiply the layers' matrices in float8 (CUDA from Ada or Hopper on). Without fused it needs torchao, and is best
    compiled."""
    deterministic: bool = False
    """Make GPU steps repeatable to the bit, flash attention's backward pass too; slower."""
    checkpoint_every: int = 2134
    """Distance of checkpoints; the last step always writes one. The default is about one of Amber's 360 chunks."""
    checkpoint_unit: Literal["steps", "tokens", "chunks"] = "steps"
    """What checkpoint_every counts: steps, tokens, or chunks of the data that were learned from."""
    keep_checkpoints: int = 0
    """Newest checkpoints to keep; 0 keeps all (the paper publishes every one)."""
    keep_every: int = 0
    """With keep_checkpoints: keep for good those whose step is a multiple of this; 0: none."""
    validate_every: int = 2134
    """Steps between validations on the hold-out; the last step always validates. 0: never."""
    validate_sequences: int = 256
    """Held-out sequences per source in a validation; 0: all."""
    inspect_every: int = 100
    """Steps between looks at the weights: how far the update moves each group of them, and, for the ledger, a
    fingerprint of all their bits. 0: never."""
    sink: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """Where metrics are copied to, beside metrics.jsonl."""

    _least_steps: ClassVar[int] = 1

    def __post_init__(self) -> None:
        wanted = "a positive number" if self._least_steps else "0 or more"
        require(self.steps >= self._least_steps, "train.steps", self.steps, wanted)
        for name in ("batch_size", "micro_batch_size", "checkpoint_every"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "a positive number")
        require(0 <= self.z_loss < math.inf, "train.z_loss", self.z_loss, "0 or more")
        if self.fused:
            kept = self.activation_checkpointing
            require(kept != "selective", "train.activation_checkpointing", kept, "none or full with train.fused")
            require(not self.mask_documents, "train.mask_documents", True, "false with train.fused")
        for name in (
            "shard_ranks",
            "keep_checkpoints",
            "keep_every",
            "validate_every",
            "validate_sequences",
            "inspect_every",
        ):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")


@dataclass(frozen=True)
class FaultConfig:
    """What is done when a step's loss or gradient is not finite, or spikes."""

    spike_factor: float = 0.0
    """A gradient norm above this times the median of the last 64 counts as a spike, for example 10; 0: none does."""
    max_skips: int = 0
    """Bad steps in a row whose update is left out; when more follow one another, the run rolls back."""
    max_rollbacks: int = 0
    """How often a run goes back to its last checkpoint and passes over the data from there to the bad step; then it
    stops with exit code 5."""

    def __post_init__(self) -> None:
        require(
            self.spike_factor == 0 or 1 < self.spike_factor < math.inf,
            "faults.spike_factor",
            self.spike_factor,
            "above 1, or 0",
        )
        for name in ("max_skips", "max_rollbacks"):
            require(getattr(self, name) >= 0, f"faults.{name}", getattr(self, name), "0 or more")


# What may differ when a run is resumed: steps learn from the same sequences, results may differ by rounding.
RESUMABLE_CHANGES = frozenset(
    {
        "data",
        "run",
        "train.micro_batch_size",
        "train.device",
        "train.parallelism",
        "train.shard_ranks",
        "train.compile",
        "train.fused",
        "train.activation_checkpointing",
        "train.checkpoint_every",
        "train.checkpoint_unit",
        "train.keep_every",
        "train.keep_checkpoints",
        "train.validate_every",
        "train.validate_sequences",
        "train.inspect_every",
        "train.sink",
    }
)


@dataclass(frozen=True)
class PretrainRecipe:
    """A pre-training run (``mobillama pretrain``)."""

    data: str
    """Directory that ``mobillama data prepare`` wrote."""
    run: str
    """Run directory, for example runs/mobillama-0.5b."""
    seed: int = 0
    """Seed of the initial weights and of the data order."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the model. model.preset names the preset that gives the defaults."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer and its schedule."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, batch and cadence."""
    faults: FaultConfig = field(default_factory=FaultConfig)
    """What is done about bad steps."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 1 << 63, "seed", self.seed, "within 0…2^63-1")
        require(not (self.train.fused and self.model.qk_norm), "model.qk_norm", True, "false with train.fused")


_LARGE_BASE = ModelConfig(share="none")

PRESETS: dict[str, tuple[ModelConfig, str]] = {
    "mobillama-0.5b": (ModelConfig(), "the paper's 0.5B: one feed-forward network for 22 layers"),
    "mobillama-0.8b": (
        ModelConfig(hidden_size=2560, intermediate_size=10240),
        "the 0.8B as its weights were released (head width 80)",
    ),
    "mobillama-0.8b-paper": (
        ModelConfig(hidden_size=2532, intermediate_size=11080, head_dim=80),
        "the 0.8B as the paper prints it; 2532/32 = 79.125 is no head width, so heads are 80 wide (q, k, v, o: 2532×2560)",
    ),
    "large-base-1.2b": (_LARGE_BASE, "the paper's large-base: no sharing"),
    "baseline1": (
        ModelConfig(hidden_size=1024, share="none"),
        "half the width, no sharing (the paper does not state its heads: 32 taken)",
    ),
    "baseline2": (ModelConfig(num_hidden_layers=8, share="none"), "8 layers, no sharing"),
    "baseline3": (ModelConfig(share="block"), "one whole block for 22 layers"),
    "mobillama-small": (
        ModelConfig(16384, 512, 1408, 22, 8, max_position_embeddings=1024),
        "laptop size, as deep as the paper's",
    ),
    "mobillama-tiny": (
        ModelConfig(4096, 256, 1024, 2, 4, max_position_embeddings=256, scale_residual_init=True),
        "laptop size: what quickstart trains in minutes on two CPU cores",
    ),
}


def preset_defaults(name: str) -> dict[str, object]:
    """Return the fields of a preset's :class:`ModelConfig` by name."""
    return {item.name: getattr(PRESETS[name][0], item.name) for item in fields(ModelConfig)}
