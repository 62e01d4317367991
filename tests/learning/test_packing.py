"""Examples in a row without padding: every token once, attention within examples, the logits of padded batches."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learning_helpers import encoded_splits, quick, resident, seeds, shaken
from model_folders import DECODERS, SIZES, write_model

from fedrot.learning.architectures import PACKABLE
from fedrot.learning.packing import pack, packed_attention

# Where PEFT has no default of its own.
TARGETS = {
    "camembert": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "phi3": ["qkv_proj"],
    **{kind: ["q_proj", "v_proj"] for kind in ("opt", "phi", "qwen3", "smollm3")},
}

lengths_lists = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@quick
@given(lengths_lists)
def test_every_token_has_one_place_and_every_other_place_is_empty(lengths: list[int]) -> None:
    found = pack(np.array(lengths))
    places = sum(block.examples * block.length for block in found.blocks)
    assert sum(block.examples for block in found.blocks) == len(lengths)
    assert found.starts.tolist() == [0, *np.cumsum(lengths)[:-1].tolist()]
    assert torch.equal(found.token[found.place], torch.arange(sum(lengths)))
    assert sorted([*found.place.tolist(), *found.empty.tolist()]) == list(range(places))
    example = np.repeat(np.arange(len(lengths)), lengths)[found.token.numpy()]  # an empty place holds its own example's
    sizes = [block.length for block in found.blocks for _ in range(block.examples)]
    assert all(len(set(own)) == 1 for own in np.split(example, np.cumsum(sizes)[:-1]))


@quick
@given(lengths_lists)
def test_a_block_wastes_little_and_its_mask_shows_its_tokens(lengths: list[int]) -> None:
    found = pack(np.array(lengths))
    held = torch.zeros(len(found.token), dtype=torch.bool)
    held[found.place] = True
    used = 0
    for block in found.blocks:
        size = block.examples * block.length
        mine = held[used : used + size].view(block.examples, block.length)
        assert float(mine.float().mean()) >= 0.85
        assert (block.mask is None) == bool(mine.all())
        if block.mask is not None:
            assert torch.equal(block.mask[:, 0, 0], mine)
        used += size
    assert [b.length for b in found.blocks] == sorted((b.length for b in found.blocks), reverse=True)


@quick
@given(seeds, st.lists(st.integers(1, 9), min_size=1, max_size=7), st.booleans(), st.sampled_from([(4, 4), (4, 2)]))
def test_attention_and_its_gradients_are_those_of_each_example_alone(
    seed: int, lengths: list[int], causal: bool, heads: tuple[int, int]
) -> None:
    rng = torch.Generator().manual_seed(seed)

    def draw(count: int) -> torch.Tensor:
        return torch.randn(1, count, sum(lengths), 3, generator=rng, dtype=torch.float64).requires_grad_()

    q, k, v = draw(heads[0]), draw(heads[1]), draw(heads[1])
    weight = torch.randn(1, sum(lengths), heads[0], 3, generator=rng, dtype=torch.float64)
    packing, module = pack(np.array(lengths)), torch.nn.Identity()
    found, _ = packed_attention(module, q, k, v, None, scaling=0.7, is_causal=causal, packing=packing)
    mine = torch.autograd.grad((found * weight).sum(), [q, k, v])
    wanted = []
    for start, stop in pairwise([0, *np.cumsum(lengths).tolist()]):
        one = [t[:, :, start:stop].repeat_interleave(heads[0] // t.shape[1], 1) for t in (q, k, v)]
        scores = one[0] @ one[1].mT * 0.7
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
        wanted.append((scores.softmax(-1) @ one[2]).transpose(1, 2))
    dense = torch.cat(wanted, 1)
    torch.testing.assert_close(found, dense, rtol=0, atol=1e-12)
    for one, other in zip(mine, torch.autograd.grad((dense * weight).sum(), [q, k, v]), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_bfloat16_attends_in_float32_on_the_processor() -> None:
    # PyTorch's attention in bfloat16 is slow there, its backward pass above all; the result is only more exact.
    rng = torch.Generator().manual_seed(3)
    packing, module = pack(np.array([5, 3, 1])), torch.nn.Module()
    q, k, v = (torch.randn(1, 2, 9, 4, generator=rng).bfloat16().requires_grad_() for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = packed_attention(module, q, k, v, None, packing=packing)
    wide = [t.detach().float().requires_grad_() for t in (q, k, v)]
    exact, _ = packed_attention(module, *wide, None, packing=packing)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())
    found.float().sum().backward()
    exact.sum().backward()
    for mine, other in zip((q, k, v), wide, strict=True):
        torch.testing.assert_close(mine.grad, other.grad.bfloat16(), rtol=0, atol=1e-2)


def test_packed_attention_without_a_packing_is_an_error_and_not_a_guess() -> None:
    x = torch.zeros(1, 1, 2, 3)
    with pytest.raises(ValueError, match="packing"):
        packed_attention(torch.nn.Identity(), x, x, x, None)


@pytest.mark.parametrize("kind", PACKABLE)
def test_packed_logits_are_those_of_padded_batches(
    kind: str, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    model = resident(write_model(tmp_path, kind, tiny_model, **SIZES[kind]), targets=TARGETS.get(kind))
    model.model.double()
    assert model.packable
    model.write(shaken(model.read(), size=0.3))
    data, rows = encoded_splits(model, tiny_data)["test"], np.array([7, 0, 31, 2, 2, 40, 11])
    assert len(set(data.lengths[rows].tolist())) > 2
    with torch.no_grad():
        padded = model.forward(model.collate(data, rows, packing=False), "fp32")
        found = model.forward(model.collate(data, rows, packing=True), "fp32")
        # The model itself is as it was: packing is over when the call is.
        again = model.forward(model.collate(data, rows, packing=False), "fp32")
    assert float((padded[0] - padded[1]).abs().max()) > 1e-3
    torch.testing.assert_close(found, padded, rtol=0, atol=1e-12)
    assert torch.equal(again, padded)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_decoder_reads_the_last_token_that_is_no_padding(
    kind: str, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Examples end with the token that also pads: transformers looks before it, and so must a packed row."""
    model = resident(write_model(tmp_path, kind, tiny_model, **SIZES[kind]))
    data, rows = encoded_splits(model, tiny_data)["test"], np.array([3, 5, 8])
    assert {int(data.tokens[data.offsets[row + 1] - 1]) for row in rows} == {data.pad}
    with torch.no_grad():
        padded = model.forward(model.collate(data, rows, packing=False), "fp32")
        found = model.forward(model.collate(data, rows, packing=True), "fp32")
    torch.testing.assert_close(found, padded, rtol=0, atol=1e-5)
    read = model.collate(data, rows, packing=True).layout.read
    assert (torch.from_numpy(data.flat(rows)[0])[read] != data.pad).all()


WINDOWED: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": 8}, "distilbert": {}}


@pytest.mark.parametrize("kind", sorted(WINDOWED))
def test_models_that_attend_in_windows_or_are_not_known_are_not_packed(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = write_model(tmp_path, kind, tiny_model, **{**SIZES[kind], **WINDOWED[kind]})
    assert not resident(folder, targets=TARGETS.get(kind)).packable
    assert set(DECODERS) < set(PACKABLE)
