"""`meshwright generate`: answers to prompts from a plan's layout, without a serving engine.

In: a plan file, prompts, and where weights are. Out: the answers, as text or JSON; the same on every layout.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.text import Text

from meshwright.commands import output
from meshwright.commands.options import Json
from meshwright.commands.runtime_room import needs_runtime
from meshwright.errors import InputError
from meshwright.plan import Plan

if TYPE_CHECKING:
    from meshwright.runtime.generation.generator import Generated, GenerationJob
    from meshwright.runtime.generation.text import TextCodec

MOST_FORKED_RANKS = 64

PlanFile = Annotated[str, typer.Argument(metavar="PLAN", help="A plan file, for training or serving.")]
PromptText = Annotated[list[str] | None, typer.Option("--prompt", help="A prompt; may be given several times.")]
PromptFile = Annotated[
    Path | None, typer.Option("--prompts", help='A prompt per line; .jsonl: {"prompt": ..} or {"tokens": [..]}.')
]
WeightsFolder = Annotated[Path | None, typer.Option("--weights", help="Folder with safetensors.")]
CheckpointFolder = Annotated[Path | None, typer.Option("--checkpoint", help="A checkpoint of train, of any layout.")]
RandomWeights = Annotated[bool, typer.Option("--random-weights", help="Untrained weights drawn from --seed.")]
TokenizerName = Annotated[
    str | None, typer.Option("--tokenizer", help="'bytes', or a tokenizer.json or its folder.", metavar="bytes|PATH")
]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, max=2**20, metavar="N", help="Per prompt.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 takes the most likely token.")]
TopK = Annotated[int, typer.Option("--top-k", help="Draw from so many tokens; 0: all.")]
TopP = Annotated[float, typer.Option("--top-p", help="Draw from the tokens that make up this probability.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of draws and of random weights.")]
EndToken = Annotated[int | None, typer.Option("--eos", help="Token that ends an answer; -1: none.")]
BatchSize = Annotated[int | None, typer.Option("--batch", min=1, metavar="N", help="Sequences of one batch.")]


def generate(
    plan: PlanFile,
    prompt: PromptText = None,
    prompts: PromptFile = None,
    weights: WeightsFolder = None,
    checkpoint: CheckpointFolder = None,
    random_weights: RandomWeights = False,
    tokenizer: TokenizerName = None,
    max_new_tokens: NewTokens = 64,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    eos: EndToken = None,
    batch: BatchSize = None,
    as_json: Json = False,
) -> int:
    """Generate from a plan: tp, pp and dp on this machine's CPU, or one rank of them under torchrun.

    Weights are safetensors, a checkpoint of `meshwright train` at any layout, or random. Greedy answers and draws of a
    seed are the same on every layout.
    """
    needs_runtime("generate")
    from meshwright.runtime.generation.generator import GenerationJob
    from meshwright.runtime.generation.sampler import Sampling
    from meshwright.runtime.generation.text import codec
    from meshwright.runtime.launch import launched_by_torchrun
    from meshwright.runtime.model_config import transformers_config

    document = Plan.read(plan)
    source = chosen_weights(document, weights, checkpoint, random_weights)
    words = codec(tokenizer or default_tokenizer(source.get("weights")))
    config = transformers_config(document)
    job = GenerationJob(
        config=document.parallel,
        model_config=config,
        prompts=read_prompts(prompt, prompts, words),
        new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p, seed),
        ends=_ends(eos, config, words),
        weights_seed=seed,
        batch=batch,
        digest=document.digest(),
        weights=source.get("weights"),
        checkpoint=source.get("checkpoint"),
    )
    done = (_joined if launched_by_torchrun() else _forked)(job)
    if done is not None:
        _show(job, done, words, as_json)
    return 0


def chosen_weights(
    plan: Plan, weights: Path | None, checkpoint: Path | None, random_weights: bool
) -> dict[str, Path | None]:
    """Exactly one source, as fields of a job; the plan's own folder where it has weights."""
    from meshwright.serving.model import needs_weights, weights_folder

    if sum((weights is not None, checkpoint is not None, random_weights)) > 1:
        raise InputError("--weights, --checkpoint and --random-weights each say where weights come from; give one")
    if random_weights:
        return {}
    if checkpoint is not None:
        return {"checkpoint": checkpoint}
    found = weights or weights_folder(plan)
    if found is None:
        raise needs_weights(plan)
    return {"weights": found}


def default_tokenizer(folder: Path | None) -> str:
    """The tokenizer beside the weights, else bytes."""
    return str(folder) if folder is not None and (folder / "tokenizer.json").is_file() else "bytes"


def read_prompts(given: Sequence[str] | None, file: Path | None, words: TextCodec) -> tuple[tuple[int, ...], ...]:
    """Token ids of every prompt, those of the options first."""
    found = [words.encode(text) for text in given or ()]
    if file is not None:
        try:
            lines = [line for line in file.read_text("utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--prompts {file}: cannot be read ({type(error).__name__})") from None
        found += [_from_json(line, words) if file.suffix == ".jsonl" else words.encode(line) for line in lines]
    if not found:
        raise InputError("no prompt: give --prompt TEXT, or --prompts FILE with one per line")
    return tuple(found)


def _from_json(line: str, words: TextCodec) -> tuple[int, ...]:
    try:
        values: dict[str, Any] = json.loads(line)
        if "tokens" in values:
            tokens = cast("list[Any]", values["tokens"])
            if type(tokens) is list and all(type(t) is int for t in tokens):
                return tuple(tokens)
        elif isinstance(values["prompt"], str):
            return words.encode(values["prompt"])
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise InputError(f'{line[:60]!r} is no prompt; write {{"prompt": "text"}} or {{"tokens": [1, 2]}}')


def _ends(given: int | None, config: Any, words: TextCodec) -> frozenset[int]:
    if given is not None:
        return frozenset() if given < 0 else frozenset({given})
    own: Any = getattr(config, "eos_token_id", None)
    if own is None:
        from meshwright.runtime.tokens import DOCUMENT_END

        return frozenset({DOCUMENT_END}) if words.is_bytes else frozenset()
    return frozenset(cast("list[int]", own if isinstance(own, list) else [own]))


def _forked(job: GenerationJob) -> Generated | None:
    from meshwright.runtime.generation.generator import generate_forked
    from meshwright.runtime.launch import RankFailedError, gpus_here

    gpus, ranks = gpus_here(), job.config.world_size
    if gpus:
        raise InputError(
            f"this machine has {gpus} GPUs: start a rank on each with torchrun --nproc-per-node {gpus} -m meshwright "
            "generate ..., or hide them (CUDA_VISIBLE_DEVICES=) to generate on the CPU"
        )
    if ranks > MOST_FORKED_RANKS:
        raise InputError(f"the plan has {ranks} ranks, more than the {MOST_FORKED_RANKS} that are forked; use torchrun")
    try:
        return generate_forked(job)
    except RankFailedError as error:
        print(f"meshwright: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def _joined(job: GenerationJob) -> Generated | None:
    from meshwright.runtime.generation.generator import generate_joined
    from meshwright.runtime.launch import joined_world

    with joined_world() as device:
        done = generate_joined(job, device)
    return done if int(os.environ["RANK"]) == 0 else None


def _show(job: GenerationJob, done: Generated, words: TextCodec, as_json: bool) -> None:
    answers = [
        {"prompt_tokens": list(prompt), "tokens": list(tokens), "text": words.decode(tokens)}
        for prompt, tokens in zip(job.prompts, done.tokens, strict=True)
    ]
    if as_json:
        ranks = job.config.world_size
        output.show_json(
            {"ranks": ranks, "seconds": done.seconds, "tokens_per_s": done.tokens_per_s, "answers": answers}
        )
        return
    for prompt, answer in zip(job.prompts, answers, strict=True):
        output.show(Text.assemble((words.decode(prompt), "bold"), str(answer["text"])))
    count = sum(len(tokens) for tokens in done.tokens)
    rate = f"{count} tokens in {done.seconds:.2f} s, {done.tokens_per_s:,.1f} tokens/s on {job.config.world_size} ranks"
    output.show(Text(rate, style="dim"), stderr=True)
