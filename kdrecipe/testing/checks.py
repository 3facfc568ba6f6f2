"""The contract kit's frame: checks with stable ids, their results, and how they are run.

A check is a plain function of a *case* (a plugin class with its options). It passes by returning,
fails by raising anything, and is skipped by raising :class:`CheckSkipped` with the reason, or by the
plugin's raising :class:`kdrecipe.errors.MissingExtra`. Its first docstring line says what it demands.

A plugin class may carry attributes for it: ``contract_options``, the options to check it with
(small ones for an architecture; the required ones if there are any); ``contract_teachers``, the names of
the teachers of a loss that takes all of them, if it looks at names; and
``expected_failed_checks``, check id -> reason why this plugin can't pass it. An expected failure
that passes is reported, too.
"""

from __future__ import annotations

import unittest
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from kdrecipe.errors import MissingExtra, PluginError
from kdrecipe.interfaces import Options

Check = Callable[[Any], None]
Checks = Mapping[str, Check]

Status = Literal["passed", "failed", "skipped", "failed as expected", "passed unexpectedly"]


class CheckSkipped(unittest.SkipTest):
    """The check does not apply; the text says why."""


class CheckFailed(AssertionError):
    """The plugin breaks its contract; the text says how."""


@dataclass(frozen=True)
class CheckResult:
    """Outcome of one check.

    Args:
        check_id: stable name, as in ``expected_failed_checks``.
        status: what happened.
        reason: why it failed or was skipped; empty if it passed.
        doc: what the check demands, one line.
    """

    check_id: str
    status: Status
    reason: str
    doc: str

    @property
    def ok(self) -> bool:
        """Whether the contract holds as far as this check goes."""
        return self.status in ("passed", "skipped", "failed as expected")


def by_id(*checks: Check) -> dict[str, Check]:
    """Functions ``check_<id>`` by their ids."""
    return {check.__name__.removeprefix("check_"): check for check in checks}


def doc_of(check: Check) -> str:
    """First line of the docstring."""
    return (check.__doc__ or "").strip().split("\n")[0]


def expected_failures(cls: Any, given: Mapping[str, str] | None, checks: Checks) -> dict[str, str]:
    """The plugin's own and the given expected failures.

    Raises:
        PluginError: one of them names no check.
    """
    expected = {**getattr(cls, "expected_failed_checks", {}), **(given or {})}
    for check_id in expected:
        if check_id not in checks:
            raise PluginError(
                f"{cls.__name__} expects to fail {check_id!r}, which is no check",
                remedy=f"checks are {', '.join(checks)}",
            )
    return expected


def run(case: Any, checks: Checks, expected: Mapping[str, str]) -> list[CheckResult]:
    """Run all checks on a case, in their order."""
    return [_run_one(case, check_id, check, expected.get(check_id)) for check_id, check in checks.items()]


def _run_one(case: Any, check_id: str, check: Check, expected: str | None) -> CheckResult:
    def result(status: Status, reason: str = "") -> CheckResult:
        return CheckResult(check_id, status, reason, doc_of(check))

    try:
        check(case)
    except CheckSkipped as skipped:
        return result("skipped", str(skipped))
    except MissingExtra as missing:
        return result("skipped", str(missing))
    except Exception as error:  # a plugin may raise whatever it likes: that is a failure, too
        if expected is not None:
            return result("failed as expected", expected)
        name = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return result("failed", f"{name}{error}".strip())
    if expected is not None:
        return result("passed unexpectedly", f"expected to fail ({expected}); take it off the list")
    return result("passed")


def contract_config(cls: Any, options: Mapping[str, Any] | Options | None) -> Any:
    """The configuration to check a plugin with: as given, or its ``contract_options``.

    Raises:
        PluginError: the options do not fit its ``Config``.
    """
    if isinstance(options, Options):
        return options
    given = getattr(cls, "contract_options", {}) if options is None else options
    try:
        return cls.Config.model_validate(dict(given))
    except ValidationError as error:
        raise PluginError(
            f"{cls.__name__} can't be checked with the options {dict(given)}: {error}",
            remedy="give it a class attribute contract_options with options that stand for a typical use",
        ) from error


def check_config_strict(case: Any) -> None:
    """``Config`` derives from ``Options`` and refuses unknown options."""
    config_class = case.cls.Config
    require(issubclass(config_class, Options), f"{config_class.__name__} does not derive from Options")
    known = case.config.model_dump()
    try:
        config_class.model_validate({**known, "no_such_option": 1})
    except ValidationError:
        return
    raise CheckFailed("the option 'no_such_option' is accepted: a misspelt option would pass in silence")


def require(condition: bool, message: str) -> None:
    """Fail the check with ``message`` unless ``condition`` holds."""
    if not condition:
        raise CheckFailed(message)
