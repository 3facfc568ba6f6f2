"""The kit itself: results, expected failures, pytest, unittest and the registry as ways in."""

from __future__ import annotations

import unittest

import pytest

from kdrecipe.errors import PluginError
from kdrecipe.interfaces import Options
from kdrecipe.plugin.registry import Registry
from kdrecipe.testing.contracts import (
    LOSS_CHECKS,
    TEACHER_CHECKS,
    CheckFailed,
    CheckSkipped,
    LossContract,
    loss_contract,
    run_checks,
    test_plugin,
)
from kdrecipe_plugins.losses.cr_ctc import CrCtc
from kdrecipe_plugins.losses.kl import KlLoss


class Doubtful(KlLoss):
    """Counts one frame too many."""

    def __call__(self, out, targets, batch):
        result = super().__call__(out, targets, batch)
        result.count = result.count + 1
        return result


BREAKS = {"doubling": "counts one too many", "empty_selection": "likewise"}


def statuses(results):
    return {r.check_id: r.status for r in results}


def test_results_say_what_failed_and_why():
    results = {r.check_id: r for r in run_checks("losses", Doubtful)}
    assert {i for i, r in results.items() if not r.ok} == set(BREAKS)
    assert "count is 23, and 45 for the doubled batch" in results["doubling"].reason
    assert results["doubling"].doc.startswith("Every utterance twice")


def test_expected_failures_are_ok_and_unexpected_passes_are_not():
    expected = {**BREAKS, "bf16": "never looked at it"}
    results = run_checks("losses", Doubtful, expected_failed_checks=expected)
    found = statuses(results)
    assert {i for i, s in found.items() if s == "failed as expected"} == set(BREAKS)
    assert found["bf16"] == "passed unexpectedly"
    assert [r.check_id for r in results if not r.ok] == ["bf16"]


def test_a_plugin_states_its_own_expected_failures():
    assert statuses(run_checks("losses", CrCtc))["gradcheck"] == "failed as expected"


def test_an_expected_failure_must_name_a_check():
    with pytest.raises(PluginError, match="'gradchek', which is no check"):
        loss_contract(KlLoss, expected_failed_checks={"gradchek": "typo"})


def test_wrong_options_are_refused():
    with pytest.raises(PluginError, match="temperatur"):
        loss_contract(KlLoss, {"temperatur": 1.0})


def test_bound_checks_pass_fail_or_skip():
    bound = {b.check_id: b for b in loss_contract(Doubtful, expected_failed_checks={"bf16": "no"}).bound()}
    bound["padding_invariance"]()
    with pytest.raises(CheckFailed, match=r"doubling: count is 23[\s\S]*demanded: Every utterance twice"):
        bound["doubling"]()
    with pytest.raises(CheckFailed, match="expected to fail"):
        bound["bf16"]()
    skipping = {b.check_id: b for b in loss_contract(CrCtc).bound()}
    with pytest.raises(CheckSkipped, match="it needs no teacher"):
        skipping["top_k_limit"]()
    with pytest.raises(CheckSkipped, match="failed as expected"):
        skipping["gradcheck"]()


@loss_contract(KlLoss, {"temperature": 2.0}).parametrize
def test_as_a_parametrised_test(check):
    check()


def test_parametrised_tests_bear_the_checks_ids():
    mark = test_as_a_parametrised_test.pytestmark[0]
    assert mark.kwargs["ids"] == list(LOSS_CHECKS)


def test_as_a_class_under_unittest():
    class Case(LossContract, unittest.TestCase):
        plugin = Doubtful

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Case).run(result)
    assert result.testsRun == len(LOSS_CHECKS)
    broken = [case.id().split(".test_")[-1] for case, _ in result.failures]
    assert sorted(broken) == sorted(BREAKS)
    assert not result.errors


class NeedsOptions(KlLoss):
    """Like kl, with an option that has no default."""

    contract_options = {"wanted": 1}

    class Config(KlLoss.Config):
        wanted: int


def test_by_name_with_the_plugins_own_options():
    registry = Registry()
    registry.add("losses", "needs_options", NeedsOptions, "test")
    assert all(r.ok for r in test_plugin(registry, "losses", "needs_options"))
    with pytest.raises(PluginError, match="unknown loss 'need_options'"):
        test_plugin(registry, "losses", "need_options")


def test_kinds_without_a_contract_say_so():
    class Anything:
        Config = Options

    registry = Registry()
    registry.add("exporters", "anything", Anything, "test")
    registry.add("corpora", "anything", Anything, "test")
    for kind, text in (("exporters", "parity gate"), ("corpora", "no tiny raw corpus")):
        (result,) = test_plugin(registry, kind, "anything")
        assert (result.status, result.ok) == ("skipped", True)
        assert text in result.reason


def test_a_teacher_is_checked_on_a_model_of_the_user_s():
    class Imported:
        class Config(Options):
            path: str

    registry = Registry()
    registry.add("teachers", "imported", Imported, "test")
    (result,) = test_plugin(registry, "teachers", "imported")
    assert (result.status, result.ok) == ("skipped", True)
    assert "kdrecipe plugins test imported --option path=..." in result.reason
    results = test_plugin(registry, "teachers", "imported", {"path": "here"})
    assert len(results) == len(TEACHER_CHECKS)
    assert not any(r.ok for r in results if r.check_id != "config_strict")
