"""The contract of each kind of plugin, and three ways to hold a plugin to it.

In a test module, one test per check::

    @loss_contract(MyLoss, {"temperature": 2.0}).parametrize
    def test_my_loss(check):
        check()

as a class, under pytest or unittest::

    class TestMyLoss(LossContract):
        plugin = MyLoss
        options = {"temperature": 2.0}

and from the command line: ``kdrecipe plugins test my_loss``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from kdrecipe.interfaces import LossSetup
from kdrecipe.testing.architecture_checks import ARCHITECTURE_CHECKS, INPUT_DIM, ArchitectureCase
from kdrecipe.testing.checks import (
    CheckFailed,
    CheckResult,
    Checks,
    CheckSkipped,
    contract_config,
    doc_of,
    expected_failures,
    run,
)
from kdrecipe.testing.compressor_checks import COMPRESSOR_CHECKS, CompressorCase
from kdrecipe.testing.corpus_checks import CORPUS_CHECKS, CorpusCase, scratch_dir, tiny_raw_corpus
from kdrecipe.testing.decode_checks import DECODER_CHECKS, METRIC_CHECKS, DecoderCase, MetricCase
from kdrecipe.testing.loss_checks import LOSS_CHECKS, LossCase
from kdrecipe.testing.teacher_checks import INPUT_DIM as TEACHER_INPUT_DIM
from kdrecipe.testing.teacher_checks import TEACHER_CHECKS, TeacherCase

if TYPE_CHECKING:
    from kdrecipe.plugin.registry import Registry

__all__ = [
    "ARCHITECTURE_CHECKS",
    "COMPRESSOR_CHECKS",
    "CORPUS_CHECKS",
    "DECODER_CHECKS",
    "LOSS_CHECKS",
    "METRIC_CHECKS",
    "TEACHER_CHECKS",
    "ArchitectureContract",
    "CheckFailed",
    "CheckResult",
    "CheckSkipped",
    "CompressorContract",
    "Contract",
    "LossContract",
    "TeacherContract",
    "architecture_contract",
    "compressor_contract",
    "corpus_contract",
    "decoder_contract",
    "loss_contract",
    "metric_contract",
    "run_checks",
    "teacher_contract",
    "test_plugin",
]

Options = Mapping[str, Any] | None
Expected = Mapping[str, str] | None


@dataclass(frozen=True)
class BoundCheck:
    """A check on a particular plugin; call it."""

    contract: Contract
    check_id: str

    @property
    def doc(self) -> str:
        """What the check demands."""
        return doc_of(self.contract.checks[self.check_id])

    def __call__(self) -> None:
        """Run it.

        Raises:
            CheckFailed: the contract is broken, or an expected failure passes.
            CheckSkipped: it does not apply, or fails as expected; pytest and unittest count it as skipped.
        """
        one = {self.check_id: self.contract.checks[self.check_id]}
        result = run(self.contract.case, one, self.contract.expected)[0]
        if not result.ok:
            raise CheckFailed(f"{self.check_id}: {result.reason}\n(demanded: {result.doc})")
        if result.status != "passed":
            raise CheckSkipped(f"{self.check_id}: {result.status}: {result.reason}")


@dataclass(frozen=True)
class Contract:
    """All checks for one plugin under one set of options.

    Args:
        checks: by id.
        case: the plugin with its options.
        expected: check id -> reason why it can't pass.
    """

    checks: Checks
    case: Any
    expected: Mapping[str, str]

    def results(self) -> list[CheckResult]:
        """Run all checks."""
        return run(self.case, self.checks, self.expected)

    def bound(self) -> list[BoundCheck]:
        """The checks, ready to call."""
        return [BoundCheck(self, check_id) for check_id in self.checks]

    def parametrize(self, test: Callable[..., None]) -> Callable[..., None]:
        """Decorator: run ``test(check)`` once per check, under the check's id."""
        import pytest

        marked: Callable[..., None] = pytest.mark.parametrize("check", self.bound(), ids=list(self.checks))(
            test
        )
        return marked


def loss_contract(
    cls: Any,
    options: Options = None,
    *,
    setup: LossSetup | None = None,
    expected_failed_checks: Expected = None,
) -> Contract:
    """Contract of a loss.

    Args:
        cls: the loss class.
        options: its options; None: its ``contract_options``, or its defaults.
        setup: the models it stands between; None: two of the same size, with the taps ``front``
            and ``encoder.0`` to ``encoder.23``.
        expected_failed_checks: check id -> reason, besides those that the class states itself.

    Raises:
        PluginError: the options are wrong, or a check expected to fail does not exist.
    """
    case = LossCase(cls, contract_config(cls, options), setup)
    return Contract(LOSS_CHECKS, case, expected_failures(cls, expected_failed_checks, LOSS_CHECKS))


def architecture_contract(
    cls: Any, options: Options = None, *, input_dim: int = INPUT_DIM, expected_failed_checks: Expected = None
) -> Contract:
    """Contract of an encoder; see :func:`loss_contract`. Choose small options: it is built many times."""
    case = ArchitectureCase(cls, contract_config(cls, options), input_dim)
    expected = expected_failures(cls, expected_failed_checks, ARCHITECTURE_CHECKS)
    return Contract(ARCHITECTURE_CHECKS, case, expected)


def compressor_contract(
    cls: Any,
    options: Options = None,
    *,
    make_model: Callable[[int], nn.Module] | None = None,
    input_dim: int | None = None,
    expected_failed_checks: Expected = None,
) -> Contract:
    """Contract of a compressor; see :func:`loss_contract`.

    Args:
        cls: the compressor class.
        options: its options.
        make_model: gives a model for a seed, called like ``AsrModel``; None: a tiny one.
        input_dim: feature bins that this model takes; to be given with it.
        expected_failed_checks: check id -> reason.
    """
    config = contract_config(cls, options)
    if make_model is None or input_dim is None:
        case = CompressorCase(cls, config)
    else:
        case = CompressorCase(cls, config, make_model, input_dim)
    expected = expected_failures(cls, expected_failed_checks, COMPRESSOR_CHECKS)
    return Contract(COMPRESSOR_CHECKS, case, expected)


def corpus_contract(
    cls: Any,
    options: Options = None,
    *,
    corpus_dir: Path | None,
    work_dir: Path,
    expected_failed_checks: Expected = None,
) -> Contract:
    """Contract of a corpus, on the raw corpus in ``corpus_dir``; see :func:`loss_contract`.

    Args:
        cls: the corpus class.
        options: its options.
        corpus_dir: a small raw corpus without faults; None if the corpus synthesises its audio.
        work_dir: an empty directory.
        expected_failed_checks: check id -> reason.
    """
    case = CorpusCase(cls, contract_config(cls, options), corpus_dir, work_dir)
    return Contract(CORPUS_CHECKS, case, expected_failures(cls, expected_failed_checks, CORPUS_CHECKS))


def decoder_contract(
    cls: Any, options: Options = None, *, expected_failed_checks: Expected = None
) -> Contract:
    """Contract of a decoder; see :func:`loss_contract`."""
    case = DecoderCase(cls, contract_config(cls, options))
    return Contract(DECODER_CHECKS, case, expected_failures(cls, expected_failed_checks, DECODER_CHECKS))


def metric_contract(
    cls: Any, options: Options = None, *, expected_failed_checks: Expected = None
) -> Contract:
    """Contract of a metric; see :func:`loss_contract`."""
    case = MetricCase(cls, contract_config(cls, options))
    return Contract(METRIC_CHECKS, case, expected_failures(cls, expected_failed_checks, METRIC_CHECKS))


def teacher_contract(
    cls: Any,
    options: Options = None,
    *,
    input_dim: int = TEACHER_INPUT_DIM,
    expected_failed_checks: Expected = None,
) -> Contract:
    """Contract of a teacher; see :func:`loss_contract`. Choose a small model: its weights are read once.

    Args:
        cls: the teacher class.
        options: its options, with the path of a model.
        input_dim: feature bins, for a teacher that hears features.
        expected_failed_checks: check id -> reason.
    """
    case = TeacherCase(cls, contract_config(cls, options), input_dim)
    return Contract(TEACHER_CHECKS, case, expected_failures(cls, expected_failed_checks, TEACHER_CHECKS))


_CONTRACTS: Mapping[str, Callable[..., Contract]] = {
    "losses": loss_contract,
    "architectures": architecture_contract,
    "compressors": compressor_contract,
    "decoders": decoder_contract,
    "metrics": metric_contract,
    "teachers": teacher_contract,
}


def run_checks(
    kind: str, cls: Any, options: Options = None, *, expected_failed_checks: Expected = None
) -> list[CheckResult]:
    """Hold a class to the contract of its kind.

    Args:
        kind: ``losses``, ``architectures``, ``compressors``, ``decoders``, ``metrics`` or ``teachers``; other
            kinds have no contract that a class can be held to by itself, which one skipped result says.
        cls: the plugin class.
        options: None: its ``contract_options``, or its defaults.
        expected_failed_checks: check id -> reason.
    """
    make = _CONTRACTS.get(kind)
    if make is None:
        reason = f"there is no contract for {kind}" + (
            ": the parity gate tests them" if kind == "exporters" else ""
        )
        return [CheckResult("contract", "skipped", reason, "")]
    return make(cls, options, expected_failed_checks=expected_failed_checks).results()


def test_plugin(
    registry: Registry,
    kind: str,
    name: str,
    options: Options = None,  # noqa: PT028
) -> list[CheckResult]:
    """Hold a registered plugin to its contract.

    Args:
        registry: where it is registered.
        kind: plural, as in ``losses``.
        name: its name.
        options: None: its ``contract_options``, or its defaults.

    Raises:
        PluginError: no such plugin, or it can't be configured.
    """
    cls = registry.get(kind, name)
    if kind != "corpora":
        required = [field for field, info in cls.Config.model_fields.items() if info.is_required()]
        if kind == "teachers" and options is None and required and not hasattr(cls, "contract_options"):
            reason = f"a model of your own is needed: kdrecipe plugins test {name} --option {required[0]}=..."
            return [CheckResult("contract", "skipped", reason, "")]
        return run_checks(kind, cls, options)
    with scratch_dir() as scratch:
        corpus_dir = tiny_raw_corpus(name, Path(scratch, "raw"))
        if corpus_dir is None and not getattr(cls, "synthesised", False):
            reason = "no tiny raw corpus in its layout; use corpus_contract(...) with one of your own"
            return [CheckResult("contract", "skipped", reason, "")]
        return corpus_contract(cls, options, corpus_dir=corpus_dir, work_dir=Path(scratch, "work")).results()


test_plugin.__test__ = False  # type: ignore[attr-defined]  # pytest: not a test, wherever it is imported


# ---------------------------------------------------------------- classes


class _Suite:
    """Base of the test classes: a method ``test_<id>`` per check."""

    plugin: ClassVar[Any]
    options: ClassVar[Options] = None
    expected_failed_checks: ClassVar[Mapping[str, str]] = {}

    def contract(self) -> Contract:
        """The contract that the methods check."""
        raise NotImplementedError


def _with_tests(suite: type[_Suite], checks: Checks) -> None:
    for check_id, check in checks.items():

        def test(self: _Suite, check_id: str = check_id) -> None:
            BoundCheck(self.contract(), check_id)()

        test.__doc__ = doc_of(check)
        setattr(suite, f"test_{check_id}", test)


class LossContract(_Suite):
    """Derive from it and set ``plugin``; maybe ``options``, ``setup``, ``expected_failed_checks``."""

    setup: ClassVar[LossSetup | None] = None

    def contract(self) -> Contract:
        """See :func:`loss_contract`."""
        return loss_contract(
            self.plugin, self.options, setup=self.setup, expected_failed_checks=self.expected_failed_checks
        )


class ArchitectureContract(_Suite):
    """Derive from it and set ``plugin``; maybe ``options``, ``expected_failed_checks``."""

    def contract(self) -> Contract:
        """See :func:`architecture_contract`."""
        return architecture_contract(
            self.plugin, self.options, expected_failed_checks=self.expected_failed_checks
        )


class CompressorContract(_Suite):
    """Derive from it and set ``plugin``; maybe ``options``, ``expected_failed_checks``."""

    def contract(self) -> Contract:
        """See :func:`compressor_contract`."""
        return compressor_contract(
            self.plugin, self.options, expected_failed_checks=self.expected_failed_checks
        )


class TeacherContract(_Suite):
    """Derive from it and set ``plugin`` and ``options``; maybe ``input_dim``, ``expected_failed_checks``."""

    input_dim: ClassVar[int] = TEACHER_INPUT_DIM

    def contract(self) -> Contract:
        """See :func:`teacher_contract`."""
        return teacher_contract(
            self.plugin,
            self.options,
            input_dim=self.input_dim,
            expected_failed_checks=self.expected_failed_checks,
        )


_with_tests(LossContract, LOSS_CHECKS)
_with_tests(ArchitectureContract, ARCHITECTURE_CHECKS)
_with_tests(CompressorContract, COMPRESSOR_CHECKS)
_with_tests(TeacherContract, TEACHER_CHECKS)
