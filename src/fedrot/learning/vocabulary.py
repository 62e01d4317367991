"""A language model's last step: from hidden states to the loss of every token that it is to write.

Scores for a whole vocabulary are the largest tensors of a step (200 kB a token at 50,000 words). The output layer is
frozen, so all that its backward pass gives is the hidden states' gradient: it is computed with the loss, some tokens at
a time, and the scores are dropped at once.
"""

from typing import Any

import torch
from torch import Tensor, nn

# Tokens at once: enough for full matrix products, 100 MB of scores at a vocabulary of 50,000.
_CHUNK = 512


def token_losses(hidden: Tensor, head: nn.Module, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(cross-entropy, whether the target is the likeliest token), both (U), in float32 or better.

    `hidden` (U, h) are the states before each target, `head` is the model's frozen output layer, `targets` (U) tokens.
    """
    bias = getattr(head, "bias", None)
    losses, right = _Losses.apply(hidden, head.weight, bias, targets)  # type: ignore[no-untyped-call]
    return losses, right


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        right = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        for start in range(0, len(hidden), _CHUNK):
            part = slice(start, start + _CHUNK)
            weight_there = weight.to(hidden.dtype)
            scores = nn.functional.linear(hidden[part], weight_there, None if bias is None else bias.to(hidden.dtype))
            scores = scores.to(wide)
            most = scores.amax(-1, keepdim=True)
            right[part] = scores.argmax(-1) == targets[part]
            chosen = scores.gather(1, targets[part, None])
            shares = scores.sub_(most).exp_()
            total = shares.sum(-1, keepdim=True)
            losses[part] = (total.log() + most - chosen).squeeze(1)
            if gradient is not None:
                shares.div_(total)
                shares.scatter_add_(1, targets[part, None], -torch.ones_like(chosen))
                gradient[part] = shares.to(hidden.dtype) @ weight_there
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(right)
        return losses, right

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (grads[0][:, None] * gradient).to(gradient.dtype), None, None, None
