"""What a recipe's values must be, each by itself and together: what cannot work is refused with the reason."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedrot.core.errors import FedrotError, RecipeError, choices
from fedrot.core.methods import methods
from fedrot.core.robust import check_count
from fedrot.running.privacy_checks import check_privacy
from fedrot.running.settings import drawn_count

if TYPE_CHECKING:
    from fedrot.running.recipe import Recipe


def ranges(r: "Recipe") -> Iterator[tuple[str, bool, str]]:
    """(key, holds, what it must be) for every value with a range of its own. NaN fails every comparison."""
    inf = float("inf")
    yield "name", bool(r.name) and "/" not in r.name and r.name not in (".", ".."), "a name without '/'"
    yield "rounds", r.rounds >= 1, "at least 1"
    for key in ("workers", "threads", "stack"):
        value = getattr(r.compute, key)
        yield f"compute.{key}", value is None or 1 <= value <= 1024, "from 1 to 1024, or null"
    yield "lora.rank", 1 <= r.lora.rank <= 4096, "from 1 to 4096"
    ranks = (r.lora.ranks or {}).values()
    yield "lora.ranks", all(1 <= rank <= r.lora.rank for rank in ranks), f"from 1 to lora.rank, {r.lora.rank}, each"
    yield "lora.alpha", r.lora.alpha is None or 0 < r.lora.alpha < inf, "positive, or null"
    yield "lora.dropout", 0 <= r.lora.dropout < 1, "in [0, 1)"
    yield "data.holdout", 0 < r.data.holdout < 1, "between 0 and 1"
    yield "data.generated", r.data.generated is None or r.data.generated >= 40, "at least 40, or null"
    yield "data.limit", r.data.limit is None or r.data.limit >= 1, "at least 1, or null"
    yield "data.max_length", r.data.max_length >= 4, "at least 4"
    yield "partition.clients", r.partition.clients is None or r.partition.clients >= 1, "at least 1, or null"
    yield "partition.concentration", 0 < r.partition.concentration < inf, "positive"
    yield "partition.minimum", r.partition.minimum >= 1, "at least 1"
    yield "partition.redraws", r.partition.redraws >= 1, "at least 1"
    yield "local.lr", 0 < r.local.lr < inf, "positive"
    yield "local.momentum", 0 <= r.local.momentum < 1, "in [0, 1)"
    yield "local.weight_decay", 0 <= r.local.weight_decay < inf, "at least 0"
    yield "local.batch", r.local.batch >= 1, "at least 1"
    yield "local.steps", r.local.steps is None or r.local.steps >= 1, "at least 1, or null"
    yield "local.epochs", r.local.epochs is None or 0 < r.local.epochs < inf, "positive, or null"
    yield "partition.bins", r.partition.bins is None or r.partition.bins >= 2, "at least 2, or null"
    yield "local.clip", r.local.clip is None or 0 < r.local.clip < inf, "positive, or null"
    yield "local.prox", 0 <= r.local.prox < inf, "at least 0"
    yield "server.lr", r.server.lr is None or 0 < r.server.lr < inf, "positive, or null"
    yield "server.beta1", 0 <= r.server.beta1 < 1, "in [0, 1)"
    yield "server.beta2", 0 <= r.server.beta2 < 1, "in [0, 1)"
    yield "server.epsilon", 0 < r.server.epsilon < inf, "positive"
    yield "federation.participation", 0 < r.federation.participation <= 1, "in (0, 1]"
    yield "federation.quorum", 0 < r.federation.quorum <= 1, "in (0, 1]"
    deadline = r.federation.deadline
    yield "federation.deadline", deadline is None or 0 < deadline < inf, "positive, or null"
    for key in ("buffer", "concurrency"):
        value = getattr(r.federation, key)
        yield f"federation.{key}", value is None or value >= 1, "at least 1, or null"
    speeds = (r.federation.speeds or {}).values()
    yield "federation.speeds", all(0 < speed < inf for speed in speeds), "positive, each"
    yield "federation.spread", r.federation.spread is None or 0 <= r.federation.spread <= 10, "from 0 to 10, or null"
    yield "checks.max_norm", r.checks.max_norm is None or 0 < r.checks.max_norm < inf, "positive, or null"
    yield "secure.threshold", 0.5 < r.secure.threshold <= 1, "above 0.5, at most 1"
    yield "secure.fewest", r.secure.fewest >= 3, "at least 3"
    yield "secure.range", 0 < r.secure.range < 2**20, "positive, below 2^20"
    near = r.secure.neighbours
    yield "secure.neighbours", near is None or (near >= 4 and near % 2 == 0), "an even number of at least 4, or null"
    yield "privacy.clip", r.privacy.clip is None or 0 < r.privacy.clip < inf, "positive, or null"
    noise = r.privacy.noise
    yield "privacy.noise", noise is None or noise == 0 or 1e-3 <= noise <= 1e6, "0, or from 1e-3 to 1e6, or null"
    yield "privacy.delta", r.privacy.delta is None or 0 < r.privacy.delta < 1, "between 0 and 1, or null"
    yield "privacy.budget", r.privacy.budget is None or 0 < r.privacy.budget < inf, "positive, or null"
    yield "robust.share", 0 < r.robust.share < 0.5, "between 0 and 0.5"
    yield "robust.bound", r.robust.bound is None or 0 < r.robust.bound < inf, "positive, or null"
    yield "robust.multiple", 1 <= r.robust.multiple < inf, "at least 1"
    yield "robust.chosen", r.robust.chosen is None or r.robust.chosen >= 1, "at least 1, or null"
    yield "diagnostics.every", r.diagnostics.every >= 0, "at least 0"
    yield "diagnostics.exact_clients", r.diagnostics.exact_clients >= 0, "at least 0"
    yield "diagnostics.sketch_width", 1 <= r.diagnostics.sketch_width <= 4096, "from 1 to 4096"
    yield "evaluation.every", r.evaluation.every >= 0, "at least 0"
    yield "evaluation.limit", r.evaluation.limit is None or r.evaluation.limit >= 1, "at least 1, or null"
    yield "evaluation.batch", r.evaluation.batch >= 1, "at least 1"
    yield "evaluation.problems", r.evaluation.problems is None or r.evaluation.problems >= 1, "at least 1, or null"
    yield "evaluation.tokens", r.evaluation.tokens >= 1, "at least 1"
    yield "evaluation.shots", r.evaluation.shots >= 0, "at least 0"
    yield "checkpoint.keep", r.checkpoint.keep >= 1, "at least 1"


def check_combinations(r: "Recipe") -> None:
    """Refuse combinations that cannot work, with the reason and the choices."""
    if (r.local.steps is None) == (r.local.epochs is None):
        raise RecipeError("local: give exactly one of local.steps and local.epochs")
    if r.local.optimizer != "sgd" and r.local.momentum:
        raise RecipeError("local.momentum is for local.optimizer sgd; adamw has its own")
    if r.model.dtype == "bfloat16" and r.local.precision == "fp32":
        raise RecipeError("model.dtype bfloat16 needs local.precision bf16")
    if r.data.source == "glue" and r.data.name is None:
        raise RecipeError("data.name: give the GLUE task (source glue): sst2, qnli, qqp, rte or mnli")
    if r.data.source == "files" and r.data.train is None:
        raise RecipeError("data.train: give the file of training examples (source files)")
    if r.data.generated is not None and r.data.source not in ("glue", "gsm8k", "trec", "codesearchnet"):
        raise RecipeError(f"data.generated: there are no made-up examples for data.source {r.data.source}")
    if r.data.labels is not None and (r.data.source != "files" or r.data.response or r.data.messages):
        raise RecipeError("data.labels: it is for examples with labels of data.source files; leave it null")
    if r.data.labels is not None and not 2 <= len(set(r.data.labels)) == len(r.data.labels):
        raise RecipeError("data.labels: give two or more, each once")
    if r.data.response and r.data.messages:
        raise RecipeError("data: give data.response or data.messages, not both")
    if r.data.source != "files" and (r.data.response or r.data.messages):
        raise RecipeError(f"data.response and data.messages are for data.source files, not {r.data.source}")
    if r.partition.kind == "column" and r.data.source == "files" and r.data.group is None:
        raise RecipeError("data.group: name the column that partition.kind column divides by")
    if r.partition.by != "label" and r.partition.kind != "dirichlet":
        raise RecipeError(f"partition.by {r.partition.by}: it is for partition.kind dirichlet; others take by label")
    if r.partition.by == "group" and r.data.source == "files" and r.data.group is None:
        raise RecipeError("data.group: name the column that partition.by group is uneven in")
    if r.partition.bins is not None and r.partition.by not in ("length", "cluster"):
        raise RecipeError("partition.bins: it is for partition.by length or cluster; leave it null")
    if r.partition.encoder is not None and r.partition.by != "cluster":
        raise RecipeError("partition.encoder: it is for partition.by cluster; leave it null")
    if r.partition.kind in ("iid", "dirichlet") and r.partition.clients is None:
        raise RecipeError(f"partition.clients: give the number of clients (kind {r.partition.kind})")
    if r.evaluation.choose == "best" and not r.evaluation.every:
        raise RecipeError("evaluation.choose: without scores in rounds there is no best one; set it to last")
    if r.evaluation.choose == "best" and r.evaluation.final == r.evaluation.split:
        raise RecipeError(
            f"evaluation.choose: the best round on {r.evaluation.split!r} would be reported on the same examples; set "
            "evaluation.final to another split, or to null"
        )
    if r.evaluation.shots and r.evaluation.answers == "none":
        raise RecipeError("evaluation.shots: they come before problems that are answered; set evaluation.answers")
    if r.evaluation.shots and (r.evaluation.final or r.evaluation.split) == "train":
        raise RecipeError("evaluation.shots: they are taken from train, whose problems are asked; choose another split")
    _method_checks(r)
    check_privacy(r)
    if r.secure.aggregation:
        _secure_checks(r)


def _method_checks(r: "Recipe") -> None:
    """Refuse what the method cannot do, with the methods that can."""
    has = r.method.capabilities
    held = r.model.quantize or r.model.dtype
    rule = r.robust.rule
    half = held != "float32" and (r.model.quantize is not None or not getattr(r.method, "dequantize", False))
    for asked, key, can, why in (
        (bool(r.lora.ranks), "lora.ranks", lambda c: c.mixed_ranks, "takes clients of one rank only"),
        (
            r.server.optimizer != "none",
            "server.optimizer",
            lambda c: c.steps,
            "sends what it made itself, not an averaged change",
        ),
        (
            r.local.scaffold,
            "local.scaffold",
            lambda c: c.variates,
            "does not keep the frame or the parameters that control variates belong to",
        ),
        (
            r.checks.max_norm is not None,
            "checks.max_norm",
            lambda c: not c.second_phase,
            "uploads sketches, whose norm says nothing about the update",
        ),
        (
            r.federation.compression != "none",
            "federation.compression",
            lambda c: not (c.second_phase or c.pooled),
            "does not upload a change of the factors that were broadcast",
        ),
        (
            r.federation.compression != "none" and r.federation.feedback,
            "federation.feedback",
            lambda c: c.keeps_frame,
            "broadcasts in a new frame each round, where what was lost means nothing; set federation.feedback false",
        ),
        (
            r.federation.buffer is not None,
            "federation.buffer",
            lambda c: c.buffered,
            "does not upload a change, of the same parts in every round, that could be added to a later broadcast",
        ),
        (
            r.privacy.mode in ("central", "local"),
            "privacy.mode",
            lambda c: c.private,
            "makes more of clients' data than a sum of their changes, and that sum is all that clip and noise protect",
        ),
        (
            r.privacy.mode == "example",
            "privacy.mode",
            lambda c: not c.pooled,
            "trains one client that holds everything, by more steps than those that the accounting is of",
        ),
        (
            r.secure.aggregation,
            "secure.aggregation",
            lambda c: c.summed,
            "needs more of its clients than the sum of what they upload",
        ),
        (
            rule != "none",
            "robust.rule",
            lambda c: bool(c.rules),
            "has no uploads of several clients to compare, or sends them in frames of its own",
        ),
        (
            rule != "none",
            "robust.rule",
            lambda c: rule in c.rules,
            f"needs each client's own factors, and {rule} makes one pair of all; set robust.rule norm or krum",
        ),
        (
            has.changes_base and half,
            "model.dtype",
            lambda c: not c.changes_base,
            f"changes the base weights, which {held} would round away; set method.dequantize, or model.dtype float32",
        ),
    ):
        if asked and not can(has):
            others = choices(n for n, m in methods().items() if can(m.capabilities) and not m.capabilities.control)
            raise RecipeError(f"{key}: method {r.method.name} {why}; methods that work: {others}")
    if r.local.scaffold and (r.lora.ranks or r.server.optimizer != "none"):
        raise RecipeError("local.scaffold: it goes with neither lora.ranks nor server.optimizer")
    _rule_checks(r)
    _buffer_checks(r)
    if has.pooled and (r.lora.head == "personal" or r.federation.participation != 1):
        raise RecipeError(
            f"method.name: {r.method.name} has one client, which holds everything; set lora.head shared and "
            "federation.participation 1"
        )


def _buffer_checks(r: "Recipe") -> None:
    """Refuse what late uploads make unsound, with the reason."""
    if r.federation.buffer is None:
        if r.federation.concurrency is not None:
            raise RecipeError("federation.concurrency: it is for federation.buffer; leave it null")
        return
    for refused, key, why in (
        (
            r.federation.participation != 1,
            "federation.participation",
            "nobody is drawn for a round; set it to 1 and federation.concurrency to how many train at once",
        ),
        (
            bool(r.lora.ranks),
            "lora.ranks",
            "what a narrow client leaves out would be taken from the adapter by every late upload; leave it null",
        ),
        (
            r.local.scaffold,
            "local.scaffold",
            "control variates are those of one broadcast, and uploads of a round are of several; set it to false",
        ),
        (
            r.robust.rule != "none",
            "robust.rule",
            "rules compare changes of one broadcast, all of one weight; set it to none",
        ),
        (
            r.privacy.mode != "none",
            "privacy.mode",
            "who takes part in a round depends on the clients' examples and speeds, which the accounting does not "
            "cover; set it to none",
        ),
    ):
        if refused:
            raise RecipeError(f"{key}: with federation.buffer, {why}")


def _secure_checks(r: "Recipe") -> None:
    """Refuse what needs uploads that nobody sees, with the reason."""
    for refused, key, why in (
        (
            r.federation.compression != "none",
            "federation.compression",
            "every upload is whole numbers of four bytes, as its mask is; set it to none",
        ),
        (
            r.federation.buffer is not None,
            "federation.buffer",
            "all clients of a sum change the same broadcast; set it to null",
        ),
        (
            r.privacy.mode == "central",
            "privacy.mode",
            "the server cannot clip changes that it does not see; take local, where clients clip and add noise",
        ),
        (
            r.robust.rule != "none",
            "robust.rule",
            "there are no uploads to compare, and a hostile client is bounded by secure.range alone; set it to none",
        ),
        (
            r.local.scaffold,
            "local.scaffold",
            "control variates are not summed; set it to false",
        ),
        (
            r.checks.max_norm is not None,
            "checks.max_norm",
            "no upload's norm is seen; set it to null, and secure.range to what a number may change by",
        ),
    ):
        if refused:
            raise RecipeError(f"{key}: with secure.aggregation, {why}")
    if r.partition.clients is not None and r.partition.kind in ("iid", "dirichlet"):
        drawn = drawn_count(r.partition.clients, r.federation.participation)
        if drawn < r.secure.fewest:
            raise RecipeError(
                f"secure.fewest: {drawn} clients are drawn for a round, and no sum of fewer than {r.secure.fewest} is "
                "opened; ask more clients"
            )


def _rule_checks(r: "Recipe") -> None:
    """Refuse what a rule against hostile clients cannot hold for."""
    if r.robust.rule != "norm" and r.robust.bound is not None:
        raise RecipeError("robust.bound: it is for robust.rule norm; leave it null")
    if r.robust.rule != "krum" and r.robust.chosen is not None:
        raise RecipeError("robust.chosen: it is for robust.rule krum; leave it null")
    if r.robust.rule == "none":
        return
    if r.local.scaffold:
        raise RecipeError("robust.rule: it does not go with local.scaffold, whose control variates no rule looks at")
    if r.lora.ranks:
        raise RecipeError(
            "robust.rule: it does not go with lora.ranks: what a narrow client leaves out cannot be told from an attack"
        )
    if r.partition.clients is not None and r.partition.kind in ("iid", "dirichlet"):
        drawn = drawn_count(r.partition.clients, r.federation.participation)
        try:
            check_count(r.robust, drawn, drawn)
        except FedrotError as problem:
            raise RecipeError(f"{problem}; lower robust.share or ask more clients") from None
