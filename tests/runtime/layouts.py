"""Layouts that parity is shown over: a chosen few for every test run, all of them for `make parity`."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

from meshwright.layout.config import ContextVariant, HybridParallelConfig, Recompute, Schedule

SEQ = 16


@dataclass(frozen=True)
class Case:
    """A family, changes to its tiny config, and a layout."""

    name: str
    config: HybridParallelConfig
    family: str = "llama"
    model: dict[str, Any] = field(default_factory=dict)


def layout(**sizes: Any) -> HybridParallelConfig:
    """dp x two microbatches unless a global batch is given."""
    return HybridParallelConfig(**({"global_batch": 4 * sizes.get("dp", 1)} | sizes))


INTERLEAVED = {"schedule": Schedule.INTERLEAVED, "vpp": 2}
ALL_TO_ALL = {"cp_variant": ContextVariant.ALL_TO_ALL}
ZB_H1 = {"schedule": Schedule.ZB_H1}
ZBV = {"schedule": Schedule.ZBV, "vpp": 2}
DUALPIPEV = {"schedule": Schedule.DUALPIPEV, "vpp": 2}

BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
BALANCED_STAGES: dict[str, dict[str, Any]] = {
    "pp2": {"pp": 2},
    "pp4": {"pp": 4, "global_batch": 6},
    "ep2 x pp2 gpipe": {"dp": 2, "pp": 2, "ep": 2, "schedule": Schedule.GPIPE},
    "tp2 sp x pp2": {"tp": 2, "pp": 2, "sequence_parallel": True},
    "tp2 x pp2 interleaved": {"tp": 2, "pp": 2, **INTERLEAVED},
    "pp2 zb-h1": {"pp": 2, **ZB_H1},
    "pp2 zbv x dp2 zero2": {"pp": 2, "dp": 2, "zero": 2, **ZBV},
    "pp2 dualpipev x tp2 x ep2": {"pp": 2, "tp": 2, "ep": 2, **DUALPIPEV},
    "pp2 x cp2 micro batch 2": {"pp": 2, "cp": 2, "micro_batch": 2},
}
FEW_TOKENS = {"num_experts": 32, "num_experts_per_tok": 1, "norm_topk_prob": False}

CP_FAMILIES = [(2, "llama"), (4, "llama"), (2, "mistral"), (4, "gemma3_text"), (2, "gpt2"), (2, "gpt_neox")]

CHOSEN = [
    Case("dp2", layout(dp=2)),
    Case("tp2 sp x dp2 zero3, grouped KV heads", layout(tp=2, dp=2, sequence_parallel=True, zero=3), "qwen3"),
    Case(
        "all three axes, tied",
        layout(dp=2, pp=2, tp=2, sequence_parallel=True, zero=1),
        model={"tie_word_embeddings": True},
    ),
    Case("tp4 over 2 KV heads, odd vocabulary", layout(tp=4), "qwen2", {"vocab": 97}),
    Case(
        "uneven stages, microbatches not a multiple of stages, tied",
        layout(pp=3, layer_split=(1, 2, 1), global_batch=5),
        "gemma3_text",
        {"tie_word_embeddings": True},
    ),
    Case("interleaved x dp2 zero2", layout(pp=2, dp=2, zero=2, **INTERLEAVED)),
    Case("gpipe x tp2, fused qkv and gate", layout(pp=2, tp=2, schedule=Schedule.GPIPE), "phi3"),
    Case("gpt2 sp, fused and transposed, biases", layout(tp=2, sequence_parallel=True), "gpt2"),
    Case("neox sp with full recompute", layout(tp=2, sequence_parallel=True, recompute=Recompute.FULL), "gpt_neox"),
    Case("zb-h1 x dp2 zero3", layout(pp=2, dp=2, zero=3, **ZB_H1), "gpt_neox"),
    Case("zbv x tp2, tied", layout(pp=2, tp=2, **ZBV), "qwen3", {"tie_word_embeddings": True}),
    Case("dualpipev x dp2", layout(pp=2, dp=2, global_batch=12, **DUALPIPEV), "gpt2"),
    Case("cp4 ring, sliding windows", layout(cp=4), "gemma3_text"),
    Case("cp2 all-to-all x tp2 sp", layout(cp=2, tp=2, sequence_parallel=True, **ALL_TO_ALL), "qwen3"),
    Case("ep2 x tp2 x pp2", layout(ep=2, tp=2, pp=2), "deepseek_v3"),
    Case(
        "ep2 x expert-tp2 x dp2 sp zero2",
        layout(ep=2, expert_tp=2, tp=2, dp=2, sequence_parallel=True, zero=2),
        "mixtral",
    ),
    Case("load-balancing loss, ep2 over dp2 x tp2", layout(ep=2, dp=2, tp=2), "mixtral", BALANCED),
    Case(
        "load-balancing loss over stages, zbv x dp2 zero3 recompute",
        layout(ep=2, dp=2, pp=2, zero=3, recompute=Recompute.FULL, **ZBV),
        "qwen3_moe",
        BALANCED,
    ),
    Case("ep4 x dp4", layout(ep=4, dp=4, global_batch=4), "qwen3_moe"),
    Case("mistral, selective recompute", layout(dp=2, pp=2, recompute=Recompute.SELECTIVE), "mistral"),
]


def _single_axes() -> list[Case]:
    cases: list[Case] = []
    for size in (2, 4):
        cases += [Case(f"{axis}{size}", layout(**{axis: size})) for axis in ("dp", "tp", "pp")]
        cases += [Case(f"dp{size} zero{zero}", layout(dp=size, zero=zero)) for zero in (1, 2, 3)]
        cases.append(Case(f"tp{size} sp", layout(tp=size, sequence_parallel=True)))
    return cases


def _all_three() -> list[Case]:
    schedules: list[dict[str, Any]] = [{"schedule": Schedule.GPIPE}, {}, INTERLEAVED]
    cases: list[Case] = []
    for schedule, zero, sp in product(schedules, (0, 1, 2, 3), (False, True)):
        config = layout(dp=2, pp=2, tp=2, zero=zero, sequence_parallel=sp, **schedule)
        cases.append(Case(f"2x2x2 {config.schedule} zero{zero} {'sp' if sp else 'no sp'}", config))
    return cases


def _zero_bubble() -> list[Case]:
    cases: list[Case] = []
    for schedule in (ZB_H1, ZBV, DUALPIPEV):
        name = schedule["schedule"]
        cases += [Case(f"{name} zero{zero}", layout(pp=2, dp=2, zero=zero, **schedule)) for zero in (0, 1, 2, 3)]
        cases += [
            Case(f"{name} alone", layout(pp=2, **schedule)),
            Case(f"{name} on 4 stages", layout(pp=4, global_batch=10, **schedule), model={"layers": 8}),
            Case(f"{name} x tp2 sp", layout(pp=2, tp=2, sequence_parallel=True, **schedule), "phi3"),
            Case(f"{name} with recompute", layout(pp=2, recompute=Recompute.FULL, **schedule), "gemma3_text"),
            Case(
                f"{name} on all axes",
                layout(dp=2, pp=2, tp=2, zero=2, sequence_parallel=True, **schedule),
                model={"tie_word_embeddings": True},
            ),
        ]
    return cases


def _context() -> list[Case]:
    cases: list[Case] = []
    for variant in ContextVariant:
        cases += [Case(f"cp{cp} {variant}", layout(cp=cp, cp_variant=variant), family) for cp, family in CP_FAMILIES]
        cases += [
            Case(
                f"tp2 sp x cp2 x dp2 zero{zero} {variant}",
                layout(tp=2, cp=2, dp=2, sequence_parallel=True, zero=zero, cp_variant=variant),
                "qwen3",
            )
            for zero in (0, 3)
        ]
        cases += [
            Case(
                f"cp2 x pp2 recompute {mode} {variant}", layout(cp=2, pp=2, recompute=mode, cp_variant=variant), "phi3"
            )
            for mode in (Recompute.FULL, Recompute.SELECTIVE)
        ]
    cases.append(Case("cp2 x dp2 hsdp", layout(cp=2, dp=2, zero=2, zero_shards=2)))
    return cases


MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss")


def _experts() -> list[Case]:
    cases: list[Case] = []
    for family in MIXTURES:
        cases += [
            Case(f"{family} ep2 x tp2 x pp2", layout(ep=2, tp=2, pp=2, sequence_parallel=True), family),
            Case(f"{family} ep4 x dp4", layout(ep=4, dp=4), family),
            Case(f"{family} tp2, experts on every rank", layout(tp=2), family),
            Case(f"{family} expert-tp2", layout(expert_tp=2, tp=2), family),
            Case(
                f"{family} ep2 x expert-tp2 x dp2 zero3 recompute",
                layout(ep=2, expert_tp=2, tp=2, dp=2, zero=3, recompute=Recompute.FULL),
                family,
            ),
        ]
    cases += [Case(f"ep2 x dp4 zero{zero}", layout(ep=2, dp=4, zero=zero), "qwen3_moe") for zero in (0, 1, 2, 3)]
    cases += [
        Case(
            f"ep4 over tp2 x dp2 {schedule['schedule']} zero{zero}",
            layout(ep=4, tp=2, dp=2, pp=2, zero=zero, **schedule),
            family,
        )
        for schedule, zero, family in ((ZB_H1, 2, "mixtral"), (ZBV, 0, "deepseek_v3"), (DUALPIPEV, 3, "qwen2_moe"))
    ]
    return [
        *cases,
        Case("ep2 x dp4 x tp2 hsdp", layout(ep=2, dp=4, tp=2, zero=3, zero_shards=2), "mixtral"),
        Case(
            "ep4 x dp4 x tp2 hsdp, one replica of experts", layout(ep=4, dp=4, tp=2, zero=2, zero_shards=2), "mixtral"
        ),
        Case("ep2 x cp2 ring", layout(ep=2, cp=2), "mixtral"),
        Case("ep4 x cp2 x dp2 all-to-all", layout(ep=4, cp=2, dp=2, **ALL_TO_ALL), "qwen3_moe"),
        Case("ep2 x cp2, latent attention", layout(ep=2, cp=2), "deepseek_v3"),
        Case("one of 32 experts per token: most get none", layout(ep=4, dp=4, global_batch=4), "qwen3_moe", FEW_TOKENS),
        Case(
            "load-balancing loss, cp2 x tp2 sp", layout(ep=2, cp=2, tp=2, sequence_parallel=True), "mixtral", BALANCED
        ),
        Case(
            "load-balancing loss, micro batch 2", layout(ep=2, dp=2, micro_batch=2, global_batch=8), "gpt_oss", BALANCED
        ),
        *(
            Case(f"load-balancing loss over stages, {family} {name}", layout(**sizes), family, BALANCED)
            for family, (name, sizes) in product(("mixtral", "qwen3_moe"), BALANCED_STAGES.items())
        ),
        Case("ep2 x tp4 over 2 KV heads", layout(ep=2, tp=4, sequence_parallel=True), "qwen3_moe"),
    ]


def _families() -> list[Case]:
    families = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "gpt2", "gpt_neox")
    layouts = [layout(tp=2, pp=2, sequence_parallel=True), layout(tp=2, dp=2, zero=3)]
    return [
        Case(
            f"{family} {'pp' if config.pp > 1 else 'zero3'} tied {tied}", config, family, {"tie_word_embeddings": tied}
        )
        for family, config, tied in product(families, layouts, (False, True))
    ]


def _corners() -> list[Case]:
    tied = {"tie_word_embeddings": True}
    return [
        Case("kv heads < tp, sp, zero3", layout(tp=4, dp=2, sequence_parallel=True, zero=3), "qwen3"),
        Case("one KV head, tp4", layout(tp=4), "llama", {"kv_heads": 1}),
        Case("kv heads < tp, fused", layout(tp=4, sequence_parallel=True), "phi3"),
        Case("odd vocabulary, sp, zero2", layout(tp=4, dp=2, zero=2, sequence_parallel=True), "llama", {"vocab": 101}),
        Case("odd vocabulary, tied over stages", layout(tp=2, pp=2), "llama", {"vocab": 99} | tied),
        Case("uneven stages, interleaved", layout(pp=2, layer_split=(2, 1, 1, 0), **INTERLEAVED), "llama"),
        Case("m=3 on 4 stages", layout(pp=4, global_batch=3)),
        Case("m=5 interleaved", layout(pp=2, global_batch=5, **INTERLEAVED)),
        Case("micro batch 2", layout(dp=2, pp=2, tp=2, micro_batch=2, global_batch=12)),
        Case("hsdp", layout(dp=4, tp=2, zero=3, zero_shards=2)),
        Case("hsdp zero2 tied", layout(dp=4, pp=2, zero=2, zero_shards=2), "llama", tied),
        *(
            Case(
                f"recompute {mode} zero{zero}",
                layout(dp=2, pp=2, tp=2, zero=zero, sequence_parallel=True, recompute=mode),
            )
            for mode, zero in product((Recompute.FULL, Recompute.SELECTIVE), (0, 3))
        ),
        Case("recompute every second layer", layout(tp=2, recompute=Recompute.FULL, recompute_every=2), "gemma3_text"),
    ]


def matrix() -> list[Case]:
    """Everything that `make parity` runs, at most 8 ranks each."""
    return [
        *CHOSEN,
        *_single_axes(),
        *_all_three(),
        *_zero_bubble(),
        *_context(),
        *_experts(),
        *_families(),
        *_corners(),
    ]
