"""Penalties, bias, barred end tokens, min-p and constraints in the loop, against a plain loop in float64."""

from __future__ import annotations

import asyncio
import copy
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase
from sera_serve.engine import ConstraintSpec, GenerateParams, GenerationResult, TokenConstraint
from sera_serve.engine.loop import choice
from sera_serve.engine.loop.choice import bias_of
from sera_serve.engine.request import BASE_PRINCIPAL, GenerationRequest
from sera_serve.engine.sampling import sampling_keys
from sera_serve.errors import ConstraintUnsatisfiable, EngineUnavailable, InvalidRequest, PromptTooLong
from support.engine import SHAPE, Start, collect, generate, settled
from support.factories import merged, random_adapter
from support.graph_recorder import Replayed
from support.sampling import kept, noise
from support.static_batches import all_at_once

EOS = 257
VOCABULARY = 259
# Another order of addition in float32, over two layers: see test_logprobs.py. Scores are divided by temperatures and
# penalties of at least a half.
ATOL = 1e-3
ADAPTERS = ["a/one", None, "b/one"]
EVERY: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 1.5, "frequency_penalty": 0.7},
    {"repetition_penalty": 0.7, "frequency_penalty": -0.4, "logit_bias": {101: 4.0, 32: -100.0, EOS: 2.0}},
    {"logit_bias": dict.fromkeys(range(0, 200, 3), -7.5)},
    {"logit_bias": {EOS: 100.0}, "min_tokens": 9},
    {"presence_penalty": -1.0, "repetition_penalty": 1.1, "min_tokens": 3, "logit_bias": {EOS: 30.0}},
]
SAMPLED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8},
    {"temperature": 1.2, "min_p": 0.02},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
]


def requests(count: int = 16, new_tokens: int = 40) -> list[GenerateParams]:
    return [
        GenerateParams(
            adapter=ADAPTERS[number % 3],
            prompt=f"{number} " + "sail on, sail " * (number % 5),
            max_new_tokens=new_tokens,
            seed=number,
            logprobs=1 if number % 4 == 0 else None,
            **EVERY[number % len(EVERY)],
            **SAMPLED[number // 2 % len(SAMPLED)],
        )
        for number in range(count)
    ]


def adjusted(logits: list[float], prompt: list[int], output: list[int], params: GenerateParams) -> list[float]:
    """The scores of the next token, by the definitions of the parameters: one token after the other."""
    seen, times = set(prompt) | set(output), Counter(output)
    scores = []
    for token, logit in enumerate(logits):
        score = logit + params.logit_bias.get(token, 0.0)
        if token in seen:
            score = score / params.repetition_penalty if score > 0 else score * params.repetition_penalty
        score -= params.frequency_penalty * times[token]
        score -= params.presence_penalty if times[token] else 0.0
        scores.append(-np.inf if token == EOS and len(output) < params.min_tokens else score)
    return scores


def check(model: torch.nn.Module, prompt: list[int], result: GenerationResult, params: GenerateParams) -> None:
    """Each token has the highest score, up to float32's rounding, after the tokens before it."""
    output = result.token_ids
    logits: Tensor = model(torch.tensor([prompt + output])).logits[0].double()
    for place, token in enumerate(output):
        at = len(prompt) + place
        scores = adjusted(logits[at - 1].tolist(), prompt, output[:place], params)
        if params.temperature:
            scaled = [score / params.temperature for score in scores]
            keep = kept(scaled, params.top_k, params.top_p, params.min_p)
            # A token at the edge of the limits may be in or out by rounding.
            keep[token] = (
                keep[token]
                or kept(
                    [score + 2 * ATOL * (other == token) for other, score in enumerate(scaled)],
                    params.top_k,
                    params.top_p,
                    params.min_p,
                )[token]
            )
            key = int(sampling_keys(np.array([params.seed], np.uint64), np.array([at], np.uint64))[0])
            scores = [score + noise(key, other) if keep[other] else -np.inf for other, score in enumerate(scaled)]
        assert scores[token] >= max(scores) - ATOL, (place, token)
    assert len(output) >= min(params.min_tokens, params.max_new_tokens or 0)
    assert result.finish_reason == ("stop" if output[-1] == EOS else "length")


@pytest.fixture(scope="module")
def adapters(decoder: FrozenBase, tmp_path_factory: pytest.TempPathFactory) -> AdapterStore:
    store = AdapterStore(tmp_path_factory.mktemp("adjusted") / "store")
    for seed, name in enumerate(filter(None, ADAPTERS)):
        store.publish(random_adapter(decoder, SHAPE, seed, strength=0.5), name)
    return store


@pytest.fixture(scope="module")
def models(decoder: FrozenBase) -> dict[str | None, torch.nn.Module]:
    """In float64: the base, and the base with each adapter merged."""
    found: dict[str | None, torch.nn.Module] = {None: copy.deepcopy(decoder.model).double()}
    for seed, name in enumerate(filter(None, ADAPTERS)):
        found[name] = merged(decoder, random_adapter(decoder, SHAPE, seed, strength=0.5)).model.double()
    return found


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="room"),
        pytest.param({"max_batch_tokens": 20}, id="chunked"),
        pytest.param({"kv_cache_tokens": 288, "max_batch_tokens": 48}, id="preempted"),
    ],
)
@torch.no_grad()
def test_each_request_of_a_mixed_batch_has_its_own(
    settings: dict[str, int],
    decoder: FrozenBase,
    adapters: AdapterStore,
    models: dict[str | None, torch.nn.Module],
    start_engine: Start,
) -> None:
    engine = start_engine(decoder, adapters, **settings)
    results = asyncio.run(all_at_once(engine, requests()))
    for params, result in zip(requests(), results, strict=True):
        check(models[params.adapter], decoder.tokenizer(params.prompt)["input_ids"], result, params)
    assert (engine.loads()["generate"].preemptions > 0) == ("kv_cache_tokens" in settings)
    # The options do something.
    plain = asyncio.run(all_at_once(engine, [GenerateParams(prompt=requests()[1].prompt, max_new_tokens=40)]))
    assert plain[0].token_ids != results[1].token_ids


def test_counts_and_biases_are_made_for_a_few_rows_at_once(
    decoder: FrozenBase, adapters: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A row of each has a number for each token of the vocabulary.
    want = [one.token_ids for one in asyncio.run(all_at_once(start_engine(decoder, adapters), requests()))]
    rows: dict[tuple[bool, bool], set[int]] = defaultdict(set)
    choose = choice.choose_tokens

    def noted(scores: Tensor, sampling: Any, penalties: Any = None, bias: Any = None) -> Tensor:
        rows[penalties is not None, bias is not None].add(len(scores))
        return choose(scores, sampling, penalties, bias)

    monkeypatch.setattr(choice, "choose_tokens", noted)
    monkeypatch.setattr(choice, "_ROWS_AT_ONCE", 2)
    assert [one.token_ids for one in asyncio.run(all_at_once(start_engine(decoder, adapters), requests()))] == want
    for has_penalties, has_bias in [(True, False), (False, True), (True, True)]:
        assert max(rows[has_penalties, has_bias]) == 2
    assert max(rows[False, False]) > 2


@torch.no_grad()
def test_a_prefix_hit_counts_the_whole_prompt(
    decoder: FrozenBase, adapters: AdapterStore, models: dict[str | None, torch.nn.Module], start_engine: Start
) -> None:
    engine = start_engine(decoder, adapters)
    params = GenerateParams(
        adapter="a/one", prompt="all of these words " * 5, repetition_penalty=1.4, max_new_tokens=20
    )

    async def twice() -> list[GenerationResult]:
        return [await (await generate(engine, params)).collect() for _ in range(2)]

    first, second = asyncio.run(twice())
    assert second.cached_tokens > 0 and second.token_ids == first.token_ids
    check(models["a/one"], decoder.tokenizer(params.prompt)["input_ids"], second, params)


def test_they_go_beside_static_steps(decoder: FrozenBase, adapters: AdapterStore, start_engine: Start) -> None:
    batch = [params for params in requests() if params.adapter is None]
    want = [one.token_ids for one in asyncio.run(all_at_once(start_engine(decoder, adapters), batch))]
    engine = start_engine(decoder, adapters, max_sequences=16)
    replayed = Replayed(engine, late=True)
    assert [one.token_ids for one in asyncio.run(all_at_once(engine, batch))] == want
    assert replayed.batches, "those without adjustments are replayed"
    held = engine.runners["generate"].runner.chooser._counts
    assert held._table is None, "the counts go with the last request that needs them"


def test_min_p_is_in_static_steps(decoder: FrozenBase, adapters: AdapterStore, start_engine: Start) -> None:
    batch = [GenerateParams(prompt="min p", temperature=1.3, min_p=0.1, seed=seed) for seed in range(4)]
    want = [one.token_ids for one in asyncio.run(all_at_once(start_engine(decoder, adapters), batch))]
    without = [GenerateParams(prompt="min p", temperature=1.3, seed=seed) for seed in range(4)]
    assert [one.token_ids for one in asyncio.run(all_at_once(start_engine(decoder, adapters), without))] != want
    engine = start_engine(decoder, adapters, max_sequences=16)
    replayed = Replayed(engine)
    assert [one.token_ids for one in asyncio.run(all_at_once(engine, batch))] == want
    assert replayed.replays > 20


def test_ends(decoder: FrozenBase, store: AdapterStore, start_engine: Start) -> None:
    engine = start_engine(decoder, store)
    to_end: dict[str, Any] = {"prompt": "hello", "logit_bias": {EOS: 100.0}, "max_new_tokens": 12}

    async def main() -> None:
        ended = await collect(engine, **to_end)
        assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == ([EOS], "stop", None)
        ignored = await collect(engine, **to_end, ignore_eos=True)
        assert (ignored.token_ids, ignored.finish_reason) == ([EOS] * 12, "length")
        named = await collect(engine, **to_end, ignore_eos=True, stop_token_ids=[EOS, 5])
        assert (named.token_ids, named.finish_reason, named.stop_reason) == ([EOS], "stop", EOS)
        late = await collect(engine, **to_end, min_tokens=4)
        assert len(late.token_ids) == 5 and late.token_ids[-1] == EOS and EOS not in late.token_ids[:-1]
        until_full = await collect(engine, prompt="hello", max_new_tokens=None, ignore_eos=True)
        assert until_full.prompt_tokens + until_full.completion_tokens == engine.context_tokens
        plain = await collect(engine, prompt="hello", max_new_tokens=30)
        at = next(place for place in range(6, 30) if plain.token_ids[place] not in plain.token_ids[:place])
        stopped = await collect(engine, prompt="hello", max_new_tokens=30, stop_token_ids=[plain.token_ids[at]])
        assert stopped.token_ids == plain.token_ids[: at + 1] and stopped.stop_reason == plain.token_ids[at]
        assert plain.text.startswith(stopped.text), "the text leaves the stop token out"
        word = next(one for one in plain.text[3:] if one.isascii())
        cut = await collect(engine, prompt="hello", max_new_tokens=30, stop=["\0never", word])
        assert cut.stop_reason == word and word not in cut.text
        exempt = await collect(engine, prompt="hello", max_new_tokens=30, stop=[word], min_tokens=cut.completion_tokens)
        assert exempt.text.startswith(cut.text + word)
        await settled(engine)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"logit_bias": {VOCABULARY: 1.0}}, "logit_bias", "token 259 of logit_bias is not in the vocabulary"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias", "send ids of 0 to 258"),
        ({"logit_bias": dict.fromkeys(range(-2000, 0), 1.0)}, "logit_bias", "not in the vocabulary"),
        ({"stop_token_ids": [3, 1 << 30]}, "stop_token_ids", "token 1073741824 of stop_token_ids"),
        ({"min_tokens": 5, "max_new_tokens": 4}, "min_tokens", "lower min_tokens"),
        ({"n": 0}, "n", "one answer"),
        ({"n": 2}, "n", "one answer"),
    ],
)
def test_what_cannot_be_done_is_refused(
    options: Mapping[str, Any],
    param: str | None,
    message: str,
    decoder: FrozenBase,
    store: AdapterStore,
    start_engine: Start,
) -> None:
    engine = start_engine(decoder, store)
    with pytest.raises(InvalidRequest, match=message) as raised:
        asyncio.run(collect(engine, **({"prompt": "x", "max_new_tokens": 8} | dict(options))))
    assert raised.value.param == param


def test_a_prompt_must_leave_room(decoder: FrozenBase, store: AdapterStore, start_engine: Start) -> None:
    engine = start_engine(decoder, store)
    full = [1] * engine.context_tokens
    with pytest.raises(PromptTooLong, match="leave room for 0 more"):
        asyncio.run(collect(engine, token_ids=full, max_new_tokens=None))
    with pytest.raises(PromptTooLong, match="lower min_tokens"):
        asyncio.run(collect(engine, token_ids=full[:-9], max_new_tokens=None, min_tokens=10))
    assert asyncio.run(collect(engine, token_ids=full[:-1], max_new_tokens=None)).completion_tokens == 1


class Spelling:
    """Allows the letters of a text one after the other, either case; then an end token."""

    def __init__(self, text: str, end: int | None = EOS) -> None:
        self.left = text
        self._end = end

    def fill(self, allowed: NDArray[np.uint32]) -> None:
        allowed[:] = 0
        if self.left == "!":
            raise RuntimeError("the grammar is broken")
        tokens = {ord(self.left[0].lower()) - 33, ord(self.left[0].upper()) - 33} if self.left else {self._end}
        for token in tokens - {None}:
            allowed[token // 32] |= np.uint32(1 << token % 32)

    def accept(self, token: int) -> None:
        assert chr(token + 33).lower() == self.left[0].lower()
        self.left = self.left[1:]

    def is_ended(self) -> bool:
        return not self.left and self._end is None


class Spelled:
    """Compiles texts to `Spelling`."""

    def __init__(self, end: int | None = EOS) -> None:
        self._end = end

    def compile(self, spec: ConstraintSpec, share_key: str | None = None) -> TokenConstraint:
        return Spelling(spec.text, self._end)

    def compiled(self, spec: ConstraintSpec, share_key: str | None = None) -> TokenConstraint | None:
        return None


def spelled(text: str, **options: Any) -> GenerateParams:
    return GenerateParams(
        prompt=f"spell {text[:3]}", constraint=ConstraintSpec("grammar", text), max_new_tokens=60, **options
    )


TEXT = "theseletterscomeoneaftertheotherwhateverthemodelsays"


@pytest.mark.parametrize("end", [EOS, None], ids=["end token", "ends by itself"])
@pytest.mark.parametrize("settings", [{}, {"kv_cache_tokens": 256, "max_batch_tokens": 30}], ids=["room", "preempted"])
def test_constraints_hold_beside_free_requests(
    settings: dict[str, int], end: int | None, decoder: FrozenBase, store: AdapterStore, start_engine: Start
) -> None:
    free = [GenerateParams(prompt=f"{number} is free", max_new_tokens=50) for number in range(6)]
    plain = start_engine(decoder, store)
    want = [one.token_ids for one in asyncio.run(all_at_once(plain, free))]
    engine = start_engine(decoder, store, **settings)
    engine.constraints = Spelled(end)
    bound = [spelled(TEXT[number:], temperature=float(number % 2), seed=number, logprobs=0) for number in range(6)]
    mixed = [one for pair in zip(free, bound, strict=True) for one in pair]
    results = asyncio.run(all_at_once(engine, mixed))
    assert [one.token_ids for one in results[::2]] == want
    for number, result in enumerate(results[1::2]):
        assert result.text.lower() == TEXT[number:]
        assert result.finish_reason == "stop"
        assert [one.token for one in result.logprobs] == result.token_ids
    assert len({one.text for one in results[1::2]}) == 6
    assert (engine.loads()["generate"].preemptions > 0) == bool(settings)


def test_a_bias_of_many_entries_costs_no_python_for_each_entry_in_a_step() -> None:
    class Counted(dict[int, float]):
        reads = 0

        def keys(self) -> Any:
            Counted.reads += 1
            return super().keys()

        def items(self) -> Any:
            Counted.reads += 1
            return super().items()

    biases = [Counted({token: row + token / 8 for token in range(row, 200, 3)}) for row in range(2)]
    batch = [
        GenerationRequest(principal=BASE_PRINCIPAL, params=GenerateParams(logit_bias=bias), tokens=[1], prompt_tokens=1)
        for bias in biases
    ]
    batch.append(
        GenerationRequest(
            principal=BASE_PRINCIPAL,
            params=GenerateParams(min_tokens=2),
            end_tokens=frozenset([7, 9]),
            tokens=[1],
            prompt_tokens=1,
        )
    )
    scores = torch.zeros(3, 300)
    want = torch.zeros(3, 300)
    for row, bias in enumerate(biases):
        for token, value in dict(bias).items():
            want[row, token] = value
    want[2, [7, 9]] = -torch.inf
    Counted.reads = 0
    for _ in range(5):
        assert bias_of(batch, {}, scores).equal(want)
    assert Counted.reads == len(biases)


def test_a_constraint_that_allows_nothing_ends_its_request_alone(
    decoder: FrozenBase, store: AdapterStore, start_engine: Start
) -> None:
    engine = start_engine(decoder, store)
    want = asyncio.run(all_at_once(engine, [GenerateParams(prompt="free")]))[0].token_ids
    engine.constraints = Spelled()

    async def main() -> list[GenerationResult | BaseException]:
        asked = [GenerateParams(prompt="free"), spelled("short", min_tokens=20), spelled("bad!"), spelled("fine")]

        async def one(params: GenerateParams) -> GenerationResult:
            return await (await generate(engine, params)).collect()

        results = await asyncio.gather(*map(one, asked), return_exceptions=True)
        await settled(engine)
        return results

    free, short, bad, fine = asyncio.run(main())
    assert isinstance(free, GenerationResult) and free.token_ids == want
    assert isinstance(fine, GenerationResult) and fine.text.lower() == "fine"
    assert isinstance(short, ConstraintUnsatisfiable)
    assert "only end after 5 tokens, and min_tokens is 20" in short.message
    assert short.param == "min_tokens"
    assert isinstance(bad, EngineUnavailable) and "the grammar is broken" in bad.message
    engine.constraints = Spelled(None)
    with pytest.raises(ConstraintUnsatisfiable, match="allows no token of the vocabulary after 0 tokens"):
        asyncio.run(all_at_once(engine, [spelled("")]))
