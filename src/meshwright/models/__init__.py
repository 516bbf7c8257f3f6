"""Models as numbers: `load` a catalogue name, path or hub id, or `ModelSpec.from_config` a config.json.

A ModelSpec lists every tensor, weight product and token mixer; `layer_parameters` and its kin say what a rank holds,
`model_flops_per_token` and its kin what a token costs.
"""

from meshwright.models.counting import (
    active_parameters,
    layer_parameters,
    matmul_parameters,
    per_rank_elements,
    rank_parameters,
    stage_parameters,
)
from meshwright.models.flops import (
    CONVENTIONS,
    attention_flops_per_token,
    backward_flops_per_token,
    forward_flops_per_token,
    mean_keys,
    mixer_flops_per_token,
    model_flops_per_token,
    recompute_flops_per_token,
)
from meshwright.models.load import CatalogueEntry, catalogue, load
from meshwright.models.shapes import from_shape, typical_shape
from meshwright.models.spec import (
    Attention,
    DenseMlp,
    LayerKind,
    LinearMixer,
    Matmul,
    ModelSpec,
    MoeMlp,
    Part,
    Split,
    TensorSpec,
)

__all__ = [
    "CONVENTIONS",
    "Attention",
    "CatalogueEntry",
    "DenseMlp",
    "LayerKind",
    "LinearMixer",
    "Matmul",
    "ModelSpec",
    "MoeMlp",
    "Part",
    "Split",
    "TensorSpec",
    "active_parameters",
    "attention_flops_per_token",
    "backward_flops_per_token",
    "catalogue",
    "forward_flops_per_token",
    "from_shape",
    "layer_parameters",
    "load",
    "matmul_parameters",
    "mean_keys",
    "mixer_flops_per_token",
    "model_flops_per_token",
    "per_rank_elements",
    "rank_parameters",
    "recompute_flops_per_token",
    "stage_parameters",
    "typical_shape",
]
