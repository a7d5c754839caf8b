"""Low-rank keys: bases lose least, costs are what autograd says, and what is tried is what is written."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from sa_convert.domain.plan import Plan
from sa_convert.domain.recipe import Calibration
from sa_convert.errors import PlanError, RecipeError
from sa_convert.jobs.converting import ConvertOptions, convert, plan
from sa_convert.observe.session import open_session
from sa_convert.plan.recipe_file import parse_recipe
from sa_convert.read.model_of import model_of
from sa_convert.read.open_model import open_model
from sa_convert.search.fitting import fit, learn
from sa_convert.treatments.ledger import Observed
from sa_convert.treatments.low_rank.bases import GroupMoments
from sa_convert.treatments.low_rank.scores import change_of_loss, gradient_of_keys, gradient_of_scores
from support.tiny_models import load_converted, save_tiny, save_tokenizer

RANKS = {1: {0: 10, 3: 8}, 4: {2: 12}}
LENGTH = 48


def recipe_text(ranks, more=""):
    layers = "\n".join(
        f"  {layer}: {{{', '.join(f'{group}: {{low_rank: {{keys: {rank}}}}}' for group, rank in told.items())}}}"
        for layer, told in ranks.items()
    )
    return (
        f"description: a test\nplan:\n{layers}\nrefit: none\ncalibration: {{sequences: 6, length: {LENGTH}}}\n"
        f"gate: {{max_perplexity_increase: 90%}}\n{more}"
    )


def test_no_other_basis_of_its_rank_loses_less():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(8, 8, generator=generator)
    keys = torch.randn(400, 8, generator=generator) @ mixing + 3
    gradients = torch.randn(400, 8, generator=generator) * torch.linspace(0.1, 3, 8)
    moments = GroupMoments(8)
    for rows in (slice(0, 100), slice(100, 400)):
        moments.add(keys[rows], gradients[rows], 0.5)
    found = moments.basis(3)
    torch.testing.assert_close(found.basis @ found.basis.T, torch.eye(3), atol=1e-5, rtol=0)

    def lost(reduced):
        """The mean square of what a change of a key does to the loss, key and gradient being independent."""
        changes = reduced - keys
        return float(torch.einsum("td,sd->ts", changes, gradients).square().mean())

    least = lost(found.reduced(keys))
    centred = keys - keys.mean(0)
    principal = torch.linalg.svd(centred, full_matrices=False).Vh[:3]
    assert least < 0.9 * lost(keys.mean(0) + centred @ principal.T @ principal)
    projection = found.basis.T @ found.encoder
    for _ in range(200):
        other = projection + 0.05 * torch.randn(8, 8, generator=generator)
        u, s, v = torch.linalg.svd(other)
        other = u[:, :3] * s[:3] @ v[:3]
        assert lost(keys.mean(0) + centred @ other.T) >= least * (1 - 1e-4)


@pytest.fixture
def observed():
    """One layer's attention, computed by hand, and its loss as a function of its keys."""
    torch.manual_seed(0)
    query, key, value = torch.randn(4, 10, 6), torch.randn(2, 10, 6), torch.randn(2, 10, 5)
    wanted = torch.randn(10, 4, 5)
    mask = torch.full((10, 10), float("-inf")).triu(1)

    def loss_of(key):
        scores = torch.einsum("gptd,gsd->gpts", query.unflatten(0, (2, 2)), key).flatten(0, 1) + mask
        output = torch.einsum("gpts,gsd->tgpd", scores.softmax(-1).unflatten(0, (2, 2)), value).flatten(1, 2)
        return (output * wanted).sum((1, 2)), scores.softmax(-1), output  # one loss for every token

    _, probabilities, output = loss_of(key)
    earlier = torch.rand(10, 3, 10)  # heads of layers before
    found = Observed(
        layer=0,
        probabilities=torch.cat([earlier, probabilities.transpose(0, 1)], dim=1),
        value=value,
        output=output,
        gradient=wanted,
        slope=False,
        scored=torch.ones(10, dtype=torch.bool),
        repetition=False,
        weight=1.0,
        query=query,
        key=key,
    )
    return found, key, loss_of


def test_gradients_of_keys_are_those_of_autograd(observed):
    found, key, loss_of = observed
    key = key.clone().requires_grad_(True)
    loss_of(key)[0].sum().backward()
    torch.testing.assert_close(gradient_of_keys(found), key.grad, atol=1e-5, rtol=1e-4)


def test_changes_of_the_loss_are_its_derivative(observed):
    found, key, loss_of = observed
    change = torch.randn(10, 6, generator=torch.Generator().manual_seed(1))
    whole = torch.zeros(2, 10, 6)
    whole[1] = change
    _, derivative = torch.func.jvp(lambda key: loss_of(key)[0], (key,), (whole,))
    told = change_of_loss(found, 1, gradient_of_scores(found), change)
    torch.testing.assert_close(told, derivative, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama in which KV group 2 of layer 3 has keys of rank 8, about a mean."""
    folder = tmp_path_factory.mktemp("base")
    save_tiny("llama", folder, max_shard_size="10GB")
    save_tokenizer(folder)
    tensors = load_file(folder / "model.safetensors")
    weight = tensors["model.layers.3.self_attn.k_proj.weight"]
    u, s, v = torch.linalg.svd(weight[32:48], full_matrices=False)
    weight[32:48] = u[:, :8] * s[:8] @ v[:8]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def converted(base, folder, text, **options):
    return convert(str(base), parse_recipe(text, "r.yaml"), folder, ConvertOptions(device="cpu", **options), "r.yaml")


def test_keys_that_are_of_low_rank_lose_nothing(base, tmp_path):
    report = converted(base, tmp_path / "out", recipe_text({3: {2: 8}}))
    assert report.perplexity.increase == pytest.approx(0, abs=1e-5)
    assert report.decode_check.same_greedy_tokens
    saved = report.savings.cache_bytes_per_token
    assert saved.before - saved.after == 8 * 4  # measured on a real cache


def test_a_search_finds_them(base, tmp_path):
    text = (
        "description: a test\nsearch: {cache: 1%, at: 64}\ntreatments: [low_rank]\nrefit: none\n"
        f"calibration: {{sequences: 6, length: {LENGTH}}}\n"
    )
    found = plan(str(base), parse_recipe(text, "r.yaml"), ConvertOptions(device="cpu"))
    assert found.plan.to_json() == {"3": {"2": {"low_rank": {"keys": 8}}}}


def test_the_written_recipe_gives_the_same_bytes(base, tmp_path):
    converted(base, tmp_path / "out", recipe_text(RANKS), validate=False)
    converted(base, tmp_path / "again", (tmp_path / "out" / "recipe.yaml").read_text(), validate=False)
    for name in ("model.safetensors", "config.json", "recipe.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize("family", ["llama", "cohere2", "qwen3", "gpt_neox"])
def test_what_is_tried_is_what_is_written(family, tmp_path):
    ranks = {1: {0: 5, 3: 4}, 2: {2: 6}}
    save_tiny(family, tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    converted(tmp_path / "base", tmp_path / "out", recipe_text(ranks), validate=False)
    model = load_converted(tmp_path / "out", dtype=torch.float32)
    tokens = torch.randint(3, 120, (1, 16), generator=torch.Generator().manual_seed(1))
    layers = {layer: {at: {"low_rank": {"keys": rank}} for at, rank in told.items()} for layer, told in ranks.items()}
    wanted, subject = Plan(layers), model_of(open_model(str(tmp_path / "base")))
    with open_session(subject, Calibration(sequences=6, length=LENGTH)) as session:
        learn(session, wanted)
        assert fit(session, wanted).tensors
        with session.probe.trying(wanted), torch.no_grad():
            tried = session.probe.model(tokens, use_cache=False).logits
            with session.probe.in_blocks():
                in_blocks = session.probe.model(tokens, use_cache=False).logits
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, tried, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(in_blocks, tried, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("{keys: 16}", "no less than the 16 numbers"),
        ("{keys: 0}", "keys is a whole number from 1"),
        ("{values: 16}", "no less than the 16 numbers"),
        ("{keys: 8, values: true}", "values is a whole number from 1"),
        ("{rank: 4}", "low_rank takes keys"),
        ("{}", "low_rank takes keys"),
        ("8", "low_rank takes keys"),
    ],
)
def test_ranks_that_cannot_be_are_refused(base, told, message):
    text = f"description: a test\nplan: {{1: {{0: {{low_rank: {told}}}}}}}\n"
    with pytest.raises((PlanError, RecipeError), match=message):
        plan(str(base), parse_recipe(text, "r.yaml"), ConvertOptions())


def test_a_lender_cannot_be_treated(base):
    text = "description: a test\nplan: {0: {0: {low_rank: {keys: 8}}}, 1: {0: {share: [[0, 0], [0, 1]]}}}\n"
    with pytest.raises(PlanError, match="lends its scores"):
        plan(str(base), parse_recipe(text, "r.yaml"), ConvertOptions())
