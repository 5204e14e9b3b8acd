"""A plan's winner as one recipe, for code and files that serve all of its scenarios."""

from __future__ import annotations

from kvat_core.schema import ModelRef, Plan, Recipe, Target
from kvat_engine_transformers.settings.knobs import require_known
from kvat_engine_transformers.settings.recipes import recipe


def winners_recipe(plan: Plan) -> Recipe:
    """What the winner does with the plan's longest prompt: what is left out there, no scenario has.

    Only lengths differ between scenarios, and a chunk of the prompt, which is left out where the prompt is not longer.
    One that is there for the longest prompt changes nothing of a shorter one.

    Raises:
        UsageError: the winner has settings that this version does not know.
    """
    settings = plan.require_winner().settings
    require_known(settings)
    target = Target(
        model=ModelRef(id=plan.model.id, revision=plan.model.revision),
        device=plan.machine.device,
        threads=plan.machine.threads,
        options=plan.engine.options,
    )
    return recipe(settings, max(plan.profile.scenarios, key=lambda scenario: scenario.prompt_tokens), target)
