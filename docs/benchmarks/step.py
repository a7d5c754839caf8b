"""Where the time of a converted model goes, next to its base: what `sa-convert bench` does not take apart.

    python docs/benchmarks/step.py profile  BASE SHARED --context 4096 --batch 4
    python docs/benchmarks/step.py prefill  BASE SHARED --context 2048 --batch 1 --chunks 512
    python docs/benchmarks/step.py compiled BASE SHARED --context 512 --batch 1
    python docs/benchmarks/step.py training BASE SHARED --context 512 --batch 2
    python docs/benchmarks/step.py layers   BASE SHARED --context 512

Both models run in this process, in turns, in float32 with two threads; ratios are taken of runs right after each
other, and the median is printed with its quartiles.

profile: one decode step with a dynamic cache, by kind of operation, timed call by call; each model in a process of its
own, since what one allocates changes how long the other's copies take. The cache is not computed but filled with noise.
prefill: a prompt in both forms of sharing, and in chunks, against the base in one piece.
compiled: a decode step with a static cache, eager and compiled by torch.compile as one graph, without a break.
training: forward and backward of the language-modelling loss.
layers: the attention of every layer in a decode step, in microseconds, of models with the same plan whose matrices are
tiny and random (Llama-shaped configurations): what is left is what code takes. One thread; medians.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from time import perf_counter

import sa_convert.registration
from sa_convert.models.arguments import cache_keyword

sa_convert.registration.cancel()  # folders run by the code inside of them
os.environ.setdefault("OMP_NUM_THREADS", "2")

KINDS = {
    "matrices": {"linear"},
    "attention": {"scaled_dot_product_attention", "matmul", "softmax"},
    "cache": {"cat", "as_strided", "new_empty", "__setitem__", "index_copy_"},
}
TURNS, STEPS = 10, 4


def load(folder):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()


def tokens(model, batch, length):
    import torch

    torch.manual_seed(0)
    return torch.randint(5, model.config.vocab_size, (batch, length))


def with_cache(model, cache):
    return {cache_keyword(model): cache, "use_cache": True}


def compare(ways, base, turns):
    """Run the ways in turns; print the median of each, and of its ratio to the base's run of the same turn."""
    times = defaultdict(list)
    for turn in range(turns + 1):
        for name, way in ways.items():
            start = perf_counter()
            way()
            if turn:  # the first warms up
                times[name].append(perf_counter() - start)
    for name in ways:
        low, middle, high = quartiles([mine / other for mine, other in zip(times[name], times[base], strict=True)])
        print(f"{name:24} {statistics.median(times[name]):8.3f} s   {middle:.3f} ({low:.3f}-{high:.3f})")


def quartiles(numbers):
    return statistics.quantiles(numbers, n=4, method="inclusive")


def filled(model, cache, batch, context):
    """The cache as after a prompt."""
    import torch

    model(tokens(model, batch, 8), **with_cache(model, cache), logits_to_keep=1)
    for layer in cache.layers:
        for slot in ("keys", "values"):
            states = getattr(layer, slot)
            setattr(layer, slot, torch.randn(*states.shape[:2], context, states.shape[-1]))
    return cache


def profile(options):
    """Each model in a process of its own."""
    found = {}
    for name in (options.base, options.shared):
        command = [sys.executable, __file__, "profile-one", name, name]
        command += ["--context", str(options.context), "--batch", str(options.batch)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = {key: float(value) for key, value in (line.split() for line in done.stdout.splitlines())}
    base, shared = found.values()
    print(f"decode step, ms; {options.context} tokens of context, batch {options.batch}")
    print(f"{'':12}{'base':>10}{'shared':>10}{'ratio':>8}")
    for kind in base:
        print(f"{kind:12}{base[kind]:10.1f}{shared[kind]:10.1f}{shared[kind] / base[kind]:8.2f}")


def profile_one(options):
    import torch
    from torch.overrides import TorchFunctionMode
    from transformers import DynamicCache

    spent = defaultdict(float)
    kind_of = {name: kind for kind, names in KINDS.items() for name in names}

    class Timed(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            start = perf_counter()
            result = function(*args, **(kwargs or {}))
            spent[kind_of.get(getattr(function, "__name__", ""), "other")] += perf_counter() - start
            return result

    model = load(options.base)
    with torch.inference_mode():
        cache = filled(model, DynamicCache(config=model.config), options.batch, options.context)
        token, given = tokens(model, options.batch, 1), with_cache(model, cache)

        def step():
            start = perf_counter()
            model(token, **given, logits_to_keep=1)
            return 1000 * (perf_counter() - start)

        for _ in range(4):
            step()
        plain = statistics.median(step() for _ in range(options.turns * 2))
        with Timed():
            for _ in range(options.turns * 2):
                step()
    measured = {kind: 1000 * spent[kind] / options.turns / 2 for kind in KINDS}
    for kind, time in measured.items():
        print(kind, time)
    print("other", max(plain - sum(measured.values()), 0))
    print("whole", plain)


def prefill(options):
    import torch
    from transformers import DynamicCache

    base, shared = load(options.base), load(options.shared)
    ids = tokens(base, options.batch, options.context)

    def run(model, form="auto", chunk=None):
        def way():
            if model is shared:
                model.config.shared_attention["form"] = form
            with torch.inference_mode():
                given = with_cache(model, DynamicCache(config=model.config))
                for part in ids.split(chunk or options.context, dim=1):
                    model(part, **given, logits_to_keep=1)

        return way

    ways = {"base": run(base), "shared": run(shared), "shared, queries": run(shared, "queries")}
    ways["shared, weights"] = run(shared, "weights")
    for chunk in options.chunks:
        ways[f"base, {chunk}"] = run(base, chunk=chunk)
        ways[f"shared, {chunk}"] = run(shared, chunk=chunk)
        ways[f"weights, {chunk}"] = run(shared, "weights", chunk)
    compare(ways, "base", options.turns)


def compiled(options):
    import torch
    from transformers import StaticCache

    length, ways = options.context + 2 * STEPS * (options.turns + 2), {}
    for name, folder in (("base", options.base), ("shared", options.shared)):
        model = load(folder)
        for how in ("eager", "compiled"):
            given = with_cache(model, StaticCache(config=model.config, max_cache_len=length))
            with torch.inference_mode():
                model(tokens(model, options.batch, options.context), **given)
            forward = model.forward if how == "eager" else torch.compile(model.forward, fullgraph=True)
            token = tokens(model, options.batch, 1)

            def way(forward=forward, given=given, token=token):
                with torch.inference_mode():
                    for _ in range(STEPS):
                        forward(token, **given)

            ways[f"{name}, {how}"] = way
    for against in ("eager", "compiled"):
        compare({name: way for name, way in ways.items() if name.endswith(against)}, f"base, {against}", options.turns)


def training(options):
    ways = {}
    for name, folder in (("base", options.base), ("shared", options.shared)):
        model = load(folder).train()
        ids = tokens(model, options.batch, options.context)

        def way(model=model, ids=ids):
            model.zero_grad(set_to_none=True)
            model(ids, labels=ids, use_cache=False).loss.backward()

        ways[name] = way
    compare(ways, "base", options.turns)


def tiny(folder):
    """A model by the code of this folder, as its config says, but for the sizes of matrices."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    config.head_dim, config.intermediate_size, config.vocab_size = 4, 16, 256
    config.hidden_size = config.head_dim * config.num_attention_heads
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.float32).eval()


def layers(options):
    import torch
    from transformers import DynamicCache

    torch.set_num_threads(1)
    found = []
    for folder in (options.base, options.shared):
        model, times, begun = tiny(folder), defaultdict(list), {}
        for number, layer in enumerate(model.model.layers):
            attention = layer.self_attn
            attention.register_forward_pre_hook(lambda _, __, at=number, to=begun: to.update({at: perf_counter()}))
            attention.register_forward_hook(
                lambda _, __, ___, at=number, of=begun, to=times: to[at].append(perf_counter() - of[at])
            )
        given = with_cache(model, DynamicCache(config=model.config))
        with torch.inference_mode():
            model(tokens(model, options.batch, options.context), **given)
            times.clear()
            for _ in range(options.turns * STEPS):
                model(tokens(model, options.batch, 1), **given)
        found.append([1e6 * statistics.median(times[number]) for number in sorted(times)])
    print(f"{'layer':>6}{'base':>8}{'shared':>8}{'more':>8}   microseconds; {options.context} tokens of context")
    for number, (base, shared) in enumerate(zip(*found, strict=True)):
        print(f"{number:6}{base:8.0f}{shared:8.0f}{shared - base:8.0f}")
    base, shared = (statistics.fmean(each) for each in found)
    print(f"{'mean':>6}{base:8.0f}{shared:8.0f}{shared - base:8.0f}")


def main():
    modes = {
        "profile": profile,
        "profile-one": profile_one,
        "prefill": prefill,
        "compiled": compiled,
        "training": training,
        "layers": layers,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=list(modes))
    parser.add_argument("base")
    parser.add_argument("shared")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--chunks", type=lambda text: [int(size) for size in text.split(",")], default=[])
    options = parser.parse_args()
    modes[options.mode](options)


if __name__ == "__main__":
    main()
