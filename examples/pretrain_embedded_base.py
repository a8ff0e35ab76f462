"""Pre-train the embedded base model, and write the files that ship in ``sera_serve/embedded_base``.

python examples/pretrain_embedded_base.py train --data ../shared/data/text --work ../pretrain --minutes 63
python examples/pretrain_embedded_base.py export --work ../pretrain --output sera_serve/embedded_base
python examples/pretrain_embedded_base.py baselines --data ../shared/data/text --work ../pretrain
python examples/pretrain_embedded_base.py evaluate --data ../shared/data/text --work ../pretrain --model DIR
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from pretrain_card import plot_curve, read_log, render_card
from pretrain_corpus import BOS, END_OF_TURN, EOS, PAD, build_streams, read_corpus, token_id
from pretrain_evaluate import as_rows, as_table, baseline_scores, held_out_model, score_model
from pretrain_run import CONTEXT, Run, RunSettings, base_config
from pretrain_tokenizer import save_tokenizer, train_tokenizer
from rich.console import Console
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaForCausalLM

app = typer.Typer(help="Pre-train, measure and export the embedded base model.", no_args_is_help=True)
console = Console()
DataOption = Annotated[
    Path,
    typer.Option(
        help="Folder with tinystories_cased.jsonl, tinystories_lower.txt, books/.", exists=True, file_okay=False
    ),
]
SeedOption = Annotated[int, typer.Option(help="Seed of the weights, the held-out stories and the batches.")]
ModelOption = Annotated[Path, typer.Option(help="Folder with the exported model.", exists=True, file_okay=False)]
WorkOption = Annotated[Path, typer.Option(help="Folder for the tokenizer, checkpoint and log; outside the repository.")]


def load_tokenizer(work: Path) -> Tokenizer:
    """The run's tokenizer; raises typer.BadParameter if ``train`` has not made it."""
    path = work / "tokenizer.json"
    if not path.exists():
        raise typer.BadParameter(f"{path} does not exist: run `train` first", param_hint="--work")
    return Tokenizer.from_file(str(path))


def new_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """A freshly initialised model for ``tokenizer``, in float32."""
    bos, eos, pad = (token_id(tokenizer, token) for token in (BOS, EOS, PAD))
    return LlamaForCausalLM(base_config(bos, eos, pad))


def load_model(work: Path) -> LlamaForCausalLM:
    """The model of the run's last checkpoint, in float32, in evaluation mode."""
    path = work / "checkpoint.pt"
    if not path.exists():
        raise typer.BadParameter(f"{path} does not exist: `train` writes one every few minutes", param_hint="--work")
    model = new_model(load_tokenizer(work))
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["model"])
    return model.eval()


@app.command()
def train(
    data: DataOption,
    work: WorkOption,
    minutes: Annotated[
        float, typer.Option(help="Training time, over all resumes; its last part decays the rate.")
    ] = 63.0,
    micro_batch: Annotated[int, typer.Option(help="Windows of 512 tokens in one forward pass.")] = 4,
    accumulation: Annotated[int, typer.Option(help="Forward passes in one optimiser step.")] = 4,
    muon_rate: Annotated[float, typer.Option(help="Learning rate of the decoder layers' matrices.")] = 0.02,
    seed: SeedOption = 0,
    compile_model: Annotated[bool, typer.Option("--compile/--no-compile", help="Use torch.compile.")] = True,
) -> None:
    """Train, or resume after an interruption: run the same command again."""
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    corpus = read_corpus(data, seed)
    if not (work / "tokenizer.json").exists():
        train_tokenizer(corpus).save(str(work / "tokenizer.json"))
    tokenizer = load_tokenizer(work)
    streams = build_streams(tokenizer, corpus)
    console.print({source: f"{len(stream):,} tokens" for source, stream in streams.items()})
    settings = RunSettings(
        minutes=minutes, micro_batch=micro_batch, accumulation=accumulation, muon_rate=muon_rate, seed=seed,
        compile=compile_model,
    )  # fmt: skip
    run = Run(new_model(tokenizer), streams, work, settings)
    run.train()
    console.print(f"done: {run.position.step:,} steps, {run.position.tokens:,} tokens")


@app.command()
def export(
    work: WorkOption,
    output: Annotated[Path, typer.Option(help="Folder of the package that receives the files.")],
) -> None:
    """Write config, bfloat16 weights and tokenizer; each file replaces its old version in one step."""
    output.mkdir(parents=True, exist_ok=True)
    model = load_model(work).to(torch.bfloat16)
    ids = {f"{name}_token_id": getattr(model.config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    # The chat template ends each turn with <|end|>: a chat's answer is at its end there.
    ids["eos_token_id"] = [ids["eos_token_id"], token_id(load_tokenizer(work), END_OF_TURN)]
    model.generation_config = GenerationConfig(**ids, do_sample=True, temperature=0.8, top_p=0.95, max_new_tokens=256)
    with tempfile.TemporaryDirectory(dir=work) as staged:
        model.save_pretrained(staged)
        save_tokenizer(load_tokenizer(work), Path(staged), CONTEXT)
        # The weights last: a reader that sees new weights also sees the config and tokenizer they need.
        for source in sorted(Path(staged).iterdir(), key=lambda path: path.suffix == ".safetensors"):
            partial = output / f".{source.name}.partial"
            shutil.copyfile(source, partial)
            partial.replace(output / source.name)
            console.print(f"{output / source.name}  {source.stat().st_size:,} bytes")


@app.command()
def baselines(data: DataOption, work: WorkOption, seed: SeedOption = 0) -> None:
    """Count the unigram and 5-gram baselines and score them on the held-out text (takes minutes, on one core)."""
    tokenizer, corpus = load_tokenizer(work), read_corpus(data, seed)
    scores = baseline_scores(tokenizer, corpus, build_streams(tokenizer, corpus))
    (work / "baselines.json").write_text(json.dumps({"table": as_table(scores), "scores": as_rows(scores)}, indent=1))
    console.print(as_table(scores))


@app.command()
def evaluate(data: DataOption, work: WorkOption, model: ModelOption, seed: SeedOption = 0) -> None:
    """Score the exported model on the held-out text, in bits per byte."""
    tokenizer, corpus, exported = load_tokenizer(work), read_corpus(data, seed), held_out_model(model)
    scores = {"model": {name: score_model(exported, tokenizer, texts) for name, texts in corpus.held_out.items()}}
    (work / "evaluation.json").write_text(json.dumps({"table": as_table(scores), "scores": as_rows(scores)}, indent=1))
    console.print(as_table(scores))


@app.command()
def card(
    data: DataOption,
    work: WorkOption,
    model: ModelOption,
    machine: Annotated[str, typer.Option(help="What the run was trained on, in words.")] = "one machine",
    seed: SeedOption = 0,
) -> None:
    """Write MODEL_CARD.md and training_curve.png beside the exported model; `evaluate` and `baselines` come first."""
    streams = build_streams(load_tokenizer(work), read_corpus(data, seed))
    plot_curve(read_log(work), model / "training_curve.png")
    text = render_card(work, model, {source: len(stream) for source, stream in streams.items()}, machine)
    (model / "MODEL_CARD.md").write_text(text, encoding="utf-8")
    console.print(f"{model / 'MODEL_CARD.md'}")


if __name__ == "__main__":
    app()
