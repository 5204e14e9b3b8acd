"""How wide a model is, and which of its parameters work on every token: read from the modules themselves."""

from __future__ import annotations

from typing import TypedDict

from torch import nn
from transformers import PreTrainedModel

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class ParameterCounts(TypedDict):
    """Fields of `ModelShape` of the same names; None where the modules do not tell."""

    parameters: int | None
    step_parameters: int | None
    experts: int | None
    experts_per_token: int | None
    expert_parameters: int | None


NO_COUNTS = ParameterCounts(
    parameters=None, step_parameters=None, experts=None, experts_per_token=None, expert_parameters=None
)
"""Of weights that are stored packed: their modules are not those that the architecture makes."""


def mlp_size(model: PreTrainedModel) -> int | None:
    """Inner width of the gated MLP that all decoder layers have; None where they have another one, or differ."""
    gates = [module for name, module in model.named_modules() if name.endswith(".mlp")]
    widths = {_gated_width(mlp) for mlp in gates}
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    return widths.pop() if len(widths) == 1 and len(gates) == layers else None


def _gated_width(mlp: nn.Module) -> int | None:
    projections = [getattr(mlp, name, None) for name in _PROJECTIONS]
    if {name for name, _ in mlp.named_children()} - {*_PROJECTIONS, "act_fn"}:
        return None
    gate = projections[0]
    return gate.out_features if isinstance(gate, nn.Linear) and all(projections) else None


def parameter_counts(model: PreTrainedModel) -> ParameterCounts:
    """Tables of embeddings are told by their module's kind, experts by the name that their list has everywhere."""
    head = model.get_output_embeddings()
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    tables -= set() if head is None else {id(head.weight)}
    named = [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in tables]
    of_experts = sum(parameter.numel() for name, parameter in named if ".experts." in name)
    everywhere = sum(parameter.numel() for name, parameter in named if ".experts." not in name)
    text = model.config.get_text_config(decoder=True)
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) if of_experts else None
    return ParameterCounts(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        step_parameters=everywhere if experts or not of_experts else None,
        experts=experts,
        experts_per_token=getattr(text, "num_experts_per_tok", None) if experts else None,
        expert_parameters=of_experts // experts if experts else None,
    )
