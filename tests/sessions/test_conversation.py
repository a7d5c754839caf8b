"""Turns of a conversation: what is read, what is never read again, and what goes if the context is full."""

import pytest
import torch
from transformers import AutoTokenizer

from sa_convert.errors import DataError, SessionError
from sa_convert.sessions.conversation import Conversation
from sa_convert.sessions.turn_tokens import new_turn
from support.session_models import model_named
from support.tiny_models import save_tokenizer

PLAIN = (
    "{% for m in messages %}<s>{{ m['role'] }}<mask>{{ m['content'] }}</s><pad>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant<mask>{% endif %}"
)
SYSTEM = "{% if messages[0]['role'] != 'system' %}<s>system<mask>lazy words</s><pad>{% endif %}" + PLAIN
REWRITES = PLAIN.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'][:3] }}")
GREEDY = {"do_sample": False, "repetition_penalty": 1.3}  # random models repeat themselves otherwise
SAID = ["The quick brown fox", "jumps over", "the lazy dog while", "forty words of English"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def templated(tokenizer):
    tokenizer.chat_template = PLAIN
    return tokenizer


def conversation(name, tokenizer, limit=200, **more):
    return Conversation(model=model_named(name), tokenizer=tokenizer, limit=limit, **more)


class Reads:
    """While open, how many tokens each pass of a model is given."""

    def __init__(self, model):
        self.model, self.counts = model, []

    def __enter__(self):
        self.hook = self.model.get_input_embeddings().register_forward_pre_hook(
            lambda _, args: self.counts.append(args[0].shape[1])
        )
        return self.counts

    def __exit__(self, *_):
        self.hook.remove()


@torch.no_grad()
def by_hand(model, tokens, count):
    """Greedy tokens without any cache, with generate()'s penalty on what was there."""
    tokens = list(tokens)
    for _ in range(count):
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        there = torch.tensor(sorted(set(tokens)))
        logits[there] = torch.where(logits[there] > 0, logits[there] / 1.3, logits[there] * 1.3)
        tokens.append(int(logits.argmax()))
        if tokens[-1] == 2:
            break
    return tokens


@pytest.mark.parametrize("name", ["base", "windows", "low rank, windows, share", "drop"])
def test_another_process_goes_on_and_reads_only_what_is_new(name, templated, tmp_path):
    file, tokens, model = tmp_path / "session", [], model_named(name)
    for turn, text in enumerate(SAID):
        mine = conversation(name, templated)
        if turn:
            mine.resume(file)
        with Reads(model) as counts:
            answer = mine.answer(text, 7, options=GREEDY)
        wanted = [*tokens, *new_turn(templated, mine.messages[:-1], tokens[-1] if tokens else None).turn_and_lead]
        assert counts == [answer.read, *[1] * (len(answer.tokens) - 1)]
        assert answer.read == len(wanted) - max(len(tokens) - 1, 0)  # the last token was said and not read
        tokens = by_hand(model, wanted, 7)
        assert mine.tokens == tokens
        mine.save_later(file)
        mine.wait()
    assert [message["content"] for message in mine.messages[::2]] == SAID


@pytest.mark.parametrize("template", [PLAIN, SYSTEM], ids=["plain", "system"])
@pytest.mark.parametrize("ended", [False, True])
def test_tokens_of_turns_are_those_of_the_whole_template(tokenizer, template, ended):
    tokenizer.chat_template = template
    messages, tokens, starts = [], [], []
    for number, text in enumerate(SAID):
        messages.append({"role": "user", "content": text})
        turn = new_turn(tokenizer, messages, tokens[-1] if number else None)
        assert not turn.whole
        starts.append(len(tokens) + len(turn.lead))
        tokens += turn.turn_and_lead
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokens == tokenizer(whole, add_special_tokens=False)["input_ids"]
        said = f"the answer {number}"
        tokens += tokenizer(said, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * ended
        messages.append({"role": "assistant", "content": said})
    for start in starts:
        assert tokenizer.decode(tokens[start:]).startswith("<s>user<mask>")


def test_a_template_that_rewrites_what_was_said(tokenizer):
    tokenizer.chat_template = REWRITES
    model, mine = model_named("base"), conversation("base", tokenizer)
    for text in SAID:
        mine.answer(text, 5, options=GREEDY)
        whole = tokenizer.apply_chat_template(mine.messages[:-1], tokenize=False, add_generation_prompt=True)
        wanted = by_hand(model, tokenizer(whole, add_special_tokens=False)["input_ids"], 5)
        assert mine.tokens == wanted


def test_without_a_template_the_text_goes_on(tokenizer):
    tokenizer.chat_template = None
    model, mine, text = model_named("base"), conversation("base", tokenizer), []
    for said in SAID:
        text += tokenizer(said, add_special_tokens=False)["input_ids"]
        mine.answer(said, 5, options=GREEDY)
        text = by_hand(model, text, 5)
        assert mine.tokens == text


@pytest.mark.parametrize("name", ["base", "windows", "low rank, windows, share"])
def test_the_oldest_turns_go_if_the_context_is_full(name, templated):
    model = model_named(name)
    mine = conversation(name, templated, limit=110, messages=[{"role": "system", "content": "lazy words"}])
    system = len(templated("<s>system<mask>lazy words</s><pad>", add_special_tokens=False)["input_ids"])
    went = 0
    for text in SAID * 2:
        with Reads(model) as counts:
            answer = mine.answer(text, 8, options=GREEDY)
        went += answer.dropped
        assert len(mine.tokens) <= 110
        assert counts[0] <= 60  # the new turn, and never what was read before
        assert mine.cached == len(mine.tokens) - 1
        assert len(mine.messages) == 1 + 2 * len(mine.starts)
        assert mine.starts[0] == system
        for start, message in zip(mine.starts, mine.messages[1::2], strict=True):
            text = templated.decode(mine.tokens[start:])
            assert text.startswith(f"<s>user<mask>{message['content']}")
    assert went > 0
    assert templated.decode(mine.tokens).startswith("<s>system<mask>lazy words</s>")


def test_a_cache_that_cannot_be_moved_is_computed_again(templated):
    said = []
    mine = conversation("base, hybrid", templated, limit=110, tell=said.append)
    for text in SAID * 2:
        mine.answer(text, 8, options=GREEDY)
        assert mine.cached == len(mine.tokens) - 1 <= 110
    assert any("one state of the whole text" in sentence and "read again now" in sentence for sentence in said)


def test_a_message_without_room_is_refused_and_the_conversation_goes_on(templated):
    mine, other = (conversation("base", templated, limit=100) for _ in range(2))
    mine.answer(SAID[0], 6, options=GREEDY)
    with pytest.raises(SessionError, match="no room in a context of 100 tokens"):
        mine.answer(" ".join(SAID * 12), 6, options=GREEDY)
    mine.answer(SAID[1], 6, options=GREEDY)
    other.answer(SAID[0], 6, options=GREEDY)
    other.answer(SAID[1], 6, options=GREEDY)
    assert (mine.tokens, mine.messages) == (other.tokens, other.messages)


def test_an_answer_that_was_stopped_is_part_of_the_conversation(templated):
    model, mine, asked = model_named("base"), conversation("base", templated), []

    def stop():
        asked.append(0)
        return len(asked) == 3

    answer = mine.answer(SAID[0], 50, stop=stop, options=GREEDY)
    assert len(answer.tokens) == 3
    tokens = [*mine.tokens, *new_turn(templated, [*mine.messages, {"role": "user", "content": "x"}], -1).turn_and_lead]
    mine.answer("x", 5, options=GREEDY)
    assert mine.tokens == by_hand(model, tokens, 5)


def test_what_the_template_refuses(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('No system here') }}"
    with pytest.raises(DataError, match="chat template refuses these messages: No system here"):
        conversation("base", tokenizer).answer("Hi", 3)


def test_a_file_without_a_conversation(templated, tmp_path):
    from sa_convert.sessions.saving import save
    from support.memory_models import some_ids
    from support.session_models import new_cache, read

    model, ids = model_named("base"), some_ids(9)[:1]
    cache = new_cache(model, "dynamic")
    read(model, cache, ids, [9])
    save(cache, ids, tmp_path / "session", model)
    with pytest.raises(SessionError, match="holds a cache and no conversation"):
        conversation("base", templated).resume(tmp_path / "session")
