"""Our transducer losses against torchaudio's, and k2's where it is installed: values and gradients."""

from __future__ import annotations

import pytest
import torch

from kdrecipe.interfaces import Lattice
from kdrecipe.lattice import cells_log_likelihood, joined_cells, simple_pass

RELATIVE = 1e-4
LENS, TOKEN_LENS = (30, 22, 26, 9), (9, 4, 1, 6)
NAMES = ("am_BTV", "lm_BPV", "encoder_BTJ", "predictor_BPJ")
V, J = 20, 16


def make_lattice() -> Lattice:
    """Random sides that take gradients; logits spread over some nats."""
    rng = torch.Generator().manual_seed(1)
    num_rows, num_frames, num_positions = len(LENS), max(LENS), max(TOKEN_LENS) + 1
    shapes = ((num_frames, V), (num_positions, V), (num_frames, J), (num_positions, J))
    sides = [torch.randn(num_rows, *shape, generator=rng).requires_grad_() for shape in shapes]
    weight_JV = torch.randn(J, V, generator=rng)
    tokens_BU = torch.randint(1, V, (num_rows, num_positions - 1), generator=rng)
    return Lattice(
        *sides,
        tokens_BU,
        torch.tensor(LENS),
        torch.tensor(TOKEN_LENS),
        lambda encoder, predictor: torch.tanh(encoder + predictor) @ weight_JV,
    )


def gradients(total: torch.Tensor, lattice: Lattice) -> list[torch.Tensor | None]:
    return list(torch.autograd.grad(total, [getattr(lattice, n) for n in NAMES], allow_unused=True))


def assert_same(got: list[torch.Tensor | None], want: list[torch.Tensor | None]) -> None:
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=RELATIVE, atol=RELATIVE * float(b.abs().max()), msg=name)


@pytest.mark.parametrize("num_positions", [None, 10])
def test_at_all_positions_it_is_torchaudios(num_positions):
    torchaudio = pytest.importorskip("torchaudio")
    ours, theirs = make_lattice(), make_lattice()
    got_B = -cells_log_likelihood(ours, joined_cells(ours, num_positions))
    logits_BTPV = theirs.join(theirs.encoder_BTJ[:, :, None], theirs.predictor_BPJ[:, None])
    want_B = torchaudio.functional.rnnt_loss(
        logits_BTPV,
        theirs.tokens_BU.int(),
        theirs.lens_B.int(),
        theirs.token_lens_B.int(),
        blank=0,
        clamp=-1,
        reduction="none",
    )
    torch.testing.assert_close(got_B, want_B, rtol=RELATIVE, atol=0)
    weights_B = torch.tensor([1.0, -2.0, 0.5, 3.0])
    assert_same(gradients(got_B @ weights_B, ours), gradients(want_B @ weights_B, theirs))


@pytest.mark.parametrize("num_positions", [3, 5])
def test_pruned_it_is_k2s(num_positions):
    k2 = pytest.importorskip("k2")
    ours, theirs = make_lattice(), make_lattice()
    simple_B = -simple_pass(ours, 0.25, 0.0).log_likelihood_B
    pruned_B = -cells_log_likelihood(ours, joined_cells(ours, num_positions, 0.25, 0.0))
    zeros_B = torch.zeros_like(theirs.lens_B)
    boundary_B4 = torch.stack([zeros_B, zeros_B, theirs.token_lens_B, theirs.lens_B], dim=1)
    want_simple_B, (px_grad, py_grad) = k2.rnnt_loss_smoothed(
        lm=theirs.lm_BPV,
        am=theirs.am_BTV,
        symbols=theirs.tokens_BU,
        termination_symbol=0,
        lm_only_scale=0.25,
        am_only_scale=0.0,
        boundary=boundary_B4,
        reduction="none",
        return_grad=True,
    )
    torch.testing.assert_close(simple_B, want_simple_B, rtol=RELATIVE, atol=0)
    ranges_BTR = k2.get_rnnt_prune_ranges(px_grad, py_grad, boundary_B4, num_positions)
    encoder, predictor = k2.do_rnnt_pruning(theirs.encoder_BTJ, theirs.predictor_BPJ, ranges_BTR)
    want_pruned_B = k2.rnnt_loss_pruned(
        theirs.join(encoder, predictor), theirs.tokens_BU, ranges_BTR, 0, boundary_B4, reduction="none"
    )
    torch.testing.assert_close(pruned_B, want_pruned_B, rtol=RELATIVE, atol=0)
    got, want = (simple_B.sum() + 2 * pruned_B.sum(), want_simple_B.sum() + 2 * want_pruned_B.sum())
    assert_same(gradients(got, ours), gradients(want, theirs))
