"""Models as numbers: `load` a catalogue name, path or hub id, or `ModelSpec.from_config` a config.json."""

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
    "Attention",
    "DenseMlp",
    "LayerKind",
    "LinearMixer",
    "Matmul",
    "ModelSpec",
    "MoeMlp",
    "Part",
    "Split",
    "TensorSpec",
]
