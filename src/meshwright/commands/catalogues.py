"""`meshwright models` and `meshwright clusters`: what can be named."""

from __future__ import annotations

from meshwright.commands import output
from meshwright.commands.options import Json


def models(as_json: Json = False) -> None:
    """List the catalogue of models: any of these names is a MODEL."""
    from meshwright import models as room
    from meshwright.report.catalogue_tables import model_document, models_table

    known = [room.load(entry.name) for entry in room.catalogue()]
    if as_json:
        output.show_json({"models": [model_document(model) for model in known]})
    else:
        output.show(models_table(known))


def clusters(as_json: Json = False) -> None:
    """List the catalogue of clusters: any of these names goes with --cluster."""
    from meshwright import hardware
    from meshwright.report.catalogue_tables import clusters_table

    known = hardware.clusters()
    if as_json:
        output.show_json({"clusters": known})
    else:
        output.show(clusters_table(known))
