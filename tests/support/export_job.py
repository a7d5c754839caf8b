"""Run in the environment of the exporters: a folder becomes programs, which generate.

    python export_job.py < jobs.json      {"name": {"folder", "format", "kind", "sample", "prompts", "new"}, ...}

kind: "forward", without a cache; "generation", prefill and decoding steps with a growing cache (onnx) or a static one
(executorch). Prompts may be of any length for onnx, and are as long as the sample for executorch. Of a folder that
cannot be exported, the error is printed.
"""

import copy
import json
import logging
import os
import sys
import traceback

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")


def exporter(name, dynamic):
    if name == "onnx":
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

        return OnnxExporter(), OnnxConfig(dynamic=dynamic)
    from transformers.exporters.exporter_executorch import ExecutorchConfig, ExecutorchExporter

    return ExecutorchExporter(), ExecutorchConfig(dynamic=dynamic)


def forward(model, job):
    """Logits of the programs and of the model, the largest difference."""
    import torch

    made, config = exporter(job["format"], dynamic=job["format"] == "onnx")
    exported = made.export(model, {"input_ids": torch.tensor([job["sample"]]), "use_cache": False}, config=config)
    off = 0.0
    for prompt in job["prompts"]:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            expected = model(ids, use_cache=False).logits
        off = max(off, (torch.as_tensor(exported(input_ids=ids).logits) - expected).abs().max().item())
    return {"off": off}


def generation(model, job):
    """Of prefill and of a decoding step, the largest difference of logits. onnx: of a prompt of another length, and as
    many greedy tokens as the job asks for."""
    import torch
    from transformers import GenerationConfig
    from transformers.exporters.utils import decompose_for_generation

    grows, length = job["format"] == "onnx", len(job["sample"]) + job["new"]
    options = {} if grows else {"max_cache_len": length, "cache_implementation": "static"}
    plan = GenerationConfig(do_sample=False, pad_token_id=0, **options)
    made, config = exporter(job["format"], dynamic=grows)
    exported = made.export_for_generation(model, inputs(job["sample"]), config, generation_config=plan)
    found = {"off": {}}
    for name, (_, given) in decompose_for_generation(model, inputs(job["prompts"][0]), generation_config=plan).items():
        with torch.no_grad():
            expected = model(**copy.deepcopy(given)).logits
        output = exported.runners[name](**given)
        found["off"][name] = (torch.as_tensor(output.logits) - expected).abs().max().item()
        if name == "decode":
            found["slots"] = [[list(layer.keys.shape), list(layer.values.shape)] for layer in cache_in(given).layers]
        elif grows:
            found["tokens"] = greedy(exported.runners["decode"], given, output, job["new"])
    return found


def greedy(decode, given, output, new):
    """Tokens after those of a prefill, whose inputs and output are given."""
    import torch

    tokens, place = [], given["input_ids"].shape[1]
    while True:
        tokens.append(int(torch.as_tensor(output.logits)[0, -1].argmax()))
        if len(tokens) == new:
            return tokens
        name = next(name for name, item in given.items() if hasattr(item, "layers"))
        told = {"input_ids": torch.tensor([tokens[-1:]]), "position_ids": torch.tensor([[place]])}
        output = decode(**told, **{name: cache_in(output)})
        place += 1


def cache_in(values):
    return next(item for item in values.values() if hasattr(item, "layers"))


def inputs(prompt):
    import torch

    ids = torch.tensor([prompt])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def main():
    from transformers import AutoModelForCausalLM

    logging.disable(logging.WARNING)
    for name, job in json.load(sys.stdin).items():
        try:
            import torch

            model = AutoModelForCausalLM.from_pretrained(
                job["folder"], trust_remote_code=True, dtype=torch.float32
            ).eval()
            result = {"forward": forward, "generation": generation}[job["kind"]](model, job)
        except Exception as error:
            result = {"error": "".join(traceback.format_exception(error))[-6000:]}
        print("RESULT " + json.dumps([name, result]), flush=True)


if __name__ == "__main__":
    main()
