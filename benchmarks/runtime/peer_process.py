"""Runs inside the environment of the peers, not of meshwright: one rank of a training job of DeepSpeed or of
transformers' own tensor parallelism, on the model and batch that meshwright's layouts run.

Reads a JSON request (peer, model folder, batch, steps, file of the answer) as its argument; rank, world and rendezvous
from the environment, as torchrun sets them. Writes CPU and wall seconds per step and the loss of the first step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

LEARNING_RATE, WEIGHT_DECAY, CLIP = 3e-4, 0.1, 1.0
SPLIT_AFTER = 5
"""Decoder layers of the first of two stages, as in meshwright's layout."""

Step = Callable[[], float]


def batch(request: dict[str, Any]) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, request["vocab"], (request["sequences"], request["seq"] + 1), generator=drawn)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def tp_plan(request: dict[str, Any]) -> Step:
    """transformers shards the model as it loads it; every rank has the whole batch."""
    dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(request["model"], tp_plan="auto", dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    tokens, labels = batch(request)
    sharded = [p for p in model.parameters() if isinstance(p, DTensor)]
    whole = [p for p in model.parameters() if not isinstance(p, DTensor)]

    def clip() -> None:
        """clip_grad_norm_ refuses a list that mixes DTensors with plain tensors: the two norms are joined by hand."""
        norms = [nn.utils.get_total_norm([p.grad for p in part]) for part in (sharded, whole)]
        total = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
        nn.utils.clip_grads_with_norm_(whole, CLIP, total)
        nn.utils.clip_grads_with_norm_(sharded, CLIP, total)

    def step() -> float:
        loss = token_loss(model(tokens, use_cache=False).logits, labels)
        loss.backward()
        clip()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def settings(micro_batch: int, microbatches: int, zero: int = 0) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": microbatches,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": zero},
        "zero_allow_untested_optimizer": True,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "torch_adam": True, "adam_w_mode": True},
        },
    }


def deepspeed_engine(request: dict[str, Any], zero: int = 0, tp: int = 1) -> Step:
    """ZeRO over replicas, or AutoTP over one batch."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32).train()
    tokens, labels = batch(request)
    rows = request["sequences"] * tp // dist.get_world_size()
    start = 0 if tp > 1 else dist.get_rank() * rows
    tokens, labels = tokens[start : start + rows], labels[start : start + rows]
    config = settings(rows, 1, zero) | ({"tensor_parallel": {"autotp_size": tp}} if tp > 1 else {})
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

    def step() -> float:
        loss = token_loss(engine(input_ids=tokens, use_cache=False).logits, labels)
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return step


class Embedding(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embed_tokens = model.model.embed_tokens

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embed_tokens(tokens)


class DecoderLayer(nn.Module):
    def __init__(self, model: Any, index: int) -> None:
        super().__init__()
        self.layer, self.rotary = model.model.layers[index], model.model.rotary_emb

    def forward(self, hidden: Tensor) -> Tensor:
        positions = torch.arange(hidden.shape[1]).unsqueeze(0)
        embeddings = self.rotary(hidden, positions)
        return self.layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=embeddings)


class LastNorm(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.norm = model.model.norm

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden)


class LastHead(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.head = model.lm_head

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)


def deepspeed_pipeline(request: dict[str, Any], microbatches: int) -> Step:
    """Two stages of the layers that meshwright's have: partitioned by the number of layers, norm and head."""
    import deepspeed
    from deepspeed.pipe import PipelineModule

    deepspeed.init_distributed(dist_backend="gloo")
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32).train()
    layers = [DecoderLayer(model, index) for index in range(model.config.num_hidden_layers)]
    pipe = PipelineModule(
        [Embedding(model), *layers, LastNorm(model), LastHead(model)],
        num_stages=2,
        loss_fn=token_loss,
        partition_method="type:DecoderLayer|LastNorm|LastHead",
    )
    held = sum(isinstance(part, DecoderLayer) for part in pipe.forward_funcs)
    if held != (SPLIT_AFTER if dist.get_rank() == 0 else len(layers) - SPLIT_AFTER):
        raise RuntimeError(f"DeepSpeed put {held} layers on stage {dist.get_rank()}")
    micro_batch = request["sequences"] // microbatches
    parameters = [p for p in pipe.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=pipe, model_parameters=parameters, config=settings(micro_batch, microbatches)
    )
    tokens, labels = batch(request)

    def data() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from zip(tokens.split(micro_batch), labels.split(micro_batch), strict=True)

    endless = data()
    return lambda: float(engine.train_batch(data_iter=endless))


PEERS: dict[str, Callable[[dict[str, Any]], Step]] = {
    "tp_plan": tp_plan,
    "deepspeed-autotp": lambda request: deepspeed_engine(request, tp=2),
    "deepspeed-pipeline-2": lambda request: deepspeed_pipeline(request, 2),
    "deepspeed-pipeline-8": lambda request: deepspeed_pipeline(request, 8),
    "deepspeed-zero0": lambda request: deepspeed_engine(request, 0),
    "deepspeed-zero1": lambda request: deepspeed_engine(request, 1),
    "deepspeed-zero2": lambda request: deepspeed_engine(request, 2),
    "deepspeed-zero3": lambda request: deepspeed_engine(request, 3),
}


def main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    step = PEERS[request["peer"]](request)
    loss, *_ = [step() for _ in range(request["steps_before"])]  # they allocate, and start the backends' threads
    if dist.get_world_size() > 1:
        mean = torch.tensor(loss, dtype=torch.float64)
        dist.all_reduce(mean)
        loss = float(mean) / dist.get_world_size()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(request["steps"]):
        step()
    taken = {
        "cpu_s": (time.process_time() - cpu) / request["steps"],
        "wall_s": (time.perf_counter() - wall) / request["steps"],
        "loss": loss,
    }
    Path(f"{request['answer']}.{os.environ['RANK']}").write_text(json.dumps(taken))


if __name__ == "__main__":
    main()
