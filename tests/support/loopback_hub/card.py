"""What the Hub checks of a model card's metadata: https://huggingface.co/docs/hub/model-cards and its modelcard.md."""

from __future__ import annotations

import re
from typing import Any

import yaml

from .http import Request, Response, answer, route
from .store import repository_name_is_valid

_LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0
cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl
gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr
mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma
grok2-community unknown other
"""
LICENSES = frozenset(_LICENSES.split())
RELATIONS = ("adapter", "merge", "quantized", "finetune")


def front_matter(content: str) -> Any:
    """The metadata between the two lines of dashes; None without any, the YAML error if it is none."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", content, re.DOTALL)
    if match is None:
        return None
    try:
        return yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return error


def strings(value: Any) -> list[str] | None:
    values = value if isinstance(value, list) else [value]
    return values if all(isinstance(item, str) and item for item in values) else None


def check_results(index: Any) -> list[str]:
    """Of `model-index`: each model has a name, each result a task, a dataset and metrics with types and values."""
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for number, model in enumerate(index):
        place = f"model-index[{number}]"
        if not isinstance(model, dict) or not isinstance(model.get("name"), str) or not model["name"]:
            errors.append(f'"{place}.name" is required')
            continue
        if not isinstance(model.get("results"), list):
            errors.append(f'"{place}.results" must be an array')
            continue
        for at, result in enumerate(model["results"]):
            here = f"{place}.results[{at}]"
            if not isinstance(result, dict):
                errors.append(f'"{here}" must be of type object')
                continue
            for part, keys in (("task", ("type",)), ("dataset", ("type", "name"))):
                held = result.get(part)
                held = held if isinstance(held, dict) else {}
                errors += [f'"{here}.{part}.{key}" is required' for key in keys if not isinstance(held.get(key), str)]
            metrics = result.get("metrics")
            if not isinstance(metrics, list) or not metrics:
                errors.append(f'"{here}.metrics" must contain at least 1 items')
                continue
            for which, metric in enumerate(metrics):
                named = isinstance(metric, dict) and isinstance(metric.get("type"), str)
                if not named or metric.get("value") is None:
                    errors.append(f'"{here}.metrics[{which}]" must have a type and a value')
    return errors


def check_card(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings."""
    data = front_matter(content)
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if isinstance(data, yaml.YAMLError):
        return [f"YAML metadata in repo card is invalid: {data}"], []
    if not isinstance(data, dict):
        return ["YAML metadata in repo card must be an object"], []
    errors = []
    for key in ("tags", "language", "license", "base_model", "datasets", "metrics"):
        if data.get(key) is not None and strings(data[key]) is None:
            errors.append(f'"{key}" must be a string or an array of strings')
    for key in ("library_name", "pipeline_tag", "license_name", "license_link"):
        if data.get(key) is not None and not isinstance(data[key], str):
            errors.append(f'"{key}" must be a string')
    for value in strings(data.get("license")) or []:
        if value not in LICENSES:
            errors.append(f'"license" must be one of [{", ".join(sorted(LICENSES))}]')
    for value in strings(data.get("base_model")) or []:
        if not repository_name_is_valid(value):
            errors.append(f'"base_model" with value "{value}" is not valid. Use a model id from https://hf.co/models.')
    if data.get("base_model_relation") not in (None, *RELATIONS):
        errors.append(f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]')
    for value in strings(data.get("language")) or []:
        if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|multilingual|code", value):
            errors.append(f'"language" must only contain lowercase characters; "{value}" is not an ISO 639 code')
    if data.get("model-index") is not None:
        errors += check_results(data["model-index"])
    return errors, []


@route("POST", "/api/validate-yaml")
def validate_yaml(request: Request) -> Response:
    errors, warnings = check_card(request.json()["content"])
    if request.headers.get("Accept") == "text/plain":
        lines = [f"- Error: {line}" for line in errors] + [f"- Warning: {line}" for line in warnings]
        return Response(
            400 if errors else 200, {"Content-Type": "text/plain; charset=utf-8"}, "\n".join(lines).encode()
        )
    described = {
        "errors": [{"message": line} for line in errors],
        "warnings": [{"message": line} for line in warnings],
    }
    return answer(described, 400 if errors else 200)
