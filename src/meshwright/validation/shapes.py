"""Models and clusters of rows, built once per distinct shape: rows that share them can be evaluated together."""

from __future__ import annotations

import json

from meshwright.hardware.spec import Cluster
from meshwright.models.fields import Fields
from meshwright.models.shapes import from_shape
from meshwright.models.spec import ModelSpec
from meshwright.validation.clusters import ClusterFacts
from meshwright.validation.skip import SkippedError

NEEDED = ("layers", "hidden", "heads", "vocab")


class Shapes:
    """Equal shapes give the same object."""

    def __init__(self) -> None:
        self._models: dict[str, ModelSpec] = {}
        self._clusters: dict[ClusterFacts, Cluster] = {}

    def model(self, row: Fields) -> ModelSpec:
        """The model of a row's `model` object."""
        section = row.section("model")
        if section is None:
            raise SkippedError("model shape is not stated")
        for name in NEEDED:
            if section.values.get(name) is None:
                raise SkippedError(f"model {name} is not stated")
        key = json.dumps(dict(section.values), sort_keys=True)
        if key not in self._models:
            self._models[key] = from_shape(section.values)
        return self._models[key]

    def cluster(self, facts: ClusterFacts) -> Cluster:
        """The cluster of a row's facts."""
        if facts not in self._clusters:
            self._clusters[facts] = facts.build()
        return self._clusters[facts]
