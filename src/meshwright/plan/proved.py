"""The proof beside a plan: `plan.yaml` may have a `plan.proof.json`, good while the plan is the one it was for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from meshwright.plan.document import Plan

MAX_PROOF_BYTES = 1 << 28


def proof_path(plan_file: Path) -> Path:
    return plan_file.with_suffix(".proof.json")


def verdict(plan_file: Path, plan: Plan) -> str | None:
    """What a reader of the plan should know of its proof; None where there is none."""
    path = proof_path(plan_file)
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > MAX_PROOF_BYTES:
            return f"not proved: {path.name} is too large to be a proof"
        found: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return f"not proved: {path.name} cannot be read"
    if not isinstance(found, dict):
        return f"not proved: {path.name} is no proof"
    proof = cast("dict[str, Any]", found)
    if proof.get("digest") != plan.digest():
        return f"not proved: the plan has changed since {path.name} was made"
    if proof.get("agrees") is not True:
        return f"not proved: the dry run in {path.name} did not agree"
    return f"proved by a dry run ({path.name})"
