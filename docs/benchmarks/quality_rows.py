"""The rows of the benchmark: how each is made, and how it is measured."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from quality_baselines import (
    Divergence,
    Spans,
    cheapest_layers,
    fit_linear,
    replaced,
    span_candidates,
    span_rows,
)
from quality_counts import cache_bytes, fingerprint, layers_around, named, percent, sequence_losses, whole_layers
from quality_text import domains

from sa_convert.domain.model import RunOptions
from sa_convert.domain.recipe import Calibration
from sa_convert.measure.quality.cache_bytes import cache_bytes_per_token
from sa_convert.measure.quality.copying import Probes, copying_loss
from sa_convert.models.load import load_base, load_converted, load_tokenizer
from sa_convert.models.placement import place
from sa_convert.observe.session import Session, open_session
from sa_convert.read.model_of import model_of
from sa_convert.read.open_model import open_model
from sa_convert.treatments.share.plans import plan_of
from sa_convert.treatments.share.sharing_map import SharingMap

ROOT = Path(__file__).parents[2]
RECOMMENDED = 4
"""Layers of the paper's span, of which there is a row whatever the budgets."""

Row = dict[str, Any]


@dataclass
class Benchmark:
    """model: folder of the base, in safetensors. work: where conversions are put."""

    model: Path
    work: Path
    texts: Path

    def __post_init__(self) -> None:
        self.described = model_of(open_model(str(self.model)))
        self.family, self.geometry = self.described.family, self.described.geometry
        self.placement = place(self.model, "cpu", "float32")
        self.tokenizer = load_tokenizer(self.model)

    @cached_property
    def _domains(self) -> dict[str, torch.Tensor]:
        return domains(self.tokenizer, self.texts)

    def measure(self, model: Any) -> Row:
        """Losses of every sequence by domain, and of every copying probe."""
        embeddings = model.get_input_embeddings().weight.shape[0]
        probes = Probes.of(self.tokenizer, embeddings)
        tokens = probes.tokens(probes.period)
        losses = {name: sequence_losses(model, rows, name) for name, rows in self._domains.items()}
        losses["copying"] = [copying_loss(model, probe[None], probes.period).loss for probe in tokens]
        return {"losses": {name: [round(loss, 5) for loss in found] for name, found in losses.items()}}

    def base(self) -> Row:
        with load_base(self.model, self.placement) as loaded:
            tokens = next(iter(self._domains.values()))[0, :16]
            return {
                "sha256": fingerprint(loaded.model),
                "parameters": loaded.model.num_parameters(),
                "cache_bytes_per_token": cache_bytes_per_token(loaded.model, tokens),
                **self.measure(loaded.model),
            }

    @contextmanager
    def session(self) -> Iterator[Session]:
        """As search and refit have it: the same samples, the model within the probe."""
        with open_session(self.described, Calibration(), RunOptions(device="cpu", dtype="float32")) as session:
            yield session

    def converted(self, sharing: dict[str, Any], refit: str, name: str) -> Row:
        """Convert by the command line and measure the folder."""
        recipe, output = self.work / f"{name}.json", self.work / name
        gate = {"max_perplexity_increase": "100%"}
        recipe.write_text(json.dumps({"sharing": sharing, "refit": refit, "gate": gate}))
        command = [sys.executable, "-m", "sa_convert", "convert", str(self.model), "--recipe", str(recipe)]
        command += [
            "-o",
            str(output),
            "--no-validate",
            "--overwrite",
            "--dtype",
            "float32",
            "--device",
            "cpu",
            "--json",
        ]
        start = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        seconds = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed with status {done.returncode}")
        report = json.loads(done.stdout)
        with load_converted(output, self.placement) as loaded:
            tokens = next(iter(self._domains.values()))[0, :16]
            return {
                "parameters": report["savings"]["parameters"]["after"],
                "cache_bytes_per_token": cache_bytes_per_token(loaded.model, tokens),
                "key_cache_removed": report["savings"]["key_cache_removed"],
                "seconds": round(seconds, 1),
                **self.measure(loaded.model),
            }

    def ours(self, budgets: list[Fraction]) -> Iterator[Row]:
        """The refit is one of the map that the search has found, so its seconds are those of both."""
        for budget in budgets:
            shown = f"{float(budget * 100):.6g}"
            searched = self.converted({"search": {"key_cache": f"{shown}%"}}, "none", f"ours-{shown}")
            report = json.loads((self.work / f"ours-{shown}" / "report.json").read_text())
            groups = report["sharing"]["reused_groups"]
            about = {"budget": percent(budget), "what": f"{groups} groups"}
            yield {"method": "ours", **about, **searched}
            refitted = self.converted({"map": report["sharing"]["layers"]}, "ridge", f"refit-{shown}")
            refitted["seconds"] = round(refitted["seconds"] + searched["seconds"], 1)
            yield {"method": "ours, refit", **about, **refitted}

    def paper(self, budgets: list[Fraction]) -> Iterator[Row]:
        depth, heads = len(self.geometry.layers), self.geometry.layers[0].heads
        wanted = {whole_layers(budget, depth): budget for budget in budgets}
        wanted.setdefault(RECOMMENDED, Fraction(RECOMMENDED, depth))
        chosen: dict[int, tuple[Spans, float]] = {}
        with self.session() as session:
            divergence = Divergence(session.probe.model, session.samples.held_out)
            for count in wanted:
                start = time.perf_counter()
                candidates = [((depth - 1 - count, depth - 2),)] if count == RECOMMENDED else None
                best: Spans = ()
                least = math.inf
                for spans in candidates or span_candidates(depth, count):
                    rows = SharingMap(span_rows(spans, heads))
                    with session.probe.trying(plan_of(rows, self.geometry)):
                        cost = divergence()
                    print(f"  paper, {named(spans)}: {cost:.4f}", file=sys.stderr, flush=True)
                    if cost < least:
                        best, least = spans, cost
                chosen[count] = best, 0.0 if candidates else time.perf_counter() - start
        for count, (spans, seconds) in chosen.items():
            sharing = {"spans": [{"layers": f"{first}-{last}", "source": first - 1} for first, last in spans]}
            row = self.converted(sharing, "none", f"paper-{count}")
            row["seconds"] = round(row["seconds"] + seconds, 1)
            yield {"method": "paper", "budget": percent(wanted[count]), "what": named(spans), "layers": count, **row}

    def drop(self, budgets: list[Fraction]) -> Iterator[Row]:
        yield from self._layers("drop", budgets)

    def linear(self, budgets: list[Fraction]) -> Iterator[Row]:
        yield from self._layers("linear", budgets)

    def _layers(self, method: str, budgets: list[Fraction]) -> Iterator[Row]:
        """Layers replaced one by one, the cheapest first; a row for every count that a budget asks for."""
        depth = len(self.geometry.layers)
        wanted: dict[int, Fraction] = {}
        for budget in budgets:
            for count in layers_around(budget, depth):
                wanted.setdefault(count, budget)
        start = time.perf_counter()
        seconds: dict[int, float] = {}
        order: tuple[int, ...] = ()
        with self.session() as session:
            model, attentions, samples = session.probe.model, session.probe.attentions, session.samples
            maps: dict[int, Any] = dict.fromkeys(range(depth))
            if method == "linear":
                maps = dict(fit_linear(model, attentions, samples))

            divergence = Divergence(model, samples.held_out)

            def cost_of(layers: tuple[int, ...]) -> float:
                with replaced(attentions, {layer: maps[layer] for layer in layers}):
                    cost = divergence()
                print(f"  {method}, {layers}: {cost:.4f}", file=sys.stderr, flush=True)
                return cost

            for order in cheapest_layers(max(wanted), depth, cost_of):
                seconds[len(order)] = time.perf_counter() - start
        with load_base(self.model, self.placement) as loaded:
            model = loaded.model
            layers = model.get_submodule(self.family.modules.layers)
            attentions = [getattr(layer, self.family.modules.attention) for layer in layers]
            for count in sorted(wanted):
                dropped = order[:count]
                with replaced(attentions, {layer: maps[layer] for layer in dropped}):
                    measured = self.measure(model)
                gone = sum(p.numel() for layer in dropped for p in attentions[layer].parameters())
                added = sum(maps[layer].weight.numel() + maps[layer].bias.numel() for layer in dropped if maps[layer])
                yield {
                    "method": method,
                    "budget": percent(wanted[count]),
                    "what": f"layer{'s' if count > 1 else ''} {', '.join(map(str, sorted(dropped)))}",
                    "layers": count,
                    "parameters": model.num_parameters() - gone + added,
                    "cache_bytes_per_token": cache_bytes(self.geometry, 4, dropped),
                    "key_cache_removed": round(count / depth, 6),
                    "seconds": round(seconds[count], 1),
                    **measured,
                }
