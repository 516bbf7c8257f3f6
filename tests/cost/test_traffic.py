"""The traffic ledger against hand counts of a small job, and its laws over ranks and sizes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.cost.shapes import decoder

from meshwright.cost.candidates import Candidates, unit_keys
from meshwright.cost.stages import Stages, stages
from meshwright.cost.traffic import TrafficTerm, ledger_entries, training_traffic
from meshwright.cost.workload import Workload
from meshwright.layout.config import ContextVariant, HybridParallelConfig, Recompute, Schedule
from meshwright.ledger import GRADIENT_BUCKET_BYTES, Collective, Phase
from meshwright.models.spec import ModelSpec

SEQ = 128
Line = tuple[int, int]


def traffic(
    model: ModelSpec, *configs: HybridParallelConfig, work: Workload | None = None
) -> tuple[tuple[TrafficTerm, ...], Stages]:
    candidates = Candidates.from_configs(configs)
    roles = stages(model, candidates)
    return training_traffic(model, work or Workload(seq=SEQ), candidates, roles, unit_keys(candidates)), roles


def lines(model: ModelSpec, config: HybridParallelConfig, role: int = 0) -> dict[tuple[str, str, str, str], Line]:
    """(axis, collective, phase, what) -> (calls, total bytes) of one config's rank."""
    terms, _ = traffic(model, config)
    entries = ledger_entries(terms, 0, role)
    return {(e.axis, e.collective, e.phase, e.what): (e.calls, e.total_bytes) for e in entries}


def of_axis(found: dict[tuple[str, str, str, str], Line], axis: str) -> dict[tuple[str, str, str], Line]:
    return {key[1:]: line for key, line in found.items() if key[0] == axis}


def test_one_rank_communicates_nothing() -> None:
    assert not lines(decoder(), HybridParallelConfig(global_batch=4))


def test_tensor_parallel_lines_without_sequence_parallel_equal_the_hand_count() -> None:
    model = decoder(layers=8)
    config = HybridParallelConfig(tp=2, micro_batch=3, global_batch=12)
    m, hidden = 4, 3 * SEQ * 64 * 2
    assert of_axis(lines(model, config), "tp") == {
        ("all_reduce", "forward", "block output"): (2 * 8 * m, 2 * 8 * m * hidden),
        ("all_reduce", "backward", "block input"): (2 * 8 * m, 2 * 8 * m * hidden),
        ("all_reduce", "forward", "embedding output"): (m, m * hidden),
        ("all_reduce", "backward", "head input"): (m, m * hidden),
        ("all_reduce", "forward", "largest logit"): (m, m * 3 * SEQ * 4),
        ("all_reduce", "forward", "sum of exponentials and label logit"): (m, m * 3 * SEQ * 8),
        ("all_reduce", "optimizer", "gradient norm"): (1, 8),
    }


def test_tensor_parallel_lines_with_sequence_parallel_equal_the_hand_count() -> None:
    model = decoder(layers=8)
    config = HybridParallelConfig(tp=2, micro_batch=3, global_batch=12, sequence_parallel=True)
    m, hidden = 4, 3 * SEQ * 64 * 2
    blocks, once = (2 * 8 * m, 2 * 8 * m * hidden), (m, m * hidden)
    norms = (2 * 8 + 1) * 64 * 4
    assert of_axis(lines(model, config), "tp") == {
        ("all_gather", "forward", "block input"): blocks,
        ("reduce_scatter", "forward", "block output"): blocks,
        ("all_gather", "backward", "block output"): blocks,
        ("reduce_scatter", "backward", "block input"): blocks,
        ("reduce_scatter", "forward", "embedding output"): once,
        ("all_gather", "backward", "embedding output"): once,
        ("all_gather", "forward", "head input"): once,
        ("reduce_scatter", "backward", "head input"): once,
        ("all_reduce", "forward", "largest logit"): (m, m * 3 * SEQ * 4),
        ("all_reduce", "forward", "sum of exponentials and label logit"): (m, m * 3 * SEQ * 8),
        ("all_reduce", "optimizer", "replicated gradients"): (1, norms),
        ("all_reduce", "optimizer", "gradient norm"): (1, 8),
    }


def test_full_recompute_repeats_the_forward_sums_but_the_last_of_each_layer() -> None:
    found = lines(decoder(layers=8), HybridParallelConfig(tp=2, global_batch=4, recompute=Recompute.FULL))
    assert found["tp", "all_reduce", "backward", "block output"][0] == 8 * 4
    found = lines(
        decoder(layers=8),
        HybridParallelConfig(tp=2, global_batch=4, recompute=Recompute.FULL, sequence_parallel=True),
    )
    assert found["tp", "all_gather", "backward", "block input"][0] == 2 * 8 * 4
    assert found["tp", "reduce_scatter", "backward", "block output"][0] == 8 * 4


def test_shared_kv_heads_are_summed_over_the_ranks_that_hold_them() -> None:
    model = decoder(layers=4, hidden=64, heads=8, kv_heads=2)
    terms, _ = traffic(model, HybridParallelConfig(tp=8, global_batch=1))
    (shared,) = [e for e in ledger_entries(terms, 0, 0) if e.what == "shared KV head gradients"]
    assert (shared.group_size, shared.calls, shared.total_bytes) == (4, 1, 4 * 2 * (8 * 64) * 4)


@pytest.mark.parametrize(
    ("zero", "parameters", "gradients"),
    [(1, (5, 0), 5), (2, (5, 0), 5 * 4), (3, (5 * 4, 5 * 4), 5 * 4)],
)
def test_sharded_state_is_gathered_and_reduced_as_its_zero_stage_says(
    zero: int, parameters: tuple[int, int], gradients: int
) -> None:
    model = decoder(layers=4, tied=False)
    found = of_axis(lines(model, HybridParallelConfig(dp=4, zero=zero, global_batch=16)), "dp")

    def of(collective: str, phase: str, suffix: str) -> Line:
        chosen = [v for k, v in found.items() if k[:2] == (collective, phase) and k[2].endswith(suffix)]
        return sum(calls for calls, _ in chosen), sum(nbytes for _, nbytes in chosen)

    n = model.parameters
    assert of("all_gather", "forward", "parameters") == (parameters[0], parameters[0] // 5 * 2 * n)
    assert of("all_gather", "backward", "parameters") == (parameters[1], parameters[1] // 5 * 2 * n)
    assert of("reduce_scatter", "backward", "gradients") == (gradients, gradients // 5 * 4 * n)


def test_plain_replicas_reduce_every_gradient_once_in_buckets() -> None:
    model = decoder(layers=4, hidden=512, heads=8, width=2048, vocab=32768)
    found = of_axis(lines(model, HybridParallelConfig(dp=4, global_batch=16)), "dp")
    sums = [found["all_reduce", "backward", f"{unit} gradients"] for unit in ("layer", "ends")]
    assert sum(nbytes for _, nbytes in sums) == 4 * model.parameters
    assert all(calls == -(-nbytes // GRADIENT_BUCKET_BYTES) for calls, nbytes in sums)


def test_exchange_of_heads_moves_queries_keys_and_values_there_and_the_output_back() -> None:
    model = decoder(layers=4, hidden=64, heads=8, kv_heads=2)
    config = HybridParallelConfig(cp=4, tp=2, micro_batch=3, global_batch=12, cp_variant=ContextVariant.ALL_TO_ALL)
    layers, token = 4 * 4, 3 * SEQ // 4 * 8 * 2  # layers x microbatches; bytes of one head (8 wide) of a rank's tokens
    there, back = (3 * layers, layers * (4 + 2 * 4) * token), (layers, layers * 4 * token)  # 1 KV head, repeated for 4
    assert of_axis(lines(model, config), "cp") == {
        ("all_to_all", phase, what): line
        for phase in ("forward", "backward")
        for what, line in (("tokens to heads", there), ("heads to tokens", back))
    }


def test_rings_and_exchanges_side_by_side_have_the_ledgers_they_have_alone() -> None:
    model = decoder(layers=4, hidden=64, heads=8, kv_heads=4)
    configs = [HybridParallelConfig(cp=2, tp=2, cp_variant=variant) for variant in ContextVariant]
    terms, _ = traffic(model, *configs)
    for row, config in enumerate(configs):
        assert ledger_entries(terms, row, 0) == ledger_entries(traffic(model, config)[0], 0, 0)


def test_hybrid_sharding_sums_shards_across_replicas() -> None:
    model = decoder(layers=4, tied=False)
    config = HybridParallelConfig(dp=8, zero=3, zero_shards=4, global_batch=8)
    terms, _ = traffic(model, config)
    entries = {(e.collective, e.what): e for e in ledger_entries(terms, 0, 0) if e.axis == "dp"}
    across = entries[Collective.ALL_REDUCE, "layer gradient shards"]
    reduced = entries[Collective.REDUCE_SCATTER, "layer gradients"]
    assert (reduced.group_size, across.group_size) == (4, 2)
    assert across.total_bytes * 4 == reduced.total_bytes


def test_experts_are_dispatched_and_combined_over_ep_and_reduced_over_their_replicas() -> None:
    model = decoder(layers=4, moe_from=1, experts=8, top_k=2, expert_width=64)
    config = HybridParallelConfig(dp=8, ep=4, global_batch=16)
    found = lines(model, config)
    copies = SEQ * 2 * 64 * 2
    calls = 3 * 2
    for phase in ("forward", "backward"):
        for what in ("dispatch", "combine"):
            assert found["ep", "all_to_all", phase, what] == (calls, calls * copies)
    experts = sum(t.size for t in model.kinds[1].tensors if t.experts) // 4
    assert found["expert_dp", "all_reduce", "backward", "expert gradients"][1] == 3 * experts * 4
    dense = model.parameters - 3 * 4 * experts
    total = sum(v[1] for k, v in found.items() if k[0] == "dp" and k[3].endswith("gradients"))
    assert total == dense * 4


def test_ring_attention_passes_keys_and_values_round_and_brings_their_gradients_home() -> None:
    model = decoder(layers=4, hidden=64, heads=4, kv_heads=2)
    found = of_axis(lines(model, HybridParallelConfig(cp=4, global_batch=2)), "cp")
    block = SEQ // 4 * 2 * 2 * 16 * 2
    for collective in ("send", "receive"):
        assert found[collective, "forward", "keys and values"] == (4 * 2 * 3, 4 * 2 * 3 * block)
        assert found[collective, "backward", "keys and values"] == (4 * 2 * 3, 4 * 2 * 3 * block)
        assert found[collective, "backward", "key and value gradients"] == (4 * 2 * 4, 4 * 2 * 4 * block)


sizes = st.sampled_from([1, 2, 4])


@st.composite
def configs(draw: st.DrawFn) -> HybridParallelConfig:
    schedule = draw(st.sampled_from(list(Schedule)))
    v_shaped = schedule in (Schedule.ZBV, Schedule.DUALPIPEV)
    pp = draw(st.sampled_from([2, 4])) if v_shaped or schedule is Schedule.INTERLEAVED else draw(sizes)
    vpp = 2 if v_shaped or schedule is Schedule.INTERLEAVED else 1
    dp, tp, cp = draw(sizes), draw(sizes), draw(sizes)
    return HybridParallelConfig(
        dp=dp,
        tp=tp,
        pp=pp,
        cp=cp,
        vpp=vpp,
        sequence_parallel=tp > 1 and draw(st.booleans()),
        global_batch=dp * 8,
        schedule=schedule,
        zero=draw(st.integers(0, 3)),
        recompute=draw(st.sampled_from(list(Recompute))),
    )


@settings(max_examples=50)
@given(st.lists(configs(), min_size=1, max_size=5), st.booleans())
def test_bytes_sent_equal_bytes_received_over_all_ranks(chosen: list[HybridParallelConfig], moe: bool) -> None:
    model = decoder(layers=16, moe_from=4 if moe else None)
    terms, roles = traffic(model, *chosen)
    sent, received = np.zeros((2, 2, len(chosen)))
    for term in terms:
        side = {Collective.SEND: sent, Collective.RECEIVE: received}.get(term.collective)
        if side is not None:
            side[int(term.phase is Phase.BACKWARD)] += (roles.weight * term.calls * term.bytes_per_call).sum(axis=1)
    assert np.array_equal(sent, received)
    boundaries = [(c.pp * c.vpp - 1 - (c.schedule in (Schedule.ZBV, Schedule.DUALPIPEV))) for c in chosen]
    forward = [t for t in terms if t.axis == "pp" and t.collective is Collective.SEND and t.phase is Phase.FORWARD]
    calls = sum((roles.weight * t.calls).sum(axis=1) for t in forward) if forward else np.zeros(len(chosen))
    assert calls == pytest.approx([b * 8 if c.pp > 1 else 0 for b, c in zip(boundaries, chosen, strict=True)])


@settings(max_examples=50)
@given(configs())
def test_reduced_and_gathered_bytes_over_all_stages_are_those_of_the_whole_model(config: HybridParallelConfig) -> None:
    """What dp reduces over all stages of one tp rank is the model once (tied tables once more)."""
    config = dataclasses.replace(config, tp=1, sequence_parallel=False, zero=min(config.zero, 1))
    model = decoder(layers=16, tied=False)
    terms, roles = traffic(model, config)
    reduced = [t for t in terms if t.what.endswith(" gradients") and t.axis == "dp" and t.phase is Phase.BACKWARD]
    total = sum(float((roles.weight * t.calls * t.bytes_per_call).sum()) for t in reduced)
    assert total == (4 * model.parameters if config.dp * config.cp > 1 else 0)


@settings(max_examples=60)
@given(configs())
def test_more_microbatches_never_send_less(config: HybridParallelConfig) -> None:
    model = decoder(layers=16)
    more = dataclasses.replace(config, global_batch=2 * config.global_batch)
    terms, _ = traffic(model, config, more)
    for term in terms:
        assert (term.calls[1] >= term.calls[0]).all()


def test_rows_of_many_candidates_equal_one_at_a_time() -> None:
    model = decoder(layers=12, moe_from=3)
    many = [
        HybridParallelConfig(dp=4, tp=tp, pp=pp, zero=zero, ep=ep, global_batch=64, sequence_parallel=tp > 1)
        for tp in (1, 2)
        for pp in (1, 2, 3)
        for zero in (0, 1, 3)
        for ep in (1, 4)
    ]
    terms, roles = traffic(model, *many)
    for row, config in enumerate(many):
        alone, alone_roles = traffic(model, config)
        for role in np.flatnonzero(alone_roles.weight[0]):
            assert ledger_entries(terms, row, int(role)) == ledger_entries(alone, 0, int(role))
            assert roles.index[row, role] == alone_roles.index[0, role]
