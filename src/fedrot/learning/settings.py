"""Settings of the learning floor: plain frozen records that import nothing heavy."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelSettings:
    """The base model that every client holds."""

    path: str = ""
    """A local folder, a GGUF file (converted once, into the cache), a hub name, or fetch:NAME for what
    `fedrot data fetch NAME` brought into the cache."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; null is its default branch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """How the frozen base weights are held; factors and head are float32 always."""
    quantize: Literal["4bit", "8bit"] | None = None
    """Hold the base weights in 4 bits (NF4) or 8, by bitsandbytes; needs a GPU and that package."""


@dataclass(frozen=True)
class LoraSettings:
    """The adapter."""

    rank: int = 4
    """Rank r of every adapted layer."""
    ranks: dict[str, int] | None = None
    """Smaller ranks of single clients, e.g. {site-a: 4}; the others have `rank`. Null: all alike."""
    alpha: float | None = None
    """LoRA alpha; the update is scaled by alpha / r (rsLoRA: alpha / sqrt(r)). Null is 2 r."""
    dropout: float = 0.05
    """Dropout on the input of the adapted path, in [0, 1). The base model's own dropout is off."""
    targets: list[str] | None = None
    """Names of the layers to adapt, e.g. [query, value]; null is PEFT's default for the base model."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r."""
    head: Literal["shared", "personal", "frozen"] = "shared"
    """The classification head: trained and averaged; trained and kept by each client; or left at its start."""

    def scale(self, rank: int) -> float:
        """The factor of B A at this rank."""
        alpha = 2.0 * rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True)
class DataSettings:
    """Where the examples come from."""

    source: Literal["files", "glue", "vader", "gsm8k", "trec", "codesearchnet"] = "files"
    """files: CSV, TSV, JSONL or parquet with named columns; glue: a GLUE task; vader: the VADER sentiment corpus;
    gsm8k: school mathematics with worked answers; trec: questions by what they ask for; codesearchnet: functions with
    their documentation, grouped by programming language. Of labels a classifier is made; of responses, a language model
    is fine-tuned."""
    name: Literal["sst2", "qnli", "qqp", "rte", "mnli"] | None = None
    """The GLUE task."""
    path: str | None = None
    """A folder: of the files below, of a GLUE task's own files, of the unpacked VADER corpus, or of CodeSearchNet's
    languages. Null: paths as they stand, the hub, or the cache."""
    train: str | None = None
    """File of training examples (source files)."""
    validation: str | None = None
    """File of validation examples; null holds out a part of the training examples."""
    test: str | None = None
    """File of test examples, if any."""
    text: str = "text"
    """Column of the text, or of the first of two."""
    pair: str | None = None
    """Column of the second text, if any."""
    label: str = "label"
    """Column of the label."""
    labels: list[str] | None = None
    """The labels' names in their order (source files), where not every file has all of them, as at sites that each have
    data of their own. Null: those of the training file, numbers by value and names by alphabet."""
    response: str | None = None
    """Column of the response that a language model learns to give to the text (source files); there is no label."""
    messages: str | None = None
    """Column of conversations, lists of {"role": ..., "content": ...}; what the assistant says is learnt."""
    template: Literal["plain", "chat"] | None = None
    """How a conversation is written down: plain, turn after turn as they are; chat, by the tokenizer's template. Null:
    chat for conversations of data.messages, plain for all else."""
    group: str | None = None
    """Column that says where an example comes from, for partition.kind column."""
    columns: list[str] | None = None
    """Names of the columns of CSV or TSV files that have no header line."""
    holdout: float = 0.1
    """Share of the training examples that is held out as the validation split where there is no validation file, and of
    every GLUE task; the choice depends on the text alone, so equal texts stay on one side."""
    generated: int | None = None
    """Where data.path is null: so many made-up training examples of the task's form (sources glue, gsm8k, trec and
    codesearchnet), to try a recipe without its data; said in the log. Null: the hub."""
    limit: int | None = None
    """At most this many training examples, drawn with the recipe's seed; null: all."""
    max_length: int = 128
    """Tokens an example is cut to."""

    @property
    def made_up(self) -> bool:
        """Whether the examples are generated, in place of data that is not at hand."""
        return self.generated is not None and self.path is None

    @property
    def form(self) -> Literal["plain", "chat"]:
        """The template that conversations are written down by."""
        return self.template or ("chat" if self.messages else "plain")


@dataclass(frozen=True)
class PartitionSettings:
    """Who gets which example. Evaluation splits are divided by the same rule, for scores by client."""

    kind: Literal["iid", "dirichlet", "column", "size"] = "iid"
    """iid: at random in equal parts; dirichlet: shares of what `by` names drawn a client; column: a client for every
    value of data.group; size: at random in the given proportions."""
    by: Literal["label", "group", "length", "cluster"] = "label"
    """What a Dirichlet split is uneven in: the label; data.group, where an example comes from; its length in
    characters; or what it is about, by clusters of embeddings. All but the first work without labels."""
    bins: int | None = None
    """Number of length quantiles or clusters; null: as many as clients, at least 2. There are fewer where fewer
    examples differ. The more there are, the more alike are the clients' numbers of examples."""
    encoder: str | None = None
    """Model whose embeddings are clustered, a small one for choice: a folder, a hub name or fetch:NAME. Null: the base
    model, on the CPU."""
    clients: int | None = None
    """Number of clients (not for column)."""
    concentration: float = 0.5
    """Dirichlet concentration: small is uneven, down to a stratum whole with one client; large is even."""
    minimum: int = 1
    """Least number of training examples a client; a Dirichlet draw that gives less is drawn again."""
    redraws: int = 1000
    """How often to draw again before giving up."""
    sizes: list[float] | None = None
    """Proportions of the clients' parts (kind size)."""
    seed: int | None = None
    """Seed of the partition; null is the recipe's."""


@dataclass(frozen=True)
class LocalSettings:
    """Local training of one client in one round. The optimizer starts afresh each round."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW or SGD."""
    lr: float = 2e-3
    """Learning rate."""
    momentum: float = 0.0
    """Momentum of SGD."""
    weight_decay: float = 0.0
    """Weight decay."""
    batch: int = 16
    """Examples a step; a client with fewer uses all it has."""
    steps: int | None = None
    """Steps a round. Give this or epochs."""
    epochs: float | None = None
    """Passes over the client's examples a round. Give this or steps."""
    clip: float | None = 1.0
    """Largest norm of a step's gradient; null: no clipping."""
    prox: float = 0.0
    """FedProx (arXiv 1812.06127): mu of the term mu / 2 ||x - x_start||^2 that holds a client near the broadcast."""
    scaffold: bool = False
    """SCAFFOLD (arXiv 1910.06378): control variates correct every client's gradients for its drift; they travel as a
    second adapter, so traffic doubles."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """Arithmetic of forward and backward: float32, or autocast to bfloat16 with float32 factors; auto: bf16 where the
    machine is faster at it (GPUs, processors with AMX or AVX512_BF16), else fp32, written in the resolved recipe."""
    checkpointing: bool = False
    """Gradient checkpointing: the backward pass computes every layer again but the last, instead of keeping what it
    computed. Less memory for a forward pass more a step; the same results."""


@dataclass(frozen=True)
class ComputeSettings:
    """How the arithmetic is done; results stay the same but for rounding. What is null is chosen when a run begins,
    from shapes and memory and never by timing, and written in the resolved recipe, which a resumed run goes by.
    """

    device: Literal["cpu", "cuda"] | None = None
    """Where models are; null: the GPUs where there are some."""
    workers: int | None = None
    """Models that work side by side, each on some of the clients; null: one on each GPU, one on the CPU."""
    threads: int | None = None
    """Threads of each worker's arithmetic; null: the cores this process may use, divided among the workers."""
    stack: int | None = None
    """Clients trained at once in one forward and backward pass; 1: one after the other."""
    packing: bool | None = None
    """Examples in a row without padding instead of padded batches; null: where the architecture is known."""


@dataclass(frozen=True)
class EvaluationSettings:
    """When and on what the global adapter is scored."""

    split: str = "validation"
    """Split scored during the run."""
    every: int = 1
    """Score after every n-th round, and after the last; 0: not in rounds."""
    final: str | None = None
    """Split scored once, after the last round, e.g. test; null: none."""
    limit: int | None = None
    """Score on a fixed subset of this many examples during the run; null: all. The final split is scored whole."""
    choose: Literal["last", "best"] = "last"
    """Which round's adapter is the result: the last one's, or that of the best score during the run, on `split`, which
    `final` may then not be."""
    batch: int = 64
    """Examples a batch."""
    answers: Literal["none", "number", "text"] = "none"
    """After the last round a language model also writes answers to the problems of the final split (or of `split`),
    and they are compared with the right ones: number, what stands behind "####" as in GSM8K; text, all that is
    written."""
    problems: int | None = None
    """Answer a fixed subset of this many problems, and score the final split on the same; null: all."""
    tokens: int = 256
    """Most tokens of an answer."""
    shots: int = 0
    """So many worked examples of the training split before each problem, the same before all, drawn with the recipe's
    seed: plain, with an empty line after each, so that an answer ends where another example would begin (answers text:
    at an empty line); by the chat template, earlier turns."""

    @property
    def scored(self) -> dict[str, str]:
        """The splits that a run scores, by the key that names each."""
        in_rounds = self.every > 0 or (self.answers != "none" and self.final is None)
        found = {"split": self.split if in_rounds else None, "final": self.final}
        return {key: split for key, split in found.items() if split is not None}
