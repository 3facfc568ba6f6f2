"""For each check there is a plugin that breaks it, and this check only."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lhotse.audio import RecordingSet
from lhotse.supervision import SupervisionSet
from pydantic import ConfigDict
from torch import nn

from kdrecipe.errors import DataError
from kdrecipe.frames import bucket_log_probs, full_precision, keep_top, valid_frames
from kdrecipe.interfaces import (
    Hidden,
    Hypothesis,
    LossOutput,
    ModelOutput,
    Options,
    Posteriors,
    Prepared,
    Tap,
    Targets,
    TargetSpec,
)
from kdrecipe.testing.contracts import (
    ARCHITECTURE_CHECKS,
    COMPRESSOR_CHECKS,
    CORPUS_CHECKS,
    DECODER_CHECKS,
    LOSS_CHECKS,
    METRIC_CHECKS,
    TEACHER_CHECKS,
    TeacherContract,
    architecture_contract,
    compressor_contract,
    corpus_contract,
    decoder_contract,
    loss_contract,
    metric_contract,
    teacher_contract,
)
from kdrecipe.testing.corpus import make_corpus
from kdrecipe.testing.models import TinyEncoder


def failed(contract):
    return [r.check_id for r in contract.results() if not r.ok]


class Loose(Options):
    """Takes any option, which breaks config_strict."""

    model_config = ConfigDict(extra="allow")


def cases(broken, checks):
    """(check id, plugin) for every check, and (None, plugin) for the sound one."""
    assert set(broken) - {None} == set(checks)
    return pytest.mark.parametrize(
        ("check_id", "cls"), list(broken.items()), ids=[i or "sound" for i in broken]
    )


# ---------------------------------------------------------------- losses


class SoundLoss:
    """KL, written with a seam wherever a check looks."""

    class Config(Options):
        """No options."""

    def __init__(self, config, setup):
        self.config = config

    @staticmethod
    def requires(config):
        return [TargetSpec("frame_logits", "ctc")]

    def student(self, logits):
        return full_precision(logits)

    def flatten(self, values, lens):
        return valid_frames(values, lens)

    def teacher(self, values):
        return values.detach()

    def with_tail(self, kept, tail):
        return torch.cat([kept, tail[:, None]], -1)

    def kl(self, log_p, log_q):
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)

    def reduce(self, kl):
        return LossOutput(kl.sum(), len(kl))

    def __call__(self, out, targets, batch):
        item = targets.posteriors("ctc")
        lens = out.lens_B
        logits = self.student(self.flatten(out.logits["ctc"], lens))
        log_p = self.flatten(self.teacher(item.log_probs_BTK), lens)
        indices = None if item.indices_BTK is None else self.flatten(item.indices_BTK, lens)
        if item.log_tail_BT is not None:
            log_p = self.with_tail(log_p, self.flatten(self.teacher(item.log_tail_BT), lens))
        log_q = bucket_log_probs(logits, indices)[..., : log_p.shape[-1]]
        kl = self.kl(log_p.to(log_q.dtype), log_q)
        return self.reduce(kl)


class CountsPadding(SoundLoss):
    """Sums over padding as well; silent where there is no valid frame at all."""

    def flatten(self, values, lens):
        return values.flatten(0, 1) if int(lens.max()) else values.flatten(0, 1)[:0]


class MeanOverBatch(SoundLoss):
    """Returns the mean over frames as if it were one frame's."""

    def reduce(self, kl):
        return LossOutput(kl.mean(), 1) if len(kl) else LossOutput(kl.sum(), 0)


class TeacherTooSoft(SoundLoss):
    """Softens the teacher only, so that its minimum is elsewhere."""

    def kl(self, log_p, log_q):
        return super().kl((log_p / 2).log_softmax(-1), log_q)


class TeachesTheTeacher(SoundLoss):
    def teacher(self, values):
        return values


class WrongGradient(SoundLoss):
    """Part of the value carries no gradient; at the teacher's, it has none anyway."""

    def kl(self, log_p, log_q):
        return super().kl(log_p, log_q.detach()) + super().kl(log_p, log_q)


class HalfPrecision(SoundLoss):
    def student(self, logits):
        return logits

    def kl(self, log_p, log_q):
        half = log_q.dtype == torch.bfloat16 or getattr(self, "half", False)
        return super().kl(log_p.bfloat16(), log_q.bfloat16()).float() if half else super().kl(log_p, log_q)

    def __call__(self, out, targets, batch):
        self.half = out.logits["ctc"].dtype == torch.bfloat16
        return super().__call__(out, targets, batch)


class ForgetsTheTail(SoundLoss):
    """Scales the kept classes up to 1 and forgets the others."""

    def with_tail(self, kept, tail):
        return kept.log_softmax(-1)


class NanWhenEmpty(SoundLoss):
    def reduce(self, kl):
        return LossOutput(kl.mean() * len(kl), len(kl))


class LooseLoss(SoundLoss):
    Config = Loose


class AsksTwice(SoundLoss):
    @staticmethod
    def requires(config):
        return [TargetSpec("frame_logits", "ctc"), TargetSpec("frame_logits", "ctc", dtype="float32")]


@cases(
    {
        None: SoundLoss,
        "padding_invariance": CountsPadding,
        "doubling": MeanOverBatch,
        "minimum_at_teacher": TeacherTooSoft,
        "no_gradient_into_targets": TeachesTheTeacher,
        "gradcheck": WrongGradient,
        "bf16": HalfPrecision,
        "top_k_limit": ForgetsTheTail,
        "empty_selection": NanWhenEmpty,
        "config_strict": LooseLoss,
        "requires_valid": AsksTwice,
    },
    LOSS_CHECKS,
)
def test_losses(check_id, cls):
    assert failed(loss_contract(cls)) == ([check_id] if check_id else [])


# ---------------------------------------------------------------- architectures


class HearsPadding(TinyEncoder):
    def forward(self, features_BTF, lens_B):
        hidden_BTD, out_lens_B = super().forward(features_BTF, lens_B)
        return hidden_BTD + features_BTF[:, -1].mean(-1)[:, None, None], out_lens_B


class WrongRule(TinyEncoder):
    def output_len(self, num_frames):
        return super().output_len(num_frames) + 1


class WrongWidth(TinyEncoder):
    def taps(self):
        return {name: (module, dim + 1) for name, (module, dim) in super().taps().items()}


class EarlyTap(TinyEncoder):
    """Has a tap before the subsampling and does not say so."""

    def __init__(self, config, input_dim):
        super().__init__(config, input_dim)
        self.early, self.input_dim = nn.Identity(), input_dim

    def taps(self):
        return {"early": (self.early, self.input_dim), **super().taps()}

    def forward(self, features_BTF, lens_B):
        return super().forward(self.early(features_BTF), lens_B)


class DeclaredEarlyTap(EarlyTap):
    def taps(self):
        return {**super().taps(), "early": Tap(self.early, self.input_dim, subsampling=1)}


class WronglyDeclaredEarlyTap(EarlyTap):
    def taps(self):
        return {**super().taps(), "early": Tap(self.early, self.input_dim, subsampling=2)}


class SecretState(TinyEncoder):
    def __init__(self, config, input_dim):
        super().__init__(config, input_dim)
        self.secret = torch.randn(())

    def forward(self, features_BTF, lens_B):
        hidden_BTD, out_lens_B = super().forward(features_BTF, lens_B)
        return hidden_BTD + self.secret, out_lens_B


class LooksAtOthers(TinyEncoder):
    def forward(self, features_BTF, lens_B):
        hidden_BTD, out_lens_B = super().forward(features_BTF, lens_B)
        return hidden_BTD + hidden_BTD[:, :1].mean(0), out_lens_B


class IdleLayer(TinyEncoder):
    def __init__(self, config, input_dim):
        super().__init__(config, input_dim)
        self.idle = nn.Linear(2, 2)


class LooseEncoder(TinyEncoder):
    class Config(Loose):
        dim: int = 4


class FixedLength(TinyEncoder):
    """Makes a Python list of positions, which an export freezes."""

    def forward(self, features_BTF, lens_B):
        hidden_BTD, out_lens_B = super().forward(features_BTF, lens_B)
        positions = torch.arange(1.0, 200.0)[: int(hidden_BTD.shape[1])].tolist()
        return hidden_BTD + torch.tensor(positions)[:, None], out_lens_B


class ForgetsWhoReads(TinyEncoder):
    def unit_groups(self):
        [group] = super().unit_groups()
        return [replace(group, parts=tuple(p for p in group.parts if p.layer != "layers.1.0"))]


@cases(
    {
        None: TinyEncoder,
        "padding_invariance": HearsPadding,
        "lens_rule": WrongRule,
        "taps_declared": WrongWidth,
        "state_dict_roundtrip": SecretState,
        "batch_invariance": LooksAtOthers,
        "gradients_everywhere": IdleLayer,
        "onnx_export": FixedLength,
        "units_go_together": ForgetsWhoReads,
        "config_strict": LooseEncoder,
    },
    ARCHITECTURE_CHECKS,
)
def test_architectures(check_id, cls):
    assert failed(architecture_contract(cls)) == ([check_id] if check_id else [])


@pytest.mark.parametrize(
    ("cls", "found"),
    [(EarlyTap, ["taps_declared"]), (DeclaredEarlyTap, []), (WronglyDeclaredEarlyTap, ["taps_declared"])],
)
def test_taps_with_frames_of_their_own_are_declared(cls, found):
    assert failed(architecture_contract(cls)) == found


# ---------------------------------------------------------------- compressors


class SoundCompressor:
    """Halves the CTC layer's weights, trained for one epoch."""

    class Config(Options):
        """No options."""

    num_epochs = 1

    def __init__(self, config):
        self.config = config

    def apply(self, model, context):
        with torch.no_grad():
            model.heads["ctc"].proj.weight.mul_(0.5)
        return model

    def on_step(self, model, step, num_steps):
        pass

    def finish(self, model):
        return model

    def rebuild(self, model):
        return model

    def report(self):
        return {"halved": 1.0}


class Lengthens(nn.Module):
    """Reports one frame fewer."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, features_BTF, lens_B):
        out = self.inner(features_BTF, lens_B)
        return ModelOutput(out.hidden_BTD, out.lens_B - 1, out.logits)


class ChangesLengths(SoundCompressor):
    def finish(self, model):
        return Lengthens(model)

    rebuild = finish


class CannotRebuild(SoundCompressor):
    def finish(self, model):
        model.heads["ctc"].proj = nn.Sequential(model.heads["ctc"].proj)
        return model


class ReportsWords(SoundCompressor):
    def report(self):
        return {"halved": "yes"}


class DrawsFreely(SoundCompressor):
    def apply(self, model, context):
        rng = torch.Generator()
        rng.seed()
        with torch.no_grad():
            weight = model.heads["ctc"].proj.weight
            weight.add_(torch.randn(weight.shape, generator=rng))
        return model


class ChangesItsMind(SoundCompressor):
    """Prunes only in finish, when nothing can recover any more."""

    def finish(self, model):
        with torch.no_grad():
            model.heads["ctc"].proj.weight.zero_()
        return model


class LooseCompressor(SoundCompressor):
    Config = Loose


class PrunesMoreWhileItTrains(SoundCompressor):
    """Its size is known only after training, so no budget can be met."""

    strength = "share"

    class Config(Options):
        share: float = 0.5

    stepped = False

    def on_step(self, model, step, num_steps):
        self.stepped = True

    def finish(self, model):
        if self.config.share and not self.stepped:
            model.encoder.layers = model.encoder.layers[:1]
        return model


@cases(
    {
        None: SoundCompressor,
        "keeps_interface": ChangesLengths,
        "rebuild_roundtrip": CannotRebuild,
        "report_numbers": ReportsWords,
        "deterministic": DrawsFreely,
        "finetune_hooks": ChangesItsMind,
        "strength_meets_budgets": PrunesMoreWhileItTrains,
        "config_strict": LooseCompressor,
    },
    COMPRESSOR_CHECKS,
)
def test_compressors(check_id, cls):
    assert failed(compressor_contract(cls)) == ([check_id] if check_id else [])


class Keeps(nn.Module):
    """A linear layer on some of its inputs."""

    def __init__(self, linear, kept):
        super().__init__()
        self.kept = kept
        self.linear = nn.Linear(len(kept), linear.out_features)
        self.linear.weight.data = linear.weight.data[:, kept].clone()
        self.linear.bias.data = linear.bias.data.clone()

    def forward(self, x):
        return self.linear(x[..., self.kept])


class KeepsLoudest(SoundCompressor):
    """Which inputs are kept is known only once there is a model: it can't be rebuilt from its options."""

    kept = ()

    def apply(self, model, context):
        size = model.heads["ctc"].proj.weight.detach().abs().sum(0)
        self.kept = size.argsort(descending=True)[:3].tolist()
        return self.rebuild(model)

    def rebuild(self, model):
        model.heads["ctc"].proj = Keeps(model.heads["ctc"].proj, list(self.kept))
        return model

    def state(self):
        return {"kept": list(self.kept)}

    def load_state(self, state):
        self.kept = state["kept"]


class KeepsNoState(KeepsLoudest):
    def state(self):
        return {}


class KeepsTensors(KeepsLoudest):
    def state(self):
        return {"kept": torch.tensor(self.kept)}


@pytest.mark.parametrize(
    ("cls", "found"),
    [(KeepsLoudest, []), (KeepsNoState, ["rebuild_roundtrip"]), (KeepsTensors, ["rebuild_roundtrip"])],
)
def test_a_compressor_is_rebuilt_from_its_state(cls, found):
    assert failed(compressor_contract(cls)) == found


# ---------------------------------------------------------------- corpora


class SoundCorpus:
    """Reads the manifests of the synthetic corpus."""

    class Config(Options):
        """No options."""

    def __init__(self, config):
        self.config = config

    def prepare(self, corpus_dir, out_dir):
        splits = {}
        for split in ("train", "dev", "test"):
            recordings = RecordingSet.from_file(corpus_dir / f"{split}_recordings.jsonl.gz").to_eager()
            supervisions = SupervisionSet.from_file(corpus_dir / f"{split}_supervisions.jsonl.gz").to_eager()
            splits[split] = (recordings, supervisions)
        return self.change(Prepared(splits), out_dir)

    def change(self, prepared, out_dir):
        return prepared


def changed(prepared, split, **fields):
    """``prepared`` with the first supervision of a split changed."""
    recordings, supervisions = prepared.splits[split]
    listed = [copy.copy(s) for s in supervisions]
    for name, value in fields.items():
        setattr(listed[0], name, value)
    return Prepared({**prepared.splits, split: (recordings, SupervisionSet.from_segments(listed))})


class OnlyTrain(SoundCorpus):
    def change(self, prepared, out_dir):
        return Prepared({"train": prepared.splits["train"]})


class SharesSpeakers(SoundCorpus):
    def change(self, prepared, out_dir):
        speaker = next(iter(prepared.splits["train"][1])).speaker
        return changed(prepared, "test", speaker=speaker)


class DiffersEachTime(SoundCorpus):
    def change(self, prepared, out_dir):
        return changed(prepared, "train", text=f"RUN {out_dir.name.upper()}")


class OverrunsItsAudio(SoundCorpus):
    def change(self, prepared, out_dir):
        return changed(prepared, "dev", duration=99.0)


class LeavesMarkup(SoundCorpus):
    def change(self, prepared, out_dir):
        return changed(prepared, "train", text="<s> RED  TEA </s>")


class LooseCorpus(SoundCorpus):
    Config = Loose


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("raw"), num_speakers=4, utterances_per_speaker=1)


@cases(
    {
        None: SoundCorpus,
        "splits_present": OnlyTrain,
        "speakers_disjoint": SharesSpeakers,
        "deterministic": DiffersEachTime,
        "validates": OverrunsItsAudio,
        "texts_clean": LeavesMarkup,
        "config_strict": LooseCorpus,
    },
    CORPUS_CHECKS,
)
def test_corpora(check_id, cls, raw, tmp_path):
    contract = corpus_contract(cls, corpus_dir=raw, work_dir=tmp_path)
    assert failed(contract) == ([check_id] if check_id else [])


# ---------------------------------------------------------------- decoders


class SoundDecoder:
    """Greedy search, one utterance at a time."""

    head = "ctc"

    class Config(Options):
        """No options."""

    def __init__(self, config, tokens, frame_shift_s):
        self.tokens, self.frame_shift_s = tokens, frame_shift_s

    def decode(self, model, out):
        best_BT = out.logits["ctc"].argmax(-1)
        return [self.one(path[:n].tolist()) for path, n in zip(best_BT, out.lens_B.tolist(), strict=True)]

    def one(self, path):
        starts = [t for t, i in enumerate(path) if i and (t == 0 or path[t - 1] != i)]
        ids = [path[t] for t in starts]
        return Hypothesis(self.tokens.decode(ids), ids, [t * self.frame_shift_s for t in starts])


class TimesInFrames(SoundDecoder):
    def one(self, path):
        found = super().one(path)
        return Hypothesis(found.text, found.tokens, [t / self.frame_shift_s for t in found.times_s])


class DecodesPadding(SoundDecoder):
    """Drops the last token if the first frame of padding shows another one."""

    def decode(self, model, out):
        best_BT = out.logits["ctc"].argmax(-1)
        found = super().decode(model, out)
        for row, n in enumerate(out.lens_B.tolist()):
            if n < best_BT.shape[1] and int(best_BT[row, n]) > 2:
                ids = found[row].tokens[:-1]
                found[row] = Hypothesis(self.tokens.decode(ids), ids, found[row].times_s[:-1])
        return found


class LoudestWins(SoundDecoder):
    """Silent about all but the utterances with the most frames of its batch."""

    def decode(self, model, out):
        longest = int(out.lens_B.max())
        found = super().decode(model, out)
        return [h if int(n) == longest else Hypothesis("") for h, n in zip(found, out.lens_B, strict=True)]


class KeepsRepeats(SoundDecoder):
    def one(self, path):
        starts = [t for t, i in enumerate(path) if i]
        ids = [path[t] for t in starts]
        return Hypothesis(self.tokens.decode(ids), ids, [t * self.frame_shift_s for t in starts])


class NeverSilent(SoundDecoder):
    def one(self, path):
        return super().one(path) if path else Hypothesis("a", [3])


class DeafToLanguage(SoundDecoder):
    class Config(Options):
        """What it says it fuses with."""

        lm_weight: float = 0.0

    def __init__(self, config, tokens, frame_shift_s, lm):
        super().__init__(config, tokens, frame_shift_s)


class LooseDecoder(SoundDecoder):
    Config = Loose


@cases(
    {
        None: SoundDecoder,
        "well_formed": TimesInFrames,
        "padding_invariance": DecodesPadding,
        "batch_invariance": LoudestWins,
        "certain_output": KeepsRepeats,
        "no_frames": NeverSilent,
        "language_model": DeafToLanguage,
        "config_strict": LooseDecoder,
    },
    DECODER_CHECKS,
)
def test_decoders(check_id, cls):
    assert failed(decoder_contract(cls)) == ([check_id] if check_id else [])


# ---------------------------------------------------------------- metrics


class SoundMetric:
    """Words that differ at their place, a crude measure."""

    class Config(Options):
        """No options."""

    def __init__(self, config):
        self.config = config

    def errors(self, reference, hypothesis):
        a, b = reference.split(), hypothesis.split()
        wrong = sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b))
        return wrong, len(a)


class NeverPerfect(SoundMetric):
    def errors(self, reference, hypothesis):
        wrong, length = super().errors(reference, hypothesis)
        return wrong + (reference == hypothesis), length


class ForgivesSilence(SoundMetric):
    def errors(self, reference, hypothesis):
        wrong, length = super().errors(reference, hypothesis)
        return (wrong if hypothesis else 0), length


class LengthOfBoth(SoundMetric):
    def errors(self, reference, hypothesis):
        wrong, length = super().errors(reference, hypothesis)
        return wrong, (length if not (reference and hypothesis) else max(length, len(hypothesis.split())))


class LooseMetric(SoundMetric):
    Config = Loose


@cases(
    {
        None: SoundMetric,
        "perfect_is_zero": NeverPerfect,
        "empty_texts": ForgivesSilence,
        "counts": LengthOfBoth,
        "config_strict": LooseMetric,
    },
    METRIC_CHECKS,
)
def test_metrics(check_id, cls):
    assert failed(metric_contract(cls)) == ([check_id] if check_id else [])


def test_every_check_has_a_line_of_documentation():
    kinds = (
        LOSS_CHECKS,
        ARCHITECTURE_CHECKS,
        COMPRESSOR_CHECKS,
        CORPUS_CHECKS,
        DECODER_CHECKS,
        METRIC_CHECKS,
    )
    for checks in kinds:
        for check_id, check in checks.items():
            assert (check.__doc__ or "").strip().split("\n")[0].endswith("."), check_id


# ---------------------------------------------------------------- teachers


class SoundTeacher:
    """Loudness of every 0.02 s as hidden states and posteriors, and of a whole utterance along its text."""

    class Config(Options):
        """No options."""

    input = "audio"
    files = [Path(__file__)]
    num_params = None
    vocab_id = "numbers"
    frame_shift_s = 0.02

    def __init__(self, config):
        self.config = config

    def provides(self):
        return [
            TargetSpec("hidden", "loudness", 2, self.frame_shift_s),
            TargetSpec("frame_logits", "ctc", 3, self.frame_shift_s, self.vocab_id),
            TargetSpec("token_logits", "attention", 3, vocab_id=self.vocab_id),
        ]

    def load(self, device):
        self.weight = torch.tensor([[3.0, -2.0, 5.0], [1.0, 8.0, -4.0]])

    def loudness(self, batch):
        samples = F.pad(batch.samples_BS, (0, -batch.samples_BS.shape[1] % 320))
        frames = samples.unflatten(1, (-1, 320))
        return torch.stack([frames.abs().mean(-1), frames.square().mean(-1).sqrt()], -1)

    def posteriors(self, values):
        return (values @ self.weight).log_softmax(-1)

    def texts(self, batch):
        said = (hypothesis.tokens for hypothesis in self.hypotheses(batch))
        return [
            [len(w) % 3 for w in text.split()] or own for text, own in zip(batch.texts, said, strict=True)
        ]

    def targets(self, batch, needs):
        values, lens = self.loudness(batch), batch.sample_lens_B // 320
        texts = self.texts(batch)
        token_lens = torch.tensor([len(text) for text in texts])
        tokens = torch.zeros(len(batch), int(token_lens.max()), dtype=torch.int64)
        for row, text in zip(tokens, texts, strict=True):
            row[: len(text)] = torch.tensor(text)
        total = batch.samples_BS.abs().sum(-1) / batch.sample_lens_B.clamp(min=1)
        along = total[:, None, None] * torch.ones(1, tokens.shape[1] + 1, 2)
        items = {
            "loudness": Hidden(values, lens),
            "ctc": Posteriors(self.posteriors(values), lens),
            "attention": Posteriors(self.posteriors(along), token_lens + 1),
        }
        found = {
            n.key: items[n.tap] if n.kind == "hidden" else keep_top(items[n.tap], n.top_k) for n in needs
        }
        return Targets(found, tokens, token_lens)

    def hypotheses(self, batch):
        return [Hypothesis("one" if n > 2000 else "", [2] if n > 2000 else []) for n in batch.sample_lens_B]


class ForgetsItsTokens(SoundTeacher):
    vocab_id = None


class HasNoFiles(SoundTeacher):
    files = ()


class HearsPaddingOfAll(SoundTeacher):
    def loudness(self, batch):
        padding = batch.samples_BS.shape[1] - int(batch.sample_lens_B.max())
        return super().loudness(batch) + padding / 1e4


class HearsTheLongest(SoundTeacher):
    def loudness(self, batch):
        return super().loudness(batch) + int(batch.sample_lens_B.max()) / 1e4


class SpeaksInDoubles(SoundTeacher):
    def targets(self, batch, needs):
        found = super().targets(batch, needs)
        for item in found.items.values():
            if isinstance(item, Hidden):
                item.values_BTD = item.values_BTD.double()
        return found


class CountsTwice(SoundTeacher):
    frame_shift_s = 0.01


class LearnsItself(SoundTeacher):
    def load(self, device):
        super().load(device)
        self.weight.requires_grad_()


class SpeaksInLogits(SoundTeacher):
    def posteriors(self, values):
        return values @ self.weight


class TiresOfABatch(SoundTeacher):
    heard = None

    def targets(self, batch, needs):
        again, self.heard = batch.samples_BS is self.heard, batch.samples_BS
        return super().targets(batch if not again else batch.map(lambda x: x * 0), needs)


class TooSure(SoundTeacher):
    def hypotheses(self, batch):
        return [Hypothesis(h.text, h.tokens, avg_log_prob=0.5) for h in super().hypotheses(batch)]


class FailsOnNothing(SoundTeacher):
    def loudness(self, batch):
        if not batch.sample_lens_B.all():
            raise ValueError("no audio")
        return super().loudness(batch)


class LooseTeacher(SoundTeacher):
    Config = Loose


@cases(
    {
        None: SoundTeacher,
        "provides_valid": ForgetsItsTokens,
        "describes_itself": HasNoFiles,
        "padding_invariance": HearsPaddingOfAll,
        "batch_invariance": HearsTheLongest,
        "declared_shapes": SpeaksInDoubles,
        "rates": CountsTwice,
        "no_gradient": LearnsItself,
        "normalised": SpeaksInLogits,
        "same_twice": TiresOfABatch,
        "hypotheses": TooSure,
        "next_to_no_audio": FailsOnNothing,
        "config_strict": LooseTeacher,
    },
    TEACHER_CHECKS,
)
def test_teachers(check_id, cls):
    assert failed(teacher_contract(cls)) == ([check_id] if check_id else [])


class Mute(SoundTeacher):
    """Has the hidden states only, and says so."""

    def provides(self):
        return super().provides()[:1]

    def targets(self, batch, needs):
        return Targets({"hidden:loudness": Hidden(self.loudness(batch), batch.sample_lens_B // 320)})

    def hypotheses(self, batch):
        raise DataError("a microphone recognises nothing")


def test_a_teacher_need_not_recognise_anything():
    skipped = {r.check_id: r.reason for r in teacher_contract(Mute).results() if r.status == "skipped"}
    assert failed(teacher_contract(Mute)) == []
    assert sorted(skipped) == ["hypotheses", "normalised"]
    assert "a microphone recognises nothing" in skipped["hypotheses"]


class TestSoundTeacherAsAClass(TeacherContract):
    plugin = SoundTeacher
