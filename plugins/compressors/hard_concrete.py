"""Learn which units to cut out: a gate on each, pressed towards a size while the model trains.

Gates are hard concrete (Louizos et al. 2018, arXiv 1712.01312): random while they learn, between 0 and 1,
often exactly either. A Lagrangian holds the expected number of parameters to a target that rises (CoFi, Xia
et al. 2022, arXiv 2204.00408; DPHuBERT, Peng et al. 2023, arXiv 2305.17651). After ``ramp`` of the training
the units whose gates are most open stay, all others are closed for good; the rest of it trains what is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from kdrecipe import hookimpl
from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import CompressContext, Options, Part, UnitGroup, UnitKind
from kdrecipe.structure import ENCODER, Sizes, to_positions, unit_groups

from .choosing import cut_out, fitting, floors, part_paths, shaped
from .scores import unit_scores

STEEPNESS = 2 / 3  # beta, gamma and zeta of the paper
LOW, HIGH = -0.1, 1.1
OPEN = 2.5  # log alpha at the start: open with a probability of 0.98
SPREAD = 0.1  # of magnitudes in log alpha at the start: what is small closes first
SPEED = 100.0  # gates and multipliers learn so much faster than weights: they have far to go in a short run
NAME = "unit_gates"


class Gates(nn.Module):
    """A gate per unit of each group, and the multipliers that press them.

    Args:
        worth: (size,) of each group, relative to its mean.
    """

    decided: Tensor

    def __init__(self, worth: Sequence[Tensor]) -> None:
        super().__init__()
        start = [(OPEN + SPREAD * w.clamp(min=1e-6).log().float()) / SPEED for w in worth]
        self.thetas = nn.ParameterList(nn.Parameter(x) for x in start)
        self.multipliers_2 = nn.Parameter(torch.zeros(2))
        self.register_buffer("decided", torch.zeros((), dtype=torch.bool))
        self.register_buffer("removed_share", torch.zeros(()))  # by the gates, when units were chosen
        for number, worth_N in enumerate(worth):
            self.register_buffer(f"open_{number}", torch.ones(len(worth_N)))
        self.now: list[Tensor] = []  # drawn once per pass of the model

    def draw(self) -> None:
        """Gates for one pass."""
        self.now = []
        for theta_N in self.thetas:
            u_N = torch.rand_like(theta_N).clamp(1e-6, 1 - 1e-6)
            noise_N = u_N.log() - (-u_N).log1p()
            self.now.append(_stretched(((noise_N + SPEED * theta_N) / STEEPNESS).sigmoid()))

    def value(self, number: int) -> Tensor:
        """(size,) of a group, each from 0 to 1."""
        if bool(self.decided):
            return self.get_buffer(f"open_{number}")
        if self.training and self.now:
            return self.now[number]
        return _stretched((SPEED * self.thetas[number]).sigmoid())

    def expected(self, number: int) -> Tensor:
        """Expected number of open gates of a group."""
        shift = STEEPNESS * math.log(-LOW / HIGH)
        count: Tensor = (SPEED * self.thetas[number] - shift).sigmoid().sum()
        return count

    @torch.no_grad()
    def decide(self, keep: Sequence[Tensor]) -> None:
        """From now on these are open, all others closed."""
        for number, units in enumerate(keep):
            open_N = self.get_buffer(f"open_{number}")
            open_N.zero_()[units.to(open_N.device)] = 1.0
        self.decided.fill_(True)
        self.now = []


def _stretched(s_N: Tensor) -> Tensor:
    return (s_N * (HIGH - LOW) + LOW).clamp(0, 1)


class HardConcrete:
    """Structured pruning by learned gates; its state is how many units are left of each group."""

    tiny_options: ClassVar[dict[str, Any]] = {"epochs": 1, "multiple_of": 1}
    contract_options: ClassVar[dict[str, Any]] = {"kinds": ["width"], "share": 0.4, "multiple_of": 1}
    strength: ClassVar[str] = "share"

    class Config(Options):
        """Options.

        Args:
            share: of the parameters of ``parts`` that goes, 0 to 1.
            kinds: what is cut: ``heads`` of attention, ``units`` of feed-forward modules, ``channels`` of
                convolutions, ``width`` of the stream between layers; not the units of LSTMs, which read
                themselves.
            parts: ``encoder``, and heads by name.
            at_least: share of each group's units that stays.
            multiple_of: of a group that loses some, so many units or a multiple stay, heads excepted.
            epochs: of training, in which gates and weights learn.
            ramp: part of it after which the units are chosen; the target rises over the first half of that.
        """

        share: float = Field(default=0.5, ge=0.0, lt=1.0)
        kinds: tuple[UnitKind, ...] = ("heads", "units", "channels")
        parts: tuple[str, ...] = Field(default=(ENCODER,), min_length=1)
        at_least: float = Field(default=0.1, ge=0.0, le=1.0)
        multiple_of: int = Field(default=8, ge=1)
        epochs: int = Field(default=10, ge=1)
        ramp: float = Field(default=0.5, gt=0.0, lt=1.0)

    def __init__(self, config: Config) -> None:
        self.config = config
        self.num_epochs = config.epochs
        self._state: dict[str, Any] = {}
        self._report: dict[str, float] = {}
        self._hooks: list[Any] = []

    def apply(self, model: nn.Module, context: CompressContext) -> nn.Module:
        """Put a gate wherever a unit is read.

        Raises:
            KdrecipeError: the model does not say what may be cut, or so much can't go.
        """
        found = unit_groups(model, self.config.parts)
        self._groups = [g for g in found if g.kind in self.config.kinds and not _reads_itself(model, g)]
        if not self._groups:
            raise KdrecipeError(
                f"hard_concrete finds no {' or '.join(self.config.kinds)} to gate in the model",
                remedy="choose other kinds, or structured_prune",
            )
        self._sizes = Sizes(model, self._groups, part_paths(self.config.parts))
        self._before = self._sizes([group.size for group in self._groups])
        worth = unit_scores(model, self._groups, "magnitude", context)
        self._choose(worth)  # or refuse, before any training
        gates = Gates(worth).to(context.device)
        model.add_module(NAME, gates)

        def draw(module: nn.Module, args: Any) -> None:
            if gates.training and not bool(gates.decided):
                gates.draw()

        self._hooks = [model.register_forward_pre_hook(draw)]
        for number, group in enumerate(self._groups):
            for part in group.parts:
                self._hooks += _gated(model.get_submodule(part.layer), part, gates, number)
        return model

    def penalty(self, model: nn.Module, step: int, num_steps: int) -> Tensor:
        """Of being larger, or smaller, than the target at this step; multipliers climb it."""
        gates: Any = model.get_submodule(NAME)
        if bool(gates.decided):
            return gates.multipliers_2.new_zeros(())  # type: ignore[no-any-return]
        expected = self._expected(gates)
        rising = min(1.0, 2 * step / max(1, round(self.config.ramp * num_steps)))
        excess = self.config.share * rising - (1 - expected / self._before)
        # the value with its gradient turned round: what minimises all else maximises over these
        climbing_2 = SPEED * (2 * gates.multipliers_2.detach() - gates.multipliers_2)
        linear, quadratic = climbing_2
        return linear * excess + quadratic * excess**2  # type: ignore[no-any-return]

    def on_step(self, model: nn.Module, step: int, num_steps: int) -> None:
        """Decide when it is time."""
        if step == max(1, round(self.config.ramp * num_steps)):
            self._decide(model.get_submodule(NAME))

    def finish(self, model: nn.Module) -> nn.Module:
        """Take the gates away and cut what they close."""
        gates: Any = model.get_submodule(NAME)
        if not bool(gates.decided):
            self._decide(gates)
        keep = [gates.get_buffer(f"open_{i}").nonzero().flatten().cpu() for i in range(len(self._groups))]
        for hook in self._hooks:
            hook.remove()
        delattr(model, NAME)
        left, kept = cut_out(model, self._groups, keep)
        params = self._sizes([left[group.name] for group in self._groups])
        self._state = {"units": left}
        self._report = {
            "pruned_share": 1 - params / self._before,
            "learnt_share": float(gates.removed_share),
            "params": float(params),
            **kept,
        }
        return model

    def state(self) -> dict[str, Any]:
        """How many ``units`` are left, by group."""
        return self._state

    def load_state(self, state: dict[str, Any]) -> None:
        """For :meth:`rebuild`."""
        self._state = state

    def rebuild(self, model: nn.Module) -> nn.Module:
        """Cut as much, whichever units."""
        return shaped(model, self.config.parts, self._state)

    def report(self) -> dict[str, float]:
        """``pruned_share`` and ``params`` of the parts, ``learnt_share`` (what the gates had come to when
        the units were chosen), and the share of each kind that is left."""
        return self._report

    def _expected(self, gates: Any) -> Any:
        """Parameters, by the probability that each gate is open."""
        return self._sizes([gates.expected(i) for i in range(len(self._groups))])

    def _choose(self, worth: Sequence[Tensor]) -> list[Tensor]:
        goal = math.ceil((1 - self.config.share) * self._before)
        least = floors(self._groups, self.config.at_least)
        multiple_of = self.config.multiple_of
        return fitting(self._groups, worth, self._sizes, goal, least, scope="global", multiple_of=multiple_of)

    @torch.no_grad()
    def _decide(self, gates: Any) -> None:
        gates.removed_share.fill_(1 - self._expected(gates) / self._before)
        gates.decide(self._choose([theta.detach().double().cpu() for theta in gates.thetas]))


def _reads_itself(model: nn.Module, group: UnitGroup) -> bool:
    return any(
        part.side == "out" and isinstance(model.get_submodule(part.layer), nn.LSTM) for part in group.parts
    )


def _gated(layer: nn.Module, part: Part, gates: Gates, number: int) -> list[Any]:
    """Hooks by which a layer hears a group's units through their gates.

    What reads them hears them multiplied; a norm takes its mean and deviation over the open ones, so that a
    closed unit is as good as cut.
    """
    if part.side == "in":

        def multiply(module: nn.Module, args: Any) -> Any:
            return (args[0] * to_positions(part, gates.value(number)).to(args[0].dtype), *args[1:])

        return [layer.register_forward_pre_hook(multiply)]
    if isinstance(layer, nn.LayerNorm):

        def norm_of_open(module: Any, args: Any, output: Tensor) -> Tensor:
            weights_D = to_positions(part, gates.value(number))
            weights_D = weights_D / weights_D.sum().clamp(min=1e-6)
            x = args[0].float()
            x = x - (x * weights_D).sum(-1, keepdim=True)
            x = x * ((x.square() * weights_D).sum(-1, keepdim=True) + module.eps).rsqrt()
            return torch.addcmul(module.bias, x, module.weight).to(output.dtype)

        return [layer.register_forward_hook(norm_of_open)]
    return []


@hookimpl
def register_compressors(register: Callable[[str, type], None]) -> None:
    register("hard_concrete", HardConcrete)
