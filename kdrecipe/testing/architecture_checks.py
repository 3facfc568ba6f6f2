"""What every encoder must hold to.

B utterances, T feature frames, F bins, D width.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdrecipe.frames import valid_frames
from kdrecipe.interfaces import taps_of
from kdrecipe.structure import Sizes, cut, unit_groups
from kdrecipe.testing.checks import CheckSkipped, by_id, check_config_strict, require
from kdrecipe.testing.models import TinyModel

INPUT_DIM = 80
LENS = (57, 41, 30)
TOLERANCE = 1e-4  # of values that are of the order of 1


@dataclass(frozen=True)
class ArchitectureCase:
    """An encoder class under test, with its options."""

    cls: Any
    config: Any
    input_dim: int = INPUT_DIM

    def build(self, seed: int = 0) -> Any:
        """An encoder in evaluation mode; the same weights for the same seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.cls(self.config, self.input_dim).eval()

    def features(self, lens: tuple[int, ...] = LENS, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Noise (B, T, F) and its lengths."""
        rng = torch.Generator().manual_seed(seed)
        return torch.randn(len(lens), max(lens), self.input_dim, generator=rng), torch.tensor(lens)


def _largest_difference(a: Tensor, b: Tensor) -> float:
    require(a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)} differ")
    return float((a - b).abs().max()) if a.numel() else 0.0


@torch.no_grad()
def check_padding_invariance(case: ArchitectureCase) -> None:
    """Output on valid frames does not depend on the content or the amount of padding."""
    encoder = case.build()
    features_BTF, lens_B = case.features()
    want = valid_frames(*encoder(features_BTF, lens_B))
    other_BTF = torch.cat([features_BTF, features_BTF[:, :8]], dim=1).flip(0) * 10
    for row, length in enumerate(lens_B.tolist()):
        other_BTF[row, :length] = features_BTF[row, :length]
    got = valid_frames(*encoder(other_BTF, lens_B))
    worst = _largest_difference(got, want)
    require(worst < TOLERANCE, f"valid frames change by {worst:.3g} when only the padding changes")


@torch.no_grad()
def check_lens_rule(case: ArchitectureCase) -> None:
    """``output_len``, and ``subsampling`` too, give as many frames as ``forward``, for every length."""
    encoder = case.build()
    for length in range(16, 33):
        features_BTF, lens_B = case.features((length,))
        hidden_BTD, out_lens_B = encoder(features_BTF, lens_B)
        told = encoder.output_len(length)
        require(
            int(out_lens_B[0]) == told, f"{length} frames give {int(out_lens_B[0])}, output_len says {told}"
        )
        require(hidden_BTD.shape[1] >= told, f"{length} frames: {told} valid of {hidden_BTD.shape[1]} frames")
    ratio = 1024 / encoder.output_len(1024)
    require(abs(ratio / encoder.subsampling - 1) < 0.05, f"1024 frames are subsampled by {ratio:.3g}")
    width = hidden_BTD.shape[2]
    require(width == encoder.output_dim, f"D is {width}, output_dim {encoder.output_dim}")


@torch.no_grad()
def check_taps_declared(case: ArchitectureCase) -> None:
    """Each declared tap is a module of the encoder that gives (B, T, D) with the declared D and frames.

    T is that of the output, or goes by the tap's ``subsampling``, up to the 2 frames that edges may cost.
    Heads may be apart: (B, H, T, D / H).
    """
    encoder = case.build()
    taps = taps_of(encoder, {})
    require(len(taps) > 0, "it declares no taps: hidden states can't be distilled into or out of it")
    features_BTF, lens_B = case.features()
    seen: dict[str, Any] = {}
    for name, tap in taps.items():
        inside = any(tap.module is m for m in encoder.modules())
        require(inside, f"the module of tap {name} is not part of it")
        tap.module.register_forward_hook(_recorder(seen, name))
    hidden_BTD, out_lens_B = encoder(features_BTF, lens_B)
    for name, tap in taps.items():
        require(name in seen, f"the module of tap {name} does not run")
        value = seen[name]
        if isinstance(value, Tensor) and value.dim() == 4:
            value = value.transpose(1, 2).flatten(2)
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        fits = len(shape) == 3 and shape[::2] == (len(LENS), tap.dim)
        given = shape or type(value).__name__
        require(fits, f"tap {name} is declared as (B, T, {tap.dim}), its module gives {given}")
        if tap.subsampling is not None:
            told = features_BTF.shape[1] / tap.subsampling
            require(abs(shape[1] - told) <= 2, f"tap {name} has {shape[1]} frames, it declares {told:g}")
        else:
            fits = int(out_lens_B.max()) <= shape[1] <= hidden_BTD.shape[1] + 2
            require(fits, f"tap {name} has {shape[1]} frames, the output {hidden_BTD.shape[1]}")


def _recorder(seen: dict[str, Any], name: str) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen[name] = output

    return hook


@torch.no_grad()
def check_state_dict_roundtrip(case: ArchitectureCase) -> None:
    """Another instance with the same state dict gives the same output."""
    one, other = case.build(0), case.build(1)
    other.load_state_dict(one.state_dict())
    args = case.features()
    worst = _largest_difference(valid_frames(*one(*args)), valid_frames(*other(*args)))
    require(
        worst < TOLERANCE, f"outputs differ by {worst:.3g}: something that matters is not in the state dict"
    )


@torch.no_grad()
def check_batch_invariance(case: ArchitectureCase) -> None:
    """An utterance's output does not depend on the others in its batch."""
    encoder = case.build()
    features_BTF, lens_B = case.features((40, 40, 40))
    together, _ = encoder(features_BTF, lens_B)
    for row in range(len(lens_B)):
        alone, _ = encoder(features_BTF[row : row + 1], lens_B[row : row + 1])
        worst = _largest_difference(together[row : row + 1], alone)
        require(worst < TOLERANCE, f"utterance {row} changes by {worst:.3g} when it is alone in the batch")


def check_gradients_everywhere(case: ArchitectureCase) -> None:
    """Every parameter takes part: it gets a gradient, and a finite one."""
    encoder = case.build().train()
    hidden_BTD, lens_B = encoder(*case.features())
    weights = torch.randn(hidden_BTD.shape, generator=torch.Generator().manual_seed(3))
    valid_frames(hidden_BTD * weights, lens_B).sum().backward()  # type: ignore[no-untyped-call]
    without = [n for n, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    require(not without, f"no gradient reaches {', '.join(without[:3])}: unused, or detached")
    broken = [n for n, p in encoder.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    require(not broken, f"the gradient of {', '.join(broken[:3])} is not finite")


def check_onnx_export(case: ArchitectureCase) -> None:
    """Exported to ONNX from one shape, it gives the same on other batch sizes and lengths."""
    from onnxruntime import InferenceSession, SessionOptions  # type: ignore[attr-defined]

    encoder = case.build()
    buffer = io.BytesIO()
    axes = {
        "features": {0: "B", 1: "T"},
        "lens": {0: "B"},
        "hidden": {0: "B", 1: "T_out"},
        "out_lens": {0: "B"},
    }
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer's advice about constants: what it breaks, we measure
        torch.onnx.export(
            encoder,
            case.features((48, 35)),
            buffer,  # type: ignore[arg-type]
            input_names=["features", "lens"],
            output_names=["hidden", "out_lens"],
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )
    options = SessionOptions()
    options.intra_op_num_threads = 1
    session = InferenceSession(buffer.getvalue(), options, providers=["CPUExecutionProvider"])
    for lens in ((61,), LENS):
        features_BTF, lens_B = case.features(lens, seed=4)
        with torch.no_grad():
            want = encoder(features_BTF, lens_B)
        hidden, out_lens = session.run(None, {"features": features_BTF.numpy(), "lens": lens_B.numpy()})
        require(
            np.array_equal(np.asarray(out_lens), want[1].numpy()),
            f"lengths {out_lens} in ONNX, {want[1].numpy()} in torch",
        )
        got = valid_frames(torch.from_numpy(hidden), want[1])
        worst = _largest_difference(got, valid_frames(*want))
        require(worst < 10 * TOLERANCE, f"ONNX and torch differ by {worst:.3g} on lengths {lens}")


@torch.no_grad()
def check_units_go_together(case: ArchitectureCase) -> None:
    """Units of a group that change places change nothing, and a part of them can be cut out."""
    if not hasattr(case.cls, "unit_groups"):
        raise CheckSkipped("it declares no units that may be cut out")
    model = TinyModel(case.build()).eval()
    batch = case.features()
    want = model(*batch).logits["ctc"]
    generator = torch.Generator().manual_seed(1)
    groups = unit_groups(model)
    require(len({group.name for group in groups}) == len(groups), "two groups of units have the same name")
    for group in groups:
        cut(model, group, torch.randperm(group.size, generator=generator))
        worst = _largest_difference(model(*batch).logits["ctc"], want)
        require(worst < TOLERANCE, f"{group.name}: units that change places change the output by {worst:.3g}")
    sizes = Sizes(model, groups, ["encoder"])
    kept = [-(-group.size // 2) for group in groups]
    for group, number in zip(unit_groups(model), kept, strict=True):
        cut(model, group, torch.arange(number))
    found = sum(p.numel() for p in model.encoder.parameters())
    require(found == sizes(kept), f"{found} parameters are left, {sizes(kept)} should be")
    got = model(*batch).logits["ctc"]
    require(got.shape == want.shape, f"with half of its units it gives {tuple(got.shape)}")


ARCHITECTURE_CHECKS = by_id(
    check_padding_invariance,
    check_lens_rule,
    check_taps_declared,
    check_state_dict_roundtrip,
    check_batch_invariance,
    check_gradients_everywhere,
    check_onnx_export,
    check_units_go_together,
    check_config_strict,
)
"""Contract of an encoder, by check id."""
