# ruff: noqa: RUF009  (option() is dataclasses.field with a help text)
"""The sections of a configuration file, as frozen dataclasses, and what must hold between them.

An option is one field here: type, limits, default and help. An option that is not set stays None,
and a property gives the value that is used instead. Every section is checked when it is made, from
a file or in Python.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from msgspec import Meta

from tinyllama.config.options import (
    PATH,
    Relation,
    allowed,
    convert,
    got,
    option,
    options_of,
    problems_of,
)
from tinyllama.config.rope_scaling import RULES, RopeScaling
from tinyllama.errors import ConfigError

# Sizes have no upper limit: parameters are counted exactly, also of models too large to build.
Count = Annotated[int, Meta(ge=1)]
Rows = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Natural = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Part = Annotated[float, Meta(gt=0, le=1)]
Doubt = Annotated[float, Meta(ge=0, lt=0.5)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]
Text = Annotated[str, Meta(min_length=1)]
Address = Annotated[
    str,
    Meta(
        pattern=r"^https?://[^/\s]+",
        description="an address that begins with http:// or https://",
    ),
]
Place = Annotated[str, Meta(min_length=1, extra={PATH: True})]
Texts = Text | Annotated[tuple[Text, ...], Meta(min_length=1)]
LinearName = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LinearNames = Literal["all-linear"] | Annotated[tuple[LinearName, ...], Meta(min_length=1)]

HeadDim = Annotated[int, Meta(ge=2, multiple_of=2)]
AttentionBias = bool | Literal["qkv"]

ATTENTION_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LINEAR = ("gate_proj", "up_proj", "down_proj")
ALL_LINEAR = (*ATTENTION_LINEAR, *MLP_LINEAR)


@dataclass(frozen=True)
class LlamaConfig:
    """[model]: the sizes of a LLaMA. Raises ConfigError for sizes that no model can have."""

    vocab_size: Count = option(32000, "number of tokens in the vocabulary")
    hidden_size: Count = option(768, "width of the residual stream")
    num_layers: Count = option(12, "transformer layers")
    num_heads: Count = option(12, "query heads per layer")
    num_kv_heads: Count | None = option(
        None,
        "key and value heads per layer; fewer than num_heads is grouped-query attention;"
        " when not set, num_heads",
    )
    head_size: HeadDim | None = option(
        None,
        "width of one query, key or value head; when not set, hidden_size / num_heads",
        key="head_dim",
    )
    intermediate_size: Count = option(3072, "width of the SwiGLU feed-forward layer")
    max_seq_len: Count = option(2048, "longest sequence, in tokens")
    rope_theta: Positive = option(10000.0, "base of the rotary embedding's frequencies")
    rope_scaling: RopeScaling | None = option(
        None,
        "scaling of those frequencies for longer contexts, with the parameters of its type under"
        " Hugging Face's names",
    )
    sliding_window: Count | None = option(
        None, "a token attends to so many tokens, itself included; when not set, to all before it"
    )
    attention_bias: AttentionBias = option(
        False, 'biases of q_proj, k_proj, v_proj and o_proj; "qkv": of the first three (Qwen 2)'
    )
    mlp_bias: bool = option(False, "biases of gate_proj, up_proj and down_proj")
    rms_norm_eps: Positive = option(1e-5, "epsilon that RMSNorm adds to the mean square")
    tie_word_embeddings: bool = option(False, "use the embedding matrix as the output head")
    base: Place | None = option(
        None, "folder of the checkpoint to start from; sizes that are not set are read from it"
    )

    def __post_init__(self) -> None:
        _validate("model", self)
        if self.rope_scaling is not None and self.rope_scaling.rope_type == "default":
            object.__setattr__(self, "rope_scaling", None)

    @property
    def kv_heads(self) -> int:
        """Key and value heads per layer: num_kv_heads, or num_heads where that is not set."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_dim(self) -> int:
        """Width of every query, key and value head: head_size, or hidden_size / num_heads."""
        return self.hidden_size // self.num_heads if self.head_size is None else self.head_size

    @property
    def scaling(self) -> RopeScaling | None:
        """rope_scaling with the length of the first training, max_seq_len where it states none."""
        return None if self.rope_scaling is None else self.rope_scaling.trained_on(self.max_seq_len)

    @property
    def biased(self) -> tuple[str, ...]:
        """Names of the linear layers that have a bias."""
        attention = ATTENTION_LINEAR[:3] if self.attention_bias == "qkv" else ATTENTION_LINEAR
        return (attention if self.attention_bias else ()) + (MLP_LINEAR if self.mlp_bias else ())

    @classmethod
    def toy_124m(cls) -> Self:
        """The sizes of configs/124m.toml, which are those of GPT-2 small and the defaults."""
        return cls()

    @classmethod
    def llama2_7b(cls) -> Self:
        """The sizes of configs/7b.toml: Llama 2 7B (Touvron et al. 2023, arXiv:2307.09288)."""
        return cls(
            hidden_size=4096,
            num_layers=32,
            num_heads=32,
            intermediate_size=11008,
            max_seq_len=4096,
        )


@dataclass(frozen=True)
class TrainingConfig:
    """[training]: the optimizer, the batch and the length of the run."""

    learning_rate: Positive = option(3e-4, "peak learning rate")
    weight_decay: NotNegative = option(0.01, "decoupled weight decay of AdamW")
    beta1: Fraction = option(0.9, "decay of AdamW's running mean of gradients")
    beta2: Fraction = option(0.95, "decay of AdamW's running mean of squared gradients")
    epsilon: Positive = option(1e-8, "epsilon that AdamW adds to the root in its denominator")
    grad_clip: NotNegative = option(1.0, "largest norm of the whole gradient; 0 for no limit")
    batch_size: Rows = option(32, "sequences per optimizer step")
    micro_batch_size: Rows | None = option(
        None,
        "sequences in memory at once, whose gradients are accumulated; must divide batch_size; when"
        " not set, as many as fit",
    )
    num_epochs: Count = option(1, "passes over the training text")
    max_steps: Count | None = option(None, "optimizer steps after which to stop")
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)] = option(0, "for weights, shuffling and dropout")
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "type of activations; sums and parameters stay float32"
    )
    optimizer_state: Literal["float32", "bfloat16"] = option(
        "float32",
        "type of AdamW's two running means; bfloat16 is rounded stochastically and takes 4 bytes"
        " per parameter less",
    )
    float32_products: Literal["exact", "bfloat16x3"] = option(
        "exact",
        "products of float32 matrices while training: exact, or each as three of bfloat16, with an"
        " error of about 2^-18, on CPUs with AMX alone; needs dtype float32",
    )
    eval_every: Count | None = option(
        None, "steps between validations; when not set, after each epoch"
    )
    eval_first: bool = option(
        False, "validate before the first step too, as step 0; needs validation text"
    )
    checkpoint_activations: bool = option(
        False, "keep only the input of each layer and recompute the rest: less memory, more time"
    )
    objective: Literal["sft", "dpo", "orpo", "distill"] = option(
        "sft",
        "what is minimised: the loss of the next token (sft), of pairs of a chosen and a rejected"
        " answer (dpo, orpo; [preference]), or of a teacher's distribution (distill;"
        " [distillation])",
    )
    label_smoothing: Fraction = option(
        0.0, "share of the target's probability that is spread over the whole vocabulary"
    )
    z_loss: NotNegative = option(
        0.0, "weight of the square of log Z, the logarithm of the softmax's denominator"
    )
    neftune_alpha: NotNegative = option(
        0.0, "noise on embeddings while training, uniform in +-alpha / sqrt(tokens x hidden_size)"
    )
    early_stopping: Count | None = option(
        None,
        "validations without a lower validation loss after which the run ends; best/ holds the"
        " weights of the lowest",
    )
    devices: Count = option(1, "devices that share the batch; only 1 for now")
    beam: Natural = option(
        0, "width of tinygrad's search for faster kernels; only 0, no search, for now"
    )

    def __post_init__(self) -> None:
        _validate("training", self)

    @property
    def micro_batch(self) -> int:
        """Sequences in memory at once: micro_batch_size, or batch_size where that is not set."""
        return self.batch_size if self.micro_batch_size is None else self.micro_batch_size

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per optimizer step."""
        return self.batch_size // self.micro_batch


@dataclass(frozen=True)
class LRScheduleConfig:
    """[lr_schedule]: the learning rate over the steps."""

    type: Literal["cosine", "linear", "constant", "wsd"] = option(
        "cosine",
        "shape of the decay from learning_rate to min_lr; wsd (warm-up, stable, decay) stays at the"
        " peak until the last decay_fraction of the steps, then falls in a straight line",
    )
    warmup_steps: Natural = option(0, "steps over which the learning rate rises from 0")
    warmup_ratio: Share = option(
        0.0, "the same as a share of the run's steps, rounded up; instead of warmup_steps"
    )
    decay_fraction: Part = option(
        0.2, "share of the steps behind the warm-up over which type wsd decays"
    )
    min_lr: NotNegative = option(0.0, "learning rate at the last step")

    def __post_init__(self) -> None:
        _validate("lr_schedule", self)


@dataclass(frozen=True)
class DataConfig:
    """[data]: texts, tokenizer, and which tokens are trained."""

    train_path: Texts = option("data/train.txt", "training text: files, folders or patterns")
    val_path: Texts | None = option(None, "validation text, in the same forms")
    context_length: Rows | None = option(
        None, "tokens per training sequence; when not set, model.max_seq_len"
    )
    tokenizer: Place | None = option(
        None,
        'tokenizer file or folder, or "train" to train one on the training text; '
        'when not set, the tokenizer of model.base, or "train" without a base',
    )
    tokenizer_vocab_size: Count | None = option(
        None, "vocabulary of a tokenizer that is trained; when not set, model.vocab_size"
    )
    special_tokens: bool = option(
        True,
        "special tokens such as <|im_start|> that are written in rows of JSON Lines, CSV and the "
        "like are read as these tokens; false: as text, as they are in plain text files",
    )
    replace_tokenizer: bool = option(
        False,
        "allow another tokenizer than that of model.base, whose embeddings then mean nothing until "
        "they are trained anew; for training the whole model, not for adapters",
    )
    train_on: Literal["all", "assistant", "last"] | None = option(
        None,
        "which tokens of a conversation are trained on: all, the assistant's, or those of its last "
        "answer; when not set, the assistant's, of a prompt its completion, and of text all",
    )
    template: Literal["chatml", "llama2", "llama3", "alpaca", "none"] | None = option(
        None,
        "how conversations are written as text; none: one message behind the other; when not set, "
        "as the chat template of the tokenizer says",
    )
    pack: bool = option(
        True,
        "several documents share a row, without seeing each other; false: a row for each, the rows "
        "of a batch of similar length",
    )
    val_fraction: Annotated[float, Meta(gt=0, lt=1)] | None = option(
        None, "share of the rows of train_path that is kept for validation, chosen by their hash"
    )
    cache_dir: Place = option(".cache/tinyllama", "folder that keeps tokenized text between runs")

    def __post_init__(self) -> None:
        _validate("data", self)

    @property
    def validates(self) -> bool:
        """Whether there is validation text."""
        return self.val_path is not None or self.val_fraction is not None


@dataclass(frozen=True)
class CheckpointingConfig:
    """[checkpointing]: when and where a run is saved."""

    save_every: Count = option(1000, "steps between checkpoints")
    checkpoint_dir: Place = option("checkpoints", "folder of the run")
    keep_last_n: Count = option(3, "checkpoints to keep; older ones are removed")
    keep_best: bool = option(
        False, "also keep the checkpoint of the lowest validation loss, in best/"
    )

    def __post_init__(self) -> None:
        _validate("checkpointing", self)


@dataclass(frozen=True)
class ObserveConfig:
    """[observe]: what a run says about itself while it goes on."""

    otlp_endpoint: Address | None = option(
        None,
        "OpenTelemetry collector that gets spans and metrics by OTLP over HTTP, such as"
        " http://127.0.0.1:4318; when not set, OTEL_EXPORTER_OTLP_ENDPOINT, or none",
    )
    otlp_operations_every: Count | None = option(
        None,
        "steps between those whose operations are spans too; such a step is timed kernel by kernel;"
        " when not set, none",
    )
    on_anomaly: Literal["note", "skip", "rollback", "stop"] = option(
        "note",
        "what unusual text, a spike of loss or gradient norm, or an update that moves the weights"
        " too far leads to: a note; its update left out; the last checkpoint before it again,"
        " without that data; the end of the run. Whatever is slow is noted in any case",
    )
    anomaly_window: Annotated[int, Meta(ge=32, le=4096)] = option(
        128, "steps before it that a step is compared with"
    )
    update_ratio_every: Natural = option(
        0, "steps between measurements of how far an update moves each layer; 0 for none"
    )
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = option(
        (), "programs that get the metrics too"
    )
    sample_prompts: tuple[Text, ...] = option(
        (), "texts that the model continues from time to time while it is trained"
    )
    sample_every: Count | None = option(
        None, "steps between these samples; when not set, where the run validates"
    )
    sample_tokens: Count = option(64, "most tokens of a sample")

    def __post_init__(self) -> None:
        _validate("observe", self)

    @property
    def guards_updates(self) -> bool:
        """Whether the update of a spiking step is left out."""
        return self.on_anomaly != "note"


@dataclass(frozen=True)
class LoraConfig:
    """[lora]: adapters y = x W^T + scale (x A^T) B^T (Hu et al. 2021, arXiv:2106.09685)."""

    rank: Count = option(16, "rank of an adapter: rows of A, columns of B")
    alpha: Positive = option(32.0, "numerator of the scale alpha / rank")
    dropout: Fraction = option(0.0, "share of an adapter's inputs that training sets to zero")
    target_modules: LinearNames = option(ATTENTION_LINEAR, "linear layers that get an adapter")
    use_rslora: bool = option(False, "scale by alpha / sqrt(rank) instead (arXiv:2312.03732)")

    def __post_init__(self) -> None:
        _validate("lora", self)

    @property
    def scale(self) -> float:
        """The factor of an adapter's output."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the adapted layers; "all-linear" is every linear layer but the head."""
        return ALL_LINEAR if self.target_modules == "all-linear" else tuple(self.target_modules)


@dataclass(frozen=True)
class QloraConfig:
    """[qlora]: how the frozen base is packed (Dettmers et al. 2023, arXiv:2305.14314)."""

    quantize_base: bool = option(True, "pack the linear layers of the frozen base in 4 bits")
    bits: Literal[4] = option(4, "bits per weight")
    block_size: Annotated[int, Meta(ge=2, multiple_of=2)] = option(
        64, "consecutive weights of a row that share one scale"
    )
    requantize: bool = option(
        False,
        "pack also what a GGUF base holds in blocks that no layer multiplies by (Q4_K, Q6_K, ...),"
        " which rounds it a second time; when false, it is widened",
    )

    def __post_init__(self) -> None:
        _validate("qlora", self)


@dataclass(frozen=True)
class PreferenceConfig:
    """[preference]: objectives of pairs: dpo (Rafailov et al. 2023, arXiv:2305.18290) and orpo
    (Hong et al. 2024, arXiv:2403.07691)."""

    beta: Positive = option(
        0.1,
        "how strongly a difference from the reference counts (dpo), or the"
        " odds ratio beside the loss of the chosen answer (orpo)",
    )
    label_smoothing: Doubt = option(
        0.0, "dpo: probability that a pair is labelled the wrong way round (arXiv:2305.18290, 3)"
    )

    def __post_init__(self) -> None:
        _validate("preference", self)


@dataclass(frozen=True)
class DistillationConfig:
    """[distillation]: learning from a teacher's distribution (Hinton et al. 2015)."""

    teacher: Place | None = option(
        None, "model whose distribution is learned: a folder or file with the same vocabulary"
    )
    temperature: Positive = option(
        1.0, "divides the logits of both; the soft loss is multiplied by its square"
    )
    alpha: Share = option(0.5, "share of the loss of the text's own tokens; the rest is soft")
    top_k: Count = option(
        64,
        "most likely tokens of the teacher that are kept, on disk in data.cache_dir",
    )

    def __post_init__(self) -> None:
        _validate("distillation", self)


RELATIONS = (
    Relation(
        ("model.hidden_size", "model.num_heads", "model.head_dim"),
        lambda hidden, heads, width: width is not None or hidden % heads == 0,
        "divisible by model.num_heads, which is {1}",
    ),
    Relation(
        ("model.hidden_size", "model.num_heads", "model.head_dim"),
        lambda hidden, heads, width: width or hidden % heads or hidden // heads % 2 == 0,
        "an even multiple of model.num_heads, which is {1}: rotary embeddings turn pairs",
    ),
    Relation(
        ("model.num_heads", "model.num_kv_heads"),
        lambda heads, kv_heads: kv_heads is None or heads % kv_heads == 0,
        "divisible by model.num_kv_heads, which is {1}",
    ),
    *(
        Relation(
            ("model.rope_scaling",),
            lambda scaling, holds=holds: scaling is None or holds(scaling),
            words,
        )
        for holds, words in RULES
    ),
    Relation(
        ("model.sliding_window", "model.attention_bias", "model.mlp_bias"),
        lambda window, attention, mlp: window is None or not (attention is True or mlp),
        "not set where model.attention_bias or model.mlp_bias is true: no format holds both",
    ),
    Relation(
        ("training.micro_batch_size", "training.batch_size"),
        lambda micro, batch: micro is None or batch % micro == 0,
        "a divisor of training.batch_size, which is {1}",
    ),
    Relation(
        ("training.float32_products", "training.dtype"),
        lambda products, dtype: products == "exact" or dtype == "float32",
        '"exact" where training.dtype is {1}',
    ),
    Relation(
        ("training.eval_first", "data.val_path", "data.val_fraction"),
        lambda first, path, share: not first or path is not None or share is not None,
        "false where neither data.val_path nor data.val_fraction is set",
    ),
    Relation(
        ("data.val_fraction", "data.val_path"),
        lambda share, path: share is None or path is None,
        "not set where data.val_path is, which names {1}",
    ),
    Relation(
        ("training.early_stopping", "data.val_path", "data.val_fraction"),
        lambda patience, *texts: patience is None or texts != (None, None),
        "not set where neither data.val_path nor data.val_fraction is set",
    ),
    Relation(
        ("checkpointing.keep_best", "data.val_path", "data.val_fraction"),
        lambda keeps, *texts: not keeps or texts != (None, None),
        "false where neither data.val_path nor data.val_fraction is set",
    ),
    Relation(
        ("training.label_smoothing", "training.objective"),
        lambda share, objective: not share or objective in ("sft", "distill"),
        "0 where training.objective is {1}; that of pairs is preference.label_smoothing",
    ),
    Relation(
        ("training.z_loss", "training.objective"),
        lambda weight, objective: not weight or objective in ("sft", "distill"),
        "0 where training.objective is {1}",
    ),
    Relation(
        ("distillation.teacher", "training.objective"),
        lambda teacher, objective: teacher is not None or objective != "distill",
        'set where training.objective is "distill": the folder or file of a model',
    ),
    Relation(
        ("lr_schedule.warmup_ratio", "lr_schedule.warmup_steps"),
        lambda share, steps: not (share and steps),
        "0 where lr_schedule.warmup_steps is set, to {1}",
    ),
    Relation(
        ("lr_schedule.min_lr", "training.learning_rate"),
        lambda low, peak: low <= peak,
        "at most training.learning_rate, which is {1}",
    ),
    Relation(
        ("data.context_length", "model.max_seq_len"),
        lambda context, longest: context is None or context <= longest,
        "at most model.max_seq_len, which is {1}",
    ),
    Relation(
        ("data.tokenizer_vocab_size", "model.vocab_size"),
        lambda tokens, rows: tokens is None or tokens <= rows,
        "at most model.vocab_size, which is {1}",
    ),
    Relation(
        ("lora.target_modules",),
        lambda names: isinstance(names, str) or len(set(names)) == len(names),
        "names that differ from each other",
    ),
)


def checkable(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that can be checked already: the sizes of a base are known once it is read."""
    has_base = values.get("model.base") is not None
    return {k: v for k, v in values.items() if not (has_base and k.startswith("model."))}


def _validate(section: str, instance: Any) -> None:
    """Raise ConfigError naming every wrong value; give each value the type its field declares."""
    values, problems = {}, []
    cls: type = type(instance)
    for key, name, _, hint, _ in options_of(section, cls):
        value = getattr(instance, name)
        try:
            values[key] = convert(value, hint)
        except ValueError:
            problems.append(f"{key}: {got(value, allowed(hint))}")
        else:  # an integer for a float, a list for a tuple
            object.__setattr__(instance, name, values[key])
    problems += problems_of(RELATIONS, checkable(values))
    if problems:
        raise ConfigError("\n".join(problems))
