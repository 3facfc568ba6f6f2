"""The transducer's head, its loss, greedy search, and distillation over the lattice."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from kdrecipe.errors import DataError, RecipeError
from kdrecipe.interfaces import (
    UNK_ID,
    Batch,
    LatticePosteriors,
    LossSetup,
    ModelInfo,
    ModelOutput,
    Targets,
)
from kdrecipe.lattice import full_lattice_posteriors, joined_cells, simple_pass, three_classes
from kdrecipe.model.heads.rnnt import RnntHead, RnntHeadOptions, RnntLoss, RnntLossOptions
from kdrecipe_plugins.losses.transducer import RnntFullSum, RnntKlLoss

V, D = 8, 6
INFO = ModelInfo("tokens", V, 0.04, {"rnnt": ("rnnt_lattice",)}, {})
PREDICTORS = ("stateless", "lstm")


def make_head(predictor="stateless", seed=0, **options):
    torch.manual_seed(seed)
    config = RnntHeadOptions(predictor=predictor, predictor_dim=16, joiner_dim=12, dropout=0.0, **options)
    return RnntHead(config, D, V)


def make_batch(lens=(9, 7, 6), token_lens=(3, 1, 0), seed=0):
    rng = torch.Generator().manual_seed(seed)
    num_tokens, token_lens_B = max(token_lens), torch.tensor(token_lens)
    tokens_BU = torch.randint(3, V, (len(lens), num_tokens), generator=rng)
    return Batch(
        [f"u{i}" for i in range(len(lens))],
        torch.randn(len(lens), max(lens), D, generator=rng),
        torch.tensor(lens),
        tokens_BU.where(torch.arange(num_tokens) < token_lens_B[:, None], 0),
        token_lens_B,
        torch.ones(len(lens), dtype=torch.bool),
    )


def run(head, batch):
    """The output of a model that is nothing but this head."""
    lattice = head(batch.features_BTF, batch.lens_B, batch)
    return ModelOutput(batch.features_BTF, batch.lens_B, lattices={"rnnt": lattice})


def targets_of(head, batch):
    lattice = head(batch.features_BTF, batch.lens_B, batch)
    items = {"rnnt_lattice:rnnt": full_lattice_posteriors(lattice)}
    return Targets(items, batch.tokens_BU, batch.token_lens_B)


def rnnt(**options):
    return RnntLoss(RnntLossOptions(**options), LossSetup(INFO))


def rnnt_kl(**options):
    return RnntKlLoss(RnntKlLoss.Config(**options), LossSetup(INFO, INFO))


# ---------------------------------------------------------------- head


def test_without_a_batch_there_is_no_lattice():
    batch = make_batch()
    assert make_head()(batch.features_BTF, batch.lens_B) is None


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_search_steps_are_the_forward_pass(predictor):
    head, batch = make_head(predictor, context_size=3), make_batch()
    lattice = head(batch.features_BTF, batch.lens_B, batch)
    state = head.start(len(batch))
    for position in range(batch.tokens_BU.shape[1] + 1):
        if position:
            state = head.advance(state, batch.tokens_BU[:, position - 1])
        used_B = position <= batch.token_lens_B
        torch.testing.assert_close(head.predict(state)[used_B], lattice.predictor_BPJ[used_B, position])
    torch.testing.assert_close(head.encode(batch.features_BTF), lattice.encoder_BTJ)
    rows = torch.tensor([2, 0, 0])
    torch.testing.assert_close(head.predict(state.select(rows)), head.predict(state)[rows])


def test_stateless_predictor_sees_its_context_only():
    head = make_head(context_size=2)
    batch = make_batch(token_lens=(3, 3, 3))
    changed = replace(batch, tokens_BU=batch.tokens_BU.clone())
    changed.tokens_BU[:, 0] = 3 + (changed.tokens_BU[:, 0] - 2) % (V - 3)
    a, b = (head(x.features_BTF, x.lens_B, x).predictor_BPJ for x in (batch, changed))
    assert (a - b).abs().amax((0, 2)).gt(1e-6).tolist() == [False, True, True, False]
    # sherpa-onnx begins with -1
    start = head.start(2)
    torch.testing.assert_close(head.predict(replace(start, parts=(start.parts[0] - 1,))), head.predict(start))


def test_every_matrix_product_is_a_linear():
    for predictor in PREDICTORS:
        leaves = [m for m in make_head(predictor).modules() if list(m.parameters(recurse=False))]
        assert {type(m) for m in leaves} == {nn.Linear, nn.Embedding}


def test_lattice_joins_in_the_precision_of_its_forward_pass():
    head, batch = make_head(), make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        lattice = head(batch.features_BTF, batch.lens_B, batch)
    lattice = replace(lattice, encoder_BTJ=lattice.encoder_BTJ.float())
    assert lattice.join(lattice.encoder_BTJ, lattice.predictor_BPJ[:, :1]).dtype == torch.bfloat16


# ---------------------------------------------------------------- greedy search


def one_by_one(head, hidden_TD):
    """Greedy search of one utterance, written down plainly."""
    tokens, frames = [], []
    for frame, encoder_J in enumerate(head.encode(hidden_TD[None])[0]):
        state = head.start(1)
        for token in tokens:
            state = head.advance(state, torch.tensor([token]))
        best = int(head.join(encoder_J, head.predict(state)[0]).argmax())
        if best not in (0, UNK_ID):
            tokens.append(best)
            frames.append(frame)
    return tokens, frames


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_greedy_search_is_one_token_per_frame_at_most(predictor):
    head = make_head(predictor).eval()
    with torch.no_grad():
        head.output.weight.mul_(8)
        head.output.bias[0] = 1.0
        head.output.bias[UNK_ID] = 1.0  # <unk> wins now and then, and is passed over
    batch = make_batch((20, 13, 0, 17), (1, 1, 1, 1))
    hidden_BTD = 2 * batch.features_BTF
    found, frames, _ = head.best_path(hidden_BTD, batch.lens_B)
    want = [one_by_one(head, hidden_BTD[i, :n]) for i, n in enumerate(batch.lens_B.tolist())]
    assert list(zip(found, frames, strict=True)) == want
    assert head.greedy(hidden_BTD, batch.lens_B) == found
    assert sum(map(len, found)) > 5
    assert not any(UNK_ID in tokens or 0 in tokens for tokens in found)


# ---------------------------------------------------------------- loss


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_it_learns(predictor):
    """Each token is a pattern in one frame; what it says then is right for texts it has not seen."""
    torch.manual_seed(0)
    head, patterns_VD = make_head(predictor), 2 * torch.randn(V, D)

    def spoken(seed):
        batch = make_batch((18, 12, 15) * 4, (5, 3, 4) * 4, seed)
        batch.features_BTF *= 0.1
        for row, length in enumerate(batch.token_lens_B.tolist()):
            for position in range(length):
                batch.features_BTF[row, 3 * position + 1] += patterns_VD[batch.tokens_BU[row, position]]
        return batch

    optimizer, loss, values = torch.optim.Adam(head.parameters(), 3e-2), rnnt(range=4), []
    for step in range(200):
        batch = spoken(step)
        value = loss(run(head, batch), Targets(), batch)
        optimizer.zero_grad()
        (value.total / value.count).backward()
        optimizer.step()
        values.append(float((value.metrics["pruned"] / value.count).detach()))
    assert sum(values[-10:]) < 0.2 * sum(values[:10])
    unseen = spoken(1000)
    found = head.greedy(unseen.features_BTF, unseen.lens_B)
    pairs = zip(found, unseen.tokens_BU.tolist(), unseen.token_lens_B.tolist(), strict=True)
    correct = sum(tokens == row[:n] for tokens, row, n in pairs)
    assert correct >= 6


def test_full_is_what_a_wide_range_gives():
    head, batch = make_head(), make_batch()
    wide, full = (
        rnnt(**o)(run(head, batch), Targets(), batch).total.item() for o in ({"range": 9}, {"full": True})
    )
    assert wide == pytest.approx(full, rel=1e-6)
    pruned = rnnt(range=2, simple_scale=0.0)(run(head, batch), Targets(), batch)
    assert set(pruned.metrics) == {"pruned"}
    assert pruned.total.item() == float(pruned.metrics["pruned"])


def test_unlabelled_empty_and_mute_utterances_are_left_out():
    head, batch = make_head(), make_batch((9, 7, 6, 0), (3, 2, 0, 2))
    batch.labelled_B[1] = False
    value = rnnt()(run(head, batch), Targets(), batch)
    only = batch.map(lambda x: x[:1])
    want = rnnt()(run(head, only), Targets(), only)
    assert int(value.count) == int(want.count) == 3
    torch.testing.assert_close(value.total, want.total)
    value.total.backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_more_tokens_than_the_range_allows_widen_it():
    head, batch = make_head(), make_batch((2, 9), (7, 1))
    value = rnnt(range=2)(run(head, batch), Targets(), batch)
    assert value.total.isfinite()


def test_the_losses_share_one_pass():
    head, batch = make_head(), make_batch()
    calls = []
    out = run(head, batch)
    join = out.lattices["rnnt"].join
    out.lattices["rnnt"].join = lambda *sides: calls.append(1) or join(*sides)
    targets = targets_of(make_head(seed=1), batch)
    total = rnnt()(out, targets, batch).total + rnnt_kl(places="occupancy")(out, targets, batch).total
    assert len(calls) == 1
    total.backward()
    assert head.output.weight.grad.isfinite().all()
    assert out.select(torch.tensor([True, False, True])).lattices["rnnt"].kept == {}


def test_a_head_is_required():
    without = replace(INFO, heads={"ctc": ("frame_logits",)})
    with pytest.raises(RecipeError, match="'rnnt' reads the head 'rnnt'"):
        RnntLoss(RnntLossOptions(), LossSetup(without))
    with pytest.raises(RecipeError, match="'rnnt_kl' reads the head 'rnnt'"):
        RnntKlLoss(RnntKlLoss.Config(), LossSetup(without, INFO))


# ---------------------------------------------------------------- distillation


@pytest.mark.parametrize("options", [{}, {"range": 2}, {"full": True}, {"places": "occupancy"}])
def test_nothing_to_learn_from_oneself(options):
    head, batch = make_head().double(), make_batch()
    batch.features_BTF = batch.features_BTF.double()
    value = rnnt_kl(temperature=2.0, **options)(run(head, batch), targets_of(head, batch), batch)
    assert float(value.total.detach()) == pytest.approx(0, abs=1e-9)
    assert value.count == int(batch.lens_B.sum())
    assert float(value.metrics["agree"]) == pytest.approx(value.count)
    grads = torch.autograd.grad(value.total, head.parameters(), allow_unused=True)
    assert max(float(g.abs().max()) for g in grads if g is not None) < 1e-5


@pytest.mark.parametrize("options", [{}, {"temperature": 3.0}, {"places": "occupancy"}])
def test_kl_is_the_formula(options):
    """Cell by cell, with the teacher's tokens spread out over all V classes."""
    head, teacher, batch = make_head(), make_head(seed=1), make_batch()
    out, targets = run(head, batch), targets_of(teacher, batch)
    got = rnnt_kl(range=2, **options)(out, targets, batch)
    temperature = options.get("temperature", 1.0)
    sides = [x(batch.features_BTF, batch.lens_B, batch) for x in (teacher, head)]
    probs = [s.join(s.encoder_BTJ[:, :, None], s.predictor_BPJ[:, None]).softmax(-1) for s in sides]
    cells, simple = joined_cells(out.lattices["rnnt"], 2), simple_pass(out.lattices["rnnt"])
    occupancy_BPT = simple.next_occupancy_BPT + simple.blank_occupancy_BPT
    total = 0.0
    for i, t, positions in zip(cells.rows_N, cells.frames_N, cells.positions_NR, strict=True):
        values, weights = [], []
        for u in positions:
            if u > batch.token_lens_B[i]:
                continue
            classes = [0] if u == batch.token_lens_B[i] else [int(batch.tokens_BU[i, u]), 0]
            p, q = (
                torch.cat([x[i, t, u, classes], 1 - x[i, t, u, classes].sum()[None]]).double() for x in probs
            )
            p, q = ((x.log() / temperature).softmax(0) for x in (p, q))
            values.append((p * (p / q).log()).sum())
            weights.append(
                occupancy_BPT[i, u, t].clamp(min=1e-6) if "places" in options else torch.tensor(1.0)
            )
        total += temperature**2 * ((torch.stack(values) * torch.stack(weights)).sum() / sum(weights)).item()
    assert float(got.total) == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"range": 2, "temperature": 3.0}, {"full": True}])
@pytest.mark.parametrize("ruled_out", [0, 1])
def test_what_the_teacher_rules_out_weighs_nothing(options, ruled_out):
    """The next token, or the blank, in half of the frames."""
    head, batch = make_head(), make_batch()

    def learn(log_prob):
        targets = targets_of(make_head(seed=1), batch)
        targets.lattice().log_probs_BTP2[:, ::2, :, ruled_out] = log_prob
        result = rnnt_kl(**options)(run(head, batch), targets, batch)
        return result.total.detach(), torch.autograd.grad(result.total, head.encoder_proj.weight)[0]

    total, gradient = learn(-torch.inf)
    assert torch.isfinite(total)
    assert torch.isfinite(gradient).all()
    for got, want in zip((total, gradient), learn(-500.0), strict=True):
        torch.testing.assert_close(got, want)


def test_a_teacher_that_rules_tokens_out_gives_finite_posteriors():
    head, batch = make_head(seed=1), make_batch()
    lattice = head(batch.features_BTF, batch.lens_B, batch)
    join, ruled_out = lattice.join, [0, int(batch.tokens_BU[0, 0])]

    def strict(encoder, predictor):
        logits = join(encoder, predictor)
        logits[..., ruled_out] = -torch.inf
        return logits

    found = full_lattice_posteriors(replace(lattice, join=strict))
    assert torch.isfinite(found.log_probs_BTP2).all()
    targets = Targets({"rnnt_lattice:rnnt": found}, batch.tokens_BU, batch.token_lens_B)
    student = make_head()
    total = rnnt_kl()(run(student, batch), targets, batch).total
    total.backward()
    assert torch.isfinite(total)
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_what_lies_after_the_last_token_is_not_read():
    head, batch = make_head(), make_batch()
    out, targets = run(head, batch), targets_of(make_head(seed=1), batch)
    want = rnnt_kl(full=True)(out, targets, batch).total
    for row, length in enumerate(batch.token_lens_B.tolist()):
        targets.lattice().log_probs_BTP2[row, :, length, 0] = -0.01
        targets.lattice().log_probs_BTP2[row, :, length + 1 :] = torch.nan
    torch.testing.assert_close(rnnt_kl(full=True)(out, targets, batch).total, want)


def test_teacher_takes_no_gradient_and_leads_the_student():
    head, batch = make_head(), make_batch()
    targets = targets_of(make_head(seed=1), batch)
    targets.lattice().log_probs_BTP2.requires_grad_()
    optimizer, loss, values = torch.optim.Adam(head.parameters(), 1e-2), rnnt_kl(), []
    for _ in range(60):
        value = loss(run(head, batch), targets, batch)
        optimizer.zero_grad()
        value.total.backward()
        optimizer.step()
        values.append(float(value.total.detach()))
    assert values[-1] < 0.1 * values[0]
    assert targets.lattice().log_probs_BTP2.grad is None


def test_another_lattice_is_refused():
    head, batch = make_head(), make_batch()
    out, teacher = run(head, batch), targets_of(head, batch)
    item = teacher.lattice()
    for change, what in (
        ({"lens_B": item.lens_B - 1}, "frame counts"),
        ({"token_lens_B": item.token_lens_B + 1}, "other texts"),
    ):
        targets = replace(teacher, items={"rnnt_lattice:rnnt": replace(item, **change)})
        with pytest.raises(DataError, match=what):
            rnnt_kl()(out, targets, batch)
    with pytest.raises(DataError, match="other texts"):
        rnnt_kl()(out, replace(teacher, tokens_BU=teacher.tokens_BU.flip(1)), batch)
    with pytest.raises(RecipeError, match="same tokens"):
        RnntKlLoss(RnntKlLoss.Config(), LossSetup(INFO, replace(INFO, vocab_id="others")))


def test_what_the_two_classes_leave():
    posteriors = LatticePosteriors(torch.tensor([0.5, 0.3]).log(), torch.tensor([1]), torch.tensor([1]))
    torch.testing.assert_close(three_classes(posteriors.log_probs_BTP2).exp(), torch.tensor([0.5, 0.3, 0.2]))


# ---------------------------------------------------------------- full sum


def full_sum(**options):
    return RnntFullSum(RnntFullSum.Config(**options), LossSetup(INFO, INFO))


def log_likelihoods(head, batch):
    """Of the texts, from the joined logits: a path is a row of moves, each a token or a blank."""
    found = []
    lattice = head(batch.features_BTF, batch.lens_B, batch)
    logits = lattice.join(lattice.encoder_BTJ[:, :, None], lattice.predictor_BPJ[:, None]).log_softmax(-1)
    for row, (frames, size) in enumerate(zip(batch.lens_B, batch.token_lens_B, strict=True)):
        scores = []
        for at in itertools.combinations(range(int(frames - 1 + size)), int(size)):
            t = u = 0
            score = torch.zeros(())
            for move in range(int(frames + size)):
                token = int(batch.tokens_BU[row, u]) if move in at else 0
                score = score + logits[row, t, u, token]
                t, u = (t, u + 1) if token else (t + 1, u)
            scores.append(score)
        found.append(torch.stack(scores).logsumexp(0))
    return torch.stack(found)


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_full_sum_is_the_distance_of_log_likelihoods(distance):
    head, teacher, batch = make_head(), make_head(seed=1), make_batch((5, 4, 3), (2, 1, 0))
    result = full_sum(distance=distance, full=True)(run(head, batch), targets_of(teacher, batch), batch)
    apart = (log_likelihoods(head, batch) - log_likelihoods(teacher, batch))[:2]  # the last text is empty
    want = apart.abs().sum() if distance == "l1" else apart.square().sum()
    torch.testing.assert_close(result.total, want, rtol=1e-3, atol=1e-4)
    assert int(result.count) == 3


def test_full_sum_leads_the_student_to_the_teachers_doubt():
    head, batch = make_head(), make_batch((9, 7, 6), (3, 1, 2))
    teacher = make_head(seed=1)
    optimizer, loss = torch.optim.Adam(head.parameters(), 1e-2), full_sum(distance="l2")
    targets = targets_of(teacher, batch)
    targets.lattice().log_probs_BTP2.requires_grad_()
    first = float(loss(run(head, batch), targets, batch).total.detach())
    for _ in range(60):
        optimizer.zero_grad()
        loss(run(head, batch), targets, batch).total.backward()
        optimizer.step()
    assert float(loss(run(head, batch), targets, batch).total.detach()) < 0.05 * first
    assert targets.lattice().log_probs_BTP2.grad is None


def test_full_sum_leaves_out_what_can_not_be():
    head, batch = make_head(), make_batch((9, 0, 6), (3, 2, 2))
    targets = targets_of(make_head(seed=1), batch)
    value = full_sum()(run(head, batch), targets, batch)
    value.total.backward()
    assert int(value.count) == 5
    assert all(p.grad.isfinite().all() for p in head.parameters() if p.grad is not None)
