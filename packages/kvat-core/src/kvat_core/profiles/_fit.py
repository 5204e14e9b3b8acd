"""Fitting a profile to the request and to the model's longest context."""

from __future__ import annotations

from collections.abc import Sequence

from kvat_core.errors import UsageError
from kvat_core.schema import Profile, Scenario


def fit(
    profile: Profile,
    *,
    preset: bool,
    contexts: Sequence[int],
    batches: Sequence[int],
    shortest_prompt_tokens: int | None,
    max_context_tokens: int | None,
) -> tuple[Profile, tuple[str, ...]]:
    """The profile with the lengths and batch sizes asked for, within what the model can hold.

    Args:
        preset: whether kvat chose the lengths; only then they may be cut.
        contexts: prompt lengths in tokens that replace the profile's; empty = its own.
        batches: batch sizes that replace the profile's; empty = its own.
        shortest_prompt_tokens: of each batch, the shortest prompt; None = as in the profile.
        max_context_tokens: longest position of the model; None = unknown, nothing is checked.

    Returns:
        The profile, and one line for each change the user did not ask for.

    Raises:
        UsageError: a length that the user chose does not fit.
    """
    scenarios = list(profile.scenarios)
    if contexts:
        scenarios = _with_contexts(scenarios, sorted(set(contexts)))
    if batches:
        scenarios = [one.reshaped(batch_size=size) for size in sorted(set(batches)) for one in scenarios]
    if shortest_prompt_tokens is not None:
        scenarios = _with_shortest(scenarios, shortest_prompt_tokens)
    notes: list[str] = []
    if max_context_tokens is not None:
        may_cut = preset and not contexts
        scenarios = [_within(scenario, max_context_tokens, may_cut, notes) for scenario in scenarios]
    return profile.model_copy(update={"scenarios": _merged(scenarios)}), tuple(notes)


def _with_contexts(scenarios: list[Scenario], contexts: list[int]) -> list[Scenario]:
    """One scenario per context; shorter contexts take the profile's shorter outputs, weights go along."""
    by_length = sorted(scenarios, key=lambda scenario: (scenario.prompt_tokens, scenario.output_tokens))
    last = len(by_length) - 1
    steps = max(1, len(contexts) - 1)
    return [
        by_length[round(index * last / steps)].reshaped(prompt_tokens=context) for index, context in enumerate(contexts)
    ]


def _with_shortest(scenarios: list[Scenario], shortest_tokens: int) -> list[Scenario]:
    """Batches get unequal prompts; a single request stays as it is."""
    batches = [scenario for scenario in scenarios if scenario.batch_size > 1]
    if not batches:
        raise UsageError("--shortest is of a batch, and every batch size is 1; ask for larger ones with --batch")
    longest = min(scenario.prompt_tokens for scenario in batches)
    if shortest_tokens >= longest:
        raise UsageError(f"--shortest {shortest_tokens} is not less than the {longest} prompt tokens of a scenario")
    return [
        scenario.model_copy(update={"shortest_prompt_tokens": shortest_tokens}) if scenario.batch_size > 1 else scenario
        for scenario in scenarios
    ]


def _within(scenario: Scenario, limit: int, may_cut: bool, notes: list[str]) -> Scenario:
    if scenario.total_tokens <= limit:
        return scenario
    if not may_cut:
        raise UsageError(
            f"{scenario.prompt_tokens} prompt + {scenario.output_tokens} output tokens exceed the model's "
            f"{limit}; ask for a shorter --context or edit the profile"
        )
    output = min(scenario.output_tokens, limit // 2)
    cut = scenario.reshaped(prompt_tokens=limit - output).model_copy(update={"output_tokens": output})
    notes.append(f"scenario {scenario.key} was cut to {cut.key}: the model holds {limit} tokens")
    return cut


def _merged(scenarios: list[Scenario]) -> tuple[Scenario, ...]:
    """Scenarios that became equal are one, with the sum of their weights."""
    weights: dict[str, float] = {}
    for scenario in scenarios:
        weights[scenario.key] = weights.get(scenario.key, 0.0) + scenario.weight
    unique = {scenario.key: scenario for scenario in scenarios}
    return tuple(one.model_copy(update={"weight": weights[key]}) for key, one in unique.items())
