"""Scores that sites give of their own examples: what is taken of a reply, and their mean."""

from collections.abc import Mapping

from fedrot.learning.evaluation import Evaluation
from fedrot.learning.scores import AVERAGED
from fedrot.running.network.messages import Message, MessageError, shown, value_of


def read_scores(reply: Message, metric: str) -> dict[str, float]:
    """A site's scores, those that can be averaged. `MessageError` where one is missing or cannot be."""
    if (said := value_of(reply.header, "metric", str)) != metric:
        raise MessageError(f"its metric is {shown(said)}, not {metric}")
    scores, found = value_of(reply.header, "scores", dict), {}
    for key in AVERAGED[metric]:
        value = found[key] = scores.get(key)
        # All but the loss are shares.
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not 0 <= value < (2**53 if key == "loss" else 1 + 1e-9):
            raise MessageError(f"its {key} is {shown(value)}")
    return found


def averaged(
    split: str, metric: str, scores: Mapping[str, Mapping[str, float]], counts: Mapping[str, int], model: str
) -> Evaluation:
    """The mean of clients' scores by their numbers of examples, `counts`, of which one is above 0 at least."""
    total = sum(counts.values())
    # In the clients' order, since sums depend on theirs.
    found = {client: scores[client] for client in sorted(scores)}
    means = {key: sum(counts[c] * one[key] for c, one in found.items()) / total for key in AVERAGED[metric]}
    return Evaluation(split, total, metric, means, model, found)
