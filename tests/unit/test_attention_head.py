"""Attention encoder-decoder: head, loss, greedy search."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrecipe.errors import RecipeError
from kdrecipe.interfaces import SOS_EOS_ID, LossSetup, ModelInfo, ModelOutput, Targets
from kdrecipe.model.heads.attention import (
    AttentionHead,
    AttentionHeadOptions,
    AttentionLoss,
    AttentionLossOptions,
    Memory,
    with_end,
)
from kdrecipe.testing.models import loss_setup, random_batch

V, D = 9, 16
LENS = torch.tensor([12, 7, 9])


def head(seed=0, dropout=0.0, **options):
    torch.manual_seed(seed)
    given = {"num_layers": 2, "dim": 8, "num_heads": 2, "dropout": dropout, **options}
    return AttentionHead(AttentionHeadOptions(**given), D, V).eval()


def batch(num_tokens=(5, 3, 1), seed=0):
    return random_batch(LENS.tolist(), vocab_size=V, num_tokens=num_tokens, seed=seed)


def hidden(seed=1):
    return torch.randn(3, 12, D, generator=torch.Generator().manual_seed(seed))


WHISPER = {"positions": "learned", "max_positions": 8, "activation": "gelu", "tied": True}


@pytest.mark.parametrize("options", [{}, WHISPER], ids=["plain", "whisper"])
@torch.no_grad()
def test_steps_say_what_the_forced_pass_says(options):
    model, text = head(**options), batch()
    forced = model(hidden(), LENS, text).log_softmax(-1)
    memory, state = model.memory(hidden(), LENS), model.start(3)
    last = torch.full((3,), SOS_EOS_ID)
    for position in range(6):
        found, state = model.step(last, state, memory)
        torch.testing.assert_close(found, forced[:, position], atol=1e-5, rtol=1e-5)
        last = text.tokens_BU[:, min(position, 4)]


@torch.no_grad()
def test_a_position_sees_no_later_token_and_no_padding():
    model, text = head(), batch()
    forced = model(hidden(), LENS, text)
    later = text.tokens_BU.clone()
    later[:, 3:] = 3
    torch.testing.assert_close(model(hidden(), LENS, replace(text, tokens_BU=later))[:, :4], forced[:, :4])
    noisy = hidden()
    noisy[1, 7:] = 1e3
    torch.testing.assert_close(model(noisy, LENS, text), forced)


@torch.no_grad()
def test_reordered_states_go_on_alike():
    model = head()
    memory, state = model.memory(hidden(), LENS), model.start(3)
    _, state = model.step(torch.tensor([1, 1, 1]), state, memory)
    rows = torch.tensor([2, 0, 0])
    want, _ = model.step(torch.tensor([4, 5, 6]), state, memory)
    keys, values = [k[rows] for k in memory.keys], [v[rows] for v in memory.values]
    moved = Memory(keys, values, memory.bias_N11T[rows])
    got, _ = model.step(torch.tensor([6, 4, 4]), state.select(rows), moved)
    torch.testing.assert_close(got, want[rows])


def test_without_a_text_there_is_nothing_to_say():
    assert head()(hidden(), LENS, None) is None


@torch.no_grad()
def test_tokens_beyond_the_learned_positions_share_the_last():
    model = head(**{**WHISPER, "max_positions": 3})
    embedded = model.embed(torch.full((1, 5), 4), 0)
    assert not torch.equal(embedded[0, 1], embedded[0, 2])
    assert torch.equal(embedded[0, 2], embedded[0, 4])
    assert model.greedy(hidden(), LENS) is not None


@torch.no_grad()
def test_a_tied_output_has_the_embedding_and_an_end_of_its_own():
    model, x = head(**WHISPER), torch.randn(1, 1, 8)
    want = model.norm(x) @ model.embedding.weight.t()
    found = model.output(x)
    assert not torch.allclose(found[..., SOS_EOS_ID], want[..., SOS_EOS_ID])
    want[..., SOS_EOS_ID] = model.norm(x) @ model.end_D
    torch.testing.assert_close(found, want)
    untied = head(**{**WHISPER, "tied": False})
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, untied)]
    assert sizes[1] - sizes[0] == V * 8 + V - 8


@pytest.mark.parametrize("options", [{}, WHISPER], ids=["plain", "whisper"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns_and_greedy_search_finds_what_it_learnt(precision, options):
    model, text = head(dropout=0.0, **options).train(), batch()
    loss, optimizer = AttentionLoss(AttentionLossOptions()), torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(80):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(hidden(), LENS, text)
        result = loss(ModelOutput(hidden(), LENS, {"attention": logits}), Targets(), text)
        optimizer.zero_grad()
        (result.total / result.count).backward()
        optimizer.step()
    wanted = [row[:n] for row, n in zip(text.tokens_BU.tolist(), text.token_lens_B.tolist(), strict=True)]
    assert model.eval().greedy(hidden(), LENS) == wanted


@torch.no_grad()
def test_greedy_search_stops_at_the_end_and_never_says_more_tokens_than_frames():
    model = head()
    model.proj.weight.zero_()
    model.proj.bias.zero_()
    model.proj.bias[4] = 1.0  # never the end
    assert model.greedy(hidden(), torch.tensor([3, 0, 12])) == [[4] * 3, [], [4] * 12]
    model.proj.bias[0] = 5.0  # the blank is no token
    assert model.greedy(hidden(), torch.tensor([3, 0, 12]))[0] == [4] * 3
    model.proj.bias[SOS_EOS_ID] = 2.0
    assert model.greedy(hidden(), LENS) == [[], [], []]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=3, max_size=3), st.floats(0.0, 0.9), st.integers(0, 99))
def test_loss_is_the_smoothed_cross_entropy_of_every_token_and_the_end(num_tokens, smoothing, seed):
    text = batch(num_tokens, seed)
    positions = max(num_tokens) + 1
    logits = torch.randn(3, positions, V, generator=torch.Generator().manual_seed(seed))
    options = AttentionLossOptions(label_smoothing=smoothing)
    result = AttentionLoss(options)(ModelOutput(hidden(), LENS, {"attention": logits}), Targets(), text)
    want = 0.0
    log_probs = logits.log_softmax(-1)
    for row, length in enumerate(num_tokens):
        for position, token in enumerate([*text.tokens_BU[row, :length].tolist(), SOS_EOS_ID]):
            one = log_probs[row, position]
            want -= float((1 - smoothing) * one[token] + smoothing * one.mean())
    assert float(result.total) == pytest.approx(want, rel=1e-4)
    assert result.count == sum(num_tokens) + 3


def test_unlabelled_and_empty_utterances_are_left_out():
    text = batch((5, 3, 0))
    text.labelled_B[1] = False
    logits = torch.randn(3, 6, V)
    logits[1:] = float("nan")
    result = AttentionLoss(AttentionLossOptions())(
        ModelOutput(hidden(), LENS, {"attention": logits}), Targets(), text
    )
    assert result.count == 6
    assert torch.isfinite(result.total)


def test_the_end_follows_the_last_token():
    tokens = torch.tensor([[5, 6, 0], [7, 0, 0], [0, 0, 0]])
    want = [[5, 6, SOS_EOS_ID, 0], [7, SOS_EOS_ID, 0, 0], [SOS_EOS_ID, 0, 0, 0]]
    assert with_end(tokens, torch.tensor([2, 1, 0])).tolist() == want


def test_a_student_without_the_head_is_refused():
    student = ModelInfo("v", V, 0.04, {"ctc": ("frame_logits",)}, {})
    with pytest.raises(RecipeError, match=r"'attention' reads the head 'attention'; the student has ctc"):
        AttentionLoss(AttentionLossOptions(), LossSetup(student))
    AttentionLoss(AttentionLossOptions(), loss_setup())


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="dim 9 is not a multiple of num_heads 4"):
        AttentionHead(AttentionHeadOptions(dim=9), D, V)
