"""What heals most in the same processor time: which stages, which parameters, which text, which steps.

    python docs/benchmarks/healing_choices.py BASE DIR [--seconds 120] [--only "outputs;local"] [--sequences 6]
                                              [--text builtin] [--rows 4] [--rate 1e-3]
                                              [--written FILE] [--results FILE]

BASE: the base model's folder; DIR: a conversion of it. Every choice starts from DIR, trains for so many seconds of
processor time (loading, writing text and measuring are not among them), and is measured on domains that nobody trained
on, as by docs/benchmarks/healing.py. The loss, rows and parameters are the product's; the loop is a plain one whose
learning rate follows the processor time, so that a busy machine changes nothing.

`local` is a stage that the product does not have. The layers that the plan changes get the base's hidden states as
input, each for itself, and learn to put out what the base's layers do: the squared error, as a part of the square of
what the base's layer adds. Layers that neither change nor lend are skipped, and no logits are made.

Results are merged into FILE (healing_choices.json beside this file), and printed as a table.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import torch  # noqa: E402

from healing import measured, probes_and_texts, rises  # noqa: E402
from sa_convert.domain.heal_settings import BOTH, HealSettings  # noqa: E402
from sa_convert.heal.distilled import Distilled, Teacher, head_of  # noqa: E402
from sa_convert.heal.healing_text import HealingRows, HealingText, healing_text  # noqa: E402
from sa_convert.heal.judge import Judge  # noqa: E402
from sa_convert.heal.trained import prepare, trained_tensors  # noqa: E402
from sa_convert.models.load import embedded_tokens, load_base, load_converted, load_tokenizer  # noqa: E402
from sa_convert.models.placement import place  # noqa: E402
from sa_convert.models.products import fast_products  # noqa: E402
from sa_convert.observe.written import written_by  # noqa: E402
from sa_convert.plan.converted import converted_parts  # noqa: E402
from sa_convert.read.folder import open_folder  # noqa: E402
from sa_convert.treatments.registry import lenders  # noqa: E402

WRITTEN = 65_536
"""Tokens that the base writes."""

WARM_UP = 0.1


QUERIES_AND_KEYS = (".q_proj.", ".k_proj.")


@dataclass(frozen=True)
class Choice:
    """local: the part of the time that the block-local stage has. still: tensors whose names have one of these stay as
    they are."""

    settings: dict[str, Any] = field(default_factory=dict)
    local: float = 0.0
    still: tuple[str, ...] = ()


CHOICES = {
    "outputs": Choice(),
    "local": Choice(local=1.0),
    "local, then outputs": Choice(local=0.3),
    "no queries and keys": Choice(still=QUERIES_AND_KEYS),
    "layers": Choice({"train": "layers"}),
    "model": Choice({"train": "model"}),
    "lora": Choice({"train": "lora"}),
    "sequences of 256": Choice({"length": 256}),
}


class Pair:
    """A base and its conversion, and what all choices share."""

    def __init__(self, base: Path, folder: Path, options: argparse.Namespace) -> None:
        self.base, self.folder, self.options = open_folder(base, str(base)), folder, options
        self.placement = place(base, dtype=options.dtype)
        self.tokenizer = load_tokenizer(base, otherwise="")
        self.converted, self.plan = converted_parts(open_folder(folder, str(folder)))
        self.windows = "window" in self.plan.treatments
        asked = {key: getattr(options, key) for key in ("text", "rows", "rate")}
        self.asked: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
        others = {"optimizer": options.optimizer, "repetition": options.repetition}
        usual = {"optimizer": "adamw", "repetition": 1.0}
        self.others = {key: value for key, value in others.items() if value != usual[key]}

    def computing(self) -> Any:
        """As transformers' Trainer computes: below float32 what trains is float32 nevertheless."""
        half = self.placement.dtype != torch.float32
        return torch.autocast("cpu", self.placement.dtype) if half else nullcontext()

    def label(self, name: str) -> str:
        """Of a choice, with the options that are not the product's defaults."""
        return ", ".join([name, *(f"{key} {value}" for key, value in {**self.asked, **self.others}.items())])

    def settings(self, choice: Choice) -> HealSettings:
        return HealSettings(**self.asked, **choice.settings, tokens=10**9).resolved("builtin", self.windows, None)

    def text(self, teacher: Any, settings: HealSettings) -> HealingText:
        length, written = settings.length, None
        if settings.text in ("written", BOTH):
            file: Path = self.options.written
            if not file.exists():
                begun = time.process_time()
                torch.save(written_by(teacher, self.tokenizer, WRITTEN // length, length), file)
                print(f"written: {time.process_time() - begun:.0f} s", file=sys.stderr)
            written = torch.load(file).reshape(-1, length)
        return healing_text(self.tokenizer, embedded_tokens(teacher), settings, written)


class Timed:
    """Yields batches until the processor time is over, and sets the learning rate to it."""

    def __init__(self, optimizer: torch.optim.Optimizer, rate: float, seconds: float) -> None:
        self.optimizer, self.rate, self.seconds, self.begun = optimizer, rate, seconds, time.process_time()

    def steps(self) -> Iterator[int]:
        step = 0
        while (used := (time.process_time() - self.begun) / self.seconds) < 1:
            part = (
                used / WARM_UP if used < WARM_UP else 0.5 * (1 + math.cos(math.pi * (used - WARM_UP) / (1 - WARM_UP)))
            )
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * max(part, 1e-2)
            yield step
            step += 1


def optimizer_of(name: str, parameters: list[Any], rate: float) -> torch.optim.Optimizer:
    """Muon is for matrices alone, which "outputs" of most families are; its steps are as long as AdamW's."""
    if name == "muon":
        return torch.optim.Muon(parameters, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)


def train(pair: Pair, choice: Choice, teacher: Any, student: Any, seconds: float) -> dict[str, Any]:
    """Tokens, parameters, the loss at the end, and by how much the divergence on each kind of held-out text rose."""
    settings = pair.settings(choice)
    text = pair.text(teacher, settings)
    few = text.rows[:1, :64]
    distilled = Distilled(student, head_of(student, teacher, few), False)
    names = [
        name
        for name in trained_tensors(pair.converted, pair.base, pair.plan, settings)
        if not any(part in name for part in choice.still)
    ]
    prepare(student, pair.converted.checkpoint, names, settings)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = optimizer_of(pair.options.optimizer, parameters, settings.peak_rate)
    rows, at, losses = text.training(10**9, settings.seed), 0, [0.0]
    answers = Teacher(teacher, True)
    judge = Judge(text.held_out, answers, torch.device("cpu"))
    with pair.computing():
        before = judge.judge(distilled, 0).divergence
    stages: list[tuple[float, Callable[[dict[str, torch.Tensor]], torch.Tensor]]] = [
        (seconds * choice.local, Local(pair, teacher, student).loss),
        (seconds * (1 - choice.local), lambda batch: _logit_loss(distilled, answers, batch)),
    ]
    for length, loss_of in stages:
        for _ in Timed(optimizer, settings.peak_rate, length).steps() if length else ():
            batch = _batch(rows, at, settings.step_rows)
            at += settings.step_rows
            distilled.train()
            with pair.computing():
                loss = loss_of(batch)
            weight = pair.options.repetition if bool((batch["row"] < 0).all()) else 1.0
            (weight * loss).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    last = losses[-10:]
    with pair.computing():
        after = judge.judge(distilled, 0).divergence
    return {
        "tokens": at * settings.length,
        "parameters": sum(one.numel() for one in parameters),
        "loss": round(sum(last) / len(last), 4),
        "judge": {kind: round(after[kind] - before[kind], 4) for kind in before},
    }


def _batch(rows: HealingRows, at: int, count: int) -> dict[str, torch.Tensor]:
    found = [rows[number] for number in range(at, at + count)]
    return {key: torch.stack([row[key] for row in found]) for key in found[0]}


def _logit_loss(distilled: Distilled, answers: Teacher, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    wanted = answers(batch["tokens"], batch["row"])
    return distilled(tokens=batch["tokens"], scored=batch["scored"], wanted=wanted)["loss"]


class Local:
    """The block-local stage."""

    def __init__(self, pair: Pair, teacher: Any, student: Any) -> None:
        self.teacher, self.student = teacher, student
        self.changed = sorted(pair.plan.layers)
        self.needed = {*self.changed, *(layer for _, (layer, _) in lenders(pair.plan, pair.converted.geometry))}
        self.inputs: dict[int, torch.Tensor] = {}
        self.wanted: dict[int, torch.Tensor] = {}
        self.found: dict[int, torch.Tensor] = {}

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad(), self._watched():
            self.teacher.base_model(input_ids=batch["tokens"], use_cache=False)
        with self._fed():
            self.student.base_model(input_ids=batch["tokens"], use_cache=False)
        parts = []
        for layer in self.changed:
            added = (self.wanted[layer] - self.inputs[layer]).square().sum(-1)
            apart = (self.found[layer] - self.wanted[layer]).square().sum(-1)
            parts.append((apart / added.mean()).mean())
        return torch.stack(parts).mean()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """What goes into the base's layers, and what comes out."""

        def note(layer: int) -> Callable[..., None]:
            def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                self.inputs[layer] = args[0] if args else kwargs["hidden_states"]
                self.wanted[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        layers = self.teacher.base_model.layers
        handles = [layer.register_forward_hook(note(at), with_kwargs=True) for at, layer in enumerate(layers)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _fed(self) -> Iterator[None]:
        """Layers of the student get what the base's got; those that are not needed pass it on."""
        layers = self.student.base_model.layers
        kept = [layer.forward for layer in layers]

        def fed(at: int) -> Callable[..., Any]:
            def forward(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
                if at not in self.needed:
                    return hidden_states
                self.found[at] = kept[at](self.inputs[at], *args, **kwargs)
                return self.wanted[at]

            return forward

        try:
            for at, layer in enumerate(layers):
                layer.forward = fed(at)
            yield
        finally:
            for layer, forward in zip(layers, kept, strict=True):
                layer.forward = forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--only", help=f"of {'; '.join(CHOICES)}")
    parser.add_argument("--sequences", type=int, default=6, help="of each domain")
    parser.add_argument("--probes", type=int, default=4, help="of each distance")
    parser.add_argument("--length", type=int, default=512, help="of the texts that measure")
    parser.add_argument("--dtype", default="auto", help="of the computation")
    parser.add_argument("--written", type=Path, default=Path("written.pt"), help="where text by the base is kept")
    parser.add_argument("--text", help="as `sa-convert heal` takes it; its default otherwise")
    parser.add_argument("--rows", type=int, help="of a step, the same")
    parser.add_argument("--rate", type=float, help="the same")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--repetition", type=float, default=1.0, help="weight of steps on random repetition alone")
    parser.add_argument("--results", type=Path, default=HERE / "healing_choices.json")
    options = parser.parse_args()
    wanted = options.only.split(";") if options.only else list(CHOICES)
    pair = Pair(options.base, options.folder, options)
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    mine = results.setdefault(options.folder.name, {})
    with fast_products(), load_base(options.base, pair.placement) as loaded:
        teacher = loaded.model.requires_grad_(False)
        texts, probes = probes_and_texts(options, pair.tokenizer, teacher)
        with pair.computing():
            before = measured(teacher, texts, probes)
        for name in ["as it was", *wanted]:
            choice = CHOICES.get(name)
            with load_converted(options.folder, pair.placement, None) as made:
                row: dict[str, Any] = {}
                if choice:
                    begun = time.process_time()
                    row = train(pair, choice, teacher, made.model, options.seconds)
                    row["seconds"] = round(time.process_time() - begun)
                with pair.computing():
                    after = measured(made.model.eval(), texts, probes)
                row |= {kind: [round(value, 4) for value in told] for kind, told in rises(before, after).items()}
            mine[pair.label(name) if choice else name] = row
            options.results.write_text(json.dumps(results, indent=1) + "\n")
            print(pair.label(name), row, flush=True)
    print(table(mine, options))


def table(rows: dict[str, Any], options: argparse.Namespace) -> str:
    distances = sorted({int(kind.split()[1]) for row in rows.values() for kind in row if kind.startswith("copying ")})
    lines = [f"| | tokens | parameters | perplexity, other domains | {' | '.join(f'copying {d}' for d in distances)} |"]
    lines.append("|---" * (4 + len(distances)) + "|")
    for name, row in rows.items():
        mean, error = row["text"]
        text = f"{math.expm1(mean):+.1%} ± {100 * error * math.exp(mean):.1f}"
        copying = " | ".join("{:+.3f} ± {:.3f}".format(*row[f"copying {d}"]) for d in distances)
        count = f"{row['tokens']:,} | {row['parameters']:,}" if "tokens" in row else " | "
        lines.append(f"| {name} | {count} | {text} | {copying} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
