"""The text of docs/accuracy.md. In: `Evidence`. Out: Markdown, and the SVG plots beside it by file name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import date

import numpy as np
from tools.accuracy import ask_aiconfigurator, ask_llm_analysis
from tools.accuracy.evidence import Evidence
from tools.accuracy.goals import GRID, confusion, goals, saturation, static, tier
from tools.accuracy.scores import (
    ERROR_COLUMNS,
    Line,
    error_cells,
    grouped,
    markdown,
    percent,
    repredicted,
    sweep_cells,
    table,
)
from tools.accuracy.spread import coverages
from tools.accuracy.svg import scatter
from tools.accuracy.training import FITS, FOLDS
from tools.calibrate_serving.folds import FITS as SERVED_FITS

from meshwright.validation.metrics import ErrorMetrics
from meshwright.validation.scored import Pair, ScoredRow

SMALLEST_GROUP = 2
LARGEST_FAMILIES = 7
TAIL = 0.05
CARRIERS = 6
OURS = {"meshwright, cross-validated": "cross-validated", "meshwright, leave one family out": "leave one family out"}


def page(evidence: Evidence, residuals: str) -> str:
    """All sections, the hand-written `residuals` at the end."""
    return "\n\n".join([*_head(evidence), *_training(evidence), *_beside(evidence), *_memory(evidence),
                        *_serving(evidence), residuals.strip()]) + "\n"  # fmt: skip


def plots(evidence: Evidence) -> dict[str, str]:
    """SVG text by file name."""
    crossed = evidence.training["cross-validated"]
    rate = "tokens/s per GPU"
    dense, moe = tier(crossed, "AB", "dense"), tier(crossed, "AB", "moe")
    memory = tier(evidence.report.scored, "AB")
    served = evidence.serving.scored
    return {
        "dense.svg": scatter(_points(dense, "rate"), "Training, dense, cross-validated", rate),
        "moe.svg": scatter(_points(moe, "rate"), "Training, mixture of experts, cross-validated", rate),
        "memory.svg": scatter(_points(memory, "memory"), "Peak memory of training", "GiB"),
        "serving.svg": scatter(_points(served, "rate"), "Serving", "output tokens/s per GPU"),
    }


def _points(rows: Iterable[ScoredRow], what: str) -> dict[str, list[tuple[float, float]]]:
    """(measured, predicted) by family, the largest first, the small ones together."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        pair: Pair | None = getattr(row, what)
        if pair is not None:
            found.setdefault(row.group.family[:26], []).append((pair.measured, pair.predicted))
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    small = [point for _, points in ordered[LARGEST_FAMILIES:] for point in points]
    return dict(ordered[:LARGEST_FAMILIES]) | ({"others": small} if small else {})


def _head(evidence: Evidence) -> list[str]:
    found = goals(evidence)
    met = sum(goal.met for goal in found)
    return [
        "# Accuracy",
        f"Predictions against published measurements, made by `make accuracy` on {date.today().isoformat()}: "
        f"{evidence.constants_rows:,} training rows of tiers A and B with a measured rate, "
        f"{len(evidence.report.scored):,} in all with tier C, {len(evidence.oom.scored):,} that did not run, "
        f"{len(evidence.serving.scored)} of serving. How rows are read: [validation.md](validation.md); the model: "
        "[cost-model.md](cost-model.md), [memory.md](memory.md), [serving.md](serving.md). Errors are of tokens/s per "
        "GPU, fractions of the measured value; bias is the mean signed error (positive: predicted too fast).",
        "- *Fitted*: the constants as shipped, which have seen these rows.\n"
        f"- *Cross-validated*: {FOLDS} folds over `config_group`; a row is predicted by a fit that saw no row of its "
        "group.\n"
        f"- *Leak groups apart*: the same over `leak_group` (the same layout at another scale or precision).\n"
        "- *Leave one family out*: predicted by a fit that saw no row of the family. A family that alone used its "
        "software or accelerator is then predicted with assumed constants.\n"
        "- A fold starts from the shipped constants and takes two Gauss-Newton steps along the whole fit's "
        "slopes; the rows it has not seen are then priced anew. Memory has no fold: its few traits were set by hand "
        "with these rows in view.\n"
        "- *Leave one release out* (serving): by a fit that saw no row of the engine's release, with the traits of the "
        "release it is based on; assumed ones where it is based on none.\n"
        "- *tau*: Kendall's tau-b of predicted against measured speed within sweeps, mean and median over sweeps; "
        "*regret*: what of the best measured speed is lost by running the configuration predicted fastest.",
        f"## Goals: {met} of {len(found)} met",
        markdown(["goal", "n", "wanted", "reached", ""], (goal.cells() for goal in found)),
        "*False fits* are counted as a share of all decisions; of the rows that ran out of memory "
        f"{percent(confusion(evidence, 'AB').false_fit_rate)} are said to fit. Missed goals: the analysis is at the "
        "end of this page.",
        *_floor(evidence),
    ]


def _floor(evidence: Evidence) -> list[str]:
    """What the rows themselves allow."""
    rows = evidence.training["fitted"]
    knowing = _knowing(evidence, rows)
    lines = [
        [name, *error_cells(ErrorMetrics.of(row.rate for row in group))]
        for name, group in grouped(knowing, lambda r: f"tier {r.group.tier}, {r.group.architecture}").items()
    ]
    return [
        "## Noise floor",
        "The same configuration measured again in another software release spreads by 3.6 % (median), 9 % (p90), 16 % "
        "(max) for dense models and 8.5 % / 49 % / 77 % for mixtures of experts (README of the measurements). An "
        "oracle that knows the mean rate of every `config_group` measured more than once would still be this far off:",
        markdown(["config groups measured again", *ERROR_COLUMNS], lines),
    ]


def _knowing(evidence: Evidence, rows: Iterable[ScoredRow]) -> list[ScoredRow]:
    """Rows of groups measured more than once, predicted by the geometric mean of their group."""
    again: dict[str, list[ScoredRow]] = {}
    for row in rows:
        again.setdefault(str(evidence.lines[row.group.id].get("config_group")), []).append(row)
    rate: dict[str, float] = {}
    for group in again.values():
        if len(group) >= SMALLEST_GROUP:
            mean = float(np.exp(np.mean([np.log(row.rate.measured) for row in group if row.rate])))
            rate |= {row.group.id: mean for row in group}
    return repredicted([row for group in again.values() for row in group], rate)


def _carriers(evidence: Evidence) -> list[str]:
    """Which families a mean comes from."""
    sections = ["### Where the means come from"]
    for fit in ("cross-validated", "leave one family out"):
        rows = tier(evidence.training[fit], "A", "dense")
        ape = {row.group.id: row.rate.ape for row in rows if row.rate}
        total, worst = sum(ape.values()), sorted(ape.values())
        kept = worst[: round(len(worst) * (1 - TAIL))]
        lines: list[list[str]] = []
        for name, group in grouped(rows, lambda r: r.group.family).items():
            share = sum(ape[row.group.id] for row in group) / total
            without = [ape[row.group.id] for row in rows if row.group.family != name]
            lines.append([name, str(len(group)), percent(share), percent(float(np.mean(without)))])
        lines.sort(key=lambda line: -float(line[2].split()[0]))
        sections += [
            f"Tier A dense, {fit}: the worst {TAIL:.0%} of rows carry {percent(1 - sum(kept) / total)} of the summed "
            f"error; without them the mean is {percent(float(np.mean(kept)))}.",
            markdown(["family", "n", "of the summed error", "mean without it"], lines[:CARRIERS]),
        ]
    return sections


def _ceiling(evidence: Evidence) -> list[str]:
    """How well the grid's own second measurements would rank it: most layouts ran with ZeRO-0 and with ZeRO-1, which
    move nearly the same bytes; one predicts the other."""
    crossed = [row for row in evidence.training["cross-validated"] if row.group.family == GRID]
    twins: dict[str, list[ScoredRow]] = {}
    for row in crossed:
        line = evidence.lines[row.group.id]
        job = [row.group.sweep, *(line[axis] for axis in ("tp", "pp", "dp", "cp", "micro_batch"))]
        twins.setdefault(repr(job), []).append(row)
    pairs = [pair for pair in twins.values() if len(pair) == SMALLEST_GROUP]
    other = {first.group.id: second.rate.measured for first, second in pairs if second.rate}
    both = repredicted(crossed, other)
    ours = repredicted(both, {row.group.id: row.predicted_rate for row in crossed})
    lines = [Line.of("its twin's measurement", both), Line.of("meshwright, cross-validated", ours)]
    return [
        f"### How well {GRID} can be ranked",
        f"{len(pairs)} layouts of tiers A and B ran twice, with ZeRO-0 and with ZeRO-1: the same messages but for "
        "gathering the weights once a step. One measurement as the prediction of the other, and ours on the same rows:",
        table(lines, "predicted by"),
    ]


def _training(evidence: Evidence) -> list[str]:
    overall: list[Line] = []
    for fit in FITS:
        rows = evidence.training[fit]
        overall.append(Line.of(f"**{fit}**, tiers A and B", rows))
        for name, group in grouped(rows, lambda r: f"tier {r.group.tier}, {r.group.architecture}").items():
            overall.append(Line.of(name, group))
    weak = [row for row in evidence.every["fitted"] if row.group.tier == "C"]
    overall.append(Line.of("**tier C** (weak labels; no fit has seen them)", weak))
    return [
        "## Training: overall",
        table(overall),
        "![dense](accuracy/dense.svg) ![mixture of experts](accuracy/moe.svg)",
        "## Training: by family",
        "Tiers A and B. Median and mean errors of three fits; p90, bias, tau and regret are cross-validated.",
        _families(evidence),
        *_carriers(evidence),
        *_ceiling(evidence),
        *_ranges(evidence),
    ]


def _ranges(evidence: Evidence) -> list[str]:
    """Whether as many runs lie in the ranges of estimates as are said to."""
    memory = [row for row in evidence.report.scored if row.memory is not None]
    lines = [
        [name, str(c.n), f"{c.range[0]:.2f} to {c.range[1]:.2f}", percent(c.inside), percent(c.inside_of_others),
         percent(c.runs_inside_of_others)]
        for name, c in coverages(evidence.training, memory).items()
    ]  # fmt: skip
    return [
        "## Ranges of estimates",
        "What an estimate's range is worth (`cost/data/spread.toml`): the predicted value times these shares, between "
        "which four of five published runs of tiers A and B lie. *Known*: devices and software with published runs; "
        "*unknown*: where matrix products, attention, memory bandwidth or element-wise work are assumed. *Others*: a "
        "run counts as inside where the range that the other families alone set holds it. A family weighs by the root "
        "of its rows, in the last column by its rows.",
        markdown(["range of", "n", "share of the predicted", "inside", "inside, others", "inside, others, run by run"],
                 lines),
    ]  # fmt: skip


def _families(evidence: Evidence) -> str:
    by = {fit: grouped(evidence.training[fit], lambda r: r.group.family) for fit in FITS}
    rows: list[list[str]] = []
    for name, crossed in by["cross-validated"].items():
        shipped, held, alone = (
            Line.of(name, by[f][name]) for f in ("fitted", "cross-validated", "leave one family out")
        )
        tiers = "".join(sorted({row.group.tier for row in crossed}))
        two = [f"{percent(x.error.median_ape)} / {percent(x.error.mape)}" for x in (shipped, held, alone)]
        rows.append([name, tiers, str(held.error.n), *two, percent(held.error.p90_ape), percent(held.error.bias),
                     *sweep_cells(held.sweeps)])  # fmt: skip
    columns = ["family", "tier", "n", "fitted", "cross-validated", "family left out", "p90", "bias", "sweeps",
               "tau mean (median)", "regret"]  # fmt: skip
    return markdown(columns, rows)


def _beside(evidence: Evidence) -> list[str]:
    """Other tools on the rows that all of them answer."""
    rivals = evidence.rivals
    asked = [set(rate) for rate in rivals.values()]
    common = set.intersection(*asked) if asked else set[str]()
    graded = [r for r in evidence.training["cross-validated"] if r.group.id in common]
    parts = {
        "tier A dense": tier(graded, "A", "dense"),
        "tiers A and B, dense, without the grid": [r for r in tier(graded, "AB", "dense") if r.group.family != GRID],
        f"{GRID} grid": [r for r in graded if r.group.family == GRID],
        "tiers A and B, mixture of experts": tier(graded, "AB", "moe"),
    }
    sections = [
        "## Side by side: training",
        "The same rows, in the same run, other tools as published and unpatched in environments of their own. "
        "*Constant MFU* is the null model: the median MFU of the accelerator and format over rows of other folds. "
        f"*llm-analysis* {ask_llm_analysis.VERSION} takes an efficiency from its user: its default is 1, so it is also "
        "given the null model's. It divides the FLOPs of a microbatch by peak and efficiency: bubbles and "
        f"communication are not in its training step. It {evidence.words.get('llm-analysis', 'was not run')}.",
    ]
    for name, rows in parts.items():
        lines = [Line.of(title, repredicted(rows, _rates(evidence, fit))) for title, fit in OURS.items()]
        lines += [Line.of(title, repredicted(rows, rate)) for title, rate in rivals.items()]
        sections += [f"### {name}", table(lines, "predicted by")]
    return sections


def _rates(evidence: Evidence, fit: str) -> dict[str, float]:
    return {row.group.id: row.predicted_rate for row in evidence.training[fit]}


def _memory(evidence: Evidence) -> list[str]:
    rows = [row for row in evidence.report.scored if row.memory is not None]
    lines = [["tiers A and B", *error_cells(ErrorMetrics.of(r.memory for r in tier(rows, "AB")))]]
    lines.append(["all tiers", *error_cells(ErrorMetrics.of(r.memory for r in rows))])
    lines += [
        [name, *error_cells(ErrorMetrics.of(r.memory for r in group))]
        for name, group in grouped(rows, lambda r: r.group.family).items()
    ]
    same = [r for r in rows if r.group.id in evidence.rival_gib and r.memory is not None]
    theirs = [Pair(r.memory.measured, evidence.rival_gib[r.group.id]) for r in same if r.memory]
    lines.append([f"the {len(same)} rows that llm-analysis answers: meshwright",
                  *error_cells(ErrorMetrics.of(r.memory for r in same))])  # fmt: skip
    lines.append(["the same: llm-analysis", *error_cells(ErrorMetrics.of(theirs))])
    confusions: list[list[str]] = []
    for name, tiers in (("A and B", "AB"), ("all, weak labels too", "ABC")):
        fit = confusion(evidence, tiers)
        confusions.append([name, *(str(n) for n in (fit.true_fits, fit.false_fits, fit.true_oom, fit.false_oom)),
                           percent(fit.accuracy), percent(fit.false_fits / max(fit.n, 1)),
                           percent(fit.false_fit_rate)])  # fmt: skip
    columns = ["tiers", "fits, ran", "fits, out of memory", "does not fit, out of memory", "does not fit, ran", "right",
               "false fits of all decisions", "of those that ran out"]  # fmt: skip
    return [
        "## Memory",
        markdown(["rows", *ERROR_COLUMNS], lines),
        "![memory](accuracy/memory.svg)",
        "## Fits or does not",
        markdown(columns, confusions),
    ]


def _served(evidence: Evidence, rows: Sequence[ScoredRow]) -> list[str]:
    """How many, median and mean of every fit, and the spread of what no fit had seen."""
    shipped = {row.group.id: row.predicted_rate for row in rows}
    by = [
        ErrorMetrics.of(
            row.rate
            for row in repredicted(rows, shipped | {row.group.id: row.predicted_rate for row in evidence.served[fit]})
        )
        for fit in SERVED_FITS
    ]
    two = [f"{percent(error.median_ape)} / {percent(error.mape)}" for error in by]
    crossed = by[SERVED_FITS.index("cross-validated")]
    return [str(crossed.n), *two, percent(crossed.p90_ape), percent(crossed.bias)]


def _serving(evidence: Evidence) -> list[str]:
    rows = [row for row in evidence.serving.scored if row.rate is not None]
    parts: Mapping[str, list[ScoredRow]] = {
        "static batch": static(rows),
        "saturation throughput": saturation(rows),
        "saturation, dense": tier(saturation(rows), "ABC", "dense"),
        "saturation, mixture of experts": tier(saturation(rows), "ABC", "moe"),
        "all": rows,
        **grouped(rows, lambda r: r.group.family),
    }
    lines = [[name, *_served(evidence, group)] for name, group in parts.items()]
    crossed = evidence.served["cross-validated"]
    same = [row for row in crossed if row.group.id in evidence.serving_rival]
    theirs = repredicted(same, evidence.serving_rival)
    by = {"all": (same, theirs)}
    for name, group in grouped(same, lambda r: r.group.family).items():
        by[name] = (group, repredicted(group, evidence.serving_rival))
    for kind in ("dense", "moe"):
        by[kind] = (tier(same, "ABC", kind), tier(theirs, "ABC", kind))
    beside = [
        [name, tool, *error_cells(ErrorMetrics.of(r.rate for r in group))]
        for name, pair in by.items()
        for tool, group in zip(("meshwright", "aiconfigurator"), pair, strict=True)
    ]
    return [
        "## Serving",
        "Median and mean errors of three fits; p90 and bias are cross-validated (rows of tier C: as shipped).",
        markdown(["rows", "n", *SERVED_FITS, "p90", "bias"], lines),
        "![serving](accuracy/serving.svg)",
        "## Side by side: serving",
        f"aiconfigurator {ask_aiconfigurator.VERSION} on the saturation rows of TensorRT-LLM: its own sweep over batch "
        "sizes and context budgets in aggregated mode without a latency target, best tokens/s per GPU. Its tables were "
        "measured with TensorRT-LLM 1.0 (A100) and 1.3 (others), newer than the rows' releases; meshwright is "
        "cross-validated. It "
        f"{evidence.words.get('aiconfigurator', 'was not run')}.",
        markdown(["rows", "predicted by", *ERROR_COLUMNS], beside),
    ]
