"""Everything that docs/accuracy.md reports, worked out once: scored rows by fit, other tools' answers, folds.

In: the folder of measurements. Out: `Evidence`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tools.accuracy import ask_aiconfigurator, ask_llm_analysis, serving
from tools.accuracy.environments import UnavailableError
from tools.accuracy.null_model import Utilised, efficiencies
from tools.accuracy.scores import repredicted
from tools.accuracy.training import FITS, FOLDS, held_out
from tools.calibrate.crossval import folds
from tools.calibrate.rows import load_rows

from meshwright.validation import ValidationReport, validate_file
from meshwright.validation.scored import ScoredRow

AGREEMENT = 1e-6
"""How far the two routes to a prediction - the fit's and the validation's - may be apart."""
HIGHEST_EFFICIENCY = 1.0


@dataclass(frozen=True)
class Evidence:
    """`training` and `served` by fit: rows of tiers A and B. `every` by fit: those and, as shipped, tier C, which no
    fit has seen. `rivals` are rates of other tools by name and row id, `rival_gib` their memory; `words` say what
    they were given, refused or lacked."""

    report: ValidationReport
    oom: ValidationReport
    serving: ValidationReport
    served: dict[str, list[ScoredRow]]
    training: dict[str, list[ScoredRow]]
    every: dict[str, list[ScoredRow]]
    lines: dict[str, dict[str, Any]]
    constants_rows: int
    rivals: dict[str, dict[str, float]]
    rival_gib: dict[str, float]
    serving_rival: dict[str, float]
    words: dict[str, str]


def gather(folder: Path, serving_seconds: float, say: Callable[[str], None]) -> Evidence:
    """Predict, fit and ask."""
    train = folder / "train.jsonl"
    held = held_out(train, say)
    served = serving.held_out(folder / "serve.jsonl", say)
    report, oom, engines = (validate_file(folder / name) for name in ("train.jsonl", "train_oom.jsonl", "serve.jsonl"))
    say("validated as shipped")
    _agree(report, held["fitted"])
    _agree(engines, served["fitted"])
    graded = [row for row in report.scored if row.group.id in held["fitted"]]
    rest = [row for row in report.scored if row.rate is not None and row.group.id not in held["fitted"]]
    training = {fit: repredicted(graded, held[fit]) for fit in FITS}
    rivals, gib, words = _training_rivals(train, say)
    rival, said = _serving_rival(folder / "serve.jsonl", serving_seconds, say)
    lines = [json.loads(line) for line in train.read_text(encoding="utf-8").splitlines() if line.strip()]
    return Evidence(
        report=report,
        oom=oom,
        serving=engines,
        served={fit: repredicted(engines.scored, rate) for fit, rate in served.items()},
        training=training,
        every={fit: [*rows, *rest] for fit, rows in training.items()},
        lines={line["id"]: line for line in lines},
        constants_rows=len(held["fitted"]),
        rivals=rivals,
        rival_gib=gib,
        serving_rival=rival,
        words={**words, "aiconfigurator": said},
    )


def _agree(report: ValidationReport, fitted: dict[str, float]) -> None:
    """The fit and `meshwright validate` must predict the same from the same constants."""
    shipped = {row.group.id: row.predicted_rate for row in report.scored}
    apart = {row: abs(rate / shipped[row] - 1) for row, rate in fitted.items()}
    worst = max(apart, key=lambda row: apart[row])
    if apart[worst] > AGREEMENT:
        raise SystemExit(f"{worst}: the fit and the validation predict {apart[worst]:.2%} apart; one of them is wrong")


def _training_rivals(
    train: Path, say: Callable[[str], None]
) -> tuple[dict[str, dict[str, float]], dict[str, float], dict[str, str]]:
    rows = load_rows(train)
    seen = Utilised.of(rows)
    names = sorted(set(rows.families))
    apart = {
        "cross-validated": folds(rows.config_groups, FOLDS),
        "leave one family out": np.array([names.index(f) for f in rows.families]),
    }
    mfu = {name: efficiencies(seen, fold) for name, fold in apart.items()}
    rivals = {
        f"constant MFU, {name}": dict(zip(rows.ids, (value * seen.at_peak).tolist(), strict=True))
        for name, value in mfu.items()
    }
    say("null model")
    gib: dict[str, float] = {}
    words: dict[str, str] = {}
    asked = {
        "llm-analysis, its default efficiency": np.full(len(rows), HIGHEST_EFFICIENCY),
        "llm-analysis, efficiency cross-validated": mfu["cross-validated"],
    }
    for name, efficiency in asked.items():
        try:
            found = ask_llm_analysis.answers(rows, efficiency.tolist(), "default" if "default" in name else "mfu")
        except UnavailableError as error:
            words["llm-analysis"] = f"could not be run here: {error}"
            continue
        rivals[name], gib = found.rate, found.gib
        words["llm-analysis"] = f"answers {len(found.rate)} of {len(rows)} rows" + _reasons(found.refused)
        say(f"{name}: {words['llm-analysis']}")
    return rivals, gib, words


def _serving_rival(serve: Path, seconds: float, say: Callable[[str], None]) -> tuple[dict[str, float], str]:
    lines = [json.loads(line) for line in serve.read_text(encoding="utf-8").splitlines() if line.strip()]
    try:
        found = ask_aiconfigurator.answers(lines, seconds, say)
    except UnavailableError as error:
        return {}, f"could not be run here: {error}"
    said = f"answers {len(found.rate)} rows" + _reasons({**found.refused, **found.not_asked})
    if found.left:
        said += f"; {found.left} jobs not asked yet (`make accuracy` again goes on)"
    return found.rate, said


def _reasons(counts: dict[str, int]) -> str:
    return "".join(f"; {count}: `{reason}`" for reason, count in counts.items())
